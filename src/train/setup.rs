//! The parts of a run before its first step: images and batches, targets, network.

use crate::adapters::file::Provenance;
use crate::adapters::{Init, LoraAdapter, LoraScaling, Target, TargetEntry, resolve_targets};
use crate::cache::fingerprint;
use crate::config::{BaseDtype, Config, LoraInit, Resolutions, TrainingMode};
use crate::data::{
    Buckets, Counts, Dataset, Item, LeftOut, Plan, PlanSettings, Sample, Selection, Size, filter, place,
};
use crate::error::{Error, Result};
use crate::io::hub::HubOptions;
use crate::model::source::{ModelSpec, PipelineFolder};
use crate::model::text_encoder::{Residency, TextEncoder, TextEncoderConfig};
use crate::model::tokenizer::PromptTokenizer;
use crate::model::transformer::{BaseWeights, Placement, Precision, QwenImageTransformer, TransformerConfig};
use crate::model::vae::VaeConfig;
use crate::pose::{PoseNetwork, PoseSpec};
use crate::progress::tell;
use crate::prompt::TEXT_TO_IMAGE;
use crate::train::checkpoint::Weights;
use crate::train::people::{self, People};
use crate::train::regions::{self, Boxes};
use crate::train::run::Options;
use crate::train::stages::{self, Timeline};
use crate::train::start::Start;
use crate::train::trainable::Trainable;
use candle_core::{DType, Device};
use std::sync::Arc;

/// The images of a run and the order in which they come.
pub struct RunData {
    /// The captioned images.
    pub dataset: Arc<Dataset>,
    /// The images that `data.filter` leaves out.
    pub left_out: Vec<LeftOut>,
    /// Every image in every shape in which it is trained or held out.
    pub samples: Vec<Sample>,
    /// The batches of a run without stages, and the images that are held out.
    pub plan: Arc<Plan>,
    /// The plan of each batch of this run.
    pub plans: Timeline<Arc<Plan>>,
    /// Size and boxes of each image; empty if no weight of the loss needs them.
    pub boxes: Vec<(Size, Boxes)>,
    /// What the user may want to know.
    pub notices: Vec<String>,
}

impl RunData {
    /// Indexes the images, looks for people in them if the config asks for it, and lays out the batches of all stages.
    pub fn open(config: &Config, options: Options) -> Result<Self> {
        let data = &config.data;
        let mut dataset = Dataset::open(&data.path, data.default_caption.as_deref(), options.quiet)?;
        dataset.use_masks(&data.masks)?;
        let mut left_out =
            dataset.leave_out(dataset.items().iter().map(|item| filter::by_size(&data.filter, item)).collect())?;
        let mut people = People::of(config, &dataset, options)?;
        if filter::asks_for_people(&data.filter) {
            let reason = |(item, people): (&Item, &People)| filter::by_people(&data.filter, item, people.counts);
            let reasons: Vec<Option<LeftOut>> = dataset.items().iter().zip(&people).map(reason).collect();
            let mut kept = reasons.iter().map(Option::is_none);
            people.retain(|_| kept.next().expect("one reason for each image"));
            left_out.extend(dataset.leave_out(reasons)?);
            left_out.sort_by(|a, b| a.path.cmp(&b.path));
        }
        let items = dataset.items();
        let sizes: Vec<_> = items.iter().map(|i| i.size).collect();
        let placed = |resolution: &Resolutions| -> Result<Vec<Sample>> {
            let buckets = resolution.sides().iter().map(|&side| Buckets::new(side, 16)).collect::<Result<Vec<_>>>()?;
            Ok(place::place(&sizes, &buckets))
        };
        let base = placed(&data.resolution)?;
        let settings = PlanSettings {
            seed: config.seed,
            batch_size: config.training.batch_size,
            held_out: data.held_out.count(items.len())?,
            caption_dropout: data.caption_dropout,
        };
        let plan = Arc::new(Plan::new(&base, settings)?);
        let plans = stages::plans(config, &plan, &base, |stage| {
            let selection = Selection::new(&stage.filter)?;
            let mut samples = placed(stage.resolution.as_ref().unwrap_or(&data.resolution))?;
            let counts = |item: usize| people.get(item).map_or(Counts::default(), |people| people.counts);
            samples.retain(|sample| selection.takes(&items[sample.item], counts(sample.item)));
            Ok(samples)
        })?;
        let mut samples: Vec<Sample> =
            plan.held_out().iter().copied().chain(plans.values().flat_map(|plan| plan.training())).collect();
        samples.sort_unstable();
        samples.dedup();
        let mut notices = dataset.notices().to_vec();
        notices.extend(place::notices(&sizes, &samples, |i| &items[i].path));
        notices.extend(people::notice(&people, regions::wants_boxes(config)?));
        let boxes = people::boxes(&dataset, people);
        Ok(Self { dataset: Arc::new(dataset), left_out, samples, plan, plans, boxes, notices })
    }
}

/// The pose network of the config's `pose:`. The licence of weights that have a strict one is told once.
///
/// Errors (usage): no such network; weights of another network.
pub fn pose_network(config: &Config) -> Result<Box<dyn PoseNetwork>> {
    static TOLD: std::sync::Once = std::sync::Once::new();
    let mut hub = HubOptions::from_env();
    hub.offline |= config.model.offline;
    let pose = &config.pose;
    let spec = PoseSpec { network: pose.network.clone(), body: pose.body.clone(), hand: pose.hand.clone() };
    spec.load(hub, &mut |notice| TOLD.call_once(|| tell(format_args!("note: {notice}"))))
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

/// Text tokens of the longest caption, as it is cut.
pub fn longest_prompt(config: &Config, dataset: &Dataset, pipeline: &PipelineFolder) -> Result<usize> {
    let tokenizer = PromptTokenizer::load(&pipeline.tokenizer)?;
    let prefix = tokenizer.num_prefix_tokens(&TEXT_TO_IMAGE)?;
    let tokens = |caption: &str| Ok(tokenizer.encode_prompt(&TEXT_TO_IMAGE, caption)?.len() - prefix);
    let captions = dataset.captions();
    let longest = captions.into_iter().map(tokens).try_fold(0, |most, n: Result<usize>| n.map(|n| most.max(n)))?;
    Ok(longest.min(config.data.max_sequence_length))
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

/// The types that weights and activations have. Weights that are trained are f32 where the config leaves it open.
///
/// Errors: they are to be trained in another type.
pub fn precision(config: &Config, on_gpu: bool) -> Result<Precision> {
    let full = config.training.mode == TrainingMode::Full;
    let base = if full && config.model.dtype == BaseDtype::Auto { BaseDtype::F32 } else { config.model.dtype };
    let precision = Precision::of(base, config.training.dtype.resolve(on_gpu));
    if full && (precision.int8 || precision.weights != DType::F32) {
        return Err(Error::usage("`training.mode: full` trains weights in f32")
            .expected("f32 as `model.dtype`", precision.base_name())
            .hint("set `model.dtype: f32`; `training.dtype: bf16` is possible beside it"));
    }
    Ok(precision)
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

/// Loads the transformer onto `device`, kept there as `placement` says, and puts on it what is trained: fresh, or as a
/// checkpoint left it.
pub fn load_network(
    config: &Config,
    pipeline: &PipelineFolder,
    start: &Start,
    device: &Device,
    placement: Placement,
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
            let weights = files.open()?;
            let mut model =
                QwenImageTransformer::from_weights_placed(transformer, weights, precision, device, placement)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_are_trained_are_f32_on_a_gpu_too_unless_the_config_says_otherwise() {
        let precision = |more: &str| {
            let text = format!("{{data: {{path: p}}, training: {{mode: full}}, model: {more}}}");
            precision(&Config::parse(&text, "c.yaml".as_ref(), &[]).unwrap(), true)
        };
        let open = precision("m").unwrap();
        assert_eq!((open.weights, open.compute, open.int8), (DType::F32, DType::BF16, false));
        let error = precision("{path: m, dtype: bf16}").expect_err("refused").to_string();
        assert!(error.contains("found bf16"), "{error}");
    }
}
