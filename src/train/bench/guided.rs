//! The structured loss in the benchmark: on pieces of random latents, in every so manyth step, where the gate is open.

use crate::cache::pose::{Crop, Window};
use crate::error::Result;
use crate::flow::gate::Gate;
use crate::kernels::no_grad;
use crate::model::vae::unpack;
use crate::train::structured::{Fired, Structured};
use candle_core::Tensor;
use serde::Serialize;

/// What is timed.
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

/// What it cost.
#[derive(Clone, Debug, Serialize)]
pub struct GuidedReport {
    every: usize,
    /// Samples it acted on, of all samples of the timed steps.
    fired_share: f64,
    /// Median time of the steps in which it acted on nothing.
    plain_step_s_median: f64,
    /// Median time of those in which it acted, and the samples it acted on in one of them.
    fired_step_s_median: f64,
    fired_samples_per_fired_step: f64,
    step_s_mean: f64,
    /// `step_s_mean / plain_step_s_median`.
    mean_over_plain: f64,
}

impl Guided {
    /// The target of each sample: its maps in a piece from the upper left corner of its latents (B, S_img, 64), which are
    /// those of an image of `grid` patches.
    pub(super) fn targets(&self, latents: &Tensor, grid: (usize, usize)) -> Result<Vec<Crop>> {
        let (height, width) = ((2 * grid.0).min(self.crop), (2 * grid.1).min(self.crop));
        let window = Window { top: 0, left: 0, height, width };
        let latents = unpack(latents, 2 * grid.0, 2 * grid.1)?;
        let target = |b: usize| {
            let piece = latents.narrow(0, b, 1)?.narrow(2, 0, height)?.narrow(3, 0, width)?.contiguous()?;
            let maps = no_grad(|| -> Result<Tensor> {
                let decoded = self.loss.decoder().decode(&piece)?;
                Ok(self.loss.network().maps(&decoded.pixels)?.into_tensor())
            })?;
            Ok(Crop { window, maps: maps.squeeze(0)? })
        };
        (0..latents.dim(0)?).map(target).collect()
    }

    /// What it acts on in a step.
    pub(super) fn fired(&self, step: usize, sigmas: &[f32], targets: &[Crop]) -> Vec<Option<Fired>> {
        let due = step.is_multiple_of(self.every);
        let fire = |(&sigma, crop): (&f32, &Crop)| {
            let gate = self.gate.at(f64::from(sigma));
            (due && gate > 0.0).then(|| Fired { gate, crop: crop.clone() })
        };
        sigmas.iter().zip(targets).map(fire).collect()
    }

    /// Of the timed steps: their times, and on how many samples of `batch` it acted in each.
    pub(super) fn report(&self, batch: usize, times: &[f64], fired: &[usize]) -> GuidedReport {
        let median_of = |acted: bool| {
            let chosen = times.iter().zip(fired).filter(|(_, fired)| (**fired > 0) == acted);
            let chosen: Vec<f64> = chosen.map(|(time, _)| *time).collect();
            if chosen.is_empty() { f64::NAN } else { super::median(&chosen) }
        };
        let total: usize = fired.iter().sum();
        let steps = fired.iter().filter(|f| **f > 0).count();
        let plain = median_of(false);
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        GuidedReport {
            every: self.every,
            fired_share: total as f64 / (batch * times.len()) as f64,
            plain_step_s_median: plain,
            fired_step_s_median: median_of(true),
            fired_samples_per_fired_step: total as f64 / steps.max(1) as f64,
            step_s_mean: mean,
            mean_over_plain: mean / plain,
        }
    }
}
