//! What the frozen networks computed once: prompt embeddings and latents, kept on disk by content.

pub mod encode;
pub mod fill;
pub mod fingerprint;
pub mod key;
pub mod pose;
pub mod source;
pub mod store;

pub use fill::{FillOptions, Filled, fill};
pub use fingerprint::fingerprint;
pub use key::Key;
pub use source::{CachedSamples, LATENTS, MASK, PROMPT_EMBEDS};
pub use store::{Entry, Store};
