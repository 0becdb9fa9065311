//! Ten training steps of a small model in bf16 and with base weights in int8, as the device runs them, against f32: every
//! gradient of the first step, and the losses.

use super::{Row, Sizes, randn};
use crate::adapters::{Init, LoraAdapter, LoraScaling, TargetEntry, resolve_targets};
use crate::config::BaseDtype;
use crate::error::Result;
use crate::kernels::Value;
use crate::kernels::route::composed_only;
use crate::model::transformer::{BaseWeights, Checkpointing, Precision, QwenImageTransformer, TransformerConfig};
use crate::optim::{AdamW, AdamWOptions, clip_grad_norm};
use crate::train::step::{NoisyBatch, forward_backward};
use crate::train::trainable::Trainable;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

/// One less the cosine between gradients in bf16 and in f32.
const GRADIENT_LIMIT: f64 = 1e-3;
/// How far apart the losses may be, relatively.
const LOSS_LIMIT: f64 = 1e-2;
const STEPS: usize = 10;

type Weights = BTreeMap<String, Value>;

/// Two blocks with heads of the published width.
pub(super) struct Small {
    pub(super) config: TransformerConfig,
    side: usize,
    text_tokens: usize,
    batch: usize,
    rank: usize,
}

impl Small {
    pub(super) fn new(sizes: Sizes) -> Self {
        let published = TransformerConfig { num_layers: 2, ..TransformerConfig::qwen_image() };
        match sizes {
            Sizes::Small => {
                let config = TransformerConfig { num_attention_heads: 2, joint_attention_dim: 96, ..published };
                Self { config, side: 6, text_tokens: 12, batch: 2, rank: 4 }
            }
            Sizes::Published => Self { config: published, side: 32, text_tokens: 200, batch: 1, rank: 16 },
        }
    }
}

/// What training gave.
pub(super) struct Trained {
    names: Vec<String>,
    pub(super) losses: Vec<f64>,
    /// Of the first step.
    pub(super) gradients: Vec<Option<Vec<f32>>>,
}

pub(super) fn check(device: &Device, sizes: Sizes) -> Result<Vec<Row>> {
    let small = Small::new(sizes);
    // The CPU's own f32 is what a GPU is held against where that takes no time.
    let reference_device = if sizes == Sizes::Small { &Device::Cpu } else { device };
    let weights = small.weights(reference_device)?;
    let reference = match sizes {
        Sizes::Small => small.train(&weights, reference_device, Precision::uniform(DType::F32))?,
        Sizes::Published => composed_only(|| small.train(&weights, reference_device, Precision::uniform(DType::F32)))?,
    };
    let (bf16, int8) = (Precision::uniform(DType::BF16), Precision::of(BaseDtype::Int8, DType::BF16));
    let mut rows = compare(&small, "bf16", &reference, &small.train(&weights, device, bf16)?);
    let composed = composed_only(|| small.train(&weights, device, bf16))?;
    rows.extend(compare(&small, "bf16 composed", &reference, &composed));
    rows.extend(compare(&small, "int8 base, bf16", &reference, &small.train(&weights, device, int8)?));
    Ok(rows)
}

fn compare(small: &Small, how: &str, reference: &Trained, found: &Trained) -> Vec<Row> {
    let row = |tensor: &str, error: f64, limit: f64, note: String| {
        let op = format!("{STEPS} steps of 2x{}x128, {how}", small.config.num_attention_heads);
        Row { note, ..Row::new(op, tensor, error, limit) }
    };
    let off = found.losses.iter().zip(&reference.losses).map(|(a, b)| (a / b - 1.0).abs());
    let off = off.fold(0.0, |worst, x| if x > worst || !x.is_finite() { x } else { worst });
    let mut worst = (0.0, String::new());
    for ((name, a), b) in reference.names.iter().zip(&found.gradients).zip(&reference.gradients) {
        let error = one_less_cosine(a.as_deref(), b.as_deref());
        if error > worst.0 || error.is_nan() {
            worst = (error, name.clone());
        }
    }
    vec![
        row("losses", off, LOSS_LIMIT, String::new()),
        row("gradients", worst.0, GRADIENT_LIMIT, format!("the worst of {}: {}", reference.names.len(), worst.1)),
    ]
}

/// 0 for two gradients that are both absent or all zero; infinite where only one is.
fn one_less_cosine(a: Option<&[f32]>, b: Option<&[f32]>) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    match (a, b) {
        (None, None) => 0.0,
        (Some(a), Some(b)) => match (dot(a, a), dot(b, b)) {
            (0.0, 0.0) => 0.0,
            (x, y) => 1.0 - dot(a, b) / (x * y).sqrt(),
        },
        _ => f64::INFINITY,
    }
}

impl Small {
    fn train(&self, weights: &Weights, device: &Device, precision: Precision) -> Result<Trained> {
        let weight =
            |name: &str, _: &[usize]| Ok(weights[name].tensor().to_dtype(precision.weights)?.to_device(device)?);
        let model = QwenImageTransformer::build(self.config.clone(), precision, device, BaseWeights::Frozen, weight)?;
        self.steps(model, Checkpointing::None)
    }

    /// Trains a network of these dimensions.
    pub(super) fn steps(&self, mut model: QwenImageTransformer, checkpointing: Checkpointing) -> Result<Trained> {
        let entries = ["qkv", "mlp", "fusion", "modulation", "entry"];
        let entries = entries.map(|name| TargetEntry { pattern: name.into(), rank: None, alpha: None });
        let scaling = LoraScaling { rank: self.rank, alpha: 2.0 * self.rank as f64, rslora: false };
        let targets = resolve_targets(&self.config.modules(), &entries, scaling)?;
        let mut adapter = LoraAdapter::init(&targets, Init::Gaussian, 5, &Device::Cpu)?;
        for (i, module) in adapter.modules.values_mut().enumerate() {
            // Not zero, so that A has a gradient too.
            module.b = randn(100 + i as u64, module.b.dims(), 0.02)?;
        }
        let trainable = Trainable::attach(&mut model, &adapter)?;
        let params = trainable.parameters();
        let mut optimizer = AdamW::new(AdamWOptions { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 });
        let mut trained = Trained { names: trainable.names().to_vec(), losses: Vec::new(), gradients: Vec::new() };
        for step in 0..STEPS {
            let (loss, mut gradients) = forward_backward(&model, &self.batch(step)?, checkpointing)?;
            let mut gradients = trainable.take_gradients(&mut gradients);
            if step == 0 {
                let flat = |t: &Tensor| t.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>();
                let all = gradients.iter().map(|g| g.as_ref().map(flat).transpose());
                trained.gradients = all.collect::<candle_core::Result<_>>()?;
            }
            trained.losses.push(loss.mean);
            clip_grad_norm(&mut gradients, 1.0)?;
            optimizer.step(&params, &gradients, 1e-3)?;
        }
        Ok(trained)
    }

    /// Base weights in f32, which all runs have, whatever their device and type.
    fn weights(&self, device: &Device) -> Result<Weights> {
        let precision = Precision::uniform(DType::F32);
        let model = QwenImageTransformer::random(self.config.clone(), 11, precision, device, BaseWeights::Frozen)?;
        Ok(model.parameters().into_iter().collect())
    }

    fn batch(&self, step: usize) -> Result<NoisyBatch> {
        let (tokens, text) = (self.side * self.side, self.text_tokens);
        let normal = |item: usize, tokens: usize, width: usize| randn(item as u64, &[self.batch, tokens, width], 1.0);
        let sample =
            |b: usize| (text - 5 * b, if b == 0 { 0.1 + 0.08 * step as f32 } else { 0.9 - 0.07 * step as f32 });
        let (lengths, sigmas) = (0..self.batch).map(sample).unzip();
        NoisyBatch::mix(
            &normal(1000, tokens, self.config.in_channels)?,
            &normal(1001 + step, tokens, self.config.in_channels)?,
            normal(999, text, self.config.joint_attention_dim)?,
            lengths,
            sigmas,
            vec![1.0; self.batch],
            vec![(1, self.side, self.side)],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::int8::Int8Matrix;

    #[test]
    fn bf16_training_follows_f32() {
        let rows = check(&Device::Cpu, Sizes::Small).unwrap();
        assert_eq!(rows.len(), 6);
        for row in rows {
            assert!(row.ok, "{row:?}");
            // bf16 is at work: the distance is that of eight bits, not nothing.
            assert!(row.error > 1e-7, "{row:?}");
        }
    }

    #[test]
    fn int8_weights_alone_leave_losses_and_gradients_where_they_were() {
        let (small, cpu) = (Small::new(Sizes::Small), Device::Cpu);
        let weights = small.weights(&cpu).unwrap();
        let reference = small.train(&weights, &cpu, Precision::uniform(DType::F32)).unwrap();
        let int8 = small.train(&weights, &cpu, Precision::of(BaseDtype::Int8, DType::F32)).unwrap();
        let rows = compare(&small, "int8", &reference, &int8);
        assert!(rows[0].error < 1e-3 && rows[1].error < 2e-4, "{rows:?}");
        // Lengths too, not directions alone.
        let length = |g: &Option<Vec<f32>>| g.iter().flatten().map(|v| f64::from(v * v)).sum::<f64>().sqrt();
        for ((name, a), b) in reference.names.iter().zip(&reference.gradients).zip(&int8.gradients) {
            assert!((length(b) - length(a)).abs() <= 0.02 * length(a), "{name}: {} {}", length(a), length(b));
        }
        // And the same weights held as floats give the same but for rounding.
        let held = |(name, value): (&String, &Value)| {
            let w = value.tensor();
            let in_block = name.starts_with("transformer_blocks.") && w.rank() == 2;
            let w = if in_block {
                Int8Matrix::quantise(name, w).unwrap().dequantise(DType::F32).unwrap()
            } else {
                w.clone()
            };
            (name.clone(), Value::constant(w))
        };
        let held: Weights = weights.iter().map(held).collect();
        let twin = small.train(&held, &cpu, Precision::uniform(DType::F32)).unwrap();
        let rows = compare(&small, "int8", &twin, &int8);
        assert!(rows[0].error < 1e-6 && rows[1].error < 1e-9, "{rows:?}");
    }

    #[test]
    fn cosines_tell_directions_apart() {
        let error = |a: &[f32], b: &[f32]| one_less_cosine(Some(a), Some(b));
        assert!(error(&[1.0, 2.0], &[2.0, 4.0]).abs() < 1e-12);
        assert!(error(&[1.0, 0.0], &[1.0, 0.05]) > GRADIENT_LIMIT);
        assert!(error(&[0.0], &[1.0]).is_nan());
        assert_eq!(one_less_cosine(None, Some(&[1.0])), f64::INFINITY);
    }
}
