//! Merging adapters: into a base model, or into one adapter.

pub mod base;
mod change;
pub mod combine;
mod into_adapter;
mod output;
mod stream;

pub use base::{Base, OutputForm, Written};
pub use change::Weighted;
pub use combine::Method;
pub use into_adapter::{MergedModule, merge_into_adapter};
