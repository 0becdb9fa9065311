//! The order of training: which samples make up the batch of a step. A pure function of (seed, step).
//!
//! An epoch shows every sample once. Each bucket's samples are shuffled and cut into batches, the last of which may be
//! short; then the batches of all buckets are shuffled. Nothing is dropped or repeated to fill a batch, so a bucket
//! with fewer images than the batch size gives one short batch per epoch, in which each image weighs more.

use crate::data::bucket::Bucket;
use crate::data::place::Sample;
use crate::error::{Error, Result};
use crate::rng::{Purpose, Stream};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

/// What a [`Plan`] depends on besides the samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlanSettings {
    /// The run's seed.
    pub seed: u64,
    /// The most samples of a batch.
    pub batch_size: usize,
    /// How many items are kept from training, in all their shapes. 0 suits small sets.
    pub held_out: usize,
    /// The probability in [0, 1] that a caption is replaced by the empty one.
    pub caption_dropout: f64,
}

/// The batches of all steps; a step here is one batch, so gradient accumulation over n batches takes n steps.
#[derive(Debug)]
pub struct Plan {
    settings: PlanSettings,
    origin: Origin,
    /// Items to train on, by bucket, ascending.
    groups: Vec<(Bucket, Vec<usize>)>,
    held_out: Vec<Sample>,
    batches_per_epoch: u64,
    /// The layout of the epoch asked for last: steps come in order.
    recent: Mutex<Option<(u64, Arc<Layout>)>>,
}

/// Where a plan begins in the run: its first step, and the number of its first epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Origin {
    step: u64,
    epoch: u64,
}

/// The batches of an epoch in order: shape and items.
type Layout = Vec<(Bucket, Vec<usize>)>;

/// The samples of one step, all of one bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedBatch {
    /// The step, from 0.
    pub step: u64,
    /// The epoch it lies in, from 0.
    pub epoch: u64,
    /// The shape of all its images.
    pub bucket: Bucket,
    /// Its items, at most the batch size, at least one.
    pub items: Vec<PlannedItem>,
}

/// An item of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedItem {
    /// Index in the dataset.
    pub item: usize,
    /// Whether its caption is replaced by the empty one in this step.
    pub caption_dropped: bool,
}

impl Plan {
    /// The plan for `samples` (of [`place`](crate::data::place::place)).
    ///
    /// Errors: no samples, a batch size of 0, a probability outside [0, 1], nothing left beside the held-out items.
    pub fn new(samples: &[Sample], settings: PlanSettings) -> Result<Self> {
        let items: Vec<usize> = BTreeSet::from_iter(samples.iter().map(|s| s.item)).into_iter().collect();
        if settings.batch_size == 0 {
            return Err(Error::usage("the batch size must be at least 1").expected("1 or more", 0));
        }
        if !(0.0..=1.0).contains(&settings.caption_dropout) {
            return Err(Error::usage("the caption dropout is a probability")
                .expected("a number from 0 to 1", settings.caption_dropout));
        }
        if settings.held_out >= items.len() {
            return Err(Error::usage("no images are left to train on")
                .detail(format!("{} images, {} of them held out", items.len(), settings.held_out))
                .hint("hold out fewer images, or add some"));
        }
        let order = Stream::new(settings.seed, 0, 0, Purpose::Split).permutation(items.len());
        let kept_out: BTreeSet<usize> = order[..settings.held_out].iter().map(|&i| items[i]).collect();
        Ok(Self::of(samples, settings, &kept_out, Origin::default()))
    }

    /// The plan that takes over from this one at `step` with other samples of the same data set: a new epoch begins, and
    /// what is held out here stays held out. `None` if nothing of `samples` is left to train on.
    pub fn followed_by(&self, samples: &[Sample], step: u64) -> Option<Self> {
        let kept_out: BTreeSet<usize> = self.held_out.iter().map(|s| s.item).collect();
        // An epoch that is broken off counts, so that the next one is shuffled anew.
        let done = step.saturating_sub(self.origin.step).div_ceil(self.batches_per_epoch);
        let origin = Origin { step, epoch: self.origin.epoch + done };
        let mut next = Self::of(samples, self.settings, &kept_out, origin);
        next.held_out = self.held_out.clone();
        (next.batches_per_epoch > 0).then_some(next)
    }

    /// Groups the samples into what is trained on and what is held out.
    fn of(samples: &[Sample], settings: PlanSettings, kept_out: &BTreeSet<usize>, origin: Origin) -> Self {
        let mut groups: BTreeMap<Bucket, BTreeSet<usize>> = BTreeMap::new();
        let mut held_out = BTreeSet::new();
        for &sample in samples {
            if kept_out.contains(&sample.item) {
                held_out.insert(sample);
            } else {
                groups.entry(sample.bucket).or_default().insert(sample.item);
            }
        }
        let groups: Vec<(Bucket, Vec<usize>)> =
            groups.into_iter().map(|(bucket, items)| (bucket, items.into_iter().collect())).collect();
        let batches_per_epoch = groups.iter().map(|(_, items)| items.len().div_ceil(settings.batch_size) as u64).sum();
        let held_out = held_out.into_iter().collect();
        Self { settings, origin, groups, held_out, batches_per_epoch, recent: Mutex::new(None) }
    }

    /// The batch of a step, which must not lie before the plan's beginning. The same for any two plans of the same
    /// samples and settings, whatever was asked before.
    pub fn batch(&self, step: u64) -> PlannedBatch {
        let place = step - self.origin.step;
        let epoch = self.origin.epoch + place / self.batches_per_epoch;
        let layout = self.layout(epoch);
        let (bucket, items) = &layout[(place % self.batches_per_epoch) as usize];
        let items =
            items.iter().map(|&item| PlannedItem { item, caption_dropped: self.drops_caption(step, item) }).collect();
        PlannedBatch { step, epoch, bucket: *bucket, items }
    }

    /// Whether the caption of `item` is dropped in `step`.
    pub fn drops_caption(&self, step: u64, item: usize) -> bool {
        let draw = Stream::new(self.settings.seed, step, item as u64, Purpose::CaptionDropout).uniform();
        draw < self.settings.caption_dropout
    }

    /// How many steps show every sample once.
    pub fn batches_per_epoch(&self) -> u64 {
        self.batches_per_epoch
    }

    /// The samples that are never trained on, sorted.
    pub fn held_out(&self) -> &[Sample] {
        &self.held_out
    }

    /// The held-out samples in batches of one bucket each, in a fixed order and with their captions. Their `step` counts
    /// them, `epoch` is 0.
    pub fn held_out_batches(&self) -> Vec<PlannedBatch> {
        let of_one_bucket = self.held_out.chunk_by(|a, b| a.bucket == b.bucket);
        let chunks = of_one_bucket.flat_map(|samples| samples.chunks(self.settings.batch_size));
        let batch = |(step, samples): (usize, &[Sample])| PlannedBatch {
            step: step as u64,
            epoch: 0,
            bucket: samples[0].bucket,
            items: samples.iter().map(|s| PlannedItem { item: s.item, caption_dropped: false }).collect(),
        };
        chunks.enumerate().map(batch).collect()
    }

    /// The samples that are trained on, sorted.
    pub fn training(&self) -> impl Iterator<Item = Sample> {
        self.groups.iter().flat_map(|&(bucket, ref items)| items.iter().map(move |&item| Sample { bucket, item }))
    }

    fn layout(&self, epoch: u64) -> Arc<Layout> {
        // Nothing panics while the lock is held, and a stale layout is as good as none.
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((cached, layout)) = &*recent
            && *cached == epoch
        {
            return layout.clone();
        }
        let shuffle = |of: u64, n| Stream::new(self.settings.seed, epoch, of, Purpose::Shuffle).permutation(n);
        let mut batches = Vec::with_capacity(self.batches_per_epoch as usize);
        for (bucket, items) in &self.groups {
            // Keyed by the shape, so that images of another shape do not change this bucket's order.
            let order = shuffle((bucket.height() as u64) << 32 | bucket.width() as u64, items.len());
            let chunks = order.chunks(self.settings.batch_size);
            batches.extend(chunks.map(|chunk| (*bucket, chunk.iter().map(|&i| items[i]).collect())));
        }
        const BATCHES: u64 = u64::MAX; // no bucket's key
        let mut unordered: Vec<Option<_>> = batches.into_iter().map(Some).collect();
        let order = shuffle(BATCHES, unordered.len());
        let batches = order.into_iter().map(|i| unordered[i].take().expect("a permutation holds each index once"));
        let layout = Arc::new(batches.collect());
        *recent = Some((epoch, Arc::clone(&layout)));
        layout
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: PlanSettings = PlanSettings { seed: 42, batch_size: 4, held_out: 0, caption_dropout: 0.25 };

    /// 23 items in three shapes (11, 9 and 3 of them), each also in a larger one.
    fn samples() -> Vec<Sample> {
        let mut samples = Vec::new();
        for item in 0..23 {
            let (h, w) = [(64, 64), (48, 80), (80, 48)][usize::from(item >= 11) + usize::from(item >= 20)];
            for scale in [1, 2] {
                samples.push(Sample { bucket: Bucket::new(h * scale, w * scale).unwrap(), item });
            }
        }
        samples
    }

    #[test]
    fn an_epoch_shows_every_sample_once_in_batches_of_one_bucket() {
        let plan = Plan::new(&samples(), SETTINGS).unwrap();
        assert_eq!(plan.batches_per_epoch(), 2 * (3 + 3 + 1));
        let mut expected = samples();
        expected.sort_unstable();
        let mut orders = Vec::new();
        for epoch in 0..3 {
            let mut seen = Vec::new();
            for step in epoch * 14..(epoch + 1) * 14 {
                let batch = plan.batch(step);
                assert_eq!((batch.step, batch.epoch), (step, epoch));
                assert!((1..=4).contains(&batch.items.len()));
                seen.extend(batch.items.iter().map(|i| Sample { bucket: batch.bucket, item: i.item }));
            }
            orders.push(seen.clone());
            seen.sort_unstable();
            assert_eq!(seen, expected, "epoch {epoch}");
        }
        assert!(orders[0] != orders[1] && orders[1] != orders[2]);
    }

    #[test]
    fn a_step_does_not_depend_on_the_steps_before_it() {
        let walked = Plan::new(&samples(), SETTINGS).unwrap();
        let in_order: Vec<_> = (0..60).map(|step| walked.batch(step)).collect();
        for step in [59, 0, 31, 30, 14, 13] {
            assert_eq!(Plan::new(&samples(), SETTINGS).unwrap().batch(step), in_order[step as usize]);
            assert_eq!(walked.batch(step), in_order[step as usize]);
        }
        let mut shuffled_input = samples();
        shuffled_input.reverse();
        assert_eq!(Plan::new(&shuffled_input, SETTINGS).unwrap().batch(5), in_order[5]);
        let other_seed = Plan::new(&samples(), PlanSettings { seed: 43, ..SETTINGS }).unwrap();
        assert!((0..14).any(|step| other_seed.batch(step).items != in_order[step as usize].items));
    }

    #[test]
    fn held_out_items_are_never_trained_on_in_any_shape() {
        let plan = Plan::new(&samples(), PlanSettings { held_out: 5, ..SETTINGS }).unwrap();
        let held_out: BTreeSet<usize> = plan.held_out().iter().map(|s| s.item).collect();
        assert_eq!((held_out.len(), plan.held_out().len()), (5, 10));
        let trained: BTreeSet<usize> =
            (0..plan.batches_per_epoch()).flat_map(|s| plan.batch(s).items).map(|i| i.item).collect();
        assert_eq!(trained.len(), 18);
        assert!(trained.is_disjoint(&held_out));
        assert_eq!(plan.training().count(), 36);
        let batches = plan.held_out_batches();
        assert!(batches.iter().all(|b| (1..=4).contains(&b.items.len())));
        let batched = batches.iter().flat_map(|b| b.items.iter().map(|i| Sample { bucket: b.bucket, item: i.item }));
        assert_eq!(batched.collect::<Vec<_>>(), plan.held_out());
        let more = Plan::new(&samples(), PlanSettings { held_out: 5, batch_size: 1, ..SETTINGS }).unwrap();
        assert_eq!(more.held_out(), plan.held_out(), "the split depends on the seed alone");
    }

    #[test]
    fn captions_are_dropped_at_the_rate_asked_for() {
        let plan = Plan::new(&samples(), SETTINGS).unwrap();
        let n = 20_000;
        let dropped = (0..n).filter(|&step| plan.drops_caption(step, 3)).count() as f64;
        // Five standard errors of a binomial.
        assert!((dropped - 0.25 * n as f64).abs() < 5.0 * (n as f64 * 0.25 * 0.75).sqrt(), "{dropped}");
        assert!((0..40).any(|step| plan.drops_caption(step, 3) != plan.drops_caption(step, 4)));
        let count = |p| {
            let plan = Plan::new(&samples(), PlanSettings { caption_dropout: p, ..SETTINGS }).unwrap();
            (0..200).filter(|&step| plan.drops_caption(step, 0)).count()
        };
        assert_eq!((count(0.0), count(1.0)), (0, 200));
    }

    #[test]
    fn a_plan_that_takes_over_begins_an_epoch_and_keeps_what_is_held_out() {
        let first = Plan::new(&samples(), PlanSettings { held_out: 5, ..SETTINGS }).unwrap();
        let kept_out: BTreeSet<usize> = first.held_out().iter().map(|s| s.item).collect();
        let some: Vec<Sample> = samples().into_iter().filter(|s| s.item < 11 && s.bucket.height() == 64).collect();
        // Two whole epochs and a batch.
        let start = 2 * first.batches_per_epoch() + 1;
        let next = first.followed_by(&some, start).unwrap();
        assert_eq!(next.held_out(), first.held_out());
        let epoch: Vec<PlannedBatch> = (start..start + next.batches_per_epoch()).map(|n| next.batch(n)).collect();
        let mut seen: Vec<usize> = epoch.iter().flat_map(|b| b.items.iter().map(|i| i.item)).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..11).filter(|i| !kept_out.contains(i)).collect::<Vec<_>>());
        assert!(epoch.iter().enumerate().all(|(i, b)| (b.step, b.epoch) == (start + i as u64, 3)));
        assert_eq!(epoch[0].items[0].caption_dropped, next.drops_caption(start, epoch[0].items[0].item));
        let held_out: Vec<Sample> = first.held_out().to_vec();
        assert!(first.followed_by(&held_out, start).is_none(), "nothing but held-out images");
        // The same samples in another epoch come in another order.
        let again = first.followed_by(&samples(), start).unwrap();
        assert!((0..8).any(|i| again.batch(start + i).items != first.batch(i).items));
    }

    #[test]
    fn impossible_plans_are_refused() {
        let refused = |settings| Plan::new(&samples(), settings).is_err();
        assert!(refused(PlanSettings { batch_size: 0, ..SETTINGS }));
        assert!(refused(PlanSettings { held_out: 23, ..SETTINGS }));
        assert!(refused(PlanSettings { caption_dropout: f64::NAN, ..SETTINGS }));
        assert!(Plan::new(&[], SETTINGS).is_err());
    }
}
