//! From heat maps and affinity fields to persons: a limb is a pair of peaks along whose line the field points.
//!
//! Source: Cao et al., "Realtime Multi-Person 2D Pose Estimation using Part Affinity Fields", CVPR 2017, and
//! <https://github.com/Hzzone/pytorch-openpose/blob/master/src/body.py>. Difference: peaks and fields are read at the
//! network's own resolution and interpolated, not enlarged to the image first.

use super::STRIDE;
use super::body::KEYPOINTS;
use crate::error::Result;
use crate::kernels::cpu::view;
use crate::pose::detection::{Detection, Keypoint, Person};
use crate::pose::peaks::{Map, Peak};
use candle_core::Tensor;

/// Pairs of keypoints, and the channel of their field's column component; the row component follows it.
const LIMBS: [(usize, usize, usize); 19] = [
    (1, 2, 12),
    (1, 5, 20),
    (2, 3, 14),
    (3, 4, 16),
    (5, 6, 22),
    (6, 7, 24),
    (1, 8, 0),
    (8, 9, 2),
    (9, 10, 4),
    (1, 11, 6),
    (11, 12, 8),
    (12, 13, 10),
    (1, 0, 28),
    (0, 14, 30),
    (14, 16, 34),
    (0, 15, 32),
    (15, 17, 36),
    (2, 16, 18),
    (5, 17, 26),
];

/// Height of a peak.
const PEAK: f32 = 0.1;
/// Mean of the field along a limb, and the share of points where it reaches that.
const FIELD: f32 = 0.05;
const SHARE: f32 = 0.8;
/// Points at which the field along a limb is read.
const SAMPLES: usize = 10;
/// A person has at least so many keypoints, and at least this mean score.
const LEAST: usize = 4;
const PERSON: f32 = 0.4;

/// Persons, peaks and soft counts of one image; no hands yet.
pub fn decode(fields: &Tensor, heatmaps: &Tensor, height: usize, width: usize) -> Result<Detection> {
    let (_, h, w, channels) = heatmaps.dims4()?;
    let (field_values, heat) = (view(fields)?, view(heatmaps)?);
    let field_channels = fields.dims()[3];
    let map = |channel| Map { values: &heat, height: h, width: w, channels, channel };
    let field = |channel| Map { values: &field_values, height: h, width: w, channels: field_channels, channel };
    let peaks: Vec<Vec<Peak>> = (0..KEYPOINTS.len()).map(|k| map(k).peaks(PEAK, 1)).collect();

    let mut people: Vec<Group> = Vec::new();
    for (from, to, channel) in LIMBS {
        for (a, b, score) in connect(&peaks[from], &peaks[to], [field(channel), field(channel + 1)]) {
            join(&mut people, (from, a), (to, b), score, &peaks);
        }
    }
    let stride = STRIDE as f32;
    let keypoint = |p: &Peak| Keypoint { x: p.x * stride, y: p.y * stride, score: p.score };
    let person = |group: &Group| {
        let found = group.keypoints.iter().flatten().count();
        let score = group.total / found as f32;
        let keypoints = group.keypoints.iter().enumerate().map(|(k, i)| Some(keypoint(&peaks[k][(*i)?]))).collect();
        (found >= LEAST && score >= PERSON).then_some(Person { score: score.min(1.0), keypoints })
    };
    let mut persons: Vec<Person> = people.iter().filter_map(person).collect();
    persons.sort_by(|a, b| b.score.total_cmp(&a.score));
    Ok(Detection {
        height,
        width,
        persons,
        hands: Vec::new(),
        soft_counts: (0..KEYPOINTS.len()).map(|k| map(k).mass().max(0.0)).collect(),
        peaks: peaks.iter().map(|p| p.iter().map(keypoint).collect()).collect(),
    })
}

/// Pairs of peaks that a field joins, best first, each peak at most once: (index, index, score).
fn connect(from: &[Peak], to: &[Peak], field: [Map; 2]) -> Vec<(usize, usize, f32)> {
    let mut candidates = Vec::new();
    for (i, a) in from.iter().enumerate() {
        for (j, b) in to.iter().enumerate() {
            let (dx, dy) = (b.x - a.x, b.y - a.y);
            let length = dx.hypot(dy).max(1e-3);
            let along = |s: usize| {
                let t = s as f32 / (SAMPLES - 1) as f32;
                let (y, x) = (a.y + t * dy, a.x + t * dx);
                (field[0].between(y, x) * dx + field[1].between(y, x) * dy) / length
            };
            let values: Vec<f32> = (0..SAMPLES).map(along).collect();
            let mean = values.iter().sum::<f32>() / SAMPLES as f32;
            // Limbs longer than half the picture are doubtful.
            let score = mean + (0.5 * field[0].height as f32 / length - 1.0).min(0.0);
            let agreeing = values.iter().filter(|v| **v > FIELD).count() as f32;
            if agreeing >= SHARE * SAMPLES as f32 && score > 0.0 {
                candidates.push((i, j, score));
            }
        }
    }
    candidates.sort_by(|a, b| b.2.total_cmp(&a.2));
    let (mut used_from, mut used_to) = (vec![false; from.len()], vec![false; to.len()]);
    candidates.retain(|&(i, j, _)| {
        let free = !used_from[i] && !used_to[j];
        if free {
            (used_from[i], used_to[j]) = (true, true);
        }
        free
    });
    candidates
}

/// Keypoints that belong together: for each kind the index of its peak.
struct Group {
    keypoints: [Option<usize>; KEYPOINTS.len()],
    /// Scores of keypoints and limbs.
    total: f32,
}

/// Adds a limb to the persons that have one of its ends, joins two persons whom it connects, or starts one.
fn join(people: &mut Vec<Group>, (ka, a): (usize, usize), (kb, b): (usize, usize), score: f32, peaks: &[Vec<Peak>]) {
    let with = |people: &[Group], k: usize, i: usize| people.iter().position(|g| g.keypoints[k] == Some(i));
    let added = |k: usize, i: usize| peaks[k][i].score + score;
    match (with(people, ka, a), with(people, kb, b)) {
        (Some(p), Some(q)) if p == q => people[p].total += score,
        (Some(p), Some(q)) => {
            let disjoint =
                people[p].keypoints.iter().zip(&people[q].keypoints).all(|(x, y)| x.is_none() || y.is_none());
            if disjoint {
                let other = people.remove(q.max(p));
                let one = &mut people[p.min(q)];
                for (mine, theirs) in one.keypoints.iter_mut().zip(other.keypoints) {
                    *mine = mine.or(theirs);
                }
                one.total += other.total + score;
            }
        }
        (Some(p), None) if people[p].keypoints[kb].is_none() => {
            people[p].keypoints[kb] = Some(b);
            people[p].total += added(kb, b);
        }
        (None, Some(q)) if people[q].keypoints[ka].is_none() => {
            people[q].keypoints[ka] = Some(a);
            people[q].total += added(ka, a);
        }
        (None, None) => {
            let mut keypoints = [None; KEYPOINTS.len()];
            (keypoints[ka], keypoints[kb]) = (Some(a), Some(b));
            people.push(Group { keypoints, total: added(ka, a) + peaks[kb][b].score });
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Heat maps and fields as a perfect network would give them.
    fn ideal(figures: &[Vec<(usize, f32, f32)>], h: usize, w: usize) -> (Tensor, Tensor) {
        let (mut heat, mut fields) = (vec![0f32; h * w * 19], vec![0f32; h * w * 38]);
        for figure in figures {
            for &(k, y, x) in figure {
                for i in 0..h * w {
                    let d2 = ((i / w) as f32 - y).powi(2) + ((i % w) as f32 - x).powi(2);
                    heat[i * 19 + k] = heat[i * 19 + k].max((-d2 / 1.5).exp());
                }
            }
            for (a, b, channel) in LIMBS {
                let at = |k| figure.iter().find(|p| p.0 == k);
                let (Some(&(_, ay, ax)), Some(&(_, by, bx))) = (at(a), at(b)) else { continue };
                let length = (by - ay).hypot(bx - ax);
                let (uy, ux) = ((by - ay) / length, (bx - ax) / length);
                for i in 0..h * w {
                    let (dy, dx) = ((i / w) as f32 - ay, (i % w) as f32 - ax);
                    let (along, across) = (dy * uy + dx * ux, dy * ux - dx * uy);
                    if (-0.5..=length + 0.5).contains(&along) && across.abs() <= 1.0 {
                        fields[i * 38 + channel] = ux;
                        fields[i * 38 + channel + 1] = uy;
                    }
                }
            }
        }
        let tensor = |values, c| Tensor::from_vec(values, (1, h, w, c), &Device::Cpu).unwrap();
        (tensor(fields, 38), tensor(heat, 19))
    }

    #[test]
    fn two_people_side_by_side_are_told_apart_by_their_fields() {
        let figure = |x: f32| {
            vec![
                (0, 4.0, x),
                (1, 8.0, x),
                (2, 8.0, x - 4.0),
                (3, 13.0, x - 6.0),
                (4, 18.0, x - 6.0),
                (5, 8.0, x + 4.0),
                (6, 13.0, x + 6.0),
                // The left wrist reaches over to the other person.
                (7, 14.0, x + 12.0),
            ]
        };
        let (fields, heat) = ideal(&[figure(12.0), figure(30.0)], 32, 50);
        let found = decode(&fields, &heat, 256, 400).unwrap();
        assert_eq!(found.persons.len(), 2);
        for person in &found.persons {
            let nose = person.keypoints[0].unwrap().x / 8.0;
            for (k, _, x) in figure(if nose < 20.0 { 12.0 } else { 30.0 }) {
                let got = person.keypoints[k].unwrap().x / 8.0;
                assert!((got - x).abs() < 0.6, "{} of the person at {nose}: {got} {x}", KEYPOINTS[k]);
            }
            assert!(person.keypoints[10].is_none());
        }
        assert_eq!(found.peaks[7].len(), 2);
        let (nothing, _) = ideal(&[], 32, 50);
        assert!(decode(&nothing, &heat, 256, 400).unwrap().persons.is_empty(), "peaks without fields are no person");
    }
}
