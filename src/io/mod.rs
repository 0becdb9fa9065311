//! Files: safetensors in and out, atomic writes.

pub mod atomic;
pub mod safetensors;
pub mod weights;

pub use atomic::write_atomic;
pub use weights::Weights;
