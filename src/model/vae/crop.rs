//! A piece of latents to pixels, differentiable: through the autoencoder's decoder, or through a tiny one in its place.

use super::{TinyDecoder, Vae};
use crate::error::Result;
use crate::kernels::{Gradients, Value};
use candle_core::Tensor;

/// What makes pixels of latents.
pub enum CropDecoder {
    /// The autoencoder's own decoder.
    Full(Box<Vae>),
    /// A tiny one.
    Tiny(Box<TinyDecoder>),
}

/// Pixels that remember what they were made of.
pub struct Decoded {
    /// (1, 3, H, W) in [-1, 1].
    pub pixels: Value,
    leaf: Value,
    /// Standard deviation of each latent channel, where the decoder wants latents that are not normalised.
    std: Option<Vec<f32>>,
}

impl CropDecoder {
    /// Decodes normalised latents (1, C, h, w).
    pub fn decode(&self, latents: &Tensor) -> Result<Decoded> {
        match self {
            Self::Full(vae) => {
                let leaf = Value::leaf(vae.config().denormalize(latents)?.contiguous()?);
                let std = vae.config().latents_std.iter().map(|&s| s as f32).collect();
                Ok(Decoded { pixels: vae.decode_value(&leaf)?, leaf, std: Some(std) })
            }
            Self::Tiny(decoder) => {
                let leaf = Value::leaf(latents.contiguous()?);
                Ok(Decoded { pixels: decoder.decode_value(&leaf)?, leaf, std: None })
            }
        }
    }
}

impl Decoded {
    /// The gradient of the normalised latents, (1, C, h, w) row-major; zeros if nothing reached them.
    pub fn gradient(&self, gradients: &mut Gradients) -> Result<Vec<f32>> {
        let Some(gradient) = gradients.take(&self.leaf) else {
            return Ok(vec![0.0; self.leaf.tensor().elem_count()]);
        };
        let mut values = gradient.flatten_all()?.to_vec1::<f32>()?;
        if let Some(std) = &self.std {
            let plane = values.len() / std.len();
            for (values, std) in values.chunks_exact_mut(plane).zip(std) {
                values.iter_mut().for_each(|v| *v *= std);
            }
        }
        Ok(values)
    }
}
