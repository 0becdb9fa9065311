//! The transformer in the sampling loop, and the noise that it starts from. B samples, S image tokens.

use crate::error::{Error, Result};
use crate::flow::FlowMatchEuler;
use crate::kernels::no_grad;
use crate::model::transformer::{Checkpointing, ImageShape, Inputs, QwenImageTransformer};
use crate::model::vae::pack;
use crate::rng::{Purpose, Stream};
use crate::sample::{Guidance, PromptBatch, denoise};
use candle_core::{DType, Device, Tensor};

/// Takes noise to latents: one network, one schedule, one image size.
pub struct Denoiser<'a> {
    /// Predicts the velocity, with the adapters that it carries.
    pub transformer: &'a QwenImageTransformer,
    /// Which noise levels are visited.
    pub scheduler: &'a FlowMatchEuler,
    /// Frames (1), rows and columns of the image in latent patches.
    pub image_shape: ImageShape,
}

impl Denoiser<'_> {
    /// Runs the loop on packed noise (B, S, C) in `steps` steps, giving packed normalised latents.
    ///
    /// Errors: shapes that do not fit; a prediction that is not finite, with the step and the block.
    pub fn run(
        &self,
        noise: Tensor,
        steps: usize,
        prompt: &PromptBatch,
        guidance: Option<Guidance>,
        step_done: impl FnMut(usize),
    ) -> Result<Tensor> {
        let sigmas = self.scheduler.inference_sigmas(steps, noise.dims3()?.1);
        // The last one is where the loop ends.
        let passes: Vec<Vec<f32>> = sigmas.iter().map(|&sigma| self.timesteps(sigma, prompt.lengths.len())).collect();
        let _held = self.transformer.modulate_ahead(&passes)?;
        let predict = |latents: &Tensor, sigma: f32, prompt: &PromptBatch| self.predict(latents, sigma, prompt);
        denoise(noise, &sigmas, prompt, guidance, predict, step_done)
    }

    /// The network's noise levels: through the timestep and back, as the original does.
    fn timesteps(&self, sigma: f32, samples: usize) -> Vec<f32> {
        vec![self.scheduler.timestep(sigma) / 1000.0; samples]
    }

    /// The velocity (B, S, C) in f32 on the CPU at one noise level.
    fn predict(&self, latents: &Tensor, sigma: f32, prompt: &PromptBatch) -> Result<Tensor> {
        let timesteps = self.timesteps(sigma, prompt.lengths.len());
        let inputs = Inputs {
            hidden_states: latents,
            encoder_hidden_states: &prompt.embeds,
            text_lengths: &prompt.lengths,
            timesteps: &timesteps,
            image_shapes: &[self.image_shape],
            additional_t_cond: None,
        };
        let velocity = no_grad(|| self.transformer.forward(inputs, Checkpointing::None))?.into_tensor();
        let velocity = velocity.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        if is_finite(&velocity)? { Ok(velocity) } else { Err(self.explain_not_finite(inputs, sigma)?) }
    }

    /// Runs the network again to find where it first goes wrong.
    fn explain_not_finite(&self, inputs: Inputs, sigma: f32) -> Result<Error> {
        let error = Error::run(format!("the transformer made NaN or infinity at noise level {sigma:.4}"));
        if !is_finite(inputs.hidden_states)? || !is_finite(inputs.encoder_hidden_states)? {
            return Ok(error.detail("its inputs are not finite already"));
        }
        let mut first = None;
        let mut look = |name: &str, tensor: &Tensor| {
            if first.is_none() && !is_finite(tensor).unwrap_or(false) {
                first = Some(name.to_string());
            }
        };
        no_grad(|| self.transformer.forward_observed(inputs, Checkpointing::None, true, &mut look))?;
        let place = first.unwrap_or_else(|| "proj_out".into());
        Ok(error
            .detail(format!("first in `{place}`"))
            .hint("a lower adapter weight or `--dtype f32` may help; else the weights are damaged"))
    }
}

/// Whether all values are finite.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.to_dtype(DType::F32)?.abs()?.max_all()?.to_scalar::<f32>()?.is_finite()
        && tensor.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?.is_finite())
}

/// The noise that an image starts from: a function of the seed and the shape alone, packed (1, S, 4 C), for latents of
/// C `channels` and an image of `rows` x `columns` patches of 2x2 latents.
pub fn initial_latents(seed: u64, channels: usize, rows: usize, columns: usize) -> Result<Tensor> {
    let shape = (1, channels, 2 * rows, 2 * columns);
    let noise = Stream::new(seed, 0, 0, Purpose::Sampling).normals(4 * channels * rows * columns, 1.0);
    pack(&Tensor::from_vec(noise, shape, &Device::Cpu)?)
}
