//! The image autoencoder, `AutoencoderKLQwenImage`.

mod config;

pub use config::VaeConfig;
