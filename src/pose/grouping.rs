//! Peaks to persons, for networks whose maps do not say which peaks belong together.

use super::detection::{Keypoint, Person};

/// The share of a skeleton's keypoints that makes a person.
const LEAST_SHARE: f32 = 0.3;

/// Groups peaks by nearness. The first keypoint of the skeleton that was found at all (heads come first, and are rarely
/// hidden) starts one person for each of its peaks; then peak after peak goes to the person whose centre is nearest, at
/// most one of a kind to each. Peaks that find no place stay outside: they are in the list of all peaks, and count there.
///
/// `peaks` by keypoint, surest first. Persons with less than three tenths of the keypoints are dropped.
pub fn group_by_distance(peaks: &[Vec<Keypoint>]) -> Vec<Person> {
    let Some(anchor) = peaks.iter().position(|p| !p.is_empty()) else { return Vec::new() };
    let mut groups: Vec<Vec<Option<Keypoint>>> = peaks[anchor]
        .iter()
        .map(|&k| {
            let mut keypoints = vec![None; peaks.len()];
            keypoints[anchor] = Some(k);
            keypoints
        })
        .collect();
    for (kind, candidates) in peaks.iter().enumerate().skip(anchor + 1) {
        let centres: Vec<(f32, f32)> = groups.iter().map(|g| centre(g)).collect();
        let distance = |g: usize, c: usize| {
            let k: &Keypoint = &candidates[c];
            (centres[g].0 - k.x).hypot(centres[g].1 - k.y)
        };
        let mut pairs: Vec<(usize, usize)> =
            (0..groups.len()).flat_map(|g| (0..candidates.len()).map(move |c| (g, c))).collect();
        pairs.sort_by(|&(g, c), &(h, d)| distance(g, c).total_cmp(&distance(h, d)));
        let mut used = vec![false; candidates.len()];
        for (g, c) in pairs {
            if groups[g][kind].is_none() && !used[c] {
                groups[g][kind] = Some(candidates[c]);
                used[c] = true;
            }
        }
    }
    let total = peaks.len() as f32;
    let person = |keypoints: Vec<Option<Keypoint>>| {
        let found = keypoints.iter().flatten().count() as f32;
        let score = keypoints.iter().flatten().map(|k| k.score).sum::<f32>() / total;
        (found >= (LEAST_SHARE * total).max(1.0)).then_some(Person { score, keypoints })
    };
    let mut persons: Vec<Person> = groups.into_iter().filter_map(person).collect();
    persons.sort_by(|a, b| b.score.total_cmp(&a.score));
    persons
}

fn centre(keypoints: &[Option<Keypoint>]) -> (f32, f32) {
    let n = keypoints.iter().flatten().count() as f32;
    let sum = keypoints.iter().flatten().fold((0.0, 0.0), |s, k| (s.0 + k.x, s.1 + k.y));
    (sum.0 / n, sum.1 / n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_figures_are_kept_apart_and_a_third_hand_belongs_to_nobody() {
        let at = |x: f32, y: f32, score| Keypoint { x, y, score };
        let peaks = vec![
            vec![at(20.0, 5.0, 0.9), at(80.0, 5.0, 0.8)],
            vec![at(90.0, 30.0, 0.9), at(10.0, 30.0, 0.7), at(30.0, 40.0, 0.6)],
            vec![at(25.0, 60.0, 0.9)],
            vec![],
        ];
        let persons = group_by_distance(&peaks);
        assert_eq!(persons.len(), 2);
        assert_eq!(persons[0].keypoints[1], Some(peaks[1][1]));
        assert_eq!(persons[0].keypoints[2], Some(peaks[2][0]));
        assert_eq!(persons[1].keypoints[1], Some(peaks[1][0]));
        assert_eq!(persons[1].keypoints[2], None);
        assert!(group_by_distance(&[vec![], vec![]]).is_empty());
        assert!(group_by_distance(&[vec![at(0.0, 0.0, 0.9)], vec![], vec![], vec![]]).is_empty(), "a head alone");
    }
}
