//! The modulation of the steps to come, a window at a time, where its weights are left on the disk.

use crate::config::Training;
use crate::data::Plan;
use crate::error::Result;
use crate::model::transformer::{Held, QwenImageTransformer};
use crate::train::batches::Batches;
use crate::train::stages::Timeline;
use std::sync::Arc;

/// How many micro-batches of `samples` a window has: so many that its tables take a sixteenth of the weights that they
/// stand for. A table has 6 D values per sample where the weights have 6 D x D.
pub fn window(width: usize, samples: usize) -> u64 {
    (width / (16 * samples)).max(1) as u64
}

/// Keeps the network's tables ahead of the steps.
pub struct Ahead<'a> {
    model: &'a QwenImageTransformer,
    batches: &'a Batches,
    plans: &'a Timeline<Arc<Plan>>,
    /// Batches in a window, in a step, and in the run.
    window: u64,
    accumulation: u64,
    end: u64,
    /// The batches before this one are computed.
    until: u64,
    held: Option<Held<'a>>,
}

impl<'a> Ahead<'a> {
    /// For the batches of `plans` in a run of this length.
    pub fn new(
        model: &'a QwenImageTransformer,
        batches: &'a Batches,
        plans: &'a Timeline<Arc<Plan>>,
        training: &Training,
    ) -> Self {
        let window = window(model.config().dim(), training.batch_size);
        let accumulation = training.gradient_accumulation as u64;
        let end = training.max_steps as u64 * accumulation;
        Self { model, batches, plans, window, accumulation, end, until: 0, held: None }
    }

    /// Before a pass of a step, which come in order: computes the next window, if its tables are not there.
    pub fn reach(&mut self, step: u64, pass: usize) -> Result<()> {
        let n = step * self.accumulation + pass as u64;
        if !self.model.modulates_ahead() || n < self.until {
            return Ok(());
        }
        self.held = None; // First, so that two windows are never there at once.
        self.until = (n + self.window).min(self.end);
        let passes: Vec<Vec<f32>> = (n..self.until).map(|n| self.batches.levels(&self.plans.at(n).batch(n))).collect();
        self.held = Some(self.model.modulate_ahead(&passes)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_a_sixteenth_of_the_published_weights() {
        assert_eq!((window(3072, 1), window(3072, 4), window(64, 8)), (192, 48, 1));
    }
}
