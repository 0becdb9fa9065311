//! From PoseNet's heads to persons: the surest keypoint that is left starts a person, whose other keypoints are found
//! by following displacements along the skeleton's edges.
//!
//! Source: Papandreou et al., PersonLab (ECCV 2018), and
//! <https://github.com/tensorflow/tfjs-models/blob/master/posenet/src/multi_pose/decode_multiple_poses.ts>. Thresholds
//! are those of its defaults, except for a person's own, which is that of its demos.

use super::{Heads, KEYPOINTS, STRIDE};
use crate::error::Result;
use crate::kernels::cpu::view;
use crate::kernels::math::sigmoid;
use crate::pose::detection::{Detection, Keypoint, Person};
use crate::pose::peaks::Map;

/// Parent and child of the 16 edges, in the order of the displacement channels.
const EDGES: [(usize, usize); 16] = [
    (0, 1),
    (1, 3),
    (0, 2),
    (2, 4),
    (0, 5),
    (5, 7),
    (7, 9),
    (5, 11),
    (11, 13),
    (13, 15),
    (0, 6),
    (6, 8),
    (8, 10),
    (6, 12),
    (12, 14),
    (14, 16),
];

/// Confidence at which a keypoint can start a person, and counts as a peak.
const ROOT: f32 = 0.5;
/// Keypoints of one kind that are nearer than this, in pixels, are the same.
const NEAR: f32 = 20.0;
/// A keypoint that was followed to within this of a peak of its map, in pixels, is the peak. The original keeps what it
/// reached, a cell beside the peak at times, with that cell's low confidence.
const SNAP: f32 = 2.0 * STRIDE as f32;
/// Mean confidence below which a group of keypoints is no person.
const PERSON: f32 = 0.15;
/// Confidence below which a keypoint of a person counts as not found.
const KEYPOINT: f32 = 0.1;
/// At most so many persons.
const MOST: usize = 32;

/// Persons, peaks and soft counts of one image of `height` x `width` pixels; no hands yet.
pub fn decode(heads: &Heads, height: usize, width: usize) -> Result<Detection> {
    let (_, h, w, channels) = heads.heatmap.dims4()?;
    let scores: Vec<f32> = view(&heads.heatmap)?.iter().map(|&x| sigmoid(x)).collect();
    let (offset, forward, backward) =
        (view(&heads.offset)?, view(&heads.displacement_fwd)?, view(&heads.displacement_bwd)?);
    let field = |values, channels| Field { values, channels, width: w };
    let grid = Grid {
        height: h,
        width: w,
        scores: &scores,
        offset: field(&offset, 2 * channels),
        forward: field(&forward, 2 * EDGES.len()),
        backward: field(&backward, 2 * EDGES.len()),
    };
    let map = |channel| Map { values: &scores, height: h, width: w, channels, channel };
    let mut roots: Vec<(usize, Keypoint)> = Vec::new();
    let mut peaks = Vec::new();
    for channel in 0..channels {
        let refined = map(channel).peaks(ROOT, 1).into_iter().map(|p| {
            let cell = (p.y.round() as usize, p.x.round() as usize);
            grid.keypoint(channel, cell)
        });
        let kept = distinct(refined.collect());
        roots.extend(kept.iter().map(|k| (channel, *k)));
        peaks.push(kept);
    }
    roots.sort_by(|a, b| b.1.score.total_cmp(&a.1.score));

    let mut persons: Vec<Person> = Vec::new();
    for (channel, root) in roots {
        if persons.len() == MOST {
            break;
        }
        if persons.iter().any(|p| is_near(p.keypoints[channel], root)) {
            continue;
        }
        let keypoints = grid.person(channel, root, &peaks);
        // What another person has already does not speak for this one.
        let own = |(k, point): (usize, &Keypoint)| {
            let taken = persons.iter().any(|p| is_near(p.keypoints[k], *point));
            if taken { 0.0 } else { point.score }
        };
        let score = keypoints.iter().enumerate().map(own).sum::<f32>() / KEYPOINTS.len() as f32;
        if score >= PERSON {
            let found = keypoints.into_iter().map(|k| (k.score >= KEYPOINT).then_some(k)).collect();
            persons.push(Person { score, keypoints: found });
        }
    }
    persons.sort_by(|a, b| b.score.total_cmp(&a.score));
    let soft_counts = (0..channels).map(|k| map(k).mass()).collect();
    Ok(Detection { height, width, persons, hands: Vec::new(), peaks, soft_counts })
}

fn is_near(a: Option<Keypoint>, b: Keypoint) -> bool {
    a.is_some_and(|a| (a.x - b.x).hypot(a.y - b.y) <= NEAR)
}

/// Of keypoints near each other only the surest.
fn distinct(keypoints: Vec<Keypoint>) -> Vec<Keypoint> {
    let mut kept: Vec<Keypoint> = Vec::new();
    for k in keypoints {
        if !kept.iter().any(|other| is_near(Some(*other), k)) {
            kept.push(k);
        }
    }
    kept
}

/// Vectors in pixels: rows in the first half of the channels, columns in the second.
struct Field<'a> {
    values: &'a [f32],
    channels: usize,
    width: usize,
}

impl Field<'_> {
    fn at(&self, (y, x): (usize, usize), index: usize) -> (f32, f32) {
        let cell = &self.values[(y * self.width + x) * self.channels..][..self.channels];
        (cell[index], cell[self.channels / 2 + index])
    }
}

struct Grid<'a> {
    height: usize,
    width: usize,
    scores: &'a [f32],
    offset: Field<'a>,
    forward: Field<'a>,
    backward: Field<'a>,
}

impl Grid<'_> {
    /// The cell nearest to a pixel.
    fn cell(&self, y: f32, x: f32) -> (usize, usize) {
        let index = |v: f32, n: usize| (v / STRIDE as f32).round().clamp(0.0, (n - 1) as f32) as usize;
        (index(y, self.height), index(x, self.width))
    }

    /// The keypoint that a cell points to.
    fn keypoint(&self, k: usize, cell: (usize, usize)) -> Keypoint {
        let (dy, dx) = self.offset.at(cell, k);
        let score = self.scores[(cell.0 * self.width + cell.1) * KEYPOINTS.len() + k];
        Keypoint { x: (cell.1 * STRIDE) as f32 + dx, y: (cell.0 * STRIDE) as f32 + dy, score }
    }

    /// Follows an edge from a keypoint to another: displacement, then twice the offset at the cell reached.
    fn follow(&self, from: Keypoint, edge: usize, to: usize, field: &Field, peaks: &[Keypoint]) -> Keypoint {
        let (dy, dx) = field.at(self.cell(from.y, from.x), edge);
        let (mut y, mut x) = (from.y + dy, from.x + dx);
        for _ in 0..2 {
            let refined = self.keypoint(to, self.cell(y, x));
            (y, x) = (refined.y, refined.x);
        }
        let distance = |p: &Keypoint| (p.x - x).hypot(p.y - y);
        let nearest = peaks.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
        if let Some(peak) = nearest.filter(|p| distance(p) <= SNAP) {
            return *peak;
        }
        let (cy, cx) = self.cell(y, x);
        Keypoint { x, y, score: self.scores[(cy * self.width + cx) * KEYPOINTS.len() + to] }
    }

    /// All keypoints of the person whose keypoint `k` is `root`: first towards the parents, then towards the children.
    fn person(&self, k: usize, root: Keypoint, peaks: &[Vec<Keypoint>]) -> Vec<Keypoint> {
        let mut found: [Option<Keypoint>; KEYPOINTS.len()] = [None; KEYPOINTS.len()];
        found[k] = Some(root);
        for (edge, &(parent, child)) in EDGES.iter().enumerate().rev() {
            if let (Some(from), None) = (found[child], found[parent]) {
                found[parent] = Some(self.follow(from, edge, parent, &self.backward, &peaks[parent]));
            }
        }
        for (edge, &(parent, child)) in EDGES.iter().enumerate() {
            if let (Some(from), None) = (found[parent], found[child]) {
                found[child] = Some(self.follow(from, edge, child, &self.forward, &peaks[child]));
            }
        }
        // Every keypoint is reached from every other one: the edges are a tree.
        found.into_iter().flatten().collect()
    }
}
