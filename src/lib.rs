//! Train LoRA adapters for Qwen-Image: the library behind the `qwen-lora` binary.
//!
//! Dependencies point down only: `cli` -> `train`, `cache`, `sample` -> `data`, `model`, `optim`, `pose` ->
//! `adapters`, `flow`, `prompt` -> `kernels`, `io`, `config`, `rng`, `error`.

pub mod adapters;
pub mod cache;
pub mod cli;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod flow;
pub mod io;
pub mod kernels;
pub mod model;
pub mod optim;
pub mod pose;
pub mod progress;
pub mod prompt;
pub mod report;
pub mod rng;
pub mod sample;
pub mod train;
pub mod verify;
pub mod world;
