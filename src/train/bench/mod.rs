//! Timing training steps as the peers' benchmark defines them (`scripts/reference/bench_torch.py`): noising, forward,
//! loss, backward, clipping to norm 1, AdamW, on cached latents and text.
//!
//! On a GPU the noise is drawn before the clock starts, as a run's loader draws it beside the step before.

mod guided;
mod process;
mod rate;

use crate::adapters::{Init, LoraAdapter, LoraScaling, TargetEntry, resolve_targets};
use crate::config::{Checkpointing, ModulationChoice, TrainingMode};
use crate::error::{Error, Result};
use crate::model::transformer::QwenImageTransformer;
use crate::optim::{AdamW, AdamWOptions, clip_grad_norm};
use crate::rng::{Purpose, Stream};
use crate::train::ahead::window;
use crate::train::memory::{Step, StepShape, feeds_modulation};
use crate::train::step::{NoisyBatch, forward_backward_observed};
use crate::train::trainable::Trainable;
use candle_core::{Device, Tensor};
pub use guided::Guided;
use guided::GuidedReport;
use process::{peak_rss_mib, since_process_start};
use rate::{StepFlops, matmul_peak};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

/// What is timed.
pub struct Shape {
    /// Rows and columns of the image in latent patches.
    pub grid: (usize, usize),
    /// Text tokens; the last sample of several has three quarters of them.
    pub text_tokens: usize,
    /// Samples in a step.
    pub batch: usize,
    /// Rank of the adapter.
    pub rank: usize,
    /// Entries of `lora.target_modules`.
    pub targets: Vec<String>,
    /// Timed steps.
    pub steps: usize,
    /// Steps before the timed ones.
    pub warmup: usize,
    /// What the forward pass keeps.
    pub checkpointing: Checkpointing,
    /// Seed of the data.
    pub seed: u64,
}

/// The benchmark's JSON line. Memory in MiB, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    engine: &'static str,
    device: String,
    dtype: &'static str,
    checkpointing: &'static str,
    /// `resident`, or `streamed`: not held, with the tables of a whole window in their place.
    modulation: &'static str,
    /// Blocks that wait in host memory.
    blocks_to_swap: usize,
    threads: usize,
    batch: usize,
    image_tokens: usize,
    text_tokens: usize,
    rank: usize,
    trainable_params: usize,
    total_params: usize,
    steps: usize,
    step_s_median: f64,
    step_s_min: f64,
    step_s_max: f64,
    tokens_per_s: f64,
    start_to_first_step_s: f64,
    peak_rss_mb: f64,
    /// What `train --dry-run` forecasts for such a step, in MiB.
    forecast_mb: f64,
    /// The most that tensors held on the GPU at once, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_device_mb: Option<f64>,
    /// Median seconds of each part of a step.
    phase_s: BTreeMap<&'static str, f64>,
    /// 10^12 operations a second that training takes, recompute not counted, and their share of the measured peak.
    model_tflops: f64,
    model_share: f64,
    gemm_gflops_peak: f64,
    /// Share of the measured peak with what is computed twice.
    gemm_share: f64,
    loss_first: f64,
    loss_last: f64,
    /// The structured loss, if it was timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    structured: Option<GuidedReport>,
}

/// Times the parts of steps, each up to the moment when the device is done with it.
struct Clock<'a> {
    device: &'a Device,
    last: Instant,
    parts: BTreeMap<&'static str, Vec<f64>>,
}

impl Clock<'_> {
    fn reached(&mut self, part: &'static str) -> Result<()> {
        self.device.synchronize()?;
        let now = Instant::now();
        self.parts.entry(part).or_default().push((now - self.last).as_secs_f64());
        self.last = now;
        Ok(())
    }

    /// Median times, without the first `warmup` steps.
    fn medians(&self, warmup: usize) -> BTreeMap<&'static str, f64> {
        self.parts.iter().map(|(part, times)| (*part, median(&times[warmup..]))).collect()
    }
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

/// The noise levels of a step.
fn sigmas(shape: &Shape, step: usize) -> Vec<f32> {
    let mut stream = Stream::new(shape.seed, step as u64, 0, Purpose::Sigma);
    (0..shape.batch).map(|_| (0.02 + 0.96 * stream.uniform()) as f32).collect()
}

/// The noise levels of some steps.
fn levels(shape: &Shape, steps: Range<usize>) -> Vec<Vec<f32>> {
    steps.map(|step| sigmas(shape, step)).collect()
}

/// Runs warm-up and timed steps on the model's device, with the structured loss if there is one; `done` is called with each
/// step's number and time. Where the model's modulation is streamed, the tables of a window of steps are held throughout, as
/// in training; making them is not timed.
///
/// Errors: targets that match nothing, or the modulation where it is streamed; a loss that is not finite.
pub fn bench(
    mut model: QwenImageTransformer,
    shape: &Shape,
    mut guided: Option<Guided>,
    mut done: impl FnMut(usize, f64),
) -> Result<BenchReport> {
    let config = model.config().clone();
    let entry = |pattern: &String| TargetEntry { pattern: pattern.clone(), rank: None, alpha: None };
    let entries: Vec<_> = shape.targets.iter().map(entry).collect();
    let scaling = LoraScaling { rank: shape.rank, alpha: shape.rank as f64, rslora: false };
    let targets = resolve_targets(&config.modules(), &entries, scaling)?;
    let adapter = LoraAdapter::init(&targets, Init::Gaussian, shape.seed, &Device::Cpu)?;
    let placement = model.placement();
    let streamed = placement.streamed_modulation;
    if streamed && targets.iter().any(|t| feeds_modulation(&t.name)) {
        return Err(Error::usage(
            "`--modulation streamed` leaves out weights that these targets train or train through",
        ));
    }
    let trainable = Trainable::attach(&mut model, &adapter)?;
    drop(adapter);
    let params = trainable.parameters();
    let mut optimizer = AdamW::new(AdamWOptions { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 });

    let tokens = shape.grid.0 * shape.grid.1;
    let normal = |step: u64, item: u64, dims: &[usize]| -> Result<Tensor> {
        let values = Stream::new(shape.seed, step, item, Purpose::Bench).normals(dims.iter().product(), 1.0);
        Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
    };
    let latents = normal(0, 0, &[shape.batch, tokens, config.in_channels])?;
    let text = normal(0, 1, &[shape.batch, shape.text_tokens, config.joint_attention_dim])?;
    let mut text_lengths = vec![shape.text_tokens; shape.batch];
    if shape.batch > 1 {
        text_lengths[shape.batch - 1] = (shape.text_tokens * 3 / 4).max(1);
    }

    let crops = guided.as_ref().map(|g| g.targets(&latents, shape.grid)).transpose()?;
    let mut fired = Vec::new();

    let window = window(config.dim(), shape.batch) as usize;
    let mut held = Some(model.modulate_ahead(&levels(shape, 0..window))?);
    let start_to_first_step_s = since_process_start().as_secs_f64();
    let device = model.device().clone();
    let gpu = GpuMemory::watch(&device)?;
    let (mut times, mut losses) = (Vec::new(), Vec::new());
    let mut clock = Clock { device: &device, last: Instant::now(), parts: BTreeMap::new() };
    for step in 0..shape.warmup + shape.steps {
        if step > 0 && step % window == 0 {
            // First, so that two windows are never there at once.
            drop(held.take());
            held = Some(model.modulate_ahead(&levels(shape, step..step + window))?);
        }
        let draw = || normal(step as u64 + 1, 0, latents.dims());
        let drawn = (!device.is_cpu()).then(draw).transpose()?;
        let started = Instant::now();
        clock.last = started;
        let sigmas = sigmas(shape, step);
        let noise = drawn.map_or_else(draw, Ok)?;
        let weights = vec![1.0; shape.batch];
        let shapes = vec![(1, shape.grid.0, shape.grid.1)];
        let mut batch = NoisyBatch::mix(&latents, &noise, text.clone(), text_lengths.clone(), sigmas, weights, shapes)?;
        if let (Some(guided), Some(crops)) = (&guided, &crops) {
            batch.fired = guided.fired(step, &batch.sigmas, crops);
        }
        fired.push(batch.fired.iter().flatten().count());
        clock.reached("noising")?;
        let structured = guided.as_mut().map(|guided| &mut guided.loss);
        let (loss, mut gradients) =
            forward_backward_observed(&model, &batch, shape.checkpointing, structured, &mut |part| {
                clock.reached(part)
            })?;
        let mut gradients = trainable.take_gradients(&mut gradients);
        let norm = clip_grad_norm(&mut gradients, 1.0)?;
        clock.reached("clipping")?;
        optimizer.step(&params, &gradients, 1e-4)?;
        drop(gradients);
        clock.reached("optimizer")?;
        if !(loss.mean.is_finite() && norm.is_finite()) {
            return Err(Error::run(format!("the loss is {} at step {step}, the gradient norm {norm}", loss.mean)));
        }
        let seconds = started.elapsed().as_secs_f64();
        done(step, seconds);
        times.push(seconds);
        losses.push(loss.mean);
    }
    let (peak_rss_mb, peak_device_mb) = (peak_rss_mib(), gpu.peak_mib()?);
    let timed = &times[shape.warmup..];
    let step_s = median(timed);
    let step = Step {
        transformer: &config,
        mode: TrainingMode::Lora,
        accumulates: false,
        shape: StepShape {
            batch: shape.batch,
            image_tokens: tokens,
            text_tokens: shape.text_tokens,
            trained: trainable.num_params(),
            ranks_per_block: (targets.len() * shape.rank).div_ceil(config.num_layers),
            trains_modulation: targets.iter().any(|t| feeds_modulation(&t.name)),
        },
    };
    let forecast = step.forecast(model.precision(), shape.checkpointing, placement, !device.is_cpu()).total();
    let peak = matmul_peak(&device, model.precision().compute)?;
    let flops = StepFlops::new(&config, shape, targets.iter().map(|t| t.in_features + t.out_features).sum());
    let base_params: usize = config.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum();
    Ok(BenchReport {
        engine: "qwen-lora",
        device: gpu.name,
        dtype: model.precision().base_name(),
        checkpointing: shape.checkpointing.as_str(),
        modulation: ModulationChoice::of(streamed).as_str(),
        blocks_to_swap: placement.swapped_blocks,
        threads: rayon::current_num_threads(),
        batch: shape.batch,
        image_tokens: tokens,
        text_tokens: shape.text_tokens,
        rank: shape.rank,
        trainable_params: trainable.num_params(),
        total_params: base_params + trainable.num_params(),
        steps: shape.steps,
        step_s_median: step_s,
        step_s_min: timed.iter().copied().fold(f64::MAX, f64::min),
        step_s_max: timed.iter().copied().fold(0.0, f64::max),
        tokens_per_s: (shape.batch * (tokens + shape.text_tokens)) as f64 / step_s,
        start_to_first_step_s,
        peak_rss_mb,
        forecast_mb: forecast.0 as f64 / (1 << 20) as f64,
        peak_device_mb,
        phase_s: clock.medians(shape.warmup),
        model_tflops: flops.model / step_s / 1e12,
        model_share: flops.model / step_s / peak,
        gemm_gflops_peak: peak / 1e9,
        gemm_share: flops.computed / step_s / peak,
        loss_first: losses[0],
        loss_last: losses[losses.len() - 1],
        structured: guided.map(|guided| guided.report(shape.batch, timed, &fired[shape.warmup..])),
    })
}

/// The name and the peak memory of the device, where it is a GPU.
struct GpuMemory {
    name: String,
    #[cfg(feature = "cuda")]
    gpu: Option<crate::kernels::cuda::Gpu>,
}

impl GpuMemory {
    /// Starts measuring.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
    fn watch(device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let gpu = crate::kernels::cuda::Gpu::of(device)?;
            gpu.reset_peak()?;
            return Ok(Self { name: gpu.describe()?, gpu: Some(gpu) });
        }
        Ok(Self {
            name: "cpu".into(),
            #[cfg(feature = "cuda")]
            gpu: None,
        })
    }

    fn peak_mib(&self) -> Result<Option<f64>> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            return Ok(Some(gpu.peak_bytes()? as f64 / (1 << 20) as f64));
        }
        Ok(None)
    }
}
