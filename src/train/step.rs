//! One micro-batch: noisy latents and target, prediction, flow-matching loss, backward.

use crate::error::Result;
use crate::kernels::cpu::{self, view};
use crate::kernels::{Gradients, backward, no_grad};
use crate::model::transformer::{Checkpointing, ImageShape, Inputs, QwenImageTransformer};
use crate::train::structured::{Fired, Structured, StructuredLoss};
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
    /// Loss weight of each latent pixel, in the order of the packed latents: (B, S_img, 4), with mean 1 over a sample.
    /// `None`: all are 1.
    pub pixel_weights: Option<Tensor>,
    /// The one target image, in latent patches.
    pub image_shapes: Vec<ImageShape>,
    /// For each sample what the structured loss acts on; empty without one.
    pub fired: Vec<Option<Fired>>,
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
        Ok(Self {
            noisy,
            target,
            prompt_embeds,
            text_lengths,
            sigmas,
            weights,
            pixel_weights: None,
            image_shapes,
            fired: Vec::new(),
        })
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
    /// Mean over samples of weight times mean squared error; with the terms of the structured loss where they acted.
    pub mean: f64,
    /// Mean squared error of each sample, weighted by its pixels only.
    pub per_sample: Vec<f64>,
    /// The terms of the structured loss; none where it is off.
    pub structured: Option<StructuredLoss>,
}

/// The loss and its gradients with respect to every leaf of the network.
pub fn forward_backward(
    model: &QwenImageTransformer,
    batch: &NoisyBatch,
    checkpointing: Checkpointing,
) -> Result<(Loss, Gradients)> {
    forward_backward_with(model, batch, checkpointing, None)
}

/// [`forward_backward`] with the structured loss, if there is one, on the samples of `batch.fired`.
pub fn forward_backward_with(
    model: &QwenImageTransformer,
    batch: &NoisyBatch,
    checkpointing: Checkpointing,
    structured: Option<&mut Structured>,
) -> Result<(Loss, Gradients)> {
    forward_backward_observed(model, batch, checkpointing, structured, &mut |_| Ok(()))
}

/// [`forward_backward_with`], calling `reached` after each of `forward`, `loss` and `backward`.
pub fn forward_backward_observed(
    model: &QwenImageTransformer,
    batch: &NoisyBatch,
    checkpointing: Checkpointing,
    structured: Option<&mut Structured>,
    reached: &mut dyn FnMut(&'static str) -> Result<()>,
) -> Result<(Loss, Gradients)> {
    let prediction = model.forward(batch.inputs(), checkpointing)?;
    reached("forward")?;
    let (loss, seed) = loss_and_seed(prediction.tensor(), batch, structured)?;
    reached("loss")?;
    let gradients = backward(vec![(prediction, seed)])?;
    reached("backward")?;
    Ok((loss, gradients))
}

/// The whole loss, and its gradient in the dtype and on the device of the prediction. Both are computed on the CPU: a
/// prediction is small, and its loss is read there in any case.
pub(super) fn loss_and_seed(
    prediction: &Tensor,
    batch: &NoisyBatch,
    structured: Option<&mut Structured>,
) -> Result<(Loss, Tensor)> {
    let on_host = prediction.to_device(&Device::Cpu)?;
    let fired = |b: usize| batch.fired.get(b).and_then(Option::as_ref);
    let (mut loss, mut seed) = match &structured {
        Some(structured) => flow_matching_loss(&on_host, batch, |b| structured.reconstruction_factor(fired(b)))?,
        None => flow_matching_loss(&on_host, batch, |_| 1.0)?,
    };
    if let Some(structured) = structured {
        let terms = structured.add(&on_host, batch, &loss.per_sample, &mut seed)?;
        loss.mean += terms.added;
        loss.structured = Some(terms);
    }
    Ok((loss, cpu::from_f32(seed, prediction.shape(), prediction.dtype())?.to_device(prediction.device())?))
}

/// The prediction, packed as `noisy`, on the CPU, without gradients.
pub fn predict(model: &QwenImageTransformer, batch: &NoisyBatch) -> Result<Tensor> {
    Ok(no_grad(|| model.forward(batch.inputs(), Checkpointing::None))?.tensor().to_device(&Device::Cpu)?)
}

/// The loss alone.
pub fn evaluate(model: &QwenImageTransformer, batch: &NoisyBatch) -> Result<Loss> {
    Ok(flow_matching_loss(&predict(model, batch)?, batch, |_| 1.0)?.0)
}

/// Weighted mean squared error of a prediction on the CPU against the target, summed in f64, and its gradient with respect
/// to the prediction. `share` is a further weight of each sample: that of the reconstruction in the structured loss.
fn flow_matching_loss(
    prediction: &Tensor,
    batch: &NoisyBatch,
    share: impl Fn(usize) -> f64,
) -> Result<(Loss, Vec<f32>)> {
    let (p, t) = (view(prediction)?, view(&batch.target)?);
    let samples = batch.weights.len();
    let n = p.len() / samples;
    let pixel_weights = batch.pixel_weights.as_ref().map(view).transpose()?;
    let channels = batch.noisy.dim(2)?;
    let mut seed = cpu::uninit(p.len());
    let mut per_sample = Vec::with_capacity(samples);
    // A share of 1 changes no bit of its sample.
    let weights: Vec<f64> = batch.weights.iter().enumerate().map(|(b, weight)| weight * share(b)).collect();
    for (b, &weight) in weights.iter().enumerate() {
        let range = b * n..(b + 1) * n;
        let factor = (2.0 * weight / (n * samples) as f64) as f32;
        let mut sum = 0f64;
        let elements = seed[range.clone()].iter_mut().zip(&p[range.clone()]).zip(&t[range.clone()]);
        match &pixel_weights {
            None => {
                for ((s, &p), &t) in elements {
                    let error = p - t;
                    sum += f64::from(error) * f64::from(error);
                    *s = factor * error;
                }
            }
            Some(weights) => {
                for (i, ((s, &p), &t)) in range.zip(elements) {
                    // A token's channels lie in the order (c, y, x): its four pixels take turns.
                    let weight = weights[i / channels * 4 + i % 4];
                    let error = p - t;
                    sum += f64::from(weight) * f64::from(error) * f64::from(error);
                    *s = factor * error * weight;
                }
            }
        }
        per_sample.push(sum / n as f64);
    }
    let mean = per_sample.iter().zip(&weights).map(|(l, w)| l * w).sum::<f64>() / samples as f64;
    drop((p, t, pixel_weights));
    Ok((Loss { mean, per_sample, structured: None }, seed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::vae::pack;
    use crate::rng::{Purpose, Stream};

    const SHAPE: (usize, usize, usize, usize) = (3, 16, 4, 6);

    fn normals(item: u64, shape: (usize, usize, usize, usize)) -> Tensor {
        let n = shape.0 * shape.1 * shape.2 * shape.3;
        let values = Stream::new(5, 0, item, Purpose::Bench).normals(n, 1.0);
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// A batch, a prediction for it, and the weights of its pixels (B, 1, h, w), which do not have mean 1 here.
    fn weighted() -> (NoisyBatch, Tensor, Tensor) {
        let (b, _, h, w) = SHAPE;
        let text = Tensor::zeros((b, 2, 8), DType::F32, &Device::Cpu).unwrap();
        let (latents, noise) = (pack(&normals(0, SHAPE)).unwrap(), pack(&normals(1, SHAPE)).unwrap());
        let weights = vec![1.5, 0.5, 1.0];
        let mut batch =
            NoisyBatch::mix(&latents, &noise, text, vec![2; b], vec![0.2, 0.5, 0.9], weights, vec![(1, h / 2, w / 2)])
                .unwrap();
        let pixels = normals(2, (b, 1, h, w)).abs().unwrap();
        batch.pixel_weights = Some(pack(&pixels).unwrap());
        (batch, pack(&normals(3, SHAPE)).unwrap(), pixels)
    }

    /// In the layout of images, where nothing is packed: the mean over samples and elements of weights times squares.
    #[test]
    fn the_gradient_is_the_weighted_one() {
        let (batch, prediction, pixels) = weighted();
        let (loss, seed) = loss_and_seed(&prediction, &batch, None).unwrap();
        let (b, c, h, w) = SHAPE;
        let error = ((normals(3, SHAPE) - normals(1, SHAPE)).unwrap() + normals(0, SHAPE)).unwrap();
        let sample = Tensor::new(&[1.5f32, 0.5, 1.0], &Device::Cpu).unwrap().reshape((b, 1, 1, 1)).unwrap();
        let weights = pixels.broadcast_mul(&sample).unwrap();
        let scale = 1.0 / (b * c * h * w) as f64;
        let expected = (error.broadcast_mul(&weights).unwrap() * (2.0 * scale)).unwrap();
        let worst = (pack(&expected).unwrap() - &seed).unwrap().abs().unwrap().max_all().unwrap();
        assert!(worst.to_scalar::<f32>().unwrap() < 1e-8, "{worst}");
        let mean = (error.sqr().unwrap().broadcast_mul(&weights).unwrap().sum_all().unwrap() * scale).unwrap();
        assert!((f64::from(mean.to_scalar::<f32>().unwrap()) - loss.mean).abs() < 1e-5);

        // The gradient is that of the loss: one element moved to both sides, which is exact for a square.
        let at = 777;
        let loss_with = |step: f32| {
            let mut moved = prediction.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            moved[at] += step;
            let moved = Tensor::from_vec(moved, prediction.shape(), &Device::Cpu).unwrap();
            loss_and_seed(&moved, &batch, None).unwrap().0.mean
        };
        let slope = loss_with(0.5) - loss_with(-0.5);
        let gradient = f64::from(seed.flatten_all().unwrap().to_vec1::<f32>().unwrap()[at]);
        assert!((slope - gradient).abs() < 1e-5 * gradient.abs(), "{slope} is not {gradient}");
    }

    #[test]
    fn a_weighted_batch_is_its_samples_one_by_one_and_weights_of_one_are_none() {
        let (mut batch, prediction, _) = weighted();
        let (loss, seed) = loss_and_seed(&prediction, &batch, None).unwrap();
        for i in 0..3 {
            let one = |t: &Tensor| t.narrow(0, i, 1).unwrap().contiguous().unwrap();
            let single = NoisyBatch {
                noisy: one(&batch.noisy),
                target: one(&batch.target),
                prompt_embeds: one(&batch.prompt_embeds),
                text_lengths: vec![2],
                sigmas: vec![batch.sigmas[i]],
                weights: vec![batch.weights[i]],
                pixel_weights: batch.pixel_weights.as_ref().map(one),
                image_shapes: batch.image_shapes.clone(),
                fired: Vec::new(),
            };
            let (alone, gradient) = loss_and_seed(&one(&prediction), &single, None).unwrap();
            assert_eq!(alone.per_sample[0], loss.per_sample[i]);
            let far = ((gradient / 3.0).unwrap() - one(&seed)).unwrap().abs().unwrap().max_all().unwrap();
            assert!(far.to_scalar::<f32>().unwrap() < 1e-8, "{far}");
        }
        let bits = |(loss, seed): (Loss, Tensor)| (loss.mean, seed.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        batch.pixel_weights = batch.pixel_weights.as_ref().map(|w| w.ones_like().unwrap());
        let ones = bits(loss_and_seed(&prediction, &batch, None).unwrap());
        batch.pixel_weights = None;
        assert!(ones == bits(loss_and_seed(&prediction, &batch, None).unwrap()));
    }
}
