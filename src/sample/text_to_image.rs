//! The loop of `QwenImagePipeline`: Euler steps along the predicted velocity, with true classifier-free guidance, and
//! the decoding of what it arrives at. B samples, S image tokens, L text tokens.
//!
//! Source: <https://github.com/huggingface/diffusers/blob/73ba2c74ae42f90ce07ad9f23fe39038d921c8e0/src/diffusers/pipelines/qwenimage/pipeline_qwenimage.py>

use crate::error::Result;
use crate::flow::scheduler::euler_step;
use crate::model::text_encoder::pad_embeds;
use crate::model::vae::{Vae, unpack};
use candle_core::{D, Tensor};

/// The prompt embeddings of a batch.
#[derive(Clone, Debug)]
pub struct PromptBatch {
    /// Padded on the right: (B, L, D).
    pub embeds: Tensor,
    /// Valid tokens of each sample.
    pub lengths: Vec<usize>,
}

impl PromptBatch {
    /// From the embeddings of each sample, (tokens, D).
    pub fn new(embeds: &[Tensor]) -> Result<Self> {
        let (embeds, lengths) = pad_embeds(embeds)?;
        Ok(Self { embeds, lengths })
    }
}

/// True classifier-free guidance: a second prediction, for what is not wanted.
pub struct Guidance<'a> {
    /// The negative prompts.
    pub negative: &'a PromptBatch,
    /// How far to go from the negative prediction through the positive one; 1 is no guidance.
    pub scale: f64,
}

/// Takes packed latents (B, S, C) from `sigmas[0]` to the last sigma. `predict` is the transformer: packed latents, the
/// noise level and a prompt to the velocity (B, S, C). `step_done` is called with 1, 2, ...
pub fn denoise(
    latents: Tensor,
    sigmas: &[f32],
    prompt: &PromptBatch,
    guidance: Option<Guidance>,
    mut predict: impl FnMut(&Tensor, f32, &PromptBatch) -> Result<Tensor>,
    mut step_done: impl FnMut(usize),
) -> Result<Tensor> {
    let mut latents = latents;
    for (i, step) in sigmas.windows(2).enumerate() {
        let mut velocity = predict(&latents, step[0], prompt)?; // (B, S, C)
        if let Some(guidance) = &guidance {
            let negative = predict(&latents, step[0], guidance.negative)?;
            velocity = guided(&velocity, &negative, guidance.scale)?;
        }
        latents = euler_step(&latents, &velocity, step[0], step[1])?;
        step_done(i + 1);
    }
    Ok(latents)
}

/// `negative + scale * (positive - negative)`, every token scaled back to the length that it has in `positive`.
fn guided(positive: &Tensor, negative: &Tensor, scale: f64) -> Result<Tensor> {
    let combined = (negative + ((positive - negative)? * scale)?)?;
    let length = |x: &Tensor| x.sqr()?.sum_keepdim(D::Minus1)?.sqrt();
    let ratio = (length(positive)? / length(&combined)?)?;
    Ok(combined.broadcast_mul(&ratio)?)
}

/// Packed, normalised latents (B, S, 4 z_dim) of images of `height` x `width` pixels, decoded: (B, 3, H, W) in [0, 1].
pub fn decode_image(vae: &Vae, latents: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let side = vae.config().spatial_compression();
    let latents = vae.config().denormalize(&unpack(latents, height / side, width / side)?)?;
    Ok(vae.decode(&latents)?.affine(0.5, 0.5)?.clamp(0f32, 1f32)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn batch() -> PromptBatch {
        PromptBatch::new(&[Tensor::ones((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap()]).unwrap()
    }

    #[test]
    fn the_exact_velocity_leads_to_the_clean_latents() {
        let clean = Tensor::new(&[[[1f32, -2.0], [0.5, 3.0]]], &Device::Cpu).unwrap();
        let noise = Tensor::new(&[[[0.25f32, 1.0], [-1.0, 0.0]]], &Device::Cpu).unwrap();
        let mut steps = 0;
        let exact = |x: &Tensor, sigma: f32, _: &PromptBatch| Ok(((x - &clean)? / f64::from(sigma))?);
        let out = denoise(noise.clone(), &[1.0, 0.7, 0.2, 0.0], &batch(), None, exact, |i| steps = i).unwrap();
        let error = (out - &clean).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-6 && steps == 3, "{error} {steps}");
    }

    #[test]
    fn guidance_turns_a_token_without_making_it_longer() {
        let row = |x: f32, y: f32| Tensor::new(&[[[x, y]]], &Device::Cpu).unwrap();
        let out = guided(&row(3.0, 4.0), &row(3.0, 0.0), 2.0).unwrap().flatten_all().unwrap();
        // Combined (3, 8), brought back to length 5.
        let expected = [3.0, 8.0].map(|v: f32| v * 5.0 / 73f32.sqrt());
        for (a, b) in out.to_vec1::<f32>().unwrap().iter().zip(expected) {
            assert!((a - b).abs() < 1e-6);
        }
        let same = guided(&row(3.0, 4.0), &row(1.0, 9.0), 1.0).unwrap().flatten_all().unwrap();
        assert_eq!(same.to_vec1::<f32>().unwrap(), [3.0, 4.0], "scale 1 changes nothing");
    }
}
