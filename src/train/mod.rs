//! Training: what is trained, one step, the run.

pub mod step;
pub mod trainable;
