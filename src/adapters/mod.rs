//! LoRA adapters: which modules they adapt, their matrices, their files.
//!
//! This layer does not know Qwen-Image: the table of a model's linear layers is passed in.

pub mod convert;
pub mod delta;
pub mod extract;
pub mod file;
pub mod inspect;
pub mod linalg;
pub mod lora;
pub mod matrix;
pub mod merge;
pub mod read;
pub mod runtime;
pub mod target;
pub mod write;

pub use lora::{Init, LoraAdapter, LoraModule};
pub use target::{LoraScaling, ModuleInfo, Target, TargetEntry, resolve_targets, select_modules};
