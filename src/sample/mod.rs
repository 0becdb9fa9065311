//! From prompts to images.

pub mod denoiser;
pub mod generate;
pub mod grid;
pub mod label;
pub mod recipe;
pub mod stages;
pub mod text_to_image;

pub use denoiser::{Denoiser, initial_latents};
pub use generate::{Generator, Image, Timing};
pub use recipe::{LoraUse, Recipe};
pub use text_to_image::{Guidance, PromptBatch, decode_image, denoise};
