//! From sets of pictures to the table.
//!
//! One set is the baseline: the other folder, or the base model. Every other set is compared with it picture by picture.

use crate::error::{Error, Result};
use crate::eval::anatomy;
use crate::eval::learned;
use crate::eval::looks::Looks;
use crate::eval::metrics::*;
use crate::eval::networks::Networks;
use crate::eval::pictures::{Part, Picture, Set};
use crate::eval::ssim::{MS_SSIM_SIDE, Window, ms_ssim, psnr, rms_difference, ssim};
use crate::eval::statistics::Measure;
use crate::eval::table::{Cell, Metric, Table};
use crate::progress;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// What is compared.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The columns of the table.
    pub sets: Vec<Set>,
    /// Index of the set that the others are compared with.
    pub baseline: usize,
    /// Whether pictures of one name are compared with each other.
    pub paired: bool,
    /// What FID and KID are distances to; the baseline if nothing else.
    pub reference: Option<Set>,
}

/// The values of one picture, by the metric's key.
pub type Values = BTreeMap<&'static str, f64>;

/// All that was measured.
#[derive(Clone, Debug, Default)]
pub struct Evaluation {
    /// The summary.
    pub table: Table,
    /// Of each set the values of each picture, in the order of its pictures.
    pub pictures: Vec<Vec<Values>>,
}

/// Measures everything that can be. `quiet` shows no progress.
///
/// Errors (usage): a picture that cannot be read, pairs of different sizes, no pairs where there should be some.
pub fn measure(comparison: &Comparison, networks: &Networks, quiet: bool) -> Result<Evaluation> {
    let sets = &comparison.sets;
    let table = Table { columns: sets.iter().map(|set| set.name.clone()).collect(), ..Table::default() };
    let mut evaluation = Evaluation { table, pictures: Vec::new() };
    let total = sets.iter().map(|set| set.pictures.len()).sum();
    let bar = progress::bar(total, "measuring", quiet);
    for (i, set) in sets.iter().enumerate() {
        let partners = match comparison.paired && i != comparison.baseline {
            true => partners(comparison, set, &mut evaluation.table)?,
            false => BTreeMap::new(),
        };
        let values = set.pictures.par_iter().map(|picture| {
            let values = values_of(picture, partners.get(picture.key.as_str()).copied());
            bar.inc(1);
            values
        });
        evaluation.pictures.push(values.collect::<Result<_>>()?);
    }
    bar.finish_and_clear();
    if comparison.paired {
        pair_rows(comparison, &mut evaluation);
    }
    learned::perceptual(comparison, networks, &mut evaluation, quiet)?;
    if comparison.paired {
        part_rows(comparison, &mut evaluation);
    }
    learned::clip_scores(comparison, networks, &mut evaluation, quiet)?;
    learned::inception(comparison, networks, &mut evaluation, quiet)?;
    anatomy::add(comparison, networks.pose.as_deref(), &mut evaluation, quiet)?;
    look_rows(comparison, &mut evaluation);
    diversity_row(comparison, &mut evaluation)?;
    Ok(evaluation)
}

/// The baseline's picture of each key that `set` has too.
fn partners<'a>(comparison: &'a Comparison, set: &'a Set, table: &mut Table) -> Result<BTreeMap<&'a str, &'a Picture>> {
    let baseline = &comparison.sets[comparison.baseline];
    let (pairs, alone) = set.pairs(baseline);
    if pairs.is_empty() {
        let example = |set: &Set| format!("`{}`", set.pictures[0].path.display());
        return Err(Error::usage("the two folders have no file name in common")
            .detail(format!("such as {} and {}", example(set), example(baseline)))
            .hint("pictures are paired by name without extension; `--sets-only` compares the sets as wholes"));
    }
    if alone != [0, 0] {
        table.note(format!(
            "{} pairs; without a partner: {} of {}, {} of {}",
            pairs.len(),
            alone[0],
            set.name,
            alone[1],
            baseline.name
        ));
    }
    Ok(pairs.into_iter().map(|(own, theirs)| (own.key.as_str(), theirs)).collect())
}

fn values_of(picture: &Picture, partner: Option<&Picture>) -> Result<Values> {
    let image = picture.load()?;
    let looks = Looks::of(&image);
    let mut values = Values::from([
        (SHARPNESS.key, looks.sharpness),
        (BRIGHTNESS.key, looks.brightness),
        (CONTRAST.key, looks.contrast),
        (SATURATION.key, looks.saturation),
        (COLOURFULNESS.key, looks.colourfulness),
    ]);
    let Some(partner) = partner else { return Ok(values) };
    let other = partner.load()?;
    if image.dimensions() != other.dimensions() {
        let size = |(w, h): (u32, u32)| format!("{w}x{h}");
        return Err(Error::usage(format!("cannot compare `{}` with its partner", picture.path.display()))
            .expected(
                format!("{}, as `{}` has", size(other.dimensions()), partner.path.display()),
                size(image.dimensions()),
            )
            .hint("resize them to one size; `--sets-only` compares the sets as wholes"));
    }
    values.insert(PSNR.key, psnr(&image, &other));
    values.insert(DRIFT.key, rms_difference(&image, &other));
    let alike = [
        (SSIM_UNIFORM.key, ssim(&image, &other, Window::Uniform7)),
        (SSIM_GAUSSIAN.key, ssim(&image, &other, Window::Gaussian11)),
        (MS_SSIM.key, ms_ssim(&image, &other)),
    ];
    values.extend(alike.into_iter().filter_map(|(key, value)| Some((key, value?))));
    Ok(values)
}

fn pair_rows(comparison: &Comparison, evaluation: &mut Evaluation) {
    let equal = |values: &&Values| values.get(PSNR.key) == Some(&f64::INFINITY);
    for (set, values) in comparison.sets.iter().zip(&evaluation.pictures) {
        let num_equal = values.iter().filter(equal).count();
        if num_equal > 0 {
            evaluation.table.note(format!("{}: {num_equal} pairs are equal and left out of the PSNR", set.name));
        }
    }
    let rows = [
        (PSNR, "all pairs are equal: their PSNR is infinite".to_string()),
        (SSIM_UNIFORM, too_small(Window::Uniform7)),
        (SSIM_GAUSSIAN, too_small(Window::Gaussian11)),
        (MS_SSIM, format!("no picture has both sides longer than {MS_SSIM_SIDE} pixels")),
        (DRIFT, String::new()),
    ];
    for (metric, otherwise) in rows {
        let cells = pair_cells(comparison, |i| Cell::new(mean_of(&evaluation.pictures[i], metric), otherwise.as_str()));
        evaluation.table.push(metric, "", cells);
    }
}

/// Drift from the baseline on prompts with and without the trigger, and how the one compares with the other.
fn part_rows(comparison: &Comparison, evaluation: &mut Evaluation) {
    for part in Part::ALL {
        let has = |set: &Set| set.pictures.iter().any(|p| p.part == Some(part));
        if !comparison.sets.iter().any(has) {
            continue;
        }
        for metric in [DRIFT, LPIPS] {
            let drift = |i: usize, part: Part| {
                let pictures = comparison.sets[i].pictures.iter().zip(&evaluation.pictures[i]);
                let own =
                    pictures.filter(|(p, _)| p.part == Some(part)).filter_map(|(_, v)| v.get(metric.key).copied());
                Measure::mean(&own.collect::<Vec<f64>>())
            };
            let measured = (0..comparison.sets.len()).any(|i| drift(i, part).is_some());
            if !measured {
                continue; // without LPIPS's weights the row for all pictures says why
            }
            let cells = pair_cells(comparison, |i| Cell::new(drift(i, part), "no picture of this kind"));
            let bleed = pair_cells(comparison, |i| match (drift(i, part), drift(i, Part::Trigger)) {
                (Some(own), Some(with)) if with.value > 0.0 => Cell::Value(Measure::of(own.value / with.value, own.n)),
                _ => Cell::NotMeasured("no drift with the trigger to compare with".into()),
            });
            evaluation.table.push(metric, part.name(), cells);
            if part != Part::Trigger {
                let kind = if metric == LPIPS { "LPIPS" } else { "pixels" };
                evaluation.table.push(BLEED, &format!("{}, {kind}", part.name()), bleed);
            }
        }
    }
}

/// A cell for every set that is compared with the baseline, in the order of the sets.
pub(super) fn pair_cells(comparison: &Comparison, cell: impl Fn(usize) -> Cell) -> Vec<Cell> {
    let sets = 0..comparison.sets.len();
    sets.map(|i| if i == comparison.baseline { Cell::Empty } else { cell(i) }).collect()
}

fn look_rows(comparison: &Comparison, evaluation: &mut Evaluation) {
    for metric in [SHARPNESS, BRIGHTNESS, CONTRAST, SATURATION, COLOURFULNESS] {
        let cells = (0..comparison.sets.len()).map(|i| Cell::new(mean_of(&evaluation.pictures[i], metric), ""));
        let cells = cells.collect();
        evaluation.table.push(metric, "", cells);
    }
}

/// The mean of the finite values of a metric.
pub(super) fn mean_of(values: &[Values], metric: Metric) -> Option<Measure> {
    let finite = values.iter().filter_map(|v| v.get(metric.key).copied()).filter(|v| v.is_finite());
    Measure::mean(&finite.collect::<Vec<f64>>())
}

/// The pictures of each prompt that has more than one.
pub(super) fn groups_of(set: &Set) -> Vec<Vec<&Picture>> {
    let mut groups: BTreeMap<usize, Vec<&Picture>> = BTreeMap::new();
    for picture in &set.pictures {
        if let Some(group) = picture.group {
            groups.entry(group).or_default().push(picture);
        }
    }
    groups.into_values().filter(|pictures| pictures.len() > 1).collect()
}

/// How far pictures of one prompt are from each other, the mean over prompts.
fn diversity_row(comparison: &Comparison, evaluation: &mut Evaluation) -> Result<()> {
    let of_group = |pictures: &Vec<&Picture>| -> Result<Option<f64>> {
        let images = pictures.iter().map(|p| p.load()).collect::<Result<Vec<_>>>()?;
        let pairs = (0..images.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
        let apart = pairs.filter_map(|(i, j)| Some(1.0 - ssim(&images[i], &images[j], Window::Gaussian11)?));
        Ok(Measure::mean(&apart.collect::<Vec<f64>>()).map(|m| m.value))
    };
    let cell = |set: &Set| -> Result<Cell> {
        let groups = groups_of(set);
        if groups.is_empty() {
            return Ok(Cell::Empty);
        }
        let apart = groups.par_iter().map(of_group).collect::<Result<Vec<_>>>()?;
        let apart: Vec<f64> = apart.into_iter().flatten().collect();
        Ok(Cell::new(Measure::mean(&apart), too_small(Window::Gaussian11)))
    };
    let cells = comparison.sets.iter().map(cell).collect::<Result<_>>()?;
    evaluation.table.push(DIVERSITY, "", cells);
    Ok(())
}

fn too_small(window: Window) -> String {
    format!("no picture is {0}x{0} or larger", window.side())
}
