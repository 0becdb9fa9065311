//! Flow matching: noise levels and how a sample moves between them.

pub mod gate;
pub mod loss;
pub mod scheduler;
pub mod sigma;

pub use scheduler::{FlowMatchEuler, TimeShift};
