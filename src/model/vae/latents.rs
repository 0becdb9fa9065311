//! Latents: the posterior that the encoder gives, their normalisation, and the 2x2 packing into tokens.

use super::VaeConfig;
use crate::error::{Error, Result};
use candle_core::{DType, Tensor};

/// The normal distribution that the encoder gives for the latent of an image. Both (B, C, h, w).
#[derive(Clone, Debug)]
pub struct Posterior {
    /// Mean, which is also the mode.
    pub mean: Tensor,
    /// Logarithm of the variance, within [-30, 20].
    pub logvar: Tensor,
}

impl Posterior {
    /// Splits the encoder's output (B, 2C, h, w).
    pub(super) fn from_moments(moments: &Tensor) -> Result<Self> {
        let parts = moments.chunk(2, 1)?;
        Ok(Self { mean: parts[0].contiguous()?, logvar: parts[1].clamp(-30f32, 20f32)? })
    }

    /// `mean + exp(logvar / 2) * noise`, for standard normal `noise` of the latent's shape.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        let std = (&self.logvar * 0.5)?.exp()?;
        Ok((&self.mean + (std * noise)?)?)
    }
}

impl VaeConfig {
    /// `(latents - latents_mean) / latents_std`: what the transformer works on. Shape (B, C, h, w).
    pub fn normalize(&self, latents: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.latent_stats(latents)?;
        Ok(latents.broadcast_sub(&mean)?.broadcast_div(&std)?)
    }

    /// The inverse of [`normalize`](Self::normalize).
    pub fn denormalize(&self, latents: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.latent_stats(latents)?;
        Ok(latents.broadcast_mul(&std)?.broadcast_add(&mean)?)
    }

    fn latent_stats(&self, like: &Tensor) -> Result<(Tensor, Tensor)> {
        let column = |values: &[f64]| -> Result<Tensor> {
            let tensor = Tensor::from_slice(values, (1, self.z_dim, 1, 1), like.device())?;
            Ok(tensor.to_dtype(DType::F32)?.to_dtype(like.dtype())?)
        };
        Ok((column(&self.latents_mean)?, column(&self.latents_std)?))
    }
}

/// Packs latents into tokens of 2x2: (B, C, h, w) to (B, h/2 * w/2, 4C), a token's channels in the order (c, y, x).
///
/// Errors: an odd height or width.
/// Source: <https://github.com/huggingface/diffusers/blob/73ba2c74ae42f90ce07ad9f23fe39038d921c8e0/src/diffusers/pipelines/qwenimage/pipeline_qwenimage.py>
pub fn pack(latents: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = latents.dims4()?;
    if h % 2 == 1 || w % 2 == 1 {
        return Err(Error::run("latents of an odd size cannot be packed")
            .expected("even height and width", format!("{h} x {w}")));
    }
    let blocks = latents.reshape((b, c, h / 2, 2, w / 2, 2))?.permute([0, 2, 4, 1, 3, 5])?;
    Ok(blocks.reshape((b, h / 2 * (w / 2), 4 * c))?)
}

/// The inverse of [`pack`], for latents of height `h` and width `w`.
///
/// Errors: tokens that are not those of such latents.
pub fn unpack(tokens: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (b, n, packed) = tokens.dims3()?;
    if packed % 4 != 0 || h % 2 == 1 || w % 2 == 1 || n != h / 2 * (w / 2) {
        return Err(Error::run("tokens do not fit the size of their latents")
            .expected(format!("{} tokens for {h} x {w}", h * w / 4), format!("{:?}", tokens.dims())));
    }
    let blocks = tokens.reshape((b, h / 2, w / 2, packed / 4, 2, 2))?.permute([0, 3, 1, 4, 2, 5])?;
    Ok(blocks.reshape((b, packed / 4, h, w))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_token_holds_its_square_channel_by_channel() {
        // One image, two channels of 2 x 4, valued 100 c + 10 y + x.
        let values: Vec<f32> = (0..16).map(|i| (100 * (i / 8) + 10 * (i / 4 % 2) + i % 4) as f32).collect();
        let latents = Tensor::from_vec(values, (1, 2, 2, 4), &Device::Cpu).unwrap();
        let tokens = pack(&latents).unwrap();
        assert_eq!(
            tokens.to_vec3::<f32>().unwrap()[0],
            [[0., 1., 10., 11., 100., 101., 110., 111.], [2., 3., 12., 13., 102., 103., 112., 113.]]
        );
        let back = unpack(&tokens, 2, 4).unwrap();
        assert_eq!(back.flatten_all().unwrap().to_vec1::<f32>().unwrap(), {
            latents.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        });
        assert!(unpack(&tokens, 4, 4).is_err());
        assert!(pack(&latents.narrow(3, 0, 3).unwrap()).is_err());
    }
}
