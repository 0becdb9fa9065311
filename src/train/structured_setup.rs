//! Before the first step of a run with a structured loss: the networks, and what they see in the targets.

use crate::cache::pose::{PoseRequest, PoseTargets, fill_pose_targets};
use crate::cache::{CachedSamples, Filled, Store, fingerprint};
use crate::config::{Config, LossWeights, Stage};
use crate::data::{Batch, Dataset, PlannedBatch, Sample};
use crate::error::{Error, Result};
use crate::flow::gate::Gate;
use crate::model::source::PipelineFolder;
use crate::model::vae::{CropDecoder, TinyDecoder, Vae, VaeConfig};
use crate::pose::PoseNetwork;
use crate::pose::weights::NetworkWeights;
use crate::train::structured::{Fired, Structured, TermWeights};
use crate::train::{interrupt, setup};
use std::path::PathBuf;

/// The shares that the config asks for: those of `loss.weights`, pose and count times `data.pose_loss_weight`.
pub fn term_weights(config: &Config) -> TermWeights {
    shares(config, &config.loss.weights)
}

/// The shares of a stage of the run.
pub fn stage_weights(config: &Config, stage: &Stage) -> TermWeights {
    shares(config, &stage.loss.or(&config.loss.weights))
}

/// The shares of each stage, or of the run if it has none.
fn all_weights(config: &Config) -> Result<Vec<TermWeights>> {
    let spans = config.stages.spans(config.training.max_steps)?;
    let stages = spans.iter().map(|(_, stage)| stage_weights(config, stage));
    Ok(if spans.is_empty() { vec![term_weights(config)] } else { stages.collect() })
}

fn shares(config: &Config, weights: &LossWeights) -> TermWeights {
    let factor = config.data.pose_loss_weight;
    TermWeights { reconstruction: weights.reconstruction, pose: factor * weights.pose, count: factor * weights.count }
}

/// What draws the targets of each batch.
#[derive(Clone, Debug)]
pub struct Guide {
    targets: PoseTargets,
    gate: Gate,
    seed: u64,
    /// Batches in a step, and steps from one that fires to the next.
    accumulation: u64,
    every: u64,
}

impl Guide {
    /// For each sample of a batch the target that the loss acts on; `None` where the step is not due, the gate is shut,
    /// or nobody is in the picture.
    pub fn fired(&self, planned: &PlannedBatch, batch: &Batch, sigmas: &[f64]) -> Result<Vec<Option<Fired>>> {
        let due = (planned.step / self.accumulation).is_multiple_of(self.every);
        let one = |(&item, &sigma): (&usize, &f64)| {
            let gate = if due { self.gate.at(sigma) } else { 0.0 };
            if gate <= 0.0 {
                return Ok(None);
            }
            let sample = Sample { bucket: batch.bucket, item };
            Ok(self.targets.draw(sample, self.seed, planned.step)?.map(|crop| Fired { gate, crop }))
        };
        batch.items.iter().zip(sigmas).map(one).collect()
    }
}

/// The loss, what draws its targets, and what to tell.
#[derive(Default)]
pub struct Prepared {
    /// The loss; `None` if it is off or nobody is in any picture.
    pub loss: Option<(Structured, Guide)>,
    /// What the user may want to know.
    pub notes: Vec<String>,
    /// What the cache of targets gave.
    pub filled: Option<Filled>,
}

/// The networks of the loss that are read before anything is computed.
pub struct Networks {
    pose: Box<dyn PoseNetwork>,
    /// A tiny decoder and its fingerprint; none for the autoencoder's own, which is loaded when latents are cached.
    tiny: Option<(TinyDecoder, String)>,
    weights: TermWeights,
}

/// Loads them, if the config asks for the loss.
///
/// Errors (usage): a pose network that is not there or is another one; a tiny decoder that is none.
pub fn load(config: &Config, pipeline: &PipelineFolder) -> Result<Option<Networks>> {
    let weights = term_weights(config);
    if !all_weights(config)?.iter().any(TermWeights::are_structured) {
        return Ok(None);
    }
    let channels = VaeConfig::from_file(&pipeline.vae.config)?.input_channels;
    if channels != 3 {
        return Err(Error::usage("the pose term wants an autoencoder of RGB images")
            .expected("3 image channels", channels)
            .hint("train without it: `--set data.pose_loss_weight=0`"));
    }
    let pose = setup::pose_network(config)?;
    let tiny = |path: &PathBuf| -> Result<(TinyDecoder, String)> {
        let weights = NetworkWeights::open("the tiny decoder", path)?;
        Ok((TinyDecoder::new(weights.tensors(), &path.display().to_string())?, weights.fingerprint()?))
    };
    let tiny = config.loss.decoder.as_ref().map(tiny).transpose()?;
    Ok(Some(Networks { pose, tiny, weights }))
}

/// Looks at all samples.
pub fn look(
    networks: Networks,
    config: &Config,
    pipeline: &PipelineFolder,
    dataset: &Dataset,
    cached: &CachedSamples,
    quiet: bool,
) -> Result<Prepared> {
    let Networks { pose, tiny, weights } = networks;
    let mut notes = Vec::new();
    let vae_config = VaeConfig::from_file(&pipeline.vae.config)?;
    let compression = vae_config.spatial_compression();
    let (decoder, decoder_print) = match tiny {
        Some((decoder, print)) => (CropDecoder::Tiny(Box::new(decoder)), print),
        None => {
            let vae = Vae::from_weights(vae_config, &pipeline.vae.open()?)?;
            (CropDecoder::Full(Box::new(vae)), fingerprint(&pipeline.vae.files()?)?)
        }
    };
    let structured = Structured::new(pose, decoder, weights);
    let store = Store::open(&config.cache_dir())?;
    let mut samples: Vec<_> = cached.latents_of.iter().map(|(sample, key)| (*sample, *key)).collect();
    samples.sort_unstable_by_key(|(sample, _)| *sample);
    let request = PoseRequest {
        network: structured.network(),
        decoder: structured.decoder(),
        decoder_print: &decoder_print,
        compression,
        crop: config.loss.crop,
        dataset,
        quiet,
        stop: &interrupt::requested,
    };
    let (targets, filled) = fill_pose_targets(&store, &samples, |key| cached.read_latents(key), &request)?;
    if targets.is_empty() {
        notes.push(format!(
            "{} finds nobody in any of the {} pictures: pose and count terms are off, the run is a plain one \
             (see `qwen-lora pose IMAGE`)",
            structured.network().name(),
            samples.len()
        ));
        return Ok(Prepared { loss: None, notes, filled: Some(filled) });
    }
    notes.push(format!(
        "pose and count terms: {} finds someone in {} of {} pictures; counted: {}",
        structured.network().name(),
        targets.len(),
        samples.len(),
        structured.counts()
    ));
    let gate = &config.loss.gate;
    let guide = Guide {
        targets,
        gate: Gate::new(gate.from, gate.to, gate.taper),
        seed: config.seed,
        accumulation: config.training.gradient_accumulation as u64,
        every: config.loss.every as u64,
    };
    Ok(Prepared { loss: Some((structured, guide)), notes, filled: Some(filled) })
}
