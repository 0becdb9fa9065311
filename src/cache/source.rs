//! Batches from the caches: what a planned step needs, read and put together.

use crate::cache::key::Key;
use crate::cache::store::Store;
use crate::data::batch::{Batch, Example, collate};
use crate::data::{Plan, PlannedBatch, PlannedItem, Sample};
use crate::error::{Error, Result};
use candle_core::Tensor;
use std::collections::HashMap;

/// The tensor in a cached latents entry: (C, h, w) in f32.
pub const LATENTS: &str = "latents";
/// The tensor in a cached mask entry: (h, w) in f32, each in [0, 1].
pub const MASK: &str = "mask";
/// The tensor in a cached embedding entry: (L, D), unpadded.
pub const PROMPT_EMBEDS: &str = "prompt_embeds";

/// Where the latents and embeddings of all samples lie.
#[derive(Clone, Debug)]
pub struct CachedSamples {
    /// The store of both kinds of entries, or of the latents only.
    pub latents: Store,
    /// The store of the embeddings; may be the same.
    pub prompt_embeds: Store,
    /// The latents of each sample.
    pub latents_of: HashMap<Sample, Key>,
    /// The embedding of each item's caption, by dataset index.
    pub caption_of: Vec<Key>,
    /// The embedding of [`NO_PROMPT`](crate::config::NO_PROMPT).
    pub no_caption: Key,
    /// The masks of those samples that have one; in the store of latents.
    pub mask_of: HashMap<Sample, Key>,
}

impl CachedSamples {
    /// The batch of one training step. Errors: an entry that is gone or damaged since the caches were filled.
    pub fn step(&self, plan: &Plan, step: u64) -> Result<Batch> {
        self.batch(&plan.batch(step))
    }

    /// The mask of a sample, row by row as its latents, each in [0, 1]; `None` if it has none.
    /// Errors: an entry that is gone or damaged.
    pub fn mask(&self, sample: Sample) -> Result<Option<Vec<f32>>> {
        let Some(key) = self.mask_of.get(&sample) else { return Ok(None) };
        Ok(Some(one(&self.latents, key, MASK)?.flatten_all()?.to_vec1()?))
    }

    /// The latents (C, h, w) of one entry. Errors: it is gone or damaged.
    pub fn read_latents(&self, key: &Key) -> Result<Tensor> {
        one(&self.latents, key, LATENTS)
    }

    /// The batch of `planned`.
    pub fn batch(&self, planned: &PlannedBatch) -> Result<Batch> {
        let read = |planned_item: &PlannedItem| {
            let &PlannedItem { item, caption_dropped } = planned_item;
            let sample = Sample { bucket: planned.bucket, item };
            let latents = self
                .latents_of
                .get(&sample)
                .ok_or_else(|| Error::run(format!("item {item} was not cached at {}", planned.bucket)))?;
            let caption = if caption_dropped { &self.no_caption } else { &self.caption_of[item] };
            Ok(Example {
                item,
                latents: one(&self.latents, latents, LATENTS)?,
                prompt_embeds: one(&self.prompt_embeds, caption, PROMPT_EMBEDS)?,
                caption_dropped,
            })
        };
        let examples: Vec<Example> = planned.items.iter().map(read).collect::<Result<_>>()?;
        collate(planned.bucket, &examples)
    }
}

fn one(store: &Store, key: &Key, name: &str) -> Result<Tensor> {
    store.require(key)?.remove(name).ok_or_else(|| {
        Error::run(format!("the cache entry `{}` lacks `{name}`", store.path(key).display()))
            .hint("remove it and run again with `--resume auto`")
    })
}
