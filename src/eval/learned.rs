//! The measures that need a network: LPIPS, CLIPScore, FID, KID. The network is busy on all cores with one picture, so
//! these go one by one.

use crate::error::Result;
use crate::eval::distance::{FEW, frechet, kernel_distance};
use crate::eval::measure::{Comparison, Evaluation, groups_of, mean_of, pair_cells};
use crate::eval::metrics::*;
use crate::eval::networks::Networks;
use crate::eval::pictures::{Picture, Set};
use crate::eval::singular::Matrix;
use crate::eval::statistics::Measure;
use crate::eval::table::{Cell, Metric};
use crate::model::clip::{Clip, score};
use crate::model::inception::{FEATURES, Inception};
use crate::model::perceptual::{Look, MIN_SIDE, Perceptual};
use crate::progress;
use std::collections::BTreeMap;

/// LPIPS between partners and among the seeds of one prompt.
pub fn perceptual(
    comparison: &Comparison,
    networks: &Networks,
    evaluation: &mut Evaluation,
    quiet: bool,
) -> Result<()> {
    const MISSING: &str = "no weights of LPIPS: name them with `--lpips`";
    let some_groups = comparison.sets.iter().any(|set| !groups_of(set).is_empty());
    let Some(network) = &networks.perceptual else {
        if comparison.paired {
            let cells = pair_cells(comparison, |_| Cell::NotMeasured(MISSING.into()));
            evaluation.table.push(LPIPS, "", cells);
        }
        if some_groups {
            let cells = comparison.sets.iter().map(|_| Cell::NotMeasured(MISSING.into())).collect();
            evaluation.table.push(DIVERSITY_LPIPS, "", cells);
        }
        return Ok(());
    };
    let too_small = format!("no picture has both sides of {MIN_SIDE} pixels or more");
    if comparison.paired {
        let baseline = &comparison.sets[comparison.baseline];
        let total = comparison.sets.iter().map(|set| set.pictures.len()).sum();
        let bar = progress::bar(total, "LPIPS", quiet);
        for (i, set) in comparison.sets.iter().enumerate().filter(|(i, _)| *i != comparison.baseline) {
            let (pairs, _) = set.pairs(baseline);
            let partners: BTreeMap<&str, &Picture> = pairs.into_iter().map(|(p, q)| (p.key.as_str(), q)).collect();
            for (picture, values) in set.pictures.iter().zip(&mut evaluation.pictures[i]) {
                bar.inc(1);
                let Some(partner) = partners.get(picture.key.as_str()) else { continue };
                if let (Some(own), Some(theirs)) = (look(network, picture)?, look(network, partner)?) {
                    values.insert(LPIPS.key, network.distance(&own, &theirs)?);
                }
            }
        }
        bar.finish_and_clear();
        let cells = pair_cells(comparison, |i| Cell::new(mean_of(&evaluation.pictures[i], LPIPS), too_small.as_str()));
        evaluation.table.push(LPIPS, "", cells);
    }
    if some_groups {
        let cell = |set: &Set| Ok(Cell::new(diversity(network, set)?, too_small.as_str()));
        let cells = comparison.sets.iter().map(cell).collect::<Result<_>>()?;
        evaluation.table.push(DIVERSITY_LPIPS, "", cells);
    }
    Ok(())
}

fn look(network: &Perceptual, picture: &Picture) -> Result<Option<Look>> {
    let image = picture.load()?;
    (image.width().min(image.height()) >= MIN_SIDE).then(|| network.look(&image)).transpose()
}

/// The mean over prompts of the mean distance of their pictures.
fn diversity(network: &Perceptual, set: &Set) -> Result<Option<Measure>> {
    let mut means = Vec::new();
    for group in groups_of(set) {
        let looks: Vec<Look> =
            group.iter().map(|p| look(network, p)).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let pairs = (0..looks.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
        let apart = pairs.map(|(i, j)| network.distance(&looks[i], &looks[j])).collect::<Result<Vec<f64>>>()?;
        means.extend(Measure::mean(&apart).map(|m| m.value));
    }
    Ok(Measure::mean(&means))
}

/// CLIPScore of pictures whose prompts are known: Chinese prompts by Chinese CLIP, others by CLIP.
pub fn clip_scores(
    comparison: &Comparison,
    networks: &Networks,
    evaluation: &mut Evaluation,
    quiet: bool,
) -> Result<()> {
    let prompts = || comparison.sets.iter().flat_map(|set| &set.pictures).filter_map(|p| p.prompt.as_deref());
    let rows = [
        (CLIP_SCORE, &networks.clip, false, "CLIP"),
        (CHINESE_CLIP_SCORE, &networks.chinese_clip, true, "Chinese CLIP"),
    ];
    for (metric, network, chinese, name) in rows {
        let num_prompts = prompts().filter(|p| is_chinese(p) == chinese).count();
        // Without a network and without a prompt of the language there is nothing to say, once the other row is there.
        if num_prompts == 0 && network.is_none() && (chinese || networks.chinese_clip.is_some()) {
            continue;
        }
        let why = match (network, num_prompts) {
            (None, _) => format!("no weights of {name}: name them with `--clip`"),
            (Some(_), 0) if chinese => "no prompt is in Chinese".into(),
            (Some(_), _) => "no prompts: in folders they are .txt files beside the pictures".into(),
        };
        if let (Some(network), true) = (network, num_prompts > 0) {
            let bar = progress::bar(num_prompts, metric.title, quiet);
            score_all(network, metric, comparison, evaluation, |prompt| is_chinese(prompt) == chinese, || bar.inc(1))?;
            bar.finish_and_clear();
        }
        let cells = evaluation.pictures.iter().map(|v| Cell::new(mean_of(v, metric), why.as_str())).collect();
        evaluation.table.push(metric, "", cells);
    }
    Ok(())
}

fn score_all(
    network: &Clip,
    metric: Metric,
    comparison: &Comparison,
    evaluation: &mut Evaluation,
    wanted: impl Fn(&str) -> bool,
    done: impl Fn(),
) -> Result<()> {
    let mut texts: BTreeMap<&str, Vec<f32>> = BTreeMap::new();
    let mut num_cut = 0;
    for (set, values) in comparison.sets.iter().zip(&mut evaluation.pictures) {
        for (picture, values) in set.pictures.iter().zip(values) {
            let Some(prompt) = picture.prompt.as_deref().filter(|p| wanted(p)) else { continue };
            if !texts.contains_key(prompt) {
                let (features, cut) = network.text(prompt)?;
                num_cut += usize::from(cut);
                texts.insert(prompt, features);
            }
            values.insert(metric.key, score(&network.image(&picture.load()?)?, &texts[prompt]));
            done();
        }
    }
    if num_cut > 0 {
        evaluation.table.note(format!(
            "{}: {num_cut} prompts are longer than the network reads; their ends do not count",
            metric.title
        ));
    }
    Ok(())
}

/// Whether a prompt has a Chinese letter.
fn is_chinese(text: &str) -> bool {
    text.chars().any(|c| ('\u{4e00}'..='\u{9fff}').contains(&c))
}

/// FID and KID of every set to the reference, which is the baseline if no other is given.
pub fn inception(comparison: &Comparison, networks: &Networks, evaluation: &mut Evaluation, quiet: bool) -> Result<()> {
    let baseline = &comparison.sets[comparison.baseline];
    let (reference, own) = match &comparison.reference {
        Some(reference) => (reference, None),
        None => (baseline, Some(comparison.baseline)),
    };
    let part = format!("to {}", reference.name);
    let Some(network) = &networks.inception else {
        let missing = Cell::NotMeasured("no weights of InceptionV3: name them with `--inception`".into());
        let cell = |i: usize| if Some(i) == own { Cell::Empty } else { missing.clone() };
        for metric in [FID, KID] {
            evaluation.table.push(metric, &part, (0..comparison.sets.len()).map(cell).collect());
        }
        return Ok(());
    };
    let total = comparison.sets.iter().chain(&comparison.reference).map(|set| set.pictures.len()).sum();
    let bar = progress::bar(total, "InceptionV3", quiet);
    let mut features: Vec<Matrix> = Vec::new();
    for set in comparison.sets.iter().chain(&comparison.reference) {
        features.push(features_of(network, set, || bar.inc(1))?);
    }
    bar.finish_and_clear();
    let reference_features = own.map_or_else(|| features.last().expect("the reference is the last"), |i| &features[i]);
    type Distance = fn(&Matrix, &Matrix) -> Result<Option<f64>>;
    for (metric, distance) in [(FID, frechet as Distance), (KID, kernel_distance as Distance)] {
        let mut cells = Vec::new();
        for (i, of_set) in features.iter().enumerate().take(comparison.sets.len()) {
            if Some(i) == own {
                cells.push(Cell::Empty);
                continue;
            }
            let n = of_set.rows.min(reference_features.rows);
            let value = distance(of_set, reference_features)?.map(|v| Measure::of(v, n));
            cells.push(Cell::new(value, "a set of pictures needs two at least"));
        }
        evaluation.table.push(metric, &part, cells);
    }
    let counts: Vec<usize> = features.iter().map(|f| f.rows).collect();
    if let Some(fewest) = counts.iter().min().filter(|n| **n < FEW) {
        evaluation.table.note(format!(
            "FID of fewer than {FEW} pictures (here {fewest}) is biased upwards and grows as they get fewer: compare only \
             values of equal numbers, and prefer KID"
        ));
    }
    Ok(())
}

fn features_of(network: &Inception, set: &Set, done: impl Fn()) -> Result<Matrix> {
    let mut values = Vec::with_capacity(set.pictures.len() * FEATURES);
    for picture in &set.pictures {
        values.extend(network.features(&picture.load()?)?.into_iter().map(f64::from));
        done();
    }
    Ok(Matrix::new(set.pictures.len(), FEATURES, values))
}
