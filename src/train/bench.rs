//! Timing training steps as the peers' benchmark defines them (`scripts/reference/bench_torch.py`): noising, forward,
//! loss, backward, clipping to norm 1, AdamW, on cached latents and text.

use crate::adapters::{Init, LoraAdapter, LoraScaling, TargetEntry, resolve_targets};
use crate::cache::pose::{Crop, Window};
use crate::config::Checkpointing;
use crate::error::{Error, Result};
use crate::flow::gate::Gate;
use crate::kernels::matmul::{Into, Mat, MatMut, gemm};
use crate::kernels::no_grad;
use crate::model::transformer::{QwenImageTransformer, TransformerConfig};
use crate::model::vae::unpack;
use crate::optim::{AdamW, AdamWOptions, clip_grad_norm};
use crate::rng::{Purpose, Stream};
use crate::train::step::{NoisyBatch, forward_backward_with};
use crate::train::structured::{Fired, Structured};
use crate::train::trainable::Trainable;
use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use std::time::{Duration, Instant};

/// What is timed.
pub struct Shape {
    /// Rows and columns of the image in latent patches.
    pub grid: (usize, usize),
    /// Text tokens; the last sample has three quarters of them.
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
    /// The structured loss in some of the steps; none times plain steps.
    pub structured: Option<Guided>,
}

/// The structured loss as it is timed: on pieces of random latents, in every so manyth step, where the gate is open.
pub struct Guided {
    /// The loss.
    pub loss: Structured,
    /// The gate.
    pub gate: Gate,
    /// Steps from one that is due to the next.
    pub every: usize,
    /// Longest side of a piece, in latents.
    pub crop: usize,
}

/// What [`Guided`] cost.
#[derive(Clone, Debug, Serialize)]
struct GuidedReport {
    every: usize,
    /// Samples it acted on, of all samples of the timed steps.
    fired_share: f64,
    /// Median time of the steps in which it acted on nothing.
    plain_step_s_median: f64,
    /// Median time of those in which it acted, and samples it acted on in them.
    fired_step_s_median: f64,
    fired_samples_per_fired_step: f64,
    step_s_mean: f64,
    /// `step_s_mean / plain_step_s_median`.
    mean_over_plain: f64,
}

/// The benchmark's JSON line. Memory in MiB, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    engine: &'static str,
    dtype: &'static str,
    checkpointing: &'static str,
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
    gemm_gflops_peak: f64,
    gemm_share: f64,
    loss_first: f64,
    loss_last: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    structured: Option<GuidedReport>,
}

/// Runs warm-up and timed steps; `done` is called with each step's number and time.
///
/// Errors: targets that match nothing, a loss that is not finite.
pub fn bench(
    mut model: QwenImageTransformer,
    shape: &mut Shape,
    mut done: impl FnMut(usize, f64),
) -> Result<BenchReport> {
    let config = model.config().clone();
    let entry = |pattern: &String| TargetEntry { pattern: pattern.clone(), rank: None, alpha: None };
    let entries: Vec<_> = shape.targets.iter().map(entry).collect();
    let scaling = LoraScaling { rank: shape.rank, alpha: shape.rank as f64, rslora: false };
    let targets = resolve_targets(&config.modules(), &entries, scaling)?;
    let adapter = LoraAdapter::init(&targets, Init::Gaussian, shape.seed, &Device::Cpu)?;
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
    text_lengths[shape.batch - 1] = (shape.text_tokens * 3 / 4).max(1);

    let targets_of_loss = shape.structured.as_ref().map(|g| guided_targets(g, &latents, shape.grid)).transpose()?;
    let mut fired_by_step = Vec::new();

    let start_to_first_step_s = since_process_start().as_secs_f64();
    let (mut times, mut losses) = (Vec::new(), Vec::new());
    for step in 0..shape.warmup + shape.steps {
        let started = Instant::now();
        let mut stream = Stream::new(shape.seed, step as u64, 0, Purpose::Sigma);
        let sigmas = (0..shape.batch).map(|_| (0.02 + 0.96 * stream.uniform()) as f32).collect();
        let noise = normal(step as u64 + 1, 0, latents.dims())?;
        let weights = vec![1.0; shape.batch];
        let shapes = vec![(1, shape.grid.0, shape.grid.1)];
        let mut batch = NoisyBatch::mix(&latents, &noise, text.clone(), text_lengths.clone(), sigmas, weights, shapes)?;
        if let (Some(guided), Some(crops)) = (&shape.structured, &targets_of_loss) {
            let due = step % guided.every == 0;
            let fire = |(&sigma, crop): (&f32, &Crop)| {
                let gate = guided.gate.at(f64::from(sigma));
                (due && gate > 0.0).then(|| Fired { gate, crop: crop.clone() })
            };
            batch.fired = batch.sigmas.iter().zip(crops).map(fire).collect();
        }
        fired_by_step.push(batch.fired.iter().flatten().count());
        let structured = shape.structured.as_mut().map(|guided| &mut guided.loss);
        let (loss, mut gradients) = forward_backward_with(&model, &batch, shape.checkpointing, structured)?;
        let mut gradients = trainable.take_gradients(&mut gradients);
        let norm = clip_grad_norm(&mut gradients, 1.0)?;
        optimizer.step(&params, &gradients, 1e-4)?;
        drop(gradients);
        if !(loss.mean.is_finite() && norm.is_finite()) {
            return Err(Error::run(format!("the loss is {} at step {step}, the gradient norm {norm}", loss.mean)));
        }
        let seconds = started.elapsed().as_secs_f64();
        done(step, seconds);
        times.push(seconds);
        losses.push(loss.mean);
    }
    let peak_rss_mb = peak_rss_mib();
    let mut timed = times[shape.warmup..].to_vec();
    timed.sort_by(f64::total_cmp);
    let median = (timed[(timed.len() - 1) / 2] + timed[timed.len() / 2]) / 2.0;
    let peak = gemm_gflops_peak();
    let flops = step_gemm_flops(&config, shape, targets.iter().map(|t| t.in_features + t.out_features).sum());
    let base_params: usize = config.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum();
    Ok(BenchReport {
        engine: "qwen-lora",
        dtype: if model.precision().compute == DType::BF16 { "bf16" } else { "f32" },
        checkpointing: match shape.checkpointing {
            Checkpointing::None => "none",
            Checkpointing::Selective => "selective",
            Checkpointing::Full => "full",
        },
        threads: rayon::current_num_threads(),
        batch: shape.batch,
        image_tokens: tokens,
        text_tokens: shape.text_tokens,
        rank: shape.rank,
        trainable_params: trainable.num_params(),
        total_params: base_params + trainable.num_params(),
        steps: shape.steps,
        step_s_median: median,
        step_s_min: timed[0],
        step_s_max: timed[timed.len() - 1],
        tokens_per_s: (shape.batch * (tokens + shape.text_tokens)) as f64 / median,
        start_to_first_step_s,
        peak_rss_mb,
        gemm_gflops_peak: peak,
        gemm_share: flops / 1e9 / peak / median,
        loss_first: losses[0],
        loss_last: losses[losses.len() - 1],
        structured: shape.structured.as_ref().map(|guided| {
            guided_report(guided.every, shape.batch, &times[shape.warmup..], &fired_by_step[shape.warmup..])
        }),
    })
}

/// The target of each sample: its maps in a piece from the upper left corner of its latents (B, S_img, 64).
fn guided_targets(guided: &Guided, latents: &Tensor, grid: (usize, usize)) -> Result<Vec<Crop>> {
    let (height, width) = ((2 * grid.0).min(guided.crop), (2 * grid.1).min(guided.crop));
    let window = Window { top: 0, left: 0, height, width };
    let latents = unpack(latents, 2 * grid.0, 2 * grid.1)?;
    let target = |b: usize| {
        let piece = latents.narrow(0, b, 1)?.narrow(2, 0, height)?.narrow(3, 0, width)?.contiguous()?;
        let maps = no_grad(|| -> Result<Tensor> {
            let decoded = guided.loss.decoder().decode(&piece)?;
            Ok(guided.loss.network().maps(&decoded.pixels)?.into_tensor())
        })?;
        Ok(Crop { window, maps: maps.squeeze(0)? })
    };
    (0..latents.dim(0)?).map(target).collect()
}

fn guided_report(every: usize, batch: usize, times: &[f64], fired: &[usize]) -> GuidedReport {
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        if times.is_empty() { f64::NAN } else { (times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2.0 }
    };
    let of = |acted: bool| {
        let chosen = times.iter().zip(fired).filter(|(_, fired)| (**fired > 0) == acted);
        median(chosen.map(|(time, _)| *time).collect())
    };
    let total: usize = fired.iter().sum();
    let steps = fired.iter().filter(|f| **f > 0).count();
    let plain = of(false);
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    GuidedReport {
        every,
        fired_share: total as f64 / (batch * times.len()) as f64,
        plain_step_s_median: plain,
        fired_step_s_median: of(true),
        fired_samples_per_fired_step: total as f64 / steps.max(1) as f64,
        step_s_mean: mean,
        mean_over_plain: mean / plain,
    }
}

/// Floating-point operations of a step's matrix products: blocks forward and backward with respect to activations,
/// attention with its recomputed scores, the adapter's three products, and what checkpointing computes twice.
fn step_gemm_flops(config: &TransformerConfig, shape: &Shape, adapter_widths: usize) -> f64 {
    let d = config.dim() as f64;
    let (image, text) = ((shape.grid.0 * shape.grid.1) as f64, shape.text_tokens as f64);
    let (batch, layers) = (shape.batch as f64, config.num_layers as f64);
    let mlp = 2.0 * 8.0 * d * d * (image + text) * batch;
    let attention_linears = 2.0 * 4.0 * d * d * (image + text) * batch;
    let attention = 4.0 * (image + text) * (image + text) * d * batch;
    let (again_mlp, again_attention) = match shape.checkpointing {
        Checkpointing::None => (0.0, 0.0),
        Checkpointing::Selective => (1.0, 0.0),
        Checkpointing::Full => (1.0, 1.0),
    };
    // Both streams' tokens go through modules of about equal widths.
    let adapter = 2.0 * shape.rank as f64 * adapter_widths as f64 * batch * (image + text) / 2.0;
    layers
        * (mlp * (2.0 + again_mlp)
            + attention_linears * (2.0 + again_attention)
            + attention * (1.0 + 2.5 + again_attention))
        + adapter * 3.0
}

/// The best rate of a 1024-cubed f32 product in this process, in 10^9 operations a second.
fn gemm_gflops_peak() -> f64 {
    let n = 1024;
    let (x, w) = (vec![0.5f32; n * n], vec![0.25f32; n * n]);
    let mut y = vec![0f32; n * n];
    let run = |y: &mut [f32]| {
        let started = Instant::now();
        gemm(MatMut::new(y, n, n), Into::Overwrite, Mat::new(&x, n, n), Mat::new(&w, n, n), 1.0);
        started.elapsed().as_secs_f64()
    };
    let best = (0..12).map(|_| run(&mut y)).fold(f64::MAX, f64::min);
    2.0 * (n * n * n) as f64 / best / 1e9
}

/// Time since the process began, from /proc where there is one (10 ms steps), else since this is first asked.
fn since_process_start() -> Duration {
    fn from_proc() -> Option<f64> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // SAFETY: sysconf has no preconditions.
        let hertz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
        let start: f64 = stat.rsplit(')').next()?.split_whitespace().nth(19)?.parse().ok()?;
        let uptime: f64 = std::fs::read_to_string("/proc/uptime").ok()?.split_whitespace().next()?.parse().ok()?;
        Some((uptime - start / hertz).max(0.0))
    }
    static FIRST: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let first = FIRST.get_or_init(Instant::now);
    from_proc().map_or_else(|| first.elapsed(), Duration::from_secs_f64)
}

/// The process's peak resident memory in MiB.
fn peak_rss_mib() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is to a whole rusage, which the call fills; zeroed is a valid value of it otherwise.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let unit = if cfg!(target_os = "macos") { 1.0 } else { 1024.0 };
    usage.ru_maxrss as f64 * unit / (1 << 20) as f64
}
