//! How many operations a step takes, and how many a second the machine can do.

use super::Shape;
use crate::config::Checkpointing;
use crate::error::Result;
use crate::kernels::matmul::{Into, Mat, MatMut, gemm};
use crate::model::transformer::TransformerConfig;
use candle_core::{DType, Device, Tensor};
use std::time::Instant;

/// Floating-point operations of a step's matrix products: blocks forward and backward with respect to activations,
/// attention with its recomputed scores, and the adapter's three products.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepFlops {
    /// What training takes, whatever is kept.
    pub model: f64,
    /// What is computed, with what checkpointing computes twice.
    pub computed: f64,
}

impl StepFlops {
    /// Of a step of `shape`; `adapter_widths` is the sum of the inputs and outputs of all adapted linears.
    pub fn new(config: &TransformerConfig, shape: &Shape, adapter_widths: usize) -> Self {
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
        let model = layers * ((mlp + attention_linears) * 2.0 + attention * 3.5) + adapter * 3.0;
        let again = layers * (mlp * again_mlp + (attention_linears + attention) * again_attention);
        Self { model, computed: model + again }
    }
}

/// The best rate of a square matrix product in this process, in operations a second: f32 on the CPU, `dtype` on a GPU.
pub fn matmul_peak(device: &Device, dtype: DType) -> Result<f64> {
    if device.is_cpu() {
        return Ok(cpu_peak());
    }
    let n = 8192;
    let random = || Tensor::randn(0f32, 1f32, (n, n), device)?.to_dtype(dtype);
    let (x, w) = (random()?, random()?);
    let mut best = f64::MAX;
    for _ in 0..12 {
        device.synchronize()?;
        let started = Instant::now();
        let y = x.matmul(&w)?;
        device.synchronize()?;
        best = best.min(started.elapsed().as_secs_f64());
        drop(y);
    }
    Ok(2.0 * (n * n * n) as f64 / best)
}

fn cpu_peak() -> f64 {
    let n = 1024;
    let (x, w) = (vec![0.5f32; n * n], vec![0.25f32; n * n]);
    let mut y = vec![0f32; n * n];
    let run = |y: &mut [f32]| {
        let started = Instant::now();
        gemm(MatMut::new(y, n, n), Into::Overwrite, Mat::new(&x, n, n), Mat::new(&w, n, n), 1.0);
        started.elapsed().as_secs_f64()
    };
    let best = (0..12).map(|_| run(&mut y)).fold(f64::MAX, f64::min);
    2.0 * (n * n * n) as f64 / best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_model_takes_the_published_operations() {
        let config = TransformerConfig::qwen_image();
        let shape = |checkpointing| Shape {
            grid: (64, 64),
            text_tokens: 512,
            batch: 1,
            rank: 16,
            targets: Vec::new(),
            steps: 1,
            warmup: 0,
            checkpointing,
            seed: 0,
        };
        // 62.6 T of linears and 15.7 T of attention forward: 180 T a step, and once more 78 T with full recompute.
        let none = StepFlops::new(&config, &shape(Checkpointing::None), 0);
        let full = StepFlops::new(&config, &shape(Checkpointing::Full), 0);
        assert_eq!(none.model, none.computed);
        assert_eq!(none.model, full.model);
        assert!((none.model / 1e12 - 180.0).abs() < 0.5, "{none:?}");
        assert!((full.computed / 1e12 - 258.3).abs() < 0.5, "{full:?}");
    }
}
