//! The networks of the Qwen-Image family. Field names are the checkpoint's names.

pub mod identify;
pub mod source;
pub mod synth;
pub mod text_encoder;
pub mod tokenizer;
pub mod transformer;
pub mod vae;
