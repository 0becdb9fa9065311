//! From a config to a run that is ready for its first step. Everything that can be wrong about the input is found here,
//! and most of it before anything is written.

use crate::cache::encode::{CacheRequest, fill_caches};
use crate::config::{Checkpointing, Config, DeviceChoice, Filter};
use crate::data::{LeftOut, Loader, Plan};
use crate::device;
use crate::error::Result;
use crate::flow::FlowMatchEuler;
use crate::io::write_atomic;
use crate::model::source::ModelSource;
use crate::model::transformer::{QwenImageTransformer, TransformerConfig};
use crate::optim::{AdamW, AdamWOptions};
use crate::report::Page;
use crate::train::batches::{Batches, TrainBatch};
use crate::train::held_out::HeldOut;
use crate::train::interrupt;
use crate::train::memory::{Budget, Machine, Settled, Step, Watch, most_of};
use crate::train::metrics::MetricsFile;
use crate::train::outcome::{DryRun, Outcome, Report};
use crate::train::preview::{self, Previews};
use crate::train::progress::Progress;
use crate::train::record::Record;
use crate::train::regions::RegionWeights;
use crate::train::run::Options;
use crate::train::run_dir::RunDir;
use crate::train::save::Saver;
use crate::train::setup::{self, RunData};
use crate::train::stages::{Course, Timeline};
use crate::train::start::Start;
use crate::train::structured::Structured;
use crate::train::structured_setup;
use crate::train::trainable::Trainable;
use std::io::Write;
use std::sync::Arc;

/// A run between its preparation and its first step.
pub struct Run {
    /// The network with what is trained on it.
    pub model: QwenImageTransformer,
    /// What is trained; shares its storage with the network.
    pub trainable: Trainable,
    /// The optimizer, with the checkpoint's state if there is one.
    pub optimizer: AdamW,
    /// What the forward pass keeps.
    pub checkpointing: Checkpointing,
    /// The stages.
    pub course: Course,
    /// The plan of each batch.
    pub plans: Arc<Timeline<Arc<Plan>>>,
    /// Makes batches from the caches.
    pub batches: Arc<Batches>,
    /// The structured loss; none where it is off.
    pub structured: Option<Structured>,
    /// The batches of the steps to come, in order.
    pub loader: Loader<TrainBatch>,
    /// What is shown, measured and written.
    pub record: Record,
}

/// What the preparation led to.
pub enum Prepared {
    /// There is something to train.
    Ready(Box<Run>),
    /// A dry run, or a run that is finished.
    Nothing(Outcome),
}

impl Run {
    /// Checks the config, the images and the networks, fills the caches, and loads what is trained.
    ///
    /// Errors: those of [`train`](crate::train::run::train).
    pub fn prepare(config: &Config, options: Options) -> Result<Prepared> {
        // With a size, a dry run is about a card of that size, which need not be in this machine.
        let asked =
            options.memory.map(|_| Machine::Another { on_gpu: config.device != DeviceChoice::Cpu, can_pin: None });
        let compute = device::open(if asked.is_some() { DeviceChoice::Cpu } else { config.device })?;
        let machine = asked.unwrap_or(Machine::This(&compute.device));
        setup::precision(config, machine.on_gpu())?;
        let dir = RunDir::new(&config.output);
        let mut config = config.clone();
        let start = Start::decide(&dir, &mut config, options.resume)?;
        if asked.is_some() {
            config.training.memory = None;
        }
        let data = RunData::open(&config, options)?;
        let pipeline = ModelSource::resolve(&setup::model_spec(&config))?;
        let (dataset_hash, base_fingerprint) = (data.dataset.hash(), setup::base_fingerprint(&pipeline)?);
        start.check_inputs(&dir, &dataset_hash, &base_fingerprint)?;
        if let Start::Finished(state) = &start {
            return Ok(Prepared::Nothing(Outcome::AlreadyFinished { dir, step: state.step }));
        }
        setup::check_networks(&pipeline)?;
        let networks = structured_setup::load(&config, &pipeline)?;
        let transformer = TransformerConfig::from_file(&pipeline.transformer.config)?;
        let course = Course::new(&config, &transformer, &data.plans)?;
        let text_tokens = setup::longest_prompt(&config, &data.dataset, &pipeline)?;
        let step = Step::of(&config, &data, &transformer, text_tokens)?;
        let settled = Settled::settle(&mut config, &step, &machine, matches!(start, Start::Fresh))?;
        let budget = options.memory.map(|available| Budget::new(&config, &step, &machine, most_of(available)));
        let config = &config;
        let dry_run = DryRun::new(config, &data, &course, &step, &settled, budget)?;
        if options.dry_run {
            return Ok(Prepared::Nothing(Outcome::DryRun(Box::new(dry_run))));
        }
        let progress = Progress::new(config.training.max_steps as u64, options.quiet);
        progress.notes(&compute.notes);
        progress.notes(&data.notices);
        progress.notes(&[format!("memory of a step, as counted: {}", settled.forecast)]);
        progress.notes(settled.note().as_slice());

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
        let prepared = match networks {
            Some(n) => structured_setup::look(n, config, &pipeline, &data.dataset, &samples, options.quiet)?,
            None => structured_setup::Prepared::default(),
        };
        progress.filled("pose maps", prepared.filled.as_ref());
        progress.notes(&prepared.notes);
        let (mut structured, guide) = prepared.loss.unzip();

        let (mut model, trainable) =
            setup::load_network(config, &pipeline, &start, &compute.device, settled.placement)?;
        // Only now is the folder a run's: after a bad image or a stop in what is above, the same command starts again.
        let yaml = config.to_yaml();
        write_atomic(&dir.config(), |file| file.write_all(yaml.as_bytes()))?;
        if config.data.filter != Filter::default() {
            let lines: Vec<String> = data.left_out.iter().map(line).collect();
            write_atomic(&dir.filtered(), |file| file.write_all(lines.concat().as_bytes()))?;
        }
        let mut optimizer = AdamW::new(AdamWOptions::from(&config.training));
        let first_step = match start {
            Start::From(checkpoint) => {
                optimizer.load_state(&trainable.parameters(), checkpoint.optimizer)?;
                if let (Some(structured), Some(saved)) = (&mut structured, &checkpoint.state.structured) {
                    structured.restore(saved)?;
                }
                checkpoint.state.step
            }
            Start::Fresh | Start::Finished(_) => 0,
        };

        let scheduler = FlowMatchEuler::from_file(&pipeline.scheduler)?;
        let regions = RegionWeights::new(config, data.boxes)?;
        let batches = Arc::new(Batches::new(config, samples, regions, guide, scheduler)?);
        let held_out = HeldOut::new(data.plan.held_out_batches(), config.evaluation.num_sigmas);
        let metrics = MetricsFile::open(&dir.metrics(), first_step)?;
        let saver = Saver::new(config, &dir, &pipeline, setup::provenance(config, &dataset_hash, &base_fingerprint));
        let previews = Previews::new(config, &dir, &pipeline, &base_fingerprint, &cached.extra_prompts);
        let mut previews = previews.unwrap_or_else(|error| {
            progress.notes(&[format!("no previews: {error}")]);
            None
        });
        if let Some(previews) = &mut previews {
            let note = previews.begin(first_step, &mut model, &trainable);
            progress.notes(note.as_slice());
        }
        let page = Page::new(config, &dir, dry_run.facts(), &course);
        let report = Report::new(config, &dir, &trainable, first_step);
        let plans = Arc::new(data.plans);
        let loader = {
            let (plans, batches) = (plans.clone(), batches.clone());
            let accumulation = config.training.gradient_accumulation as u64;
            let range = first_step * accumulation..config.training.max_steps as u64 * accumulation;
            Loader::new(range, config.data.prefetch, move |n| batches.training(&plans.at(n).batch(n)))?
        };
        let dataset = data.dataset;
        let memory = Watch::new(config, &settled, &compute.device)?;
        let checkpointing = settled.checkpointing;
        let record = Record {
            first_step,
            max_steps: config.training.max_steps as u64,
            measure_every: config.evaluation.every as u64,
            dir,
            dataset,
            held_out,
            metrics,
            progress,
            memory,
            report,
            page,
            previews,
            saver,
        };
        Ok(Prepared::Ready(Box::new(Self {
            model,
            trainable,
            optimizer,
            checkpointing,
            course,
            plans,
            batches,
            structured,
            loader,
            record,
        })))
    }
}

/// A line of `filtered.jsonl`.
fn line(left_out: &LeftOut) -> String {
    serde_json::to_string(left_out).expect("paths and numbers are JSON") + "\n"
}
