//! What a run leaves behind while it goes on: metrics, held-out losses, checkpoints, pictures, the page about it. None
//! of it reaches the training.

use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::model::transformer::QwenImageTransformer;
use crate::optim::{AdamW, Parameter};
use crate::report::Page;
use crate::train::batches::Batches;
use crate::train::held_out::HeldOut;
use crate::train::interrupt;
use crate::train::memory::Watch;
use crate::train::metrics::{MetricsFile, StepMetrics};
use crate::train::outcome::Report;
use crate::train::preview::Previews;
use crate::train::progress::Progress;
use crate::train::run_dir::{Found, RunDir};
use crate::train::save::Saver;
use crate::train::stages::Stage;
use crate::train::structured::Structured;
use crate::train::trainable::Trainable;
use std::ops::Range;
use std::sync::Arc;

/// Everything that watches a run.
pub struct Record {
    /// Steps that were done before.
    pub first_step: u64,
    /// Steps of the whole run.
    pub max_steps: u64,
    /// Steps between two measurements of the held-out loss; 0 for none.
    pub measure_every: u64,
    /// The run directory.
    pub dir: RunDir,
    /// The images, to name them.
    pub dataset: Arc<Dataset>,
    /// The held-out loss.
    pub held_out: HeldOut,
    /// `metrics.jsonl`.
    pub metrics: MetricsFile,
    /// Bar or lines.
    pub progress: Progress,
    /// Watches over `training.memory`.
    pub memory: Watch,
    /// What is said at the end.
    pub report: Report,
    /// `report.html`.
    pub page: Page,
    /// Pictures; none if they are off or failed.
    pub previews: Option<Previews>,
    /// Checkpoints and export.
    pub saver: Saver,
}

impl Record {
    /// The steps to come, from 0.
    pub fn steps(&self) -> Range<u64> {
        self.first_step..self.max_steps
    }

    /// Before the first step of this process: measures once, unless the run is resumed.
    pub fn begin(&mut self, model: &QwenImageTransformer, batches: &Batches) -> Result<()> {
        if self.first_step == 0 && self.measures(0) {
            let measured = self.held_out.measure(model, batches, 0)?;
            self.metrics.log(&measured)?;
            self.report.held_out(&measured);
        }
        self.progress.begin(self.first_step);
        Ok(())
    }

    /// The step after `step` steps belongs to `stage`: says so where it is the first one of it.
    pub fn stage(&mut self, stage: &Stage, step: u64) {
        if step == stage.steps.start || step == self.first_step {
            self.progress.stage(stage);
        }
    }

    /// A step is done.
    pub fn step(&mut self, line: &StepMetrics) -> Result<()> {
        self.metrics.log(line)?;
        self.progress.step(line);
        Ok(())
    }

    fn measures(&self, done: u64) -> bool {
        let every = self.measure_every;
        every > 0 && !self.held_out.is_empty() && (done.is_multiple_of(every) || done == self.max_steps)
    }

    /// Measures the held-out loss after `done` steps, if it is time.
    pub fn measure_if_due(&mut self, done: u64, model: &QwenImageTransformer, batches: &Batches) -> Result<()> {
        if self.measures(done) {
            let measured = self.held_out.measure(model, batches, done)?;
            self.metrics.log(&measured)?;
            self.progress.held_out(&measured);
            self.report.held_out(&measured);
        }
        Ok(())
    }

    fn saves(&self, done: u64, stop: bool) -> bool {
        stop || self.saver.is_due(done)
    }

    /// Writes checkpoint and export after `done` steps, if it is time or the run stops.
    pub fn save_if_due(
        &mut self,
        done: u64,
        stop: bool,
        trainable: &Trainable,
        optimizer: &AdamW,
        params: &[Parameter],
        structured: Option<&Structured>,
    ) -> Result<()> {
        if !self.saves(done, stop) {
            return Ok(());
        }
        self.saver.save(done, trainable, optimizer, params, structured.map(Structured::save))
    }

    /// Makes pictures after `done` steps, if it is time, and the page anew, if there is something new for it.
    pub fn show_if_due(&mut self, done: u64, stop: bool, model: &QwenImageTransformer) {
        let shows = self.previews.as_ref().filter(|previews| previews.is_due(done) && !stop);
        if let Some(previews) = shows {
            self.progress.notes(previews.make(done, model).as_slice());
        }
        if self.measures(done) || self.saves(done, stop) || shows.is_some() {
            self.progress.notes(self.page.write(done).as_slice());
        }
    }

    /// Why the run ends after `done` steps, once they are saved: the user asked for it, or it takes more memory than it
    /// may. None after the last step.
    pub fn reason_to_stop(&self, done: u64) -> Result<Option<Error>> {
        if done == self.max_steps {
            return Ok(None);
        }
        if interrupt::requested() {
            let stopped = Error::interrupted(format!("stopped after step {done} of {}; saved", self.max_steps));
            return Ok(Some(stopped.hint("continue with `--resume auto`")));
        }
        self.memory.exceeded(done)
    }

    /// Ends the run, if there is a reason.
    pub fn stop(&mut self, reason: Option<Error>) -> Result<()> {
        reason.map_or(Ok(()), |reason| {
            self.progress.end();
            Err(reason)
        })
    }

    /// A bad step is never skipped quietly: names the step and its `items`.
    pub fn check_finite(&self, what: &str, value: f64, step: u64, items: &[usize]) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        let saved = match self.dir.look()? {
            Found::Checkpoints(steps) => {
                steps.last().map(|&s| format!("the last checkpoint: {}", self.dir.checkpoint(s).display()))
            }
            Found::Empty | Found::Started => None,
        };
        let images: Vec<&str> = items.iter().map(|&item| self.dataset.items()[item].path.as_str()).collect();
        Err(Error::run(format!("the {what} is {value} at step {}", step + 1))
            .detail(format!("images: {}", images.join(", ")))
            .detail(saved.unwrap_or("there is no checkpoint yet".into()))
            .hint("lower `training.learning_rate`, or look at these images, and start a new run with another `output`"))
    }

    /// The last step is done.
    pub fn finish(mut self) -> Report {
        self.progress.end();
        self.report.finish(self.max_steps);
        self.report
    }
}
