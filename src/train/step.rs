//! One micro-batch: noisy latents and target, prediction, flow-matching loss, backward.

use crate::error::Result;
use crate::kernels::cpu::{self, view};
use crate::kernels::{Gradients, backward, no_grad};
use crate::model::transformer::{Checkpointing, ImageShape, Inputs, QwenImageTransformer};
use candle_core::{DType, Device, Tensor};

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
    forward_backward_observed(model, batch, checkpointing, &mut |_| Ok(()))
}

/// [`forward_backward`], calling `reached` after each of `forward`, `loss` and `backward`.
pub fn forward_backward_observed(
    model: &QwenImageTransformer,
    batch: &NoisyBatch,
    checkpointing: Checkpointing,
    reached: &mut dyn FnMut(&'static str) -> Result<()>,
) -> Result<(Loss, Gradients)> {
    let prediction = model.forward(batch.inputs(), checkpointing)?;
    reached("forward")?;
    let (loss, seed) = flow_matching_loss(prediction.tensor(), batch)?;
    reached("loss")?;
    let gradients = backward(vec![(prediction, seed)])?;
    reached("backward")?;
    Ok((loss, gradients))
}

/// The prediction, packed as `noisy`, on the CPU, without gradients.
pub fn predict(model: &QwenImageTransformer, batch: &NoisyBatch) -> Result<Tensor> {
    Ok(no_grad(|| model.forward(batch.inputs(), Checkpointing::None))?.tensor().to_device(&Device::Cpu)?)
}

/// The loss alone.
pub fn evaluate(model: &QwenImageTransformer, batch: &NoisyBatch) -> Result<Loss> {
    Ok(flow_matching_loss(&predict(model, batch)?, batch)?.0)
}

/// Weighted mean squared error against the target, summed in f64, and its gradient in the dtype and on the device of the
/// prediction. Both are computed on the CPU: a prediction is small, and its loss is read there in any case.
fn flow_matching_loss(prediction: &Tensor, batch: &NoisyBatch) -> Result<(Loss, Tensor)> {
    let on_host = prediction.to_device(&Device::Cpu)?;
    let (p, t) = (view(&on_host)?, view(&batch.target)?);
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
    let seed = cpu::from_f32(seed, prediction.shape(), prediction.dtype())?.to_device(prediction.device())?;
    Ok((Loss { mean, per_sample }, seed))
}
