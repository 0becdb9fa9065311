//! From a planned batch to a noisy one: a pure function of (config, seed, batch number).

use crate::cache::CachedSamples;
use crate::config::{Config, LossWeighting, SigmaRange};
use crate::data::{Batch, PlannedBatch, Sample};
use crate::error::Result;
use crate::flow::FlowMatchEuler;
use crate::flow::loss::{CaptionWeight, Weighting};
use crate::flow::sigma::SigmaSampler;
use crate::model::vae::pack;
use crate::rng::{Purpose, Stream};
use crate::train::regions::RegionWeights;
use crate::train::stages::Timeline;
use crate::train::step::NoisyBatch;
use crate::train::structured_setup::Guide;
use candle_core::{DType, Device, Tensor};

/// What turns cached samples into training batches.
pub struct Batches {
    samples: CachedSamples,
    seed: u64,
    /// The noise levels of the run, at which the held-out loss is measured in all stages.
    sigmas: SigmaSampler,
    /// The noise levels of each batch.
    stage_sigmas: Timeline<SigmaSampler>,
    weighting: LossWeighting,
    caption_weight: CaptionWeight,
    regions: RegionWeights,
    /// Draws the targets of the structured loss; none where it is off.
    guide: Option<Guide>,
}

/// A batch ready for the network, and what the metrics say of it.
pub struct TrainBatch {
    /// The network's inputs and the target.
    pub noisy: NoisyBatch,
    /// Dataset index of each sample.
    pub items: Vec<usize>,
    /// Samples whose caption was dropped.
    pub captions_dropped: usize,
    /// The epoch it belongs to.
    pub epoch: u64,
}

impl Batches {
    /// Batches from these caches, with the noise levels and loss weights of the config, the weights of regions, and the
    /// targets of the structured loss.
    ///
    /// Errors: stages that do not fit the run.
    pub fn new(
        config: &Config,
        samples: CachedSamples,
        regions: RegionWeights,
        guide: Option<Guide>,
        scheduler: FlowMatchEuler,
    ) -> Result<Self> {
        let sigmas = SigmaSampler::new(&config.flow, scheduler.clone());
        let mut stage_sigmas = Timeline::new(sigmas.clone());
        for (steps, stage) in config.stages.spans(config.training.max_steps)? {
            let mut flow = config.flow.clone();
            (flow.sigma_min, flow.sigma_max) = stage.sigma.map_or((flow.sigma_min, flow.sigma_max), SigmaRange::get);
            let start = steps.start * config.training.gradient_accumulation as u64;
            stage_sigmas.then(start, SigmaSampler::new(&flow, scheduler.clone()));
        }
        Ok(Self {
            samples,
            seed: config.seed,
            sigmas,
            stage_sigmas,
            weighting: config.flow.weighting,
            caption_weight: CaptionWeight::new(config.data.caption_weight, config.data.caption_dropout),
            regions,
            guide,
        })
    }

    /// The batch of `planned`, with noise and noise levels drawn for (seed, planned.step, item).
    pub fn training(&self, planned: &PlannedBatch) -> Result<TrainBatch> {
        let batch = self.samples.batch(planned)?;
        let tokens = image_tokens(&batch);
        let levels = self.stage_sigmas.at(planned.step);
        let sigmas = self.draw(planned, tokens);
        // Per batch, because the noise levels depend on the image size.
        let weighting = Weighting::new(self.weighting, |q| levels.quantile(q, tokens));
        let weights = sigmas.iter().zip(&batch.caption_dropped);
        let weights = weights.map(|(&s, &dropped)| weighting.at(s) * self.caption_weight.of(dropped)).collect();
        let mut noisy = self.mix(&batch, &sigmas, weights, |item| (planned.step, item, Purpose::Noise))?;
        noisy.pixel_weights = self.pixel_weights(&batch, planned.step)?;
        if let Some(guide) = &self.guide {
            noisy.fired = guide.fired(planned, &batch, &sigmas)?;
        }
        Ok(TrainBatch {
            noisy,
            captions_dropped: batch.caption_dropped.iter().filter(|&&d| d).count(),
            items: batch.items,
            epoch: planned.epoch,
        })
    }

    /// A noise level for each sample of `planned`.
    fn draw(&self, planned: &PlannedBatch, image_tokens: usize) -> Vec<f64> {
        let levels = self.stage_sigmas.at(planned.step);
        let stream = |item: usize| Stream::new(self.seed, planned.step, item as u64, Purpose::Sigma);
        planned.items.iter().map(|item| levels.draw(&mut stream(item.item), image_tokens)).collect()
    }

    /// The noise levels that [`training`](Self::training) will draw for `planned`, as the network gets them.
    pub fn levels(&self, planned: &PlannedBatch) -> Vec<f32> {
        self.draw(planned, planned.bucket.image_tokens()).into_iter().map(|s| s as f32).collect()
    }

    /// Those of [`held_out`](Self::held_out).
    pub fn held_out_levels(&self, planned: &PlannedBatch, index: usize, count: usize) -> Vec<f32> {
        vec![self.held_out_level(planned.bucket.image_tokens(), index, count) as f32; planned.items.len()]
    }

    fn held_out_level(&self, image_tokens: usize, index: usize, count: usize) -> f64 {
        self.sigmas.quantile((index as f64 + 0.5) / count as f64, image_tokens)
    }

    /// A held-out batch at quantile `(index + 1/2) / count` of the noise levels, always with the same noise.
    pub fn held_out(&self, planned: &PlannedBatch, index: usize, count: usize) -> Result<NoisyBatch> {
        let batch = self.samples.batch(planned)?;
        let sigma = self.held_out_level(image_tokens(&batch), index, count);
        let sigmas = vec![sigma; batch.len()];
        self.mix(&batch, &sigmas, vec![1.0; batch.len()], |item| (index as u64, item, Purpose::HeldOut))
    }

    /// The weights of masks and regions, packed: (B, S_img, 4). `None` if all are 1.
    fn pixel_weights(&self, batch: &Batch, n: u64) -> Result<Option<Tensor>> {
        let (samples, _, height, width) = batch.latents.dims4()?;
        let of = |&item: &usize| {
            let sample = Sample { bucket: batch.bucket, item };
            self.regions.of(sample, n, self.samples.mask(sample)?.as_deref())
        };
        let weights: Vec<Option<Vec<f32>>> = batch.items.iter().map(of).collect::<Result<_>>()?;
        if weights.iter().all(Option::is_none) {
            return Ok(None);
        }
        let even = || vec![1.0; height * width];
        let weights: Vec<f32> = weights.into_iter().flat_map(|w| w.unwrap_or_else(even)).collect();
        Ok(Some(pack(&Tensor::from_vec(weights, (samples, 1, height, width), &Device::Cpu)?)?))
    }

    fn mix(
        &self,
        batch: &Batch,
        sigmas: &[f64],
        weights: Vec<f64>,
        stream: impl Fn(u64) -> (u64, u64, Purpose),
    ) -> Result<NoisyBatch> {
        let (samples, channels, height, width) = batch.latents.dims4()?;
        let mut noise = Vec::with_capacity(batch.latents.elem_count());
        for &item in &batch.items {
            let (step, item, purpose) = stream(item as u64);
            noise.extend(Stream::new(self.seed, step, item, purpose).normals(channels * height * width, 1.0));
        }
        let noise = Tensor::from_vec(noise, (samples, channels, height, width), &Device::Cpu)?;
        NoisyBatch::mix(
            &pack(&batch.latents.to_dtype(DType::F32)?)?,
            &pack(&noise)?,
            batch.prompt_embeds.clone(),
            batch.lengths.clone(),
            sigmas.iter().map(|&s| s as f32).collect(),
            weights,
            vec![(1, height / 2, width / 2)],
        )
    }
}

/// Image tokens of one sample.
fn image_tokens(batch: &Batch) -> usize {
    let dims = batch.latents.dims();
    dims[2] * dims[3] / 4
}
