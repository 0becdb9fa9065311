//! How often a detector objects to a body: more than two hands, elbows, knees or feet for each person it sees.
//!
//! This is a *detector-flagged rate*, not the rate of wrong bodies: a detector misses much, fingers above all, and errs
//! more on drawings than on photos, so the share of pictures without a person for it stands beside it. The network must
//! be another one than that of the loss, which an adapter may have learned to please.

use crate::error::Result;
use crate::eval::measure::{Comparison, Evaluation, Values};
use crate::eval::metrics::{ANATOMY, NO_DETECTION};
use crate::eval::statistics::{Measure, mcnemar};
use crate::eval::table::Cell;
use crate::pose::{Detection, Keypoint, PoseNetwork, Skeleton, detect_image};
use crate::progress;
use std::collections::BTreeMap;

/// Keypoints of at least this confidence count.
const SURE: f32 = 0.5;

/// Keypoints of one kind that are nearer than this share of the longer side are one: left and right are easily confused.
const APART: f32 = 0.05;

/// Parts of which a person has two. Where a network knows hands, its wrists say nothing new; likewise feet and ankles.
const PAIRS: [&[&str]; 4] = [&["hand", "wrist"], &["elbow"], &["knee"], &["foot", "ankle"]];

/// Adds the values of every picture and the rows.
pub fn add(
    comparison: &Comparison,
    network: Option<&dyn PoseNetwork>,
    evaluation: &mut Evaluation,
    quiet: bool,
) -> Result<()> {
    let Some(network) = network else {
        let why = "no pose network: name one with `--pose`, such as the built-in `posenet`";
        let cells = comparison.sets.iter().map(|_| Cell::NotMeasured(why.into())).collect();
        evaluation.table.push(ANATOMY, "", cells);
        return Ok(());
    };
    let total = comparison.sets.iter().map(|set| set.pictures.len()).sum();
    let bar = progress::bar(total, "anatomy", quiet);
    for (set, values) in comparison.sets.iter().zip(&mut evaluation.pictures) {
        for (picture, values) in set.pictures.iter().zip(values) {
            let found = detect_image(network, &picture.load()?)?;
            let flagged = is_flagged(&found, network.skeleton());
            values.insert(NO_DETECTION.key, f64::from(flagged.is_none()));
            values.extend(flagged.map(|f| (ANATOMY.key, f64::from(f))));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    rows(comparison, evaluation);
    evaluation.table.note(format!(
        "the anatomy rate is what {} flags among pictures in which it sees a person; it cannot judge fingers",
        network.name()
    ));
    Ok(())
}

/// Whether a picture shows more than its persons should have; `None` without a person.
fn is_flagged(found: &Detection, skeleton: &Skeleton) -> Option<bool> {
    let persons = found.persons.len();
    let apart = APART * found.width.max(found.height) as f32;
    let excess = |kinds: &&[&str]| {
        let named = |kind: &&&str| {
            let ends = |k: &usize| skeleton.keypoints()[*k].ends_with(**kind);
            let keypoints: Vec<usize> = (0..skeleton.keypoints().len()).filter(ends).collect();
            (!keypoints.is_empty()).then_some(keypoints)
        };
        let keypoints = kinds.iter().find_map(|kind| named(&kind)).unwrap_or_default();
        num_distinct(keypoints.iter().flat_map(|&k| &found.peaks[k]), apart) > 2 * persons
    };
    (persons > 0).then(|| found.hands.len() > 2 * persons || PAIRS.iter().any(excess))
}

/// How many of the sure points are `apart` from each other, surest first.
fn num_distinct<'a>(points: impl Iterator<Item = &'a Keypoint>, apart: f32) -> usize {
    let mut points: Vec<&Keypoint> = points.filter(|p| p.score >= SURE).collect();
    points.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut kept: Vec<&Keypoint> = Vec::new();
    for point in points {
        if kept.iter().all(|k| (k.x - point.x).hypot(k.y - point.y) > apart) {
            kept.push(point);
        }
    }
    kept.len()
}

fn rows(comparison: &Comparison, evaluation: &mut Evaluation) {
    let values_of = |i: usize, key: &'static str| -> BTreeMap<&str, bool> {
        let pictures = comparison.sets[i].pictures.iter().zip(&evaluation.pictures[i]);
        pictures.filter_map(|(p, v): (_, &Values)| Some((p.key.as_str(), *v.get(key)? > 0.0))).collect()
    };
    let rate = |values: &BTreeMap<&str, bool>| Measure::rate(values.values().filter(|v| **v).count(), values.len());
    let base = values_of(comparison.baseline, ANATOMY.key);
    let (mut flagged, mut unseen) = (Vec::new(), Vec::new());
    for i in 0..comparison.sets.len() {
        let own = values_of(i, ANATOMY.key);
        let mut measure = rate(&own);
        if comparison.paired && i != comparison.baseline {
            let both = || own.iter().filter_map(|(key, v)| Some((*v, *base.get(key)?)));
            let (more, less) = (both().filter(|p| *p == (true, false)), both().filter(|p| *p == (false, true)));
            measure = measure.map(|m| m.tested(mcnemar(more.count(), less.count())));
        }
        flagged.push(Cell::new(measure, "the network sees no person in any picture"));
        unseen.push(Cell::new(rate(&values_of(i, NO_DETECTION.key)), "no pictures"));
    }
    evaluation.table.push(ANATOMY, "", flagged);
    evaluation.table.push(NO_DETECTION, "", unseen);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::pictures::{Picture, Set};
    use crate::pose::Person;

    fn detection(persons: usize, wrists: [&[(f32, f32)]; 2]) -> Detection {
        let keypoint = |&(x, y): &(f32, f32)| Keypoint { x, y, score: 0.9 };
        let person = Person { score: 0.9, keypoints: vec![None; 2] };
        Detection {
            height: 100,
            width: 100,
            persons: vec![person; persons],
            hands: Vec::new(),
            peaks: wrists.map(|points| points.iter().map(keypoint).collect()).to_vec(),
            soft_counts: vec![0.0; 2],
        }
    }

    #[test]
    fn a_third_wrist_is_flagged_and_left_for_right_is_not() {
        let skeleton = Skeleton::of(&["left_wrist", "right_wrist"]);
        let flagged = |persons, wrists| is_flagged(&detection(persons, wrists), &skeleton);
        // Both maps peak at both wrists.
        assert_eq!(flagged(1, [&[(10.0, 10.0), (80.0, 10.0)], &[(11.0, 10.0), (80.0, 12.0)]]), Some(false));
        let three: [&[(f32, f32)]; 2] = [&[(10.0, 10.0), (40.0, 60.0)], &[(80.0, 10.0)]];
        assert_eq!(flagged(1, three), Some(true));
        assert_eq!(flagged(2, three), Some(false));
        assert_eq!(flagged(0, three), None);
    }

    #[test]
    fn rates_are_paired_with_the_baseline() {
        let set = |name: &str| {
            let picture = |i: usize| Picture {
                key: i.to_string(),
                path: Default::default(),
                prompt: None,
                group: None,
                part: None,
            };
            Set { name: name.into(), pictures: (0..6).map(picture).collect() }
        };
        let comparison = Comparison { sets: vec![set("base"), set("a")], baseline: 0, paired: true, reference: None };
        let mut evaluation = Evaluation::default();
        evaluation.table.columns = vec!["base".into(), "a".into()];
        // Of the base 4 of 6 are flagged, of the adapter 1 of 5: one picture has no person.
        let values = |flagged: [Option<bool>; 6]| {
            let one = |f: Option<bool>| {
                let mut values = Values::from([(NO_DETECTION.key, f64::from(f.is_none()))]);
                values.extend(f.map(|f| (ANATOMY.key, f64::from(f))));
                values
            };
            flagged.map(one).to_vec()
        };
        let (yes, no) = (Some(true), Some(false));
        evaluation.pictures = vec![values([yes, yes, yes, yes, no, no]), values([no, no, no, None, yes, no])];
        rows(&comparison, &mut evaluation);
        let cell = |row: usize, column: usize| match &evaluation.table.rows[row].cells[column] {
            Cell::Value(measure) => *measure,
            other => panic!("{other:?}"),
        };
        assert_eq!((cell(0, 0).value, cell(0, 0).p_value), (4.0 / 6.0, None));
        assert_eq!((cell(0, 1).value, cell(0, 1).n, cell(0, 1).p_value), (0.2, 5, Some(mcnemar(1, 3))));
        assert_eq!(cell(1, 1).value, 1.0 / 6.0);
    }
}
