//! How much each latent of an image counts in the loss: more where hands, limbs and persons are, less where the user's
//! mask is dark.
//!
//! The weight of a latent is `mask * region`. With the brightness `m` of the mask over it, `mask = floor + (1 - floor) m^gamma`.
//! `region` begins at 1 and is moved towards the weight of persons, then of limbs, then of hands, each time by
//! `c^gamma`, where `c` is the share of the latent that lies in a box of that kind: hands have the last word. The weights
//! of an image are divided by their mean.

use crate::config::{Config, Multipliers, Positive, Regions};
use crate::data::mask::LATENT_PIXELS;
use crate::data::resample::Cover;
use crate::data::{Bucket, Sample, Size};
use crate::error::Result;
use crate::train::stages::Timeline;

/// A rectangle in pixels: left, upper, right, lower edge.
pub type Edges = [f32; 4];

/// Where the hands, limbs and persons of an image are, in its own pixels.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Boxes {
    /// One around each person.
    pub persons: Vec<Edges>,
    /// One around each part of an arm or leg.
    pub limbs: Vec<Edges>,
    /// One around each hand.
    pub hands: Vec<Edges>,
}

/// The weights of person, limbs and hands, in this order.
type Weights = [f64; 3];

/// Makes the weights of samples.
pub struct RegionWeights {
    gamma: f64,
    floor: f64,
    /// The weights of each batch.
    stages: Timeline<Weights>,
    /// Of each item of the data set: size and boxes; empty if no weight needs them.
    items: Vec<(Size, Boxes)>,
}

/// Whether any step of the run weighs a region, so that boxes are needed.
pub fn wants_boxes(config: &Config) -> Result<bool> {
    let spans = config.stages.spans(config.training.max_steps)?;
    let weighs = |weights: Weights| weights != [1.0; 3];
    let stages = spans.iter().any(|(_, stage)| weighs(weights_of(&config.regions, &stage.regions)));
    Ok(stages || (spans.is_empty() && weighs(weights_of(&config.regions, &Multipliers::default()))))
}

fn weights_of(regions: &Regions, stage: &Multipliers) -> Weights {
    let or = |own: Option<Positive>, run: f64| own.map_or(run, Positive::get);
    [or(stage.person, regions.person), or(stage.limbs, regions.limbs), or(stage.hands, regions.hands)]
}

impl RegionWeights {
    /// The weights that the config asks for; `items` are size and boxes of each item, or nothing if [`wants_boxes`] says
    /// no. Errors: stages that do not fit the run.
    pub fn new(config: &Config, items: Vec<(Size, Boxes)>) -> Result<Self> {
        let regions = &config.regions;
        let mut stages = Timeline::new(weights_of(regions, &Multipliers::default()));
        for (steps, stage) in config.stages.spans(config.training.max_steps)? {
            let start = steps.start * config.training.gradient_accumulation as u64;
            stages.then(start, weights_of(regions, &stage.regions));
        }
        Ok(Self { gamma: regions.gamma, floor: regions.floor, stages, items })
    }

    /// The weights of `sample` in batch `n`, one for each latent, row by row, with mean 1; `mask` is its mask, of the
    /// same shape. `None` if all are 1.
    pub fn of(&self, sample: Sample, n: u64, mask: Option<&[f32]>) -> Result<Option<Vec<f32>>> {
        let boxes = self.items.get(sample.item).filter(|_| *self.stages.at(n) != [1.0; 3]);
        let boxes = boxes.filter(|(_, b)| !(b.persons.is_empty() && b.limbs.is_empty() && b.hands.is_empty()));
        if mask.is_none() && boxes.is_none() {
            return Ok(None);
        }
        let latents = sample.bucket.height() / LATENT_PIXELS * (sample.bucket.width() / LATENT_PIXELS);
        let mut weights = vec![1f64; latents];
        if let Some((size, boxes)) = boxes {
            let kinds = [&boxes.persons, &boxes.limbs, &boxes.hands];
            for (kind, &goal) in kinds.into_iter().zip(self.stages.at(n)) {
                let covered = coverage(kind, *size, sample.bucket)?;
                for (weight, share) in weights.iter_mut().zip(covered) {
                    *weight += (goal - *weight) * share.powf(self.gamma);
                }
            }
        }
        if let Some(mask) = mask {
            assert_eq!(mask.len(), latents, "a mask has the shape of its latents");
            for (weight, &m) in weights.iter_mut().zip(mask) {
                *weight *= self.floor + (1.0 - self.floor) * f64::from(m).powf(self.gamma);
            }
        }
        let mean = weights.iter().sum::<f64>() / latents as f64;
        Ok(Some(weights.into_iter().map(|w| (w / mean) as f32).collect()))
    }
}

/// The share of each latent of a bucket, row by row, that lies in the one of the `boxes` that covers most of it. The boxes
/// are in pixels of an image of `size` and go where its pixels go when it is resized and cropped to the bucket.
pub fn coverage(boxes: &[Edges], size: Size, bucket: Bucket) -> Result<Vec<f64>> {
    let cover = Cover::new((size.height, size.width), (bucket.height(), bucket.width()))?;
    let (h, w) = (bucket.height() / LATENT_PIXELS, bucket.width() / LATENT_PIXELS);
    let cell = LATENT_PIXELS as f64;
    let to_cells = |edge: f32, from: usize, to: usize, start: usize| {
        (f64::from(edge) * to as f64 / from as f64 - start as f64) / cell
    };
    let overlap = |low: f64, high: f64, i: usize| (high.min(i as f64 + 1.0) - low.max(i as f64)).max(0.0);
    let mut covered = vec![0f64; h * w];
    for &[left, upper, right, lower] in boxes {
        let [x0, x1] = [left, right].map(|x| to_cells(x, size.width, cover.resized.1, cover.columns.start));
        let [y0, y1] = [upper, lower].map(|y| to_cells(y, size.height, cover.resized.0, cover.rows.start));
        for (i, covered) in covered.iter_mut().enumerate() {
            *covered = covered.max(overlap(y0, y1, i / w) * overlap(x0, x1, i % w));
        }
    }
    Ok(covered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::data::{Mask, mask::latent_mask};
    use image::{Rgb, RgbImage};
    use std::path::Path;

    fn config(sets: &[&str]) -> Config {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        Config::parse("model: m\ndata: {path: x}\n", Path::new("a.yaml"), &sets).unwrap()
    }

    fn mask_file(folder: &Path, name: &str, image: &RgbImage) -> Mask {
        let path = folder.join(name);
        image.save(&path).unwrap();
        Mask { hash: blake3::hash(&std::fs::read(&path).unwrap()), path }
    }

    /// A box and a mask that paints the box white are two ways to say one thing, wherever the crop cuts.
    #[test]
    fn boxes_and_masks_go_where_the_pixels_go() {
        let dir = tempfile::tempdir().unwrap();
        for (size, bucket, edges) in [
            ((96, 64), (48, 48), [10.0, 30.0, 50.0, 70.0]),
            ((64, 96), (48, 48), [10.0, 4.0, 41.0, 33.0]),
            ((100, 300), (64, 96), [20.0, 10.0, 170.0, 90.0]),
            ((30, 40), (96, 128), [5.0, 6.0, 20.0, 25.0]),
        ] {
            let (height, width) = size;
            let [x0, y0, x1, y1] = edges;
            let inside = |x: f32, y: f32| x >= x0 && x < x1 && y >= y0 && y < y1;
            let paint = |flip: bool| {
                RgbImage::from_fn(width as u32, height as u32, |x, y| {
                    let x = if flip { width as u32 - 1 - x } else { x };
                    Rgb([if inside(x as f32, y as f32) { 255 } else { 0 }; 3])
                })
            };
            let (size, bucket) = (Size { height, width }, Bucket::new(bucket.0, bucket.1).unwrap());
            let straight = latent_mask(&mask_file(dir.path(), "a.png", &paint(false)), bucket).unwrap();
            let covered = coverage(&[edges], size, bucket).unwrap();
            // Anti-aliasing blurs an edge over a pixel or two of the eight.
            let far = straight.iter().zip(&covered).map(|(&m, c)| (f64::from(m) - c).abs()).fold(0.0, f64::max);
            assert!(far < 0.15, "{size:?}: {far}");
            assert!(covered.iter().any(|&c| c > 0.9) && covered.contains(&0.0));

            let w = bucket.width() / LATENT_PIXELS;
            let mirrored = |row_by_row: &[f64]| -> Vec<f64> {
                row_by_row.chunks(w).flat_map(|r| r.iter().rev().copied()).collect()
            };
            let flipped_box = [width as f32 - x1, y0, width as f32 - x0, y1];
            let flipped = coverage(&[flipped_box], size, bucket).unwrap();
            let far = mirrored(&flipped).iter().zip(&covered).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(far < 1e-6, "{far}");
            let flipped: Vec<f64> = latent_mask(&mask_file(dir.path(), "b.png", &paint(true)), bucket)
                .unwrap()
                .iter()
                .map(|&m| f64::from(m))
                .collect();
            let far =
                mirrored(&flipped).iter().zip(&straight).map(|(a, &b)| (a - f64::from(b)).abs()).fold(0.0, f64::max);
            assert!(far < 0.02, "{far}");
        }
    }

    #[test]
    fn hands_have_the_last_word_and_the_mean_is_one() {
        let stages = "stages=[{name: a, until: 10}, {name: b, regions: {limbs: 3, hands: 6}}]";
        let config = config(&["training.max_steps=20", "training.gradient_accumulation=2", "regions.gamma=1", stages]);
        assert!(wants_boxes(&config).unwrap());
        let size = Size { height: 32, width: 32 };
        // The upper half is an arm, its right end a hand; the lower left latent is half an arm.
        let boxes = Boxes {
            persons: vec![[0.0, 0.0, 32.0, 32.0]],
            limbs: vec![[0.0, 0.0, 32.0, 16.0], [0.0, 24.0, 4.0, 32.0]],
            hands: vec![[24.0, 0.0, 32.0, 16.0]],
        };
        let weights = RegionWeights::new(&config, vec![(size, boxes), (size, Boxes::default())]).unwrap();
        let sample = |item| Sample { bucket: Bucket::new(32, 32).unwrap(), item };
        assert_eq!(
            weights.of(sample(0), 19, None).unwrap(),
            None,
            "the first stage, of ten steps of two batches, is even"
        );
        assert_eq!(weights.of(sample(1), 20, None).unwrap(), None, "nobody there");
        let found = weights.of(sample(0), 20, None).unwrap().unwrap();
        let expected = [3., 3., 3., 6., 3., 3., 3., 6., 1., 1., 1., 1., 2., 1., 1., 1.];
        let mean = expected.iter().sum::<f32>() / 16.0;
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected / mean).abs() < 1e-6, "{found} is not {expected}/{mean}");
        }

        // A mask multiplies; black keeps the floor.
        let mask: Vec<f32> = (0..16).map(|i| if i % 4 == 3 { 0.0 } else { 1.0 }).collect();
        let masked = weights.of(sample(0), 20, Some(&mask)).unwrap().unwrap();
        assert!((masked[3] / masked[2] - 6.0 * 0.05 / 3.0).abs() < 1e-6, "{masked:?}");
        let alone = weights.of(sample(1), 0, Some(&mask)).unwrap().unwrap();
        assert!((alone[3] / alone[2] - 0.05).abs() < 1e-6 && (alone.iter().sum::<f32>() - 16.0).abs() < 1e-4);
        let even = weights.of(sample(1), 0, Some(&[0.0; 16])).unwrap().unwrap();
        assert!(even.iter().all(|&w| w == 1.0), "all black is as good as no mask");
    }

    #[test]
    fn gamma_widens_soft_edges() {
        let config = config(&["regions.hands=5"]);
        let size = Size { height: 16, width: 16 };
        let boxes = Boxes { hands: vec![[0.0, 0.0, 4.0, 8.0]], ..Boxes::default() };
        let weights = RegionWeights::new(&config, vec![(size, boxes)]).unwrap();
        let sample = Sample { bucket: Bucket::new(16, 16).unwrap(), item: 0 };
        let found = weights.of(sample, 0, None).unwrap().unwrap();
        assert!((f64::from(found[0] / found[1]) - (1.0 + 4.0 * 0.5f64.powf(0.7))).abs() < 1e-5, "{found:?}");
        assert!(!wants_boxes(&self::config(&[])).unwrap());
    }
}
