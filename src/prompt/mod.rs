//! Prompts: the templates that a caption is put into.

pub mod template;

pub use template::{TEXT_TO_IMAGE, Template};
