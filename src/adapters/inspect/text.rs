//! An inspection for the terminal.

use super::{Inspection, Lint, Prediction, Verdict};
use crate::io::disk::human;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

impl Verdict {
    /// In a word or two.
    pub fn text(self) -> &'static str {
        match self {
            Self::Loads => "loads",
            Self::Partly => "in part",
            Self::Nothing => "loads nothing",
            Self::Fails => "fails",
        }
    }
}

impl Prediction {
    /// The strength in words: `as meant`, `x 0.5`.
    pub fn strength_text(&self) -> String {
        match self.strength.as_slice() {
            [] => "-".into(),
            [one] if (one - 1.0).abs() < 1e-3 => "as meant".into(),
            several => several.iter().map(|s| format!("x {s}")).collect::<Vec<_>>().join(", "),
        }
    }
}

/// Distinct numbers in a row: `4, 8`; a dash for none.
pub fn list<T: fmt::Display>(values: impl IntoIterator<Item = T>) -> String {
    let values: Vec<String> = values.into_iter().map(|v| v.to_string()).collect();
    if values.is_empty() { "-".into() } else { values.join(", ") }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.file)?;
        let kinds = list(self.kinds.iter().map(|(kind, n)| format!("{n} x {kind}")));
        writeln!(f, "  spelling    {}", self.spelling)?;
        writeln!(f, "  modules     {kinds}")?;
        if self.text_encoder_modules > 0 {
            writeln!(f, "              {} of them in the text encoder", self.text_encoder_modules)?;
        }
        writeln!(f, "  parameters  {} in {}, {}", self.params, list(&self.dtypes), human(self.bytes))?;
        writeln!(f, "  alpha from  {}", list(&self.alpha_from))?;
        for (key, value) in &self.trained_on {
            writeln!(f, "  {key}: {value}")?;
        }
        if self.kinds.is_empty() {
            writeln!(f)?;
            return self.findings(f);
        }
        writeln!(f, "\n  {:<12} {:>7}  {:>8}  {:>10}  {:>8}", "group", "modules", "rank", "alpha", "scale")?;
        for g in &self.groups {
            let (ranks, alphas, scales) = (list(&g.ranks), list(&g.alphas), list(&g.scales));
            writeln!(f, "  {:<12} {:>7}  {ranks:>8}  {alphas:>10}  {scales:>8}", g.name, g.modules)?;
        }
        writeln!(f, "\n  {:<18} {:<14} {:<10} note", "tool", "verdict", "strength")?;
        for p in &self.tools {
            writeln!(f, "  {:<18} {:<14} {:<10} {}", p.tool, p.verdict.text(), p.strength_text(), p.note)?;
        }
        self.strength_table(f)?;
        if self.lints.is_empty() {
            writeln!(f, "\n  nothing to complain about")?;
        } else {
            writeln!(f)?;
        }
        self.findings(f)
    }
}

/// Findings of one kind that are shown; a file of another model has thousands.
const SHOWN: usize = 5;

impl Inspection {
    /// The findings to show: the first few of each kind, the last of them with the number of those left out.
    pub(super) fn shown_lints(&self) -> Vec<(&Lint, usize)> {
        let mut shown: Vec<(&Lint, usize)> = Vec::new();
        for lint in &self.lints {
            let of_kind = shown.iter().filter(|(l, _)| l.code == lint.code).count();
            match shown.iter_mut().rfind(|(l, _)| l.code == lint.code) {
                Some((_, left_out)) if of_kind == SHOWN => *left_out += 1,
                _ => shown.push((lint, 0)),
            }
        }
        shown
    }

    fn findings(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (lint, left_out) in self.shown_lints() {
            let level = format!("{:?}", lint.level).to_lowercase();
            writeln!(f, "  {level}: {} [{}]", lint.text, lint.code)?;
            if left_out > 0 {
                writeln!(f, "  and {left_out} more of this kind; `--json` has them all")?;
            }
        }
        Ok(())
    }

    /// Strength by part of the block over the blocks: least, mean, most; relative to the base if it is known.
    fn strength_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let relative = self.strength.iter().all(|s| s.relative.is_some());
        let mut parts: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for s in &self.strength {
            parts.entry(&s.part).or_default().push(s.relative.unwrap_or(s.norm));
        }
        if parts.is_empty() {
            return Ok(());
        }
        let what = if relative { "|change| / |weight|" } else { "|change|" };
        writeln!(f, "\n  {:<28} {:>6}  {:>9}  {:>9}  {:>9}   {what}", "strength", "blocks", "least", "mean", "most")?;
        for (part, values) in parts {
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let (least, most) = values.iter().fold((f64::INFINITY, 0f64), |(l, m), v| (l.min(*v), m.max(*v)));
            writeln!(f, "  {part:<28} {:>6}  {least:>9.4}  {mean:>9.4}  {most:>9.4}", values.len())?;
        }
        let blocks: BTreeSet<usize> = self.strength.iter().filter_map(|s| s.block).collect();
        if blocks.len() > 1 {
            writeln!(f, "\n  {:<28} {:>9}", "block", "mean")?;
            for block in blocks {
                let values: Vec<f64> = self
                    .strength
                    .iter()
                    .filter(|s| s.block == Some(block))
                    .map(|s| s.relative.unwrap_or(s.norm))
                    .collect();
                writeln!(f, "  {block:<28} {:>9.4}", values.iter().sum::<f64>() / values.len() as f64)?;
            }
        }
        Ok(())
    }
}
