//! A training run from config to adapter.

use crate::config::{Config, MemorySize};
use crate::error::Result;
use crate::optim::{Accumulator, clip_grad_norm, learning_rate};
use crate::train::ahead::Ahead;
use crate::train::metrics::StepTotals;
use crate::train::outcome::Outcome;
use crate::train::prepare::{Prepared, Run};
use crate::train::step::forward_backward_with;
use std::time::Instant;

/// How a run is started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Continue an existing run.
    pub resume: bool,
    /// Check everything, train nothing, write nothing.
    pub dry_run: bool,
    /// Memory that a dry run holds its forecast against.
    pub memory: Option<MemorySize>,
    /// No bars and no notes.
    pub quiet: bool,
}

/// Trains as `config` says.
///
/// Errors: usage (exit code 2) before anything is written; run (1) with the last checkpoint whole; interrupted (130)
/// after saving.
pub fn train(config: &Config, options: Options) -> Result<Outcome> {
    let run = match Run::prepare(config, options)? {
        Prepared::Ready(run) => *run,
        Prepared::Nothing(outcome) => return Ok(outcome),
    };
    let Run {
        model,
        trainable,
        mut optimizer,
        checkpointing,
        course,
        plans,
        batches,
        mut structured,
        mut loader,
        mut record,
    } = run;
    let params = trainable.parameters();
    let mut ahead = Ahead::new(&model, &batches, &plans, &config.training);
    let mut accumulator = Accumulator::new(params.len());

    record.begin(&model, &batches)?;
    for step in record.steps() {
        let started = Instant::now();
        let stage = course.at(step);
        record.stage(stage, step);
        if let Some(structured) = &mut structured {
            structured.set_weights(stage.terms);
        }
        let mut totals = StepTotals::default();
        for pass in 0..config.training.gradient_accumulation {
            ahead.reach(step, pass)?;
            let batch = loader.next().expect("the loader has a batch for every step")?;
            let (loss, mut gradients) =
                forward_backward_with(&model, &batch.noisy, checkpointing, structured.as_mut())?;
            record.check_finite("loss", loss.mean, step, &batch.items)?;
            totals.add(&loss, &batch);
            let gradients = stage.freeze(trainable.names(), trainable.take_gradients(&mut gradients));
            accumulator.add(gradients, batch.items.len())?;
        }
        let mut gradients = accumulator.take_mean()?;
        let grad_norm = clip_grad_norm(&mut gradients, config.training.max_grad_norm)?;
        record.check_finite("gradient norm", grad_norm, step, totals.items())?;
        let lr = learning_rate(&config.training, step as usize) * stage.learning_rate;
        optimizer.step(&params, &gradients, lr)?;

        let done = step + 1;
        record.step(&totals.metrics(stage.name.as_deref(), done, lr, grad_norm, started.elapsed()))?;
        record.measure_if_due(done, &model, &batches)?;
        let stop = record.reason_to_stop(done)?;
        record.save_if_due(done, stop.is_some(), &trainable, &optimizer, &params, structured.as_ref())?;
        record.show_if_due(done, stop.is_some(), &model);
        record.stop(stop)?;
    }
    Ok(Outcome::Finished(record.finish()))
}
