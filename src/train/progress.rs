//! What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere.

use crate::cache::Filled;
use crate::cache::encode::CacheReport;
use crate::progress::tell;
use crate::train::metrics::{HeldOutMetrics, StepMetrics};
use crate::train::stages::Stage;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Without a terminal, lines come at most this often.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// Shows the progress of a run on standard error.
pub struct Progress {
    bar: ProgressBar,
    quiet: bool,
    terminal: bool,
    max_steps: u64,
    first_step: u64,
    began: Instant,
    last_line: Option<Instant>,
    /// Exponential mean of the loss, which alone jumps with the noise level of each batch.
    smooth_loss: Option<f64>,
    held_out: Option<f64>,
}

impl Progress {
    /// A display for `max_steps` steps; nothing is shown if `quiet`.
    pub fn new(max_steps: u64, quiet: bool) -> Self {
        let style = ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len} {msg} ETA {eta}")
            .expect("the template is well-formed")
            .progress_chars("=> ");
        let bar = ProgressBar::with_draw_target(Some(max_steps), ProgressDrawTarget::hidden()).with_style(style);
        let terminal = std::io::stderr().is_terminal();
        Self {
            bar,
            quiet,
            terminal,
            max_steps,
            first_step: 0,
            began: Instant::now(),
            last_line: None,
            smooth_loss: None,
            held_out: None,
        }
    }

    /// Notes about the input.
    pub fn notes(&self, notes: &[String]) {
        if !self.quiet {
            notes.iter().for_each(|note| tell(format_args!("note: {note}")));
        }
    }

    /// What the caches gave.
    pub fn cached(&self, report: &CacheReport) {
        self.filled("prompt embeddings", Some(&report.prompts));
        self.filled("latents", Some(&report.latents));
    }

    /// What one of the caches gave, if it was needed.
    pub fn filled(&self, what: &str, filled: Option<&Filled>) {
        let Some(filled) = filled.filter(|_| !self.quiet) else { return };
        tell(format_args!("{what}: {} computed, {} from the cache", filled.computed, filled.reused));
        filled.notices.iter().for_each(|note| tell(format_args!("note: {note}")));
    }

    /// The first step is about to run.
    pub fn begin(&mut self, first_step: u64) {
        (self.first_step, self.began) = (first_step, Instant::now());
        if self.quiet {
            return;
        }
        if first_step > 0 {
            tell(format_args!("going on after step {first_step}"));
        }
        if self.terminal {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.bar.set_prefix("training");
            self.bar.set_position(first_step);
            self.bar.reset_eta();
        }
    }

    /// A stage begins, or goes on in a resumed run.
    pub fn stage(&mut self, stage: &Stage) {
        let Some(name) = stage.name.as_deref().filter(|_| !self.quiet) else { return };
        // Above the bar, which is drawn again by the next step.
        self.bar.suspend(|| tell(format_args!("stage {stage}")));
        self.bar.set_prefix(format!("training · {name}"));
    }

    /// A step is done.
    pub fn step(&mut self, line: &StepMetrics) {
        let smooth = self.smooth_loss.map_or(line.loss, |s| s + 0.05 * (line.loss - s));
        self.smooth_loss = Some(smooth);
        if self.quiet {
            return;
        }
        let held_out = self.held_out.map(|h| format!(" held-out {h:.4}")).unwrap_or_default();
        let text = format!("loss {smooth:.4}{held_out} lr {:.2e} {:.2} s/step", line.lr, line.step_s);
        if self.terminal {
            self.bar.set_message(text);
            self.bar.set_position(line.step);
            return;
        }
        let due = self.last_line.is_none_or(|t| t.elapsed() >= LINE_EVERY) || line.step == self.max_steps;
        if due {
            self.last_line = Some(Instant::now());
            let done = (line.step - self.first_step).max(1) as f64;
            let left = self.began.elapsed().mul_f64((self.max_steps - line.step) as f64 / done);
            tell(format_args!("step {}/{}  {text}  ETA {}", line.step, self.max_steps, HumanDuration(left)));
        }
    }

    /// The held-out loss was measured.
    pub fn held_out(&mut self, measured: &HeldOutMetrics) {
        self.held_out = Some(measured.held_out_loss);
    }

    /// The last step is done.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
