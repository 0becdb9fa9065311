//! The networks of the Qwen-Image family, and those that judge images. Field names are the checkpoint's names.

pub mod clip;
pub mod convnet;
pub mod identify;
pub mod inception;
pub mod perceptual;
pub mod source;
pub mod synth;
pub mod text_encoder;
pub mod tokenizer;
pub mod transformer;
pub mod vae;
