//! The Qwen-Image transformer: a double-stream MMDiT whose image and text streams meet in joint attention.

mod config;

pub use config::TransformerConfig;
