//! Prompts: the templates that a caption is put into, prompts in parts, and which adapters a prompt calls for.

pub mod routing;
pub mod structured;
pub mod table;
pub mod template;
pub mod variation;

pub use template::{TEXT_TO_IMAGE, Template};
