//! The structured loss: a picture's persons, beside its latents.
//!
//! At a low noise level the prediction `v` says what the clean latents would be, `x0 = noisy - sigma v`. A piece of them
//! is decoded, a pose network looks at it, and its maps are compared with those of the target: their distance (pose) and
//! their soft counts (count). The gradient goes back through network and decoder into `v`: `dL/dv = -sigma dL/dx0`.
//!
//! A sample's loss is `r rec + g (w_pose s_pose pose + w_count s_count count)`, `g` the gate at its noise level and
//! `r = 1 + g (w_rec - 1)`. The scales `s` bring each term to the size of the reconstruction, by the running means of
//! both over the samples that fired so far, so that the weights are shares. Where the gate is shut, or nobody is in the
//! target, `r` is 1: such a sample is trained as without the structured loss, bit for bit.

use crate::cache::pose::{Crop, Window};
use crate::error::{Error, Result};
use crate::kernels::backward;
use crate::kernels::cpu::{self, view};
use crate::model::vae::CropDecoder;
use crate::pose::PoseNetwork;
use crate::pose::compare::compare;
use crate::pose::skeleton::Counted;
use crate::train::step::NoisyBatch;
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

/// A sample on which the structured loss acts in this step.
pub struct Fired {
    /// How far the gate is open, above 0.
    pub gate: f64,
    /// The piece of the target and its maps.
    pub crop: Crop,
}

/// Shares of the terms in the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TermWeights {
    /// Of the reconstruction, where the gate is open.
    pub reconstruction: f64,
    /// Of the pose term.
    pub pose: f64,
    /// Of the count term.
    pub count: f64,
}

impl TermWeights {
    /// Whether there is more than the reconstruction.
    pub fn are_structured(&self) -> bool {
        self.pose > 0.0 || self.count > 0.0
    }
}

/// The loss, and what it remembers from step to step.
pub struct Structured {
    network: Box<dyn PoseNetwork>,
    decoder: CropDecoder,
    counted: Counted,
    weights: TermWeights,
    running: Running,
}

/// Running means of the terms over the samples that fired. Part of the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Running {
    samples: u64,
    reconstruction: f64,
    pose: f64,
    count: f64,
}

/// `Running` and the network that it belongs to, as a checkpoint holds them: the bits of the numbers, which JSON keeps
/// exactly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Fingerprint of the pose network.
    pub network: String,
    /// Samples so far.
    pub samples: u64,
    /// Bits of the means of reconstruction, pose and count.
    pub means: [u64; 3],
}

/// The mean follows about this many samples.
const MEMORY: f64 = 200.0;
/// Means below these are rounding and noise, and are not scaled up further.
const LEAST_POSE: f64 = 1e-3;
const LEAST_COUNT: f64 = 1e-4;

impl Running {
    fn add(&mut self, reconstruction: f64, pose: f64, count: f64) {
        self.samples += 1;
        let step = (1.0 / self.samples as f64).max(1.0 / MEMORY);
        for (mean, value) in
            [(&mut self.reconstruction, reconstruction), (&mut self.pose, pose), (&mut self.count, count)]
        {
            *mean += step * (value - *mean);
        }
    }

    fn pose_scale(&self) -> f64 {
        self.reconstruction / self.pose.max(LEAST_POSE)
    }

    fn count_scale(&self) -> f64 {
        self.reconstruction / self.count.max(LEAST_COUNT)
    }
}

/// What the terms were in one batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StructuredLoss {
    /// What the count term counts.
    pub counted: &'static str,
    /// Samples on which the loss acted.
    pub fired: usize,
    /// Sum of their gates.
    pub gate: f64,
    /// Sum over them of the squared error.
    pub reconstruction: f64,
    /// Sum over them of the pose term, without weight and scale.
    pub pose: f64,
    /// The same of the count term.
    pub count: f64,
    /// What pose and count add to the batch's loss, weighted and scaled.
    pub added: f64,
    /// Square of the norm of the gradient that the reconstruction gives the prediction.
    pub reconstruction_gradient: f64,
    /// The same of the gradient that pose and count together give it.
    pub structured_gradient: f64,
    /// The same of the pose term's gradient at the maps, weighted and scaled.
    pub pose_gradient_at_maps: f64,
    /// The same of the count term's.
    pub count_gradient_at_maps: f64,
}

impl StructuredLoss {
    /// Adds the sums of another batch, which weighs `weight` times the first one in what it added. Gradients count where
    /// the loss acted.
    pub fn accumulate(&mut self, other: &Self, weight: f64) {
        self.counted = other.counted;
        self.added += weight * other.added;
        if other.fired == 0 {
            return;
        }
        self.fired += other.fired;
        for (sum, value) in [
            (&mut self.gate, other.gate),
            (&mut self.reconstruction, other.reconstruction),
            (&mut self.pose, other.pose),
            (&mut self.count, other.count),
            (&mut self.reconstruction_gradient, other.reconstruction_gradient),
            (&mut self.structured_gradient, other.structured_gradient),
            (&mut self.pose_gradient_at_maps, other.pose_gradient_at_maps),
            (&mut self.count_gradient_at_maps, other.count_gradient_at_maps),
        ] {
            *sum += value;
        }
    }
}

impl Structured {
    /// A loss that remembers nothing yet.
    pub fn new(network: Box<dyn PoseNetwork>, decoder: CropDecoder, weights: TermWeights) -> Self {
        let counted = network.skeleton().counted();
        Self { network, decoder, counted, weights, running: Running::default() }
    }

    /// The shares.
    pub fn weights(&self) -> TermWeights {
        self.weights
    }

    /// Other shares from here on, as a stage may ask for.
    pub fn set_weights(&mut self, weights: TermWeights) {
        self.weights = weights;
    }

    /// What the count term counts.
    pub fn counts(&self) -> &'static str {
        self.counted.what
    }

    /// The network.
    pub fn network(&self) -> &dyn PoseNetwork {
        self.network.as_ref()
    }

    /// The decoder.
    pub fn decoder(&self) -> &CropDecoder {
        &self.decoder
    }

    /// What a checkpoint must hold.
    pub fn save(&self) -> SavedState {
        let Running { samples, reconstruction, pose, count } = self.running;
        let means = [reconstruction, pose, count].map(f64::to_bits);
        SavedState { network: self.network.fingerprint().into(), samples, means }
    }

    /// Goes on from a checkpoint. Errors (usage): it was written with another network.
    pub fn restore(&mut self, saved: &SavedState) -> Result<()> {
        if saved.network != self.network.fingerprint() {
            return Err(Error::usage("the run was trained with another pose network")
                .expected(short(&saved.network), short(self.network.fingerprint()))
                .hint("put the weights back to continue this run, or give a new run another `output`"));
        }
        let [reconstruction, pose, count] = saved.means.map(f64::from_bits);
        self.running = Running { samples: saved.samples, reconstruction, pose, count };
        Ok(())
    }

    /// The factor on a sample's reconstruction.
    pub fn reconstruction_factor(&self, fired: Option<&Fired>) -> f64 {
        match fired {
            Some(fired) if self.weights.are_structured() => 1.0 + fired.gate * (self.weights.reconstruction - 1.0),
            _ => 1.0,
        }
    }

    /// Adds pose and count of the samples that fired: their gradient to `seed`, that of the prediction (packed, as
    /// `batch.noisy`). `reconstruction` is the squared error of each sample.
    pub fn add(
        &mut self,
        prediction: &Tensor,
        batch: &NoisyBatch,
        reconstruction: &[f64],
        seed: &mut [f32],
    ) -> Result<StructuredLoss> {
        let samples = batch.sigmas.len();
        let norm = |x: &[f32]| x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
        let mut loss = StructuredLoss {
            counted: self.counted.what,
            reconstruction_gradient: norm(seed),
            ..StructuredLoss::default()
        };
        if !self.weights.are_structured() {
            return Ok(loss);
        }
        let (noisy, predicted) = (view(&batch.noisy)?, view(prediction)?);
        for (b, fired) in batch.fired.iter().enumerate() {
            let Some(Fired { gate, crop }) = fired else { continue };
            let pixels = Packed::of(batch, b, crop.window)?;
            let sigma = batch.sigmas[b];
            let clean = pixels.indices().map(|i| noisy[i] - sigma * predicted[i]).collect();
            let latents = cpu::from_f32(clean, pixels.shape(), DType::F32)?;

            let decoded = self.decoder.decode(&latents)?;
            let maps = self.network.maps(&decoded.pixels)?;
            let (target, channels) = (view(&crop.maps)?, crop.maps.dim(2)?);
            if maps.dims()[1..] != *crop.maps.dims() {
                return Err(Error::run("the maps of prediction and target differ in shape")
                    .expected(format!("{:?}", crop.maps.dims()), format!("{:?}", &maps.dims()[1..])));
            }
            let terms = compare(&view(maps.tensor())?, &target, channels, &self.counted);

            self.running.add(reconstruction[b], terms.pose, terms.count);
            let weight = batch.weights[b] * gate / samples as f64;
            let pose_weight = weight * self.weights.pose * self.running.pose_scale();
            let count_weight = weight * self.weights.count * self.running.count_scale();
            let scaled = |gradient: &[f32], by: f64| -> Vec<f32> {
                gradient.iter().map(|g| (f64::from(*g) * by) as f32).collect()
            };
            let (pose, count) =
                (scaled(&terms.pose_gradient, pose_weight), scaled(&terms.count_gradient, count_weight));
            loss.pose_gradient_at_maps += norm(&pose);
            loss.count_gradient_at_maps += norm(&count);
            let at_maps = pose.iter().zip(&count).map(|(p, c)| p + c).collect();
            let at_maps = cpu::from_f32(at_maps, maps.tensor().shape(), DType::F32)?;
            let gradient = decoded.gradient(&mut backward(vec![(maps, at_maps)])?)?;
            for (i, g) in pixels.indices().zip(gradient) {
                let at_prediction = -sigma * g;
                loss.structured_gradient += f64::from(at_prediction).powi(2);
                seed[i] += at_prediction;
            }

            loss.fired += 1;
            loss.gate += gate;
            loss.reconstruction += reconstruction[b];
            loss.pose += terms.pose;
            loss.count += terms.count;
            loss.added += pose_weight * terms.pose + count_weight * terms.count;
        }
        Ok(loss)
    }
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// Where the latents of a window of one sample lie in packed tensors (B, S_img, 4C).
struct Packed {
    first: usize,
    channels: usize,
    /// Columns of the whole image, in tokens.
    tokens_wide: usize,
    window: Window,
}

impl Packed {
    fn of(batch: &NoisyBatch, sample: usize, window: Window) -> Result<Self> {
        let (_, tokens, width) = batch.noisy.dims3()?;
        let (_, rows, columns) = batch.image_shapes[0];
        if window.top + window.height > 2 * rows || window.left + window.width > 2 * columns {
            return Err(Error::run("a piece of the target lies outside its picture")
                .expected(format!("within {} x {} latents", 2 * columns, 2 * rows), format!("{window:?}")));
        }
        Ok(Self { first: sample * tokens * width, channels: width / 4, tokens_wide: columns, window })
    }

    fn shape(&self) -> Vec<usize> {
        vec![1, self.channels, self.window.height, self.window.width]
    }

    /// Channel by channel, row by row; see [`pack`](crate::model::vae::pack).
    fn indices(&self) -> impl Iterator<Item = usize> + '_ {
        let Window { top, left, height, width } = self.window;
        (0..self.channels * height * width).map(move |i| {
            let (c, y, x) = (i / (height * width), top + i / width % height, left + i % width);
            let token = y / 2 * self.tokens_wide + x / 2;
            self.first + (token * self.channels + c) * 4 + y % 2 * 2 + x % 2
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::safetensors::{RawTensor, write};
    use crate::kernels::testing::randn;
    use crate::model::synth::{self, Preset, SynthOptions};
    use crate::model::vae::{Vae, pack};
    use crate::pose::heatmap::HeatmapNetwork;
    use crate::pose::weights::formula;
    use crate::train::step::loss_and_seed;
    use candle_core::Device;
    use std::collections::BTreeMap;

    const WEIGHTS: TermWeights = TermWeights { reconstruction: 0.7, pose: 0.2, count: 0.1 };
    const WINDOW: Window = Window { top: 2, left: 4, height: 6, width: 8 };

    fn network(folder: &std::path::Path) -> Box<dyn PoseNetwork> {
        let json = r#"{"kind": "heatmap", "stride": 4, "keypoints": ["head", "left_hand", "right_hand"], "layers": [
            {"name": "a", "stride": 2, "kernel": 5, "relu": true}, {"name": "b", "stride": 2, "kernel": 3, "relu": false}]}"#;
        let raw = |name: &str, shape: &[usize]| RawTensor::from_tensor(name, &formula(name, shape)).unwrap();
        let shapes: [(&str, &[usize]); 4] =
            [("a.weight", &[6, 3, 5, 5]), ("a.bias", &[6]), ("b.weight", &[3, 6, 3, 3]), ("b.bias", &[3])];
        let path = folder.join("net.safetensors");
        let metadata = BTreeMap::from([("pose_network".to_string(), json.to_string())]);
        write(&path, shapes.map(|(name, shape)| raw(name, shape)).into(), &metadata).unwrap();
        Box::new(HeatmapNetwork::load(&path).unwrap())
    }

    fn structured(folder: &std::path::Path) -> Structured {
        let pipeline = folder.join("pipe");
        if !pipeline.exists() {
            synth::write(&SynthOptions::preset(Preset::Tiny), &pipeline).unwrap();
        }
        let vae = Vae::load(&pipeline.join("vae")).unwrap();
        Structured::new(network(folder), CropDecoder::Full(Box::new(vae)), WEIGHTS)
    }

    /// Two samples of 64 x 96 pixels, of which the first fires, and a prediction for them.
    fn batch(structured: &Structured, gate: f64) -> (NoisyBatch, Tensor) {
        let shape = [2, 16, 8, 12];
        let packed = |item| pack(&randn(item, &shape, 0.8)).unwrap();
        let text = Tensor::zeros((2, 2, 8), DType::F32, &Device::Cpu).unwrap();
        let mut batch =
            NoisyBatch::mix(&packed(0), &packed(1), text, vec![2; 2], vec![0.4, 0.3], vec![1.2, 0.9], vec![(1, 4, 6)])
                .unwrap();
        let target = randn(2, &[1, 16, WINDOW.height, WINDOW.width], 0.8);
        let decoded = structured.decoder.decode(&target).unwrap();
        let maps = structured.network.maps(&decoded.pixels).unwrap().into_tensor().squeeze(0).unwrap();
        batch.fired = vec![Some(Fired { gate, crop: Crop { window: WINDOW, maps } }), None];
        (batch, packed(3))
    }

    #[test]
    fn the_gradient_through_decoder_and_network_is_that_of_the_whole_loss() {
        let folder = tempfile::tempdir().unwrap();
        let mut loss = structured(folder.path());
        let gate = 0.75;
        let (batch, prediction) = batch(&loss, gate);
        let (base, seed) = loss_and_seed(&prediction, &batch, Some(&mut loss)).unwrap();
        let terms = base.structured.clone().unwrap();
        assert_eq!((terms.fired, terms.counted), (1, "hands"));
        assert!(terms.pose > 0.01 && terms.count > 1e-4, "{terms:?}");
        // After one sample the means are its own terms: each has the size of the reconstruction.
        let expected = batch.weights[0] * gate * 0.5 * base.per_sample[0] * (WEIGHTS.pose + WEIGHTS.count);
        assert!((terms.added - expected).abs() < 1e-9 * expected, "{} {expected}", terms.added);

        // The scales are constants of the step: the difference is taken with those of the base.
        let weight = batch.weights[0] * gate / 2.0;
        let scales =
            (weight * WEIGHTS.pose * loss.running.pose_scale(), weight * WEIGHTS.count * loss.running.count_scale());
        // Along the part of the gradient that is pose and count: what the bare reconstruction leaves of it.
        let mut unguided = structured(folder.path());
        unguided.set_weights(TermWeights { pose: 0.0, count: 1e-12, ..WEIGHTS });
        let (_, bare) = loss_and_seed(&prediction, &batch, Some(&mut unguided)).unwrap();
        let part = (&seed - &bare).unwrap();
        let dot = |a: &Tensor, b: &Tensor| {
            let product = (a * b).unwrap().to_dtype(DType::F64).unwrap();
            product.sum_all().unwrap().to_scalar::<f64>().unwrap()
        };
        let norm = dot(&part, &part).sqrt();
        assert!(norm > 0.0 && (norm - terms.structured_gradient.sqrt()).abs() < 1e-3 * norm, "{norm}");
        let direction = (&part / norm).unwrap();
        let moved = |by: f64| {
            let mut fresh = structured(folder.path());
            let prediction = (&prediction + (&direction * by).unwrap()).unwrap();
            let (l, _) = loss_and_seed(&prediction, &batch, Some(&mut fresh)).unwrap();
            let t = l.structured.unwrap();
            l.mean - t.added + scales.0 * t.pose + scales.1 * t.count
        };
        let step = 2e-2;
        let numeric = (moved(step) - moved(-step)) / (2.0 * step);
        let analytic = dot(&seed, &direction);
        // In f32, across the kinks of an absolute value, of a clamp and of a ReLU.
        assert!((numeric - analytic).abs() < 0.04 * norm, "{numeric} {analytic} {norm}");
    }

    #[test]
    fn a_sample_that_does_not_fire_is_trained_as_without_the_loss_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let mut loss = structured(folder.path());
        let (mut batch, prediction) = batch(&loss, 1.0);
        let bits = |seed: &Tensor| seed.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (_, with) = loss_and_seed(&prediction, &batch, Some(&mut loss)).unwrap();
        let (plain_loss, plain) = loss_and_seed(&prediction, &batch, None).unwrap();
        let (with, plain) = (bits(&with), bits(&plain));
        let half = plain.len() / 2;
        assert!(with[half..] == plain[half..] && with[..half] != plain[..half]);
        // Outside the piece only the weight of the reconstruction is another.
        let inside: std::collections::BTreeSet<usize> = Packed::of(&batch, 0, WINDOW).unwrap().indices().collect();
        assert_eq!(inside.len(), 16 * 6 * 8);
        for i in (0..half).filter(|i| !inside.contains(i)) {
            assert!((with[i] - 0.7 * plain[i]).abs() <= 1e-6 * plain[i].abs(), "{i}");
        }
        batch.fired = vec![None, None];
        let before = loss.save();
        let (off_loss, off) = loss_and_seed(&prediction, &batch, Some(&mut loss)).unwrap();
        assert!(bits(&off) == plain && off_loss.mean.to_bits() == plain_loss.mean.to_bits());
        assert_eq!(before, loss.save(), "nothing fired, nothing was learned");
    }

    #[test]
    fn what_it_remembers_comes_back_from_json_to_the_bit() {
        let folder = tempfile::tempdir().unwrap();
        let mut loss = structured(folder.path());
        loss.running.add(0.1, 1.0 / 3.0, 0.7);
        loss.running.add(0.3, 0.123_456_789, 1e-9);
        let json = serde_json::to_string(&loss.save()).unwrap();
        let mut other = structured(folder.path());
        other.restore(&serde_json::from_str(&json).unwrap()).unwrap();
        assert_eq!(other.running, loss.running);
        let foreign = SavedState { network: "0123456789abcdef".into(), ..loss.save() };
        assert!(other.restore(&foreign).unwrap_err().to_string().contains("another pose network"));
    }
}
