//! Flow matching: noise levels and how a sample moves between them.

pub mod scheduler;

pub use scheduler::{FlowMatchEuler, TimeShift};
