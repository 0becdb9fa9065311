//! One micro-batch: noisy latents and target, prediction, flow-matching loss, backward.

use crate::error::Result;
use crate::kernels::cpu::{self, view};
use crate::kernels::{Gradients, backward, no_grad};
use crate::model::transformer::{Checkpointing, ImageShape, Inputs, QwenImageTransformer};
use candle_core::{DType, Tensor};

/// A micro-batch whose noise has been drawn. All tensors are f32 on the CPU.
pub struct NoisyBatch {
    /// `(1 - sigma) latents + sigma noise`, packed: (B, S_img, 64).
    pub noisy: Tensor,
    /// `noise - latents`, packed as `noisy`.
    pub target: Tensor,
    /// Prompt features, padded on the right: (B, S_txt, joint_attention_dim).
    pub prompt_embeds: Tensor,
    /// Valid text tokens of each sample.
    pub text_lengths: Vec<usize>,
    /// Noise level of each sample, in [0, 1].
    pub sigmas: Vec<f32>,
    /// Loss weight of each sample.
    pub weights: Vec<f64>,
    /// The one target image, in latent patches.
    pub image_shapes: Vec<ImageShape>,
}

impl NoisyBatch {
    /// Mixes packed `latents` and `noise` (B, S_img, 64) at `sigmas`.
    pub fn mix(
        latents: &Tensor,
        noise: &Tensor,
        prompt_embeds: Tensor,
        text_lengths: Vec<usize>,
        sigmas: Vec<f32>,
        weights: Vec<f64>,
        image_shapes: Vec<ImageShape>,
    ) -> Result<Self> {
        let per_sample = latents.elem_count() / sigmas.len();
        let (x0, eps) = (view(latents)?, view(noise)?);
        let sigma = |i: usize| sigmas[i / per_sample];
        let noisy = (0..x0.len()).map(|i| (1.0 - sigma(i)) * x0[i] + sigma(i) * eps[i]).collect();
        let target = (0..x0.len()).map(|i| eps[i] - x0[i]).collect();
        let tensor = |values| cpu::from_f32(values, latents.shape(), DType::F32);
        let (noisy, target) = (tensor(noisy)?, tensor(target)?);
        Ok(Self { noisy, target, prompt_embeds, text_lengths, sigmas, weights, image_shapes })
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            hidden_states: &self.noisy,
            encoder_hidden_states: &self.prompt_embeds,
            text_lengths: &self.text_lengths,
            timesteps: &self.sigmas,
            image_shapes: &self.image_shapes,
            additional_t_cond: None,
        }
    }
}

/// The loss of a micro-batch.
pub struct Loss {
    /// Mean over samples of weight times mean squared error.
    pub mean: f64,
    /// Unweighted mean squared error of each sample.
    pub per_sample: Vec<f64>,
}

/// The loss and its gradients with respect to every leaf of the network.
pub fn forward_backward(
    model: &QwenImageTransformer,
    batch: &NoisyBatch,
    checkpointing: Checkpointing,
) -> Result<(Loss, Gradients)> {
    let prediction = model.forward(batch.inputs(), checkpointing)?;
    let (loss, seed) = flow_matching_loss(prediction.tensor(), batch)?;
    Ok((loss, backward(vec![(prediction, seed)])?))
}

/// The prediction, packed as `noisy`, without gradients.
pub fn predict(model: &QwenImageTransformer, batch: &NoisyBatch) -> Result<Tensor> {
    Ok(no_grad(|| model.forward(batch.inputs(), Checkpointing::None))?.into_tensor())
}

/// The loss alone.
pub fn evaluate(model: &QwenImageTransformer, batch: &NoisyBatch) -> Result<Loss> {
    Ok(flow_matching_loss(&predict(model, batch)?, batch)?.0)
}

/// Weighted mean squared error against the target, summed in f64, and its gradient in the dtype of the prediction.
fn flow_matching_loss(prediction: &Tensor, batch: &NoisyBatch) -> Result<(Loss, Tensor)> {
    let (p, t) = (view(prediction)?, view(&batch.target)?);
    let samples = batch.weights.len();
    let n = p.len() / samples;
    let mut seed = cpu::uninit(p.len());
    let mut per_sample = Vec::with_capacity(samples);
    for (b, &weight) in batch.weights.iter().enumerate() {
        let range = b * n..(b + 1) * n;
        let factor = (2.0 * weight / (n * samples) as f64) as f32;
        let mut sum = 0f64;
        for ((s, &p), &t) in seed[range.clone()].iter_mut().zip(&p[range.clone()]).zip(&t[range]) {
            let error = p - t;
            sum += f64::from(error) * f64::from(error);
            *s = factor * error;
        }
        per_sample.push(sum / n as f64);
    }
    let mean = per_sample.iter().zip(&batch.weights).map(|(l, w)| l * w).sum::<f64>() / samples as f64;
    drop((p, t));
    let seed = cpu::from_f32(seed, prediction.shape(), prediction.dtype())?;
    Ok((Loss { mean, per_sample }, seed))
}
