//! The networks of the Qwen-Image family. Field names are the checkpoint's names.

pub mod transformer;
