//! How a run ended, for people and as JSON.

use crate::config::{Checkpointing, Config, MemorySize, ModulationChoice, TrainingMode};
use crate::error::Result;
use crate::model::transformer::Precision;
use crate::train::memory::{Budget, Forecast, Settled, Step};
use crate::train::metrics::HeldOutMetrics;
use crate::train::run_dir::RunDir;
use crate::train::setup::{self, RunData};
use crate::train::stages::Course;
use crate::train::trainable::Trainable;
use serde::Serialize;
use serde_json::{Value as Json, json};
use std::collections::BTreeSet;
use std::fmt;
use std::time::Instant;

/// What became of a call of [`train`](crate::train::run::train).
pub enum Outcome {
    /// All steps are done.
    Finished(Report),
    /// They were done before.
    AlreadyFinished {
        /// The run directory.
        dir: RunDir,
        /// Its last step.
        step: u64,
    },
    /// Everything was checked and nothing was trained.
    DryRun(Box<DryRun>),
}

/// What a run made.
pub struct Report {
    dir: RunDir,
    modules: usize,
    num_params: usize,
    began: Instant,
    first_step: u64,
    last_step: u64,
    full: bool,
    first_held_out: Option<f64>,
    last_held_out: Option<f64>,
}

impl Report {
    /// A report on the run that begins now.
    pub fn new(config: &Config, dir: &RunDir, trainable: &Trainable, first_step: u64) -> Self {
        Self {
            dir: dir.clone(),
            modules: trainable.names().len() / 2,
            num_params: trainable.num_params(),
            began: Instant::now(),
            first_step,
            last_step: first_step,
            full: config.training.mode == TrainingMode::Full,
            first_held_out: None,
            last_held_out: None,
        }
    }

    /// Notes a measurement.
    pub fn held_out(&mut self, measured: &HeldOutMetrics) {
        self.first_held_out.get_or_insert(measured.held_out_loss);
        self.last_held_out = Some(measured.held_out_loss);
    }

    /// Notes the end.
    pub fn finish(&mut self, last_step: u64) {
        self.last_step = last_step;
    }
}

/// What a dry run found.
#[derive(Serialize)]
pub struct DryRun {
    images: usize,
    samples_per_epoch: usize,
    batches_per_epoch: u64,
    held_out_samples: usize,
    captions: usize,
    max_steps: usize,
    epochs: f64,
    buckets: Vec<String>,
    modules: usize,
    trainable_params: usize,
    base_params: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stages: Vec<String>,
    base: &'static str,
    dtype: &'static str,
    #[serde(skip)]
    precision: Precision,
    checkpointing: Checkpointing,
    modulation: ModulationChoice,
    blocks_to_swap: usize,
    #[serde(rename = "memory_bytes")]
    memory: Forecast,
    #[serde(rename = "memory_limit_bytes", skip_serializing_if = "Option::is_none")]
    limit: Option<MemorySize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<Budget>,
    notes: Vec<String>,
}

impl DryRun {
    /// Counts what would be trained; `budget` is what the ways to run take.
    ///
    /// Errors: targets that do not fit the model.
    pub fn new(
        config: &Config,
        data: &RunData,
        course: &Course,
        step: &Step,
        settled: &Settled,
        budget: Option<Budget>,
    ) -> Result<Self> {
        let transformer = step.transformer;
        let base_params = transformer.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum();
        let modules = match config.training.mode {
            TrainingMode::Full => 0,
            TrainingMode::Lora => setup::targets(config, transformer)?.len(),
        };
        let batches_per_epoch = data.plan.batches_per_epoch();
        let mut buckets: Vec<_> = data.samples.iter().map(|s| s.bucket).collect();
        buckets.sort();
        let count = |group: &[crate::data::Bucket]| format!("{} x{}", group[0], group.len());
        let seen = config.training.max_steps * config.training.gradient_accumulation;
        Ok(Self {
            images: data.dataset.items().len(),
            samples_per_epoch: data.plan.training().count(),
            batches_per_epoch,
            held_out_samples: data.plan.held_out().len(),
            captions: data.dataset.items().iter().map(|item| &item.caption).collect::<BTreeSet<_>>().len(),
            max_steps: config.training.max_steps,
            epochs: seen as f64 / batches_per_epoch as f64,
            buckets: buckets.chunk_by(|a, b| a == b).map(count).collect(),
            modules,
            trainable_params: step.shape.trained,
            base_params,
            stages: course.lines(),
            base: settled.precision.base_name(),
            dtype: settled.precision.compute.as_str(),
            precision: settled.precision,
            checkpointing: settled.checkpointing,
            modulation: settled.modulation(),
            blocks_to_swap: settled.placement.swapped_blocks,
            memory: settled.forecast.clone(),
            limit: settled.limit,
            budget,
            notes: data.notices.clone(),
        })
    }
}

impl DryRun {
    /// What the page about the run says of data set and network.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let modules = if self.modules > 0 { format!(" in {} modules", self.modules) } else { String::new() };
        vec![
            ("images", self.images.to_string()),
            ("different captions", self.captions.to_string()),
            ("buckets", self.buckets.join(", ")),
            ("samples in an epoch", self.samples_per_epoch.to_string()),
            ("batches in an epoch", self.batches_per_epoch.to_string()),
            ("held-out samples", self.held_out_samples.to_string()),
            ("epochs in the run", format!("{:.1}", self.epochs)),
            ("base parameters", format!("{:.1} M", self.base_params as f64 / 1e6)),
            ("trained parameters", format!("{:.2} M{modules}", self.trainable_params as f64 / 1e6)),
            ("base weights", self.base.to_string()),
            ("compute type", self.dtype.to_string()),
            ("checkpointing", self.checkpointing.as_str().to_string()),
            ("modulation", self.modulation.as_str().to_string()),
            ("blocks swapped", self.blocks_to_swap.to_string()),
            ("memory forecast", self.memory.to_string()),
            ("memory limit", self.limit.map_or("none".into(), |limit| limit.to_string())),
        ]
    }
}

impl Outcome {
    /// One JSON object.
    pub fn to_json(&self) -> Json {
        match self {
            Self::Finished(r) => json!({
                "outcome": "finished",
                "steps": r.last_step,
                "first_step": r.first_step,
                "seconds": r.began.elapsed().as_secs_f64(),
                "held_out_loss_first": r.first_held_out,
                "held_out_loss_last": r.last_held_out,
                "trainable_params": r.num_params,
                "output": r.dir.root(),
                "product": r.product(),
            }),
            Self::AlreadyFinished { dir, step } => {
                json!({"outcome": "already finished", "steps": step, "output": dir.root()})
            }
            Self::DryRun(found) => json!({"outcome": "dry run", "found": found}),
        }
    }
}

impl Report {
    fn product(&self) -> std::path::PathBuf {
        if self.full { self.dir.transformer() } else { self.dir.adapter() }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished(report) => report.fmt(f),
            Self::AlreadyFinished { dir, step } => {
                write!(f, "the run in `{}` is finished: {step} steps", dir.root().display())?;
                for (what, product) in [("adapter", dir.adapter()), ("transformer", dir.transformer())] {
                    if product.exists() {
                        write!(f, "\n  {what:<11}  {}", product.display())?;
                    }
                }
                Ok(())
            }
            Self::DryRun(found) => found.fmt(f),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.began.elapsed().as_secs_f64();
        write!(f, "done: {} steps in {seconds:.1} s", self.last_step - self.first_step)?;
        if let (Some(first), Some(last)) = (self.first_held_out, self.last_held_out) {
            write!(f, ", held-out loss {first:.4} -> {last:.4}")?;
        }
        let product = self.product();
        if self.full {
            write!(f, "\n  transformer  {}", product.display())?;
        } else {
            let mib = std::fs::metadata(&product).map(|m| m.len() as f64 / (1 << 20) as f64).unwrap_or_default();
            write!(f, "\n  adapter      {} ({} modules, {mib:.1} MiB)", product.display(), self.modules)?;
        }
        write!(f, "\n  metrics      {}", self.dir.metrics().display())?;
        write!(f, "\n  checkpoint   {}", self.dir.checkpoint(self.last_step).display())?;
        write!(f, "\n  report       {}", self.dir.report().display())?;
        if self.full {
            return write!(f, "\nnext: use it in place of the base model's `transformer` folder");
        }
        write!(
            f,
            "\nnext: in diffusers  pipe.load_lora_weights(\"{}\")\n      in ComfyUI    copy the file to models/loras",
            product.display()
        )
    }
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))?;
        writeln!(f, "images      {} with {} different captions", self.images, self.captions)?;
        writeln!(f, "buckets     {}", self.buckets.join(", "))?;
        writeln!(
            f,
            "epoch       {} samples in {} batches, {} held out",
            self.samples_per_epoch, self.batches_per_epoch, self.held_out_samples
        )?;
        writeln!(f, "run         {} steps, {:.1} epochs", self.max_steps, self.epochs)?;
        self.stages.iter().try_for_each(|stage| writeln!(f, "stage       {stage}"))?;
        writeln!(f, "base        {:.1} M parameters", self.base_params as f64 / 1e6)?;
        let modules = if self.modules > 0 { format!(" in {} modules", self.modules) } else { String::new() };
        writeln!(f, "trained     {:.2} M parameters{modules}", self.trainable_params as f64 / 1e6)?;
        let limit = self.limit.map(|limit| format!(", at most {limit}")).unwrap_or_default();
        let (policy, modulation) = (self.checkpointing.as_str(), self.modulation.as_str());
        let swapped = match self.blocks_to_swap {
            0 => String::new(),
            n => format!(", {n} blocks swapped"),
        };
        let precision = self.precision;
        writeln!(f, "runs        in {precision}, checkpointing {policy}, modulation {modulation}{swapped}{limit}")?;
        writeln!(f, "memory      {}", self.memory)?;
        if let Some(budget) = &self.budget {
            writeln!(
                f,
                "            What fits into nine tenths of the memory asked about; the rest is for what is not counted:"
            )?;
            budget.to_string().lines().try_for_each(|line| writeln!(f, "            {line}"))?;
            if !budget.choices.iter().any(|c| c.fits) {
                writeln!(f, "            nothing fits: {}", Budget::ADVICE)?;
            }
        }
        write!(f, "dry run: nothing was written")
    }
}
