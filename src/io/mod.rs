//! Files: safetensors in and out, JSON configs, atomic writes, models from the hub.

pub mod atomic;
pub mod checkpoint;
pub mod disk;
pub mod floats;
pub mod fp8;
pub mod gguf;
pub mod hub;
pub mod json;
pub mod png;
pub mod safetensors;
pub mod weights;

pub use atomic::write_atomic;
pub use json::JsonObject;
pub use weights::Weights;
