//! The image autoencoder, `AutoencoderKLQwenImage`: images to latents of an eighth of their size, and back.
//!
//! In f32 on the CPU. Every part is made of differentiable ops with frozen weights, so that a loss on decoded pixels
//! reaches the latent.

mod blocks;
mod config;
pub mod crop;
mod decoder;
mod encoder;
pub mod latents;
pub mod tiling;
pub mod tiny;

pub use config::VaeConfig;
pub use crop::CropDecoder;
pub use latents::{Posterior, pack, unpack};
pub use tiling::Tiling;
pub use tiny::TinyDecoder;

use crate::error::{Error, Result};
use crate::io::Weights;
use crate::kernels::conv::Conv2d;
use crate::kernels::pixels::{channels_first, channels_last, clamp};
use crate::kernels::{Value, no_grad};
use blocks::Scope;
use candle_core::Tensor;
use decoder::Decoder;
use encoder::Encoder;
use std::path::Path;
use tiling::{Grid, in_tiles};

/// The autoencoder.
pub struct Vae {
    config: VaeConfig,
    tiling: Tiling,
    encoder: Encoder,
    quant_conv: Conv2d,
    post_quant_conv: Conv2d,
    decoder: Decoder,
}

impl Vae {
    /// Loads the folder `vae/`: `config.json` and the weights beside it.
    ///
    /// Errors: those of [`VaeConfig::from_file`]; a missing, misshapen or unknown tensor.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::from_weights(VaeConfig::from_file(&folder.join("config.json"))?, &Weights::open_folder(folder)?)
    }

    /// Takes the tensors that `config` implies out of `weights`.
    ///
    /// Errors: a missing, misshapen or unknown tensor.
    pub fn from_weights(config: VaeConfig, weights: &Weights) -> Result<Self> {
        weights.check(&config.tensors(), |_| false)?;
        let scope = Scope { weights, prefix: String::new() };
        Ok(Self {
            encoder: Encoder::load(&scope.at("encoder"), &config)?,
            quant_conv: scope.at("quant_conv").causal_conv(2 * config.z_dim, 2 * config.z_dim, 1)?,
            post_quant_conv: scope.at("post_quant_conv").causal_conv(config.z_dim, config.z_dim, 1)?,
            decoder: Decoder::load(&scope.at("decoder"), &config)?,
            tiling: Tiling::default(),
            config,
        })
    }

    /// The same autoencoder with other tiles. Errors: tiles that cannot be blended.
    pub fn with_tiling(mut self, tiling: Tiling) -> Result<Self> {
        tiling.check(self.config.spatial_compression())?;
        self.tiling = tiling;
        Ok(self)
    }

    /// The dimensions and the statistics of the latents.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Encodes images, in tiles if they are large.
    ///
    /// Shapes: `pixels` (B, image channels, H, W) in [-1, 1] -> both parts (B, z_dim, H/8, W/8).
    /// Errors: sides that are not multiples of the spatial compression, a wrong number of channels.
    pub fn encode(&self, pixels: &Tensor) -> Result<Posterior> {
        let (_, _, h, w) = pixels.dims4()?;
        let side = self.config.spatial_compression();
        if h % side != 0 || w % side != 0 {
            return Err(Error::run("the image does not fit the autoencoder")
                .expected(format!("sides that are multiples of {side}"), format!("{w} x {h}")));
        }
        no_grad(|| {
            let moments = |x: &Tensor| Ok(self.moments(&Value::constant(x.clone()))?.into_tensor());
            Posterior::from_moments(&if h * w > self.tiling.above {
                in_tiles(pixels, self.pixel_grid(), self.latent_grid(), moments)?
            } else {
                moments(pixels)?
            })
        })
    }

    /// Decodes latents, in tiles if the image is large.
    ///
    /// Shapes: `latents` (B, z_dim, h, w), not normalised -> (B, image channels, 8h, 8w) in [-1, 1].
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = latents.dims4()?;
        no_grad(|| {
            let pixels = |z: &Tensor| Ok(self.decode_value(&Value::constant(z.clone()))?.into_tensor());
            if h * w * self.config.spatial_compression().pow(2) > self.tiling.above {
                in_tiles(latents, self.latent_grid(), self.pixel_grid(), pixels)
            } else {
                pixels(latents)
            }
        })
    }

    /// [`decode`](Self::decode) without tiles, as an op through which gradients flow.
    pub fn decode_value(&self, latents: &Value) -> Result<Value> {
        let z = self.post_quant_conv.forward(&channels_last(latents)?)?; // (B, h, w, z_dim)
        let image = self.decoder.forward(&z)?; // (B, 8h, 8w, image channels)
        channels_first(&clamp(&image, -1.0, 1.0)?)
    }

    /// (B, image channels, H, W) -> (B, 2 z_dim, H/8, W/8)
    fn moments(&self, pixels: &Value) -> Result<Value> {
        let encoded = self.encoder.forward(&channels_last(pixels)?)?; // (B, H/8, W/8, 2 z_dim)
        channels_first(&self.quant_conv.forward(&encoded)?)
    }

    fn pixel_grid(&self) -> Grid {
        Grid { size: self.tiling.size, stride: self.tiling.stride }
    }

    fn latent_grid(&self) -> Grid {
        let side = self.config.spatial_compression();
        Grid { size: self.tiling.size / side, stride: self.tiling.stride / side }
    }
}
