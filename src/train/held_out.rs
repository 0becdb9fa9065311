//! The held-out loss: images that are never trained on, at fixed noise levels with fixed noise, so that two
//! measurements differ by the weights alone.

use crate::data::PlannedBatch;
use crate::error::Result;
use crate::model::transformer::QwenImageTransformer;
use crate::train::batches::Batches;
use crate::train::metrics::HeldOutMetrics;
use crate::train::step::evaluate;

/// What is measured.
pub struct HeldOut {
    batches: Vec<PlannedBatch>,
    num_sigmas: usize,
}

impl HeldOut {
    /// The held-out images `batches`, each at `num_sigmas` evenly spaced quantiles of the training noise levels.
    pub fn new(batches: Vec<PlannedBatch>, num_sigmas: usize) -> Self {
        Self { batches, num_sigmas }
    }

    /// Whether nothing is held out.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Measures after `step` steps.
    pub fn measure(&self, model: &QwenImageTransformer, batches: &Batches, step: u64) -> Result<HeldOutMetrics> {
        let levels = |index: usize| {
            self.batches.iter().map(move |planned| batches.held_out_levels(planned, index, self.num_sigmas))
        };
        let _held = model.modulate_ahead(&(0..self.num_sigmas).flat_map(levels).collect::<Vec<_>>())?;
        let mut by_sigma = Vec::with_capacity(self.num_sigmas);
        for index in 0..self.num_sigmas {
            let (mut sum, mut samples) = (0.0, 0);
            for planned in &self.batches {
                let loss = evaluate(model, &batches.held_out(planned, index, self.num_sigmas)?)?;
                sum += loss.per_sample.iter().sum::<f64>();
                samples += loss.per_sample.len();
            }
            by_sigma.push(sum / samples as f64);
        }
        let mean = by_sigma.iter().sum::<f64>() / by_sigma.len() as f64;
        Ok(HeldOutMetrics { step, held_out_loss: mean, held_out_by_sigma: by_sigma })
    }
}
