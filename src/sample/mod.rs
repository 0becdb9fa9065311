//! From a prompt to an image.

pub mod text_to_image;

pub use text_to_image::{Guidance, PromptBatch, decode_image, denoise};
