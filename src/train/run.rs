//! A training run from config to adapter.

use crate::cache::encode::{CacheRequest, fill_caches};
use crate::config::{Config, TrainingMode};
use crate::data::Loader;
use crate::device;
use crate::error::{Error, Result};
use crate::flow::FlowMatchEuler;
use crate::io::write_atomic;
use crate::model::source::ModelSource;
use crate::optim::{Accumulator, AdamW, AdamWOptions, clip_grad_norm, learning_rate};
use crate::report::Page;
use crate::train::batches::{Batches, TrainBatch};
use crate::train::held_out::HeldOut;
use crate::train::interrupt;
use crate::train::metrics::{MetricsFile, StepMetrics};
use crate::train::outcome::{DryRun, Outcome, Report};
use crate::train::preview::{self, Previews};
use crate::train::progress::Progress;
use crate::train::run_dir::{Found, RunDir};
use crate::train::save::Saver;
use crate::train::setup::{self, RunData, Start};
use crate::train::step::{Loss, forward_backward};
use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

/// How a run is started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Continue an existing run.
    pub resume: bool,
    /// Check everything, train nothing, write nothing.
    pub dry_run: bool,
    /// No bars and no notes.
    pub quiet: bool,
}

/// Trains as `config` says.
///
/// Errors: usage (exit code 2) before anything is written; run (1) with the last checkpoint whole; interrupted (130)
/// after saving.
pub fn train(config: &Config, options: Options) -> Result<Outcome> {
    config.check_supported()?;
    let compute = device::open(config.device)?;
    setup::precision(config, !compute.device.is_cpu())?;
    let dir = RunDir::new(&config.output);
    let start = Start::decide(&dir, config, options.resume)?;
    let data = RunData::open(config, options.quiet)?;
    let pipeline = ModelSource::resolve(&setup::model_spec(config))?;
    let (dataset_hash, base_fingerprint) = (data.dataset.hash(), setup::base_fingerprint(&pipeline)?);
    start.check_inputs(&dir, &dataset_hash, &base_fingerprint)?;
    if let Start::Finished(state) = &start {
        return Ok(Outcome::AlreadyFinished { dir, step: state.step });
    }
    setup::check_networks(&pipeline)?;
    let dry_run = DryRun::new(config, &data, &pipeline)?;
    if options.dry_run {
        return Ok(Outcome::DryRun(dry_run));
    }
    let mut progress = Progress::new(config.training.max_steps as u64, options.quiet);
    progress.notes(&compute.notes);
    progress.notes(&data.notices);

    dir.create()?;
    let preview_prompts = preview::prompts(&config.preview);
    let request = CacheRequest {
        pipeline: &pipeline,
        dataset: &data.dataset,
        samples: &data.samples,
        extra_prompts: &preview_prompts,
        max_sequence_length: config.data.max_sequence_length,
        quiet: options.quiet,
        stop: &interrupt::requested,
    };
    let (samples, cached) = fill_caches(&config.cache_dir(), &request)?;
    progress.cached(&cached);

    let (mut model, trainable) = setup::load_network(config, &pipeline, &start, &compute.device)?;
    // Only now is the folder a run's: after a bad image or a stop in what is above, the same command starts again.
    let yaml = config.to_yaml();
    write_atomic(&dir.config(), |file| file.write_all(yaml.as_bytes()))?;
    let params = trainable.parameters();
    let mut optimizer = AdamW::new(AdamWOptions::from(&config.training));
    let first_step = match start {
        Start::From(checkpoint) => {
            optimizer.load_state(&params, checkpoint.optimizer)?;
            checkpoint.state.step
        }
        Start::Fresh | Start::Finished(_) => 0,
    };
    let scheduler = FlowMatchEuler::from_file(&pipeline.scheduler)?;
    let batches = Arc::new(Batches::new(config, samples, scheduler));
    let held_out = HeldOut::new(data.plan.held_out_batches(), config.evaluation.num_sigmas);
    let provenance = setup::provenance(config, &dataset_hash, &base_fingerprint);
    let mut metrics = MetricsFile::open(&dir.metrics(), first_step)?;
    let saver = Saver::new(config, &dir, &pipeline, provenance);
    let previews = Previews::new(config, &dir, &pipeline, &base_fingerprint, &cached.extra_prompts);
    let mut previews = previews.unwrap_or_else(|error| {
        progress.notes(&[format!("no previews: {error}")]);
        None
    });
    if let Some(previews) = &mut previews {
        let note = previews.begin(first_step, &mut model, &trainable);
        progress.notes(note.as_slice());
    }
    let page = Page::new(config, &dir, dry_run.facts());
    let mut report = Report::new(&dir, &trainable, first_step);

    let accumulation = config.training.gradient_accumulation as u64;
    let max_steps = config.training.max_steps as u64;
    let mut loader = {
        let (plan, batches) = (data.plan, batches.clone());
        let range = first_step * accumulation..max_steps * accumulation;
        Loader::new(range, config.data.prefetch, move |n| batches.training(&plan.batch(n)))?
    };
    let measures = |step: u64| {
        let every = config.evaluation.every as u64;
        every > 0 && !held_out.is_empty() && (step.is_multiple_of(every) || step == max_steps)
    };
    if first_step == 0 && measures(0) {
        let measured = held_out.measure(&model, &batches, 0)?;
        metrics.log(&measured)?;
        report.held_out(&measured);
    }
    progress.begin(first_step);
    let mut accumulator = Accumulator::new(params.len());
    for step in first_step..max_steps {
        let started = Instant::now();
        let mut totals = StepTotals::default();
        for _ in 0..accumulation {
            let batch = loader.next().expect("the loader has a batch for every step")?;
            let (loss, mut gradients) = forward_backward(&model, &batch.noisy, config.training.checkpointing)?;
            let name = |&item: &usize| data.dataset.items()[item].path.clone();
            check_finite("loss", loss.mean, step, &dir, &batch.items.iter().map(name).collect::<Vec<_>>())?;
            totals.add(&loss, &batch);
            accumulator.add(trainable.take_gradients(&mut gradients))?;
        }
        let mut gradients = accumulator.take_mean()?;
        let grad_norm = clip_grad_norm(&mut gradients, config.training.max_grad_norm)?;
        let name = |&item: &usize| data.dataset.items()[item].path.clone();
        check_finite("gradient norm", grad_norm, step, &dir, &totals.items.iter().map(name).collect::<Vec<_>>())?;
        let lr = learning_rate(&config.training, step as usize);
        optimizer.step(&params, &gradients, lr)?;

        let done = step + 1;
        let line = totals.metrics(done, lr, grad_norm, started.elapsed().as_secs_f64());
        metrics.log(&line)?;
        progress.step(&line);
        if measures(done) {
            let measured = held_out.measure(&model, &batches, done)?;
            metrics.log(&measured)?;
            progress.held_out(&measured);
            report.held_out(&measured);
        }
        let stop = interrupt::requested();
        let saves = saver.is_due(done) || stop;
        if saves {
            saver.save(done, &trainable, &optimizer, &params)?;
        }
        let shows = previews.as_ref().filter(|previews| previews.is_due(done) && !stop);
        if let Some(previews) = shows {
            progress.notes(previews.make(done, &model).as_slice());
        }
        if measures(done) || saves || shows.is_some() {
            progress.notes(page.write(done).as_slice());
        }
        if stop && done < max_steps {
            progress.end();
            return Err(Error::interrupted(format!("stopped after step {done} of {max_steps}; saved"))
                .hint("continue with `--resume auto`"));
        }
    }
    progress.end();
    report.finish(config.training.mode == TrainingMode::Full, max_steps);
    Ok(Outcome::Finished(report))
}

/// Sums over the batches of one step.
#[derive(Default)]
struct StepTotals {
    loss: f64,
    batches: usize,
    sigma: f64,
    items: Vec<usize>,
    captions_dropped: usize,
    epoch: Option<u64>,
}

impl StepTotals {
    fn add(&mut self, loss: &Loss, batch: &TrainBatch) {
        self.loss += loss.mean;
        self.batches += 1;
        self.sigma += batch.noisy.sigmas.iter().map(|&s| f64::from(s)).sum::<f64>();
        self.items.extend(&batch.items);
        self.captions_dropped += batch.captions_dropped;
        self.epoch.get_or_insert(batch.epoch);
    }

    fn metrics(&self, step: u64, lr: f64, grad_norm: f64, step_s: f64) -> StepMetrics {
        StepMetrics {
            step,
            epoch: self.epoch.unwrap_or_default(),
            loss: self.loss / self.batches as f64,
            lr,
            grad_norm,
            sigma_mean: self.sigma / self.items.len() as f64,
            samples: self.items.len(),
            captions_dropped: self.captions_dropped,
            step_s,
        }
    }
}

/// A bad step is never skipped quietly.
fn check_finite(what: &str, value: f64, step: u64, dir: &RunDir, images: &[String]) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    let saved = match dir.look()? {
        Found::Checkpoints(steps) => {
            steps.last().map(|&s| format!("the last checkpoint: {}", dir.checkpoint(s).display()))
        }
        Found::Empty | Found::Started => None,
    };
    Err(Error::run(format!("the {what} is {value} at step {}", step + 1))
        .detail(format!("images: {}", images.join(", ")))
        .detail(saved.unwrap_or("there is no checkpoint yet".into()))
        .hint("lower `training.learning_rate`, or look at these images, and start a new run with another `output`"))
}
