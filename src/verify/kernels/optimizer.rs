//! Clipping and AdamW on the device against the CPU, three steps.

use super::{Row, Sizes, distance, kernels_expected, launches, randn};
use crate::error::Result;
use crate::optim::{AdamW, AdamWOptions, Parameter, clip_grad_norm};
use candle_core::{Device, Tensor};
use std::time::Instant;

/// f32 here and there, in other orders of summing; the optimizer divides by square roots of what may be small.
const LIMIT: f64 = 1e-5;

const OPTIONS: AdamWOptions = AdamWOptions { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };

struct Run {
    params: Vec<Parameter>,
    optimizer: AdamW,
    norm: f64,
    best_s: f64,
}

pub(super) fn check(device: &Device, sizes: Sizes) -> Result<Vec<Row>> {
    let shapes: Vec<Vec<usize>> = match sizes {
        Sizes::Small => vec![vec![3, 7], vec![1], vec![16, 320], vec![5000]],
        // The adapter of rank 16 on the twelve linears of one block.
        Sizes::Published => {
            let pair = |k: usize, n: usize| [vec![16, k], vec![n, 16]];
            let widths = [(1, 1), (1, 1), (1, 1), (1, 1), (1, 4), (4, 1)];
            widths.iter().chain(&widths).flat_map(|(k, n)| pair(3072 * k, 3072 * n)).collect()
        }
    };
    let before = launches();
    let there = steps(device, &shapes)?;
    let launched = launches() > before;
    let here = steps(&Device::Cpu, &shapes)?;
    let missing = !launched && kernels_expected(device);
    let state = |run: &Run| -> Result<Vec<Tensor>> {
        Ok(run.optimizer.state_tensors(&run.params)?.into_iter().map(|(_, t)| t).collect())
    };
    let mut worst = 0f64;
    for (a, b) in state(&there)?.iter().zip(&state(&here)?) {
        worst = worst.max(distance(a, b)?);
    }
    let mut weights = 0f64;
    for (a, b) in there.params.iter().zip(&here.params) {
        weights = weights.max(distance(&a.tensor, &b.tensor)?);
    }
    let row = |tensor: &str, error: f64| {
        let row = Row::new(format!("clipping + AdamW, {} tensors", shapes.len()), tensor, error, LIMIT);
        let note = if missing { "no kernel was launched".into() } else { String::new() };
        Row { ok: row.ok && !missing, note, ..row }
    };
    let first = Row { seconds: Some(there.best_s), ..row("norm", (there.norm / here.norm - 1.0).abs()) };
    Ok(vec![first, row("weights", weights), row("moments", worst)])
}

fn steps(device: &Device, shapes: &[Vec<usize>]) -> Result<Run> {
    let normal =
        |item: u64, shape: &[usize], std: f64| -> Result<Tensor> { Ok(randn(item, shape, std)?.to_device(device)?) };
    let parameter = |(i, shape): (usize, &Vec<usize>)| -> Result<Parameter> {
        Ok(Parameter { name: format!("p{i}"), tensor: normal(i as u64, shape, 0.1)? })
    };
    let params: Vec<Parameter> = shapes.iter().enumerate().map(parameter).collect::<Result<_>>()?;
    let mut run = Run { params, optimizer: AdamW::new(OPTIONS), norm: 0.0, best_s: f64::MAX };
    for t in 0..3 {
        let gradient = |(i, shape): (usize, &Vec<usize>)| -> Result<Option<Tensor>> {
            // The second has none in the second step.
            Ok(if (i, t) == (1, 1) { None } else { Some(normal(100 * (t + 1) + i as u64, shape, 0.02)?) })
        };
        let mut gradients: Vec<_> = shapes.iter().enumerate().map(gradient).collect::<Result<_>>()?;
        device.synchronize()?;
        let began = Instant::now();
        run.norm = clip_grad_norm(&mut gradients, 0.5)?;
        run.optimizer.step(&run.params, &gradients, 1e-3)?;
        device.synchronize()?;
        run.best_s = run.best_s.min(began.elapsed().as_secs_f64());
    }
    Ok(run)
}
