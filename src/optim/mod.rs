//! Optimizer, learning-rate schedules, gradient clipping and accumulation.

pub mod accumulate;
pub mod adamw;
pub mod clip;
pub mod schedule;

pub use accumulate::Accumulator;
pub use adamw::{AdamW, AdamWOptions, Parameter};
pub use clip::clip_grad_norm;
pub use schedule::learning_rate;
