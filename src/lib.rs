//! Train LoRA adapters for Qwen-Image: the library behind the `qwen-lora` binary.
//!
//! Dependencies point down only: `cli` -> `train`, `cache`, `sample` -> `data`, `model`, `optim` ->
//! `adapters`, `flow`, `prompt` -> `kernels`, `io`, `config`, `rng`, `error`.

pub mod config;
pub mod error;
pub mod io;
pub mod kernels;
pub mod rng;
