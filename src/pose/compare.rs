//! The two terms of the structured loss: how far the maps of a picture are from those of its target.

use super::skeleton::Counted;

/// Below this soft count of the target a relative error is taken as if it were this: a hand where there was none counts,
/// but not without bound.
const LEAST_COUNT: f64 = 0.5;

/// The terms, and their gradients with respect to the prediction's maps.
pub struct Terms {
    /// `sum |p - q| / sum q`: 0 for equal maps, about 1 where nobody is found in the prediction.
    pub pose: f64,
    /// Mean over the groups of keypoints of `huber((c(p) - c(q)) / max(c(q), 1/2))`, c the sum of a group's maps.
    pub count: f64,
    /// Gradient of `pose`.
    pub pose_gradient: Vec<f32>,
    /// Gradient of `count`.
    pub count_gradient: Vec<f32>,
}

/// Compares the maps of a prediction with those of its target.
///
/// Shapes: `prediction`, `target` (h, w, K) with channels last, in one order. The sums run in f64 in one order, so the
/// result does not depend on the number of threads.
pub fn compare(prediction: &[f32], target: &[f32], channels: usize, counted: &Counted) -> Terms {
    let mass: f64 = target.iter().map(|&q| f64::from(q)).sum::<f64>().max(f64::from(f32::MIN_POSITIVE));
    let mut distance = 0f64;
    let step = (1.0 / mass) as f32;
    let mut pose_gradient = Vec::with_capacity(prediction.len());
    for (&p, &q) in prediction.iter().zip(target) {
        distance += f64::from((p - q).abs());
        pose_gradient.push(match p.total_cmp(&q) {
            std::cmp::Ordering::Greater => step,
            std::cmp::Ordering::Less => -step,
            std::cmp::Ordering::Equal => 0.0,
        });
    }

    let mut per_channel = vec![0f64; channels];
    let mut count = 0f64;
    for group in &counted.groups {
        let sum = |maps: &[f32]| -> f64 {
            maps.chunks_exact(channels).flat_map(|cell| group.iter().map(|&k| f64::from(cell[k]))).sum()
        };
        let scale = sum(target).max(LEAST_COUNT);
        let error = (sum(prediction) - sum(target)) / scale;
        let share = 1.0 / counted.groups.len() as f64;
        count += share * if error.abs() <= 1.0 { 0.5 * error * error } else { error.abs() - 0.5 };
        for &k in group {
            per_channel[k] += share * error.clamp(-1.0, 1.0) / scale;
        }
    }
    let count_gradient = (0..prediction.len()).map(|i| per_channel[i % channels] as f32).collect();
    Terms { pose: distance / mass, count, pose_gradient, count_gradient }
}

/// Whether maps show someone: two keypoints (or all, of a network with fewer) with a confidence of one half.
pub fn shows_someone(maps: &[f32], channels: usize) -> bool {
    let sure = |k: usize| maps.iter().skip(k).step_by(channels).any(|&v| v >= 0.5);
    (0..channels).filter(|&k| sure(k)).count() >= channels.min(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    fn counted() -> Counted {
        Counted { what: "limb ends", groups: vec![vec![0], vec![1, 3]] }
    }

    #[test]
    fn equal_maps_are_at_distance_zero_and_empty_ones_at_one() {
        let target = [0.5f32, 1.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.25];
        let same = compare(&target, &target, 4, &counted());
        assert_eq!((same.pose, same.count), (0.0, 0.0));
        assert!(same.pose_gradient.iter().chain(&same.count_gradient).all(|g| *g == 0.0));
        let nobody = compare(&[0.0; 8], &target, 4, &counted());
        assert_eq!((nobody.pose, nobody.count), (1.0, 0.5));
        // Twice as many of everything.
        let doubled = compare(&target.map(|q| 2.0 * q), &target, 4, &counted());
        assert_eq!((doubled.pose, doubled.count), (1.0, 0.5));
        // Three hands more than the target's half a hand, beyond the quadratic part.
        let more = compare(&[0.5, 4.0, 0.25, 0.25, 0.5, 3.5, 0.75, 0.25], &target, 4, &counted());
        assert!((more.count - 0.5 * (6.0 / 2.0 - 0.5)).abs() < 1e-6, "{}", more.count);
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let mut stream = Stream::new(1, 0, 0, Purpose::Bench);
        let mut maps = || (0..24).map(|_| stream.uniform() as f32).collect::<Vec<_>>();
        let (p, q) = (maps(), maps());
        let terms = compare(&p, &q, 4, &counted());
        for i in 0..p.len() {
            let moved = |by: f32| {
                let mut p = p.clone();
                p[i] += by;
                let t = compare(&p, &q, 4, &counted());
                (t.pose, t.count)
            };
            let ((a, c), (b, d)) = (moved(1e-3), moved(-1e-3));
            assert!(((a - b) / 2e-3 - f64::from(terms.pose_gradient[i])).abs() < 1e-4, "pose at {i}");
            assert!(((c - d) / 2e-3 - f64::from(terms.count_gradient[i])).abs() < 1e-4, "count at {i}");
        }
    }

    #[test]
    fn someone_is_two_sure_keypoints() {
        assert!(shows_someone(&[0.1, 0.9, 0.2, 0.6, 0.0, 0.3], 3));
        assert!(!shows_someone(&[0.1, 0.9, 0.2, 0.4, 0.8, 0.3], 3));
        assert!(shows_someone(&[0.1, 0.6], 1));
    }
}
