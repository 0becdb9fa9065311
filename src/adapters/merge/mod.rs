//! Merging adapters: into a base model, or into one adapter.

pub mod base;
mod change;
pub mod combine;
mod stream;

pub use base::{Base, OutputForm, Written};
pub use change::Weighted;
