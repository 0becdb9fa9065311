//! What happens before the first step: where the run stands, its data, its network.

use crate::adapters::file::Provenance;
use crate::adapters::{Init, LoraAdapter, LoraScaling, Target, TargetEntry, resolve_targets};
use crate::cache::fingerprint;
use crate::config::{Config, LoraInit, TrainingMode};
use crate::data::{Buckets, Dataset, Plan, PlanSettings, Sample, place};
use crate::error::{Error, Result};
use crate::model::source::{ModelSpec, PipelineFolder};
use crate::model::text_encoder::{Residency, TextEncoder, TextEncoderConfig};
use crate::model::transformer::{BaseWeights, Precision, QwenImageTransformer, TransformerConfig};
use crate::model::vae::VaeConfig;
use crate::progress::tell;
use crate::train::checkpoint::{Checkpoint, State, Weights};
use crate::train::run_dir::{Found, RunDir};
use crate::train::trainable::Trainable;
use candle_core::{DType, Device};

/// Where a run begins.
pub enum Start {
    /// At step 0.
    Fresh,
    /// After a checkpoint.
    From(Box<Checkpoint>),
    /// It has reached its last step already.
    Finished(State),
}

impl Start {
    /// Looks into the run directory and decides, without changing anything.
    ///
    /// Errors (usage): an existing run without `resume`, another config, no whole checkpoint among those there.
    pub fn decide(dir: &RunDir, config: &Config, resume: bool) -> Result<Self> {
        let found = dir.look()?;
        if !resume && found != Found::Empty {
            return Err(occupied(dir, &found));
        }
        match found {
            Found::Empty => Ok(Self::Fresh),
            Found::Started => {
                if let Ok(text) = std::fs::read_to_string(dir.config()) {
                    refuse_differences(dir, config, &text)?;
                }
                Ok(Self::Fresh)
            }
            Found::Checkpoints(steps) => {
                let newest = *steps.last().expect("a list of checkpoints is not empty");
                let state = State::load(&dir.checkpoint(newest));
                if let Ok(state) = &state {
                    refuse_differences(dir, config, &state.config)?;
                    if state.step == state.max_steps {
                        return Ok(Self::Finished(state.clone()));
                    }
                }
                last_whole(dir, config, &steps)
            }
        }
    }

    /// Refuses to go on with other images, captions or base weights.
    pub fn check_inputs(&self, dir: &RunDir, dataset_hash: &str, base_fingerprint: &str) -> Result<()> {
        let state = match self {
            Self::Fresh => return Ok(()),
            Self::From(checkpoint) => &checkpoint.state,
            Self::Finished(state) => state,
        };
        for (what, changed, saved, now) in [
            ("dataset", "images or captions were added, removed or changed", &state.dataset_hash, dataset_hash),
            ("base model", "its config or weights are others", &state.base_fingerprint, base_fingerprint),
        ] {
            if saved != now {
                return Err(Error::usage(format!("the run in `{}` has another {what}", dir.root().display()))
                    .detail(changed)
                    .expected(format!("the fingerprint {}", short(saved)), short(now))
                    .hint("restore it to continue this run, or give a new run another `output`"));
            }
        }
        Ok(())
    }
}

/// Why nothing is started in a folder that is not empty.
fn occupied(dir: &RunDir, found: &Found) -> Error {
    let root = dir.root().display();
    let newest = match found {
        Found::Checkpoints(steps) => steps.last().and_then(|&step| State::load(&dir.checkpoint(step)).ok()),
        Found::Empty | Found::Started => None,
    };
    match newest {
        Some(state) if state.step == state.max_steps => {
            Error::usage(format!("there is a finished run in `{root}`")).hint("give this one another `output`")
        }
        Some(state) => Error::usage(format!("there is a run in `{root}`"))
            .detail(format!("its last checkpoint is at step {} of {}", state.step, state.max_steps))
            .hint("continue it with `--resume auto`, or give this one another `output`"),
        None if !matches!(found, Found::Checkpoints(_)) && !dir.config().exists() => {
            Error::usage(format!("the output folder `{root}` is not empty and holds no run"))
                .hint("give another `output`")
        }
        None => Error::usage(format!("there is a run in `{root}`"))
            .detail("it has no whole checkpoint")
            .hint("`--resume auto` starts it again, or give this one another `output`"),
    }
}

/// The beginning of a hash, enough to tell two apart.
fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

fn last_whole(dir: &RunDir, config: &Config, steps: &[u64]) -> Result<Start> {
    let mut damage = Vec::new();
    for &step in steps.iter().rev() {
        match Checkpoint::load(&dir.checkpoint(step), &Device::Cpu) {
            Ok(checkpoint) => {
                damage
                    .iter()
                    .for_each(|line| tell(format_args!("note: a newer checkpoint is damaged and not used: {line}")));
                refuse_differences(dir, config, &checkpoint.state.config)?;
                return Ok(Start::From(Box::new(checkpoint)));
            }
            // Its hint is about files that are given, not about ours.
            Err(error) => damage.extend(error.to_string().lines().next().map(str::to_string)),
        }
    }
    let error = Error::usage(format!("no checkpoint in `{}` is whole", dir.checkpoints().display()));
    let error = damage.into_iter().fold(error, Error::detail);
    Err(error.hint("put back a copy of one, or start a new run with another `output`"))
}

fn refuse_differences(dir: &RunDir, config: &Config, saved: &str) -> Result<()> {
    let saved = Config::parse(saved, &dir.config(), &[])?;
    let differences = config.differences(&saved);
    if differences.is_empty() {
        return Ok(());
    }
    let error = Error::usage(format!("the run in `{}` has another config", dir.root().display()));
    let error = differences.into_iter().fold(error, |e, line| e.detail(line));
    Err(error.hint("restore these values to continue it, or give a new run another `output`"))
}

/// The images of a run and the order in which they come.
pub struct RunData {
    /// The captioned images.
    pub dataset: Dataset,
    /// Every image in every shape that it is trained in.
    pub samples: Vec<Sample>,
    /// The batches.
    pub plan: Plan,
    /// What the user may want to know.
    pub notices: Vec<String>,
}

impl RunData {
    /// Indexes the images and lays out the batches.
    pub fn open(config: &Config, quiet: bool) -> Result<Self> {
        let data = &config.data;
        let dataset = Dataset::open(&data.path, data.default_caption.as_deref(), quiet)?;
        let resolutions =
            data.resolution.sides().iter().map(|&side| Buckets::new(side, 16)).collect::<Result<Vec<_>>>()?;
        let sizes: Vec<_> = dataset.items().iter().map(|i| i.size).collect();
        let samples = place::place(&sizes, &resolutions);
        let settings = PlanSettings {
            seed: config.seed,
            batch_size: config.training.batch_size,
            held_out: data.held_out.count(dataset.items().len())?,
            caption_dropout: data.caption_dropout,
        };
        let plan = Plan::new(&samples, settings)?;
        let mut notices = dataset.notices().to_vec();
        notices.extend(place::notices(&sizes, &samples, |i| &dataset.items()[i].path));
        Ok(Self { dataset, samples, plan, notices })
    }
}

/// The config's `model:` as the loader wants it.
pub fn model_spec(config: &Config) -> ModelSpec {
    let model = &config.model;
    ModelSpec {
        path: model.path.clone(),
        revision: model.revision.clone(),
        offline: model.offline,
        transformer: model.transformer.clone(),
        vae: model.vae.clone(),
        text_encoder: model.text_encoder.clone(),
    }
}

/// The linears that get an adapter. Errors: an entry of `lora.target_modules` that matches nothing.
pub fn targets(config: &Config, transformer: &TransformerConfig) -> Result<Vec<Target>> {
    let lora = &config.lora;
    let entry = |target: &crate::config::Target| TargetEntry {
        pattern: target.name.clone(),
        rank: target.rank.map(|r| r.get()),
        alpha: target.alpha.map(|a| a.get()),
    };
    let entries: Vec<_> = lora.target_modules.entries().iter().map(entry).collect();
    let default = LoraScaling { rank: lora.rank.get(), alpha: lora.alpha, rslora: lora.rslora };
    resolve_targets(&transformer.modules(), &entries, default)
}

/// The types that weights and activations have. Errors: all weights are to be trained in another type than f32.
pub fn precision(config: &Config, on_gpu: bool) -> Result<Precision> {
    let compute = config.training.dtype.resolve(on_gpu);
    let weights = match config.model.dtype {
        crate::config::ComputeDtype::Auto => compute,
        given => given.resolve(on_gpu),
    };
    if config.training.mode == TrainingMode::Full && weights != DType::F32 {
        return Err(Error::usage("`training.mode: full` trains weights in f32")
            .expected("f32 as `model.dtype`", weights.as_str())
            .hint("set `model.dtype: f32`; `training.dtype: bf16` is possible beside it"));
    }
    Ok(Precision { weights, compute })
}

/// Checks the tensors of all three networks against their configs, reading headers only, so that a broken file is
/// found before anything is computed.
pub fn check_networks(pipeline: &PipelineFolder) -> Result<()> {
    let transformer = TransformerConfig::from_file(&pipeline.transformer.config)?;
    QwenImageTransformer::check_weights(&transformer, &pipeline.transformer.open()?)?;
    let vae = VaeConfig::from_file(&pipeline.vae.config)?;
    pipeline.vae.open()?.check(&vae.tensors(), |_| false)?;
    let text_encoder = TextEncoderConfig::from_file(&pipeline.text_encoder.config)?;
    TextEncoder::from_weights(text_encoder, pipeline.text_encoder.open()?, Residency::Streamed).map(|_| ())
}

/// Loads the transformer onto `device` and puts on it what is trained: fresh, or as a checkpoint left it.
pub fn load_network(
    config: &Config,
    pipeline: &PipelineFolder,
    start: &Start,
    device: &Device,
) -> Result<(QwenImageTransformer, Trainable)> {
    let files = &pipeline.transformer;
    let transformer = TransformerConfig::from_file(&files.config)?;
    let precision = precision(config, !device.is_cpu())?;
    let saved = match start {
        Start::From(checkpoint) => Some(&checkpoint.weights),
        Start::Fresh | Start::Finished(_) => None,
    };
    match config.training.mode {
        TrainingMode::Lora => {
            let targets = targets(config, &transformer)?;
            let mut model = QwenImageTransformer::from_weights(
                transformer,
                &files.open()?,
                precision,
                device,
                BaseWeights::Frozen,
            )?;
            let init = match config.lora.init {
                LoraInit::Gaussian => Init::Gaussian,
                LoraInit::Kaiming => Init::KaimingUniform,
            };
            let mut adapter = LoraAdapter::init(&targets, init, config.seed, &Device::Cpu)?;
            match saved {
                Some(Weights::Adapter(saved)) => restore(&mut adapter, saved)?,
                Some(Weights::Full(_)) => return Err(another_kind("an adapter", "all weights")),
                None => {}
            }
            let trainable = Trainable::attach(&mut model, &adapter)?;
            Ok((model, trainable))
        }
        TrainingMode::Full => {
            let model = QwenImageTransformer::from_weights(
                transformer,
                &files.open()?,
                precision,
                device,
                BaseWeights::Trained,
            )?;
            let trainable = Trainable::all_weights(&model);
            match saved {
                Some(Weights::Full(tensors)) => trainable.restore(tensors)?,
                Some(Weights::Adapter(_)) => return Err(another_kind("all weights", "an adapter")),
                None => {}
            }
            Ok((model, trainable))
        }
    }
}

/// Takes A and B of the checkpoint; rank, alpha and scale are those of the config, which is the same.
fn restore(adapter: &mut LoraAdapter, saved: &LoraAdapter) -> Result<()> {
    let names = |a: &LoraAdapter| a.modules.keys().cloned().collect::<Vec<_>>();
    if names(adapter) != names(saved) {
        return Err(Error::usage("the checkpoint's adapter has other modules than the config asks for"));
    }
    for (name, module) in &mut adapter.modules {
        let old = &saved.modules[name];
        if (module.a.dims(), module.b.dims()) != (old.a.dims(), old.b.dims()) {
            return Err(Error::usage(format!("the checkpoint's `{name}` has another shape")).expected(
                format!("{:?} and {:?}", module.a.dims(), module.b.dims()),
                format!("{:?} and {:?}", old.a.dims(), old.b.dims()),
            ));
        }
        (module.a, module.b) = (old.a.clone(), old.b.clone());
    }
    Ok(())
}

fn another_kind(expected: &str, found: &str) -> Error {
    Error::usage("the checkpoint holds something else than this run trains").expected(expected, found)
}

/// Fingerprint of the base transformer.
pub fn base_fingerprint(pipeline: &PipelineFolder) -> Result<String> {
    fingerprint(&pipeline.transformer.files()?)
}

/// What the adapter's metadata says of its origin.
pub fn provenance(config: &Config, dataset_hash: &str, base_fingerprint: &str) -> Provenance {
    let sides: Vec<String> = config.data.resolution.sides().iter().map(|s| format!("{s}x{s}")).collect();
    let base = config.model.path.rsplit(['/', '\\']).next().unwrap_or_default();
    Provenance {
        title: format!("LoRA for {base}"),
        architecture: "qwen-image/lora".into(),
        resolution: sides.join(","),
        base: base.into(),
        base_fingerprint: base_fingerprint.into(),
        dataset_hash: dataset_hash.into(),
        config: config.embedded_json(),
    }
}
