//! Differentiable operations: a small reverse-mode tape over candle tensors, and ops with hand-derived backward.
//!
//! Candle's own autograd is not used, because (read in candle-core 0.11.1 `backprop.rs`) it computes the gradients
//! of frozen weights, accumulates every gradient by allocating zeros and adding, keeps the whole graph alive while
//! it runs, and knows only one output per op. Tensors, dtypes and devices are candle's; the tape is ours.
//!
//! The ops of the training path run on any device, see [`route`]; those of the text encoder and the VAE on the CPU.

pub mod attention;
pub mod basic;
pub mod causal_attention;
pub mod channel_norm;
pub mod checkpoint;
mod composed;
pub mod conv;
pub mod cpu;
pub mod cuda;
pub mod depthwise;
pub mod int8;
pub mod linear;
pub mod math;
pub mod matmul;
pub mod modulation;
pub mod norm;
pub mod pixels;
pub mod pool;
pub mod relu;
pub mod rope;
pub mod route;
pub mod spatial_attention;
pub mod swap;
pub mod tape;
pub mod tensors;
#[cfg(test)]
pub(crate) mod testing;
mod tiles;
pub mod upsample;
pub mod weight;

pub use tape::{Gradients, Value, backward, no_grad};
