//! What a pose network sees in the targets: for each sample a few pieces of its picture with someone in them, and the
//! maps of these pieces.
//!
//! The maps are those of the decoded latents, not of the image file, so that a perfect prediction is at distance 0.

use super::{Entry, FillOptions, Filled, Key, Store, fill};
use crate::data::resample::cover_crop;
use crate::data::{Dataset, Sample};
use crate::error::{Error, Result};
use crate::kernels::cpu::view;
use crate::kernels::no_grad;
use crate::model::vae::CropDecoder;
use crate::pose::compare::shows_someone;
use crate::pose::{Keypoint, PoseNetwork, detect_image};
use crate::rng::{Purpose, Stream};
use candle_core::{Device, Tensor};
use std::collections::HashMap;

/// Pieces kept of one picture at most.
const MOST_CROPS: usize = 4;

/// What is needed to look at targets.
pub struct PoseRequest<'a> {
    /// The network.
    pub network: &'a dyn PoseNetwork,
    /// What makes pixels of latents.
    pub decoder: &'a CropDecoder,
    /// The decoder's identity.
    pub decoder_print: &'a str,
    /// Pixels per latent.
    pub compression: usize,
    /// Longest side of a piece, in pixels.
    pub crop: usize,
    /// The images.
    pub dataset: &'a Dataset,
    /// No progress bars.
    pub quiet: bool,
    /// Asked between two entries; true stops.
    pub stop: &'a dyn Fn() -> bool,
}

/// A piece of a picture, in latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// A piece with someone in it, and its maps (h, w, K).
#[derive(Clone, Debug)]
pub struct Crop {
    /// Where it is.
    pub window: Window,
    /// The network's maps of it.
    pub maps: Tensor,
}

/// The pieces of all samples.
#[derive(Clone, Debug)]
pub struct PoseTargets {
    store: Store,
    /// The entry of each sample with someone in it, and the number of its pieces.
    pieces: HashMap<Sample, (Key, usize)>,
}

impl PoseTargets {
    /// Samples in which someone is.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether nobody is in any sample.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// One of the pieces of a sample, drawn for (seed, step, item); `None` if nobody is in it.
    ///
    /// Errors: an entry that is gone or damaged since the caches were filled.
    pub fn draw(&self, sample: Sample, seed: u64, step: u64) -> Result<Option<Crop>> {
        let Some((key, count)) = self.pieces.get(&sample) else { return Ok(None) };
        let which = Stream::new(seed, step, sample.item as u64, Purpose::Crop).below(*count);
        let mut entry = self.store.require(key)?;
        let (window, maps) = (entry.remove(&window_name(which)), entry.remove(&maps_name(which)));
        let (Some(window), Some(maps)) = (window, maps) else {
            return Err(Error::run(format!("the cache entry `{}` is not whole", self.store.path(key).display()))
                .hint("remove it and run again with `--resume auto`"));
        };
        let edges = window.to_vec1::<u32>()?;
        let [top, left, height, width] =
            edges[..].try_into().map(|e: [u32; 4]| e.map(|v| v as usize)).map_err(|_| {
                Error::run(format!("the cache entry `{}` is of another form", self.store.path(key).display()))
            })?;
        Ok(Some(Crop { window: Window { top, left, height, width }, maps }))
    }
}

fn window_name(i: usize) -> String {
    format!("window.{i}")
}

fn maps_name(i: usize) -> String {
    format!("maps.{i}")
}

const COUNT: &str = "count";

/// Makes sure that all samples have been looked at. `latents` gives each sample's entry of latents, and its tensor.
pub fn fill_pose_targets(
    store: &Store,
    samples: &[(Sample, Key)],
    latents: impl Fn(&Key) -> Result<Tensor>,
    request: &PoseRequest,
) -> Result<(PoseTargets, Filled)> {
    let key = |(_, latents): &(Sample, Key)| {
        Key::pose_maps(latents, request.decoder_print, request.network.fingerprint(), request.crop)
    };
    let keys: Vec<Key> = samples.iter().map(key).collect();
    let options = FillOptions { label: "pose maps", batch_size: 1, quiet: request.quiet };
    let filled = fill(store, &keys, options, |missing| {
        if (request.stop)() {
            return Err(
                Error::interrupted("stopped while looking for persons").hint("run it again: what is cached stays")
            );
        }
        missing.iter().map(|&i| look(samples[i].0, &latents(&samples[i].1)?, request)).collect()
    })?;
    let mut pieces = HashMap::new();
    for ((sample, _), key) in samples.iter().zip(keys) {
        let count = store.require(&key)?.remove(COUNT).map(|t| t.to_vec1::<u32>()).transpose()?;
        let count = count.and_then(|c| c.first().copied()).unwrap_or(0) as usize;
        if count > 0 {
            pieces.insert(*sample, (key, count));
        }
    }
    Ok((PoseTargets { store: store.clone(), pieces }, filled))
}

/// The pieces of one sample, whose normalised latents are (C, h, w).
fn look(sample: Sample, latents: &Tensor, request: &PoseRequest) -> Result<Entry> {
    let (_, h, w) = latents.dims3()?;
    let side = (request.crop / request.compression).max(2);
    let windows = if h <= side && w <= side {
        vec![Window { top: 0, left: 0, height: h, width: w }]
    } else {
        let (height, width) = (sample.bucket.height(), sample.bucket.width());
        let image = cover_crop(&request.dataset.load(sample.item)?, height, width)?;
        let found = detect_image(request.network, &image)?;
        let persons = found.persons.iter().flat_map(|p| p.keypoints.iter().flatten());
        let points: Vec<Keypoint> = found.peaks.iter().flatten().chain(persons).copied().collect();
        choose(&points, [h, w], side, request.compression)
    };
    let mut entry = Entry::new();
    let mut count = 0;
    for window in windows {
        let piece = latents.narrow(1, window.top, window.height)?.narrow(2, window.left, window.width)?;
        let maps = no_grad(|| -> Result<Tensor> {
            let decoded = request.decoder.decode(&piece.unsqueeze(0)?.contiguous()?)?;
            Ok(request.network.maps(&decoded.pixels)?.into_tensor())
        })?;
        let maps = maps.squeeze(0)?;
        if shows_someone(&view(&maps)?, maps.dim(2)?) {
            let edges = [window.top, window.left, window.height, window.width].map(|v| v as u32);
            entry.insert(window_name(count), Tensor::new(&edges, &Device::Cpu)?);
            entry.insert(maps_name(count), maps);
            count += 1;
        }
    }
    entry.insert(COUNT.into(), Tensor::new(&[count as u32], &Device::Cpu)?);
    Ok(entry)
}

/// At most [`MOST_CROPS`] windows with sides of at most `side` latents: first the one with most of the points'
/// confidence, then the one with most of what is in none so far.
fn choose(points: &[Keypoint], [h, w]: [usize; 2], side: usize, compression: usize) -> Vec<Window> {
    let starts = |n: usize| -> Vec<usize> {
        if n <= side {
            return vec![0];
        }
        let mut starts: Vec<usize> = (0..n - side).step_by((side / 2).max(1)).collect();
        starts.push(n - side);
        starts
    };
    let (height, width) = (h.min(side), w.min(side));
    let windows: Vec<Window> = starts(h)
        .into_iter()
        .flat_map(|top| starts(w).into_iter().map(move |left| Window { top, left, height, width }))
        .collect();
    let inside = |window: &Window, p: &Keypoint| {
        let (y, x) = (p.y / compression as f32, p.x / compression as f32);
        let within = |v: f32, start: usize, n: usize| v >= start as f32 && v < (start + n) as f32;
        within(y, window.top, window.height) && within(x, window.left, window.width)
    };
    let mut left: Vec<&Keypoint> = points.iter().collect();
    let mut chosen = Vec::new();
    while chosen.len() < MOST_CROPS {
        let gain = |window: &Window| left.iter().filter(|p| inside(window, p)).map(|p| p.score).sum::<f32>();
        // Of equal windows the first one.
        let mut best: Option<(f32, Window)> = None;
        for window in &windows {
            let gain = gain(window);
            if gain > best.map_or(0.5, |b| b.0) {
                best = Some((gain, *window));
            }
        }
        let Some((_, window)) = best else { break };
        left.retain(|p| !inside(&window, p));
        chosen.push(window);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_go_where_people_are_and_cover_all_of_them_if_four_can() {
        let at = |x: f32, y: f32| Keypoint { x, y, score: 0.9 };
        // Latents of 96 x 64 (768 x 512 pixels), windows of 32 (256 pixels).
        let mut points = vec![at(100.0, 100.0), at(120.0, 200.0), at(90.0, 180.0)];
        let windows = choose(&points, [96, 64], 32, 8);
        assert_eq!(windows, [Window { top: 0, left: 0, height: 32, width: 32 }]);
        points.push(at(500.0, 760.0));
        points.push(at(505.0, 700.0));
        let windows = choose(&points, [96, 64], 32, 8);
        assert_eq!(windows.len(), 2);
        assert_eq!(windows[1], Window { top: 64, left: 32, height: 32, width: 32 });
        assert!(choose(&[], [96, 64], 32, 8).is_empty());
        // A side shorter than a window.
        assert_eq!(choose(&points, [20, 64], 32, 8)[0].height, 20);
    }
}
