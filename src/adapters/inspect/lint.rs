//! What is wrong with an adapter, or likely to surprise its user.

use super::predict::{Prediction, Verdict};
use super::strength::{Strength, block_of};
use crate::adapters::read::{AdapterFile, AlphaSource, ModuleTable, Problem, count};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// The adapter does not do what it is for.
    Error,
    /// It may surprise.
    Warning,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lint {
    /// How bad it is.
    pub level: Level,
    /// A short name, the same for findings of one kind.
    pub code: &'static str,
    /// What and where.
    pub text: String,
}

/// What the model is known to be, for findings about coverage.
pub struct Model<'a> {
    /// Number of blocks, if it is known.
    pub num_blocks: Option<usize>,
    /// Modules that get no gradient in training, so that their B stays zero and some tools leave them out.
    pub no_gradient: &'a dyn Fn(&str) -> bool,
}

/// All findings, the worst first.
pub fn lints(
    adapter: &AdapterFile,
    table: &ModuleTable,
    strengths: &[Strength],
    tools: &[Prediction],
    model: &Model,
) -> Vec<Lint> {
    let mut out = Vec::new();
    let mut add = |level, code, text: String| out.push(Lint { level, code, text });
    if adapter.transformer.is_empty() && adapter.text_encoder.is_empty() {
        let is_model = adapter.file().names().iter().any(|n| n.ends_with("norm_q.weight"));
        let text = if is_model {
            "these are the weights of a whole model, not an adapter"
        } else {
            "no module of this file can be used"
        };
        add(Level::Error, "no_adapter", text.into());
    }
    for problem in &adapter.problems {
        let code = match problem {
            Problem::Stranger(..) => "key_not_read",
            Problem::Twice(..) => "key_twice",
            Problem::Incomplete(..) => "incomplete",
            Problem::Misshapen(..) => "misshapen",
            Problem::Swapped(..) => "a_b_swapped",
        };
        add(Level::Error, code, problem.text(table));
    }
    let not_finite: Vec<&str> = strengths.iter().filter(|s| !s.norm.is_finite()).map(|s| s.module.as_str()).collect();
    if let Some(first) = not_finite.first() {
        let text = format!("NaN or infinite values in {}, such as `{first}`", count(not_finite.len(), "module"));
        add(Level::Error, "not_finite", text);
    }
    let zero: Vec<&str> = strengths
        .iter()
        .filter(|s| s.norm == 0.0 && !(model.no_gradient)(&s.module))
        .map(|s| s.module.as_str())
        .collect();
    if !zero.is_empty() && strengths.iter().all(|s| s.norm == 0.0) {
        add(Level::Error, "all_zero", "every B is zero: the adapter is untrained and changes nothing".into());
    } else if let Some(first) = zero.first() {
        let text = format!("B is zero in {}, such as `{first}`: they change nothing", count(zero.len(), "module"));
        add(Level::Warning, "b_zero", text);
    }
    if adapter.entries().any(|e| e.scale == 0.0) {
        add(Level::Warning, "scale_zero", "alpha is 0 in some modules: they change nothing".into());
    }
    for prediction in tools {
        let strengths = prediction.strength.iter().map(|s| format!("{s}")).collect::<Vec<_>>().join(", ");
        let tool = prediction.tool;
        if prediction.strength.iter().any(|s| *s > 1.001) {
            let text = format!("{tool} applies alpha twice or wrongly: strength {strengths} of the one meant");
            add(Level::Warning, "alpha_applied_twice", text);
        } else if prediction.verdict != Verdict::Nothing && prediction.strength.iter().any(|s| *s < 0.999) {
            let text = format!("{tool} does not see alpha: strength {strengths} of the one meant");
            add(Level::Warning, "alpha_ignored", text);
        }
    }
    let broad = |p: &&Prediction| matches!(p.tool, "diffusers" | "ComfyUI");
    if !adapter.transformer.is_empty() && !tools.iter().filter(broad).any(|p| p.verdict == Verdict::Loads) {
        let text =
            "neither diffusers nor ComfyUI loads all of this file: `convert --to diffusers` writes one that both load";
        add(Level::Warning, "not_loaded", text.into());
    }
    if adapter.entries().any(|e| e.alpha_source == AlphaSource::Assumed) && !says_it_is_folded(adapter) {
        let text = "no alpha is stored: right only if it was trained with alpha = rank, or the scale is folded in";
        add(Level::Warning, "alpha_unknown", text.into());
    }
    out.extend(coverage(adapter, model));
    out.sort_by_key(|l| l.level);
    out
}

/// DiffSynth trains with alpha = rank and stores none: that is as meant.
fn says_it_is_folded(adapter: &AdapterFile) -> bool {
    use crate::adapters::read::{PartStyle, Prefix};
    adapter.spellings().iter().all(|s| *s == (Prefix::Bare, PartStyle::AbNamed))
}

/// Parts that most blocks adapt and some do not.
fn coverage(adapter: &AdapterFile, model: &Model) -> Vec<Lint> {
    let mut blocks_of: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
    let mut stack = "";
    for name in adapter.transformer.keys() {
        if let (Some(block), part) = block_of(name) {
            blocks_of.entry(part).or_default().insert(block);
            stack = name.split('.').next().unwrap_or_default();
        }
    }
    let seen = blocks_of.values().filter_map(|b| b.last()).max().map_or(0, |last| last + 1);
    let num_blocks = model.num_blocks.unwrap_or(seen).max(seen);
    let mut gaps: BTreeMap<Vec<usize>, Vec<&str>> = BTreeMap::new();
    for (part, blocks) in blocks_of {
        if blocks.len() * 2 <= num_blocks {
            // Few blocks were meant: a choice, not a gap.
            continue;
        }
        let missing: Vec<usize> = (0..num_blocks)
            .filter(|b| !blocks.contains(b) && !(model.no_gradient)(&format!("{stack}.{b}.{part}")))
            .collect();
        if !missing.is_empty() {
            gaps.entry(missing).or_default().push(part);
        }
    }
    let gap = |(blocks, parts): (Vec<usize>, Vec<&str>)| {
        let last = blocks == [num_blocks - 1];
        let code = if last { "last_block_missing" } else { "blocks_missing" };
        let (block, lacks) = if blocks.len() == 1 { ("block", "lacks") } else { ("blocks", "lack") };
        let numbers: Vec<String> = blocks.iter().map(usize::to_string).collect();
        let text = format!("{block} {} of {num_blocks} {lacks} {}", numbers.join(", "), parts.join(", "));
        Lint { level: Level::Warning, code, text }
    };
    gaps.into_iter().map(gap).collect()
}
