//! The text encoder: the language model of Qwen2.5-VL.

mod config;

pub use config::{TextEncoderConfig, VisionConfig};
