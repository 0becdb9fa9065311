//! Which linear layers get an adapter: `lora.target_modules` against the table of a model's modules.
//!
//! An entry is, in the order in which it is tried:
//! - `re:<regex>`: a regular expression for the **whole** module name (anchored at both ends);
//! - the name of a group of the model, such as `qkv`, `mlp.text` or `visual`;
//! - a glob, if it holds one of `*?[{`: for the whole name, `*` matches dots too (`transformer_blocks.1?.attn.*`);
//! - otherwise a module's exact name, or the end of names at a dot: `attn.to_out.0` is that layer of every block.
//!
//! Entries add up: a module is a target if any entry matches it. Its rank and alpha come from the **last** matching
//! entry that states one of them, so a general entry may stand before or after the special one that refines it.
//! An entry with a rank of its own and no alpha keeps the ratio of `lora.alpha` to `lora.rank`, and with it the
//! strength at which its modules start; one with only an alpha keeps `lora.rank`.

use crate::error::{Error, Result};
use std::collections::BTreeSet;

/// One linear layer of a model, as the model describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleInfo {
    /// The name in the checkpoint, without `.weight`: `transformer_blocks.0.attn.to_q`.
    pub name: String,
    /// Width of the input.
    pub in_features: usize,
    /// Width of the output.
    pub out_features: usize,
    /// Every group name that means this module: `qkv`, `visual`, `qkv.visual`.
    pub groups: Vec<&'static str>,
}

/// One entry of `lora.target_modules`.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetEntry {
    /// Group, name, suffix, glob or `re:` expression.
    pub pattern: String,
    /// Rank for the modules that this entry matches; `None`: `lora.rank`.
    pub rank: Option<usize>,
    /// Alpha for the modules that this entry matches; `None`: see the head of this file.
    pub alpha: Option<f64>,
}

impl From<&str> for TargetEntry {
    fn from(pattern: &str) -> Self {
        Self { pattern: pattern.into(), rank: None, alpha: None }
    }
}

/// Rank and alpha of modules whose entry states none, and how the strength follows from them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraScaling {
    /// `lora.rank`.
    pub rank: usize,
    /// `lora.alpha`.
    pub alpha: f64,
    /// Rank-stabilised scaling: alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
    pub rslora: bool,
}

impl LoraScaling {
    /// The factor on B A.
    pub fn scale(&self, rank: usize, alpha: f64) -> f64 {
        alpha / if self.rslora { (rank as f64).sqrt() } else { rank as f64 }
    }
}

/// One module to adapt.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The module's name.
    pub name: String,
    /// Width of the input.
    pub in_features: usize,
    /// Width of the output.
    pub out_features: usize,
    /// Rank of the adapter.
    pub rank: usize,
    /// Alpha, a number that f32 holds exactly, so that checkpoints give it back as it was.
    pub alpha: f64,
    /// alpha / rank, or alpha / sqrt(rank).
    pub scale: f64,
}

/// The targets that `entries` mean, in the order of `modules`.
///
/// Errors (usage): no entry, an entry that matches nothing (near names and the groups are listed), a bad glob or
/// regex, a rank of zero, an alpha that is not a positive number.
pub fn resolve_targets(modules: &[ModuleInfo], entries: &[TargetEntry], default: LoraScaling) -> Result<Vec<Target>> {
    check_strength("lora", default.rank, default.alpha)?;
    if entries.is_empty() {
        return Err(Error::usage("`lora.target_modules` is empty")
            .hint(format!("name what to train; the groups are {}", list(group_names(modules)))));
    }
    let mut chosen: Vec<Option<(usize, f64)>> = vec![None; modules.len()];
    for entry in entries {
        let stated = own_strength(entry, default)?;
        let matcher = Matcher::new(&entry.pattern, modules, ENTRIES)?;
        let mut matched = false;
        for (module, slot) in modules.iter().zip(&mut chosen) {
            if matcher.matches(module) {
                matched = true;
                *slot = stated.or(*slot).or(Some((default.rank, default.alpha)));
            }
        }
        if !matched {
            return Err(matches_nothing(&entry.pattern, modules, ENTRIES));
        }
    }
    let target = |(module, chosen): (&ModuleInfo, Option<(usize, f64)>)| {
        let (rank, alpha) = chosen?;
        let alpha = f64::from(alpha as f32);
        Some(Target {
            name: module.name.clone(),
            in_features: module.in_features,
            out_features: module.out_features,
            rank,
            alpha,
            scale: default.scale(rank, alpha),
        })
    };
    Ok(modules.iter().zip(chosen).filter_map(target).collect())
}

/// The names of those among `modules` that the patterns of `key` mean, patterns as in `lora.target_modules`.
///
/// Errors (usage): no pattern, one that matches nothing, a bad glob or regex.
pub fn select_modules<'a>(modules: &'a [ModuleInfo], patterns: &[String], key: &str) -> Result<BTreeSet<&'a str>> {
    if patterns.is_empty() {
        return Err(Error::usage(format!("`{key}` is empty: nothing would be trained"))
            .hint(format!("name what to train; the groups are {}", list(group_names(modules)))));
    }
    let mut chosen = BTreeSet::new();
    for pattern in patterns {
        let matcher = Matcher::new(pattern, modules, key)?;
        let mut matching = modules.iter().filter(|m| matcher.matches(m)).peekable();
        if matching.peek().is_none() {
            return Err(matches_nothing(pattern, modules, key));
        }
        chosen.extend(matching.map(|m| m.name.as_str()));
    }
    Ok(chosen)
}

/// The key of the entries in messages.
const ENTRIES: &str = "lora.target_modules";

/// Rank and alpha if the entry states at least one of them.
fn own_strength(entry: &TargetEntry, default: LoraScaling) -> Result<Option<(usize, f64)>> {
    let strength = match (entry.rank, entry.alpha) {
        (None, None) => return Ok(None),
        (Some(rank), Some(alpha)) => (rank, alpha),
        (Some(rank), None) => (rank, default.alpha * rank as f64 / default.rank as f64),
        (None, Some(alpha)) => (default.rank, alpha),
    };
    // A rank of zero would also make the derived alpha zero: the rank is what the user wrote.
    check_strength(&format!("lora.target_modules `{}`", entry.pattern), strength.0, strength.1)?;
    Ok(Some(strength))
}

fn check_strength(place: &str, rank: usize, alpha: f64) -> Result<()> {
    if rank == 0 {
        return Err(Error::usage(format!("{place}: rank is 0")).expected("a rank of at least 1", "0"));
    }
    // f32 is what adapter files hold.
    if !(alpha as f32 > 0.0 && (alpha as f32).is_finite()) {
        return Err(Error::usage(format!("{place}: bad alpha"))
            .expected("a positive number", alpha)
            .hint("alpha / rank is the factor on the adapter; alpha = rank is a sound start"));
    }
    Ok(())
}

enum Matcher {
    Group(String),
    Regex(regex::Regex),
    Glob(globset::GlobMatcher),
    Suffix(String),
}

impl Matcher {
    fn new(pattern: &str, modules: &[ModuleInfo], key: &str) -> Result<Self> {
        let bad = |kind: &str, e: &dyn std::fmt::Display| {
            Error::usage(format!("{key}: `{pattern}` is not a {kind}")).detail(e.to_string())
        };
        if let Some(expression) = pattern.strip_prefix("re:") {
            let whole = format!("^(?:{expression})$");
            return regex::Regex::new(&whole).map(Self::Regex).map_err(|e| bad("regular expression", &e));
        }
        if modules.iter().any(|m| m.groups.contains(&pattern)) {
            return Ok(Self::Group(pattern.into()));
        }
        if pattern.contains(['*', '?', '[', '{']) {
            return globset::Glob::new(pattern).map(|g| Self::Glob(g.compile_matcher())).map_err(|e| bad("glob", &e));
        }
        Ok(Self::Suffix(pattern.into()))
    }

    fn matches(&self, module: &ModuleInfo) -> bool {
        match self {
            Self::Group(group) => module.groups.contains(&group.as_str()),
            Self::Regex(regex) => regex.is_match(&module.name),
            Self::Glob(glob) => glob.is_match(&module.name),
            Self::Suffix(end) => {
                module.name.strip_suffix(end.as_str()).is_some_and(|head| head.is_empty() || head.ends_with('.'))
            }
        }
    }
}

fn matches_nothing(pattern: &str, modules: &[ModuleInfo], key: &str) -> Error {
    let near = near_names(pattern, modules);
    let whose = if key == ENTRIES { "of this model" } else { "that this run trains" };
    let mut error = Error::usage(format!("{key}: `{pattern}` matches no module {whose}"));
    if !near.is_empty() {
        error = error.detail(format!("near names: {}", list(near)));
    }
    error = error.detail(format!("groups: {}", list(group_names(modules))));
    if modules.iter().any(|m| m.name.starts_with(pattern)) {
        return error.hint(format!("names match at their end; for everything below it write `{pattern}*`"));
    }
    error.hint("an entry is a group, a module name or its end, a glob with `*`, or `re:` and a regular expression")
}

/// All group names in the order in which the model first mentions them.
fn group_names(modules: &[ModuleInfo]) -> Vec<&str> {
    let mut seen = BTreeSet::new();
    modules.iter().flat_map(|m| m.groups.iter().copied()).filter(|g| seen.insert(*g)).collect()
}

/// At most four groups, names or ends of names that are spelled like `pattern`, the best first.
fn near_names<'a>(pattern: &str, modules: &'a [ModuleInfo]) -> Vec<&'a str> {
    let plain = pattern.trim_start_matches("re:");
    let ends = modules.iter().flat_map(|m| {
        let after_dots = m.name.match_indices('.').map(|(dot, _)| &m.name[dot + 1..]);
        std::iter::once(m.name.as_str()).chain(after_dots)
    });
    let candidates: BTreeSet<&str> = ends.chain(group_names(modules)).collect();
    let mut scored: Vec<(f64, &str)> =
        candidates.into_iter().map(|c| (strsim::jaro_winkler(plain, c), c)).filter(|(score, _)| *score > 0.8).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().take(4).map(|(_, name)| name).collect()
}

fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, groups: &[&'static str]) -> ModuleInfo {
        ModuleInfo { name: name.into(), in_features: 8, out_features: 6, groups: groups.to_vec() }
    }

    fn table() -> Vec<ModuleInfo> {
        let mut modules = vec![module("img_in", &["entry", "visual", "entry.visual"])];
        for block in 0..12 {
            let at = |name: &str, groups: &[&'static str]| module(&format!("blocks.{block}.{name}"), groups);
            modules.push(at("attn.to_q", &["qkv", "visual", "qkv.visual"]));
            modules.push(at("attn.add_q_proj", &["qkv", "text", "qkv.text"]));
            modules.push(at("attn.to_out.0", &["fusion", "visual", "fusion.visual"]));
            modules.push(at("attn.not_to_out.0", &[]));
        }
        modules
    }

    const DEFAULT: LoraScaling = LoraScaling { rank: 4, alpha: 8.0, rslora: false };

    fn names(entries: &[&str]) -> Vec<String> {
        let entries: Vec<TargetEntry> = entries.iter().map(|&e| e.into()).collect();
        resolve_targets(&table(), &entries, DEFAULT).unwrap().into_iter().map(|t| t.name).collect()
    }

    #[test]
    fn groups_names_suffixes_globs_and_regexes_match_what_they_say() {
        assert_eq!(names(&["qkv"]).len(), 24);
        assert_eq!(names(&["qkv.text"]).len(), 12);
        assert_eq!(names(&["visual"]).len(), 25);
        assert_eq!(names(&["img_in"]), ["img_in"]);
        // At a dot: `not_to_out.0` ends with the same letters.
        assert_eq!(names(&["to_out.0"]).len(), 12);
        assert_eq!(names(&["attn.to_out.0"]).len(), 12);
        // Block 1 is not block 11.
        assert_eq!(names(&["blocks.1.attn.to_q"]), ["blocks.1.attn.to_q"]);
        assert_eq!(names(&["blocks.1?.attn.to_q"]), ["blocks.10.attn.to_q", "blocks.11.attn.to_q"]);
        assert_eq!(names(&["blocks.{2,3}.*to_q"]), ["blocks.2.attn.to_q", "blocks.3.attn.to_q"]);
        // A regex is for the whole name: unanchored it would find block 1, 10 and 11 here.
        assert_eq!(names(&[r"re:blocks\.1\.attn\.(to_q|add_q_proj)"]).len(), 2);
        // Alternatives stay inside the anchors.
        assert_eq!(names(&["re:img_in|blocks"]), ["img_in"]);
    }

    #[test]
    fn targets_come_once_and_in_module_order() {
        let all = names(&["fusion", "qkv", "attn.to_q", "img_in"]);
        assert_eq!(all.len(), 37);
        assert_eq!(all[..3], ["img_in", "blocks.0.attn.to_q", "blocks.0.attn.add_q_proj"]);
    }

    #[test]
    fn own_rank_and_alpha_refine_wherever_the_general_entry_stands() {
        let own = TargetEntry { pattern: "blocks.0.attn.to_q".into(), rank: Some(2), alpha: Some(3.0) };
        for entries in [[own.clone(), "qkv".into()], ["qkv".into(), own]] {
            let targets = resolve_targets(&table(), &entries, DEFAULT).unwrap();
            assert_eq!((targets[0].rank, targets[0].alpha, targets[0].scale), (2, 3.0, 1.5));
            assert_eq!((targets[1].rank, targets[1].alpha, targets[1].scale), (4, 8.0, 2.0));
        }
        let first = TargetEntry { pattern: "qkv".into(), rank: Some(2), alpha: Some(3.0) };
        let last = TargetEntry { pattern: "attn.to_q".into(), rank: None, alpha: Some(1.0) };
        let targets = resolve_targets(&table(), &[first, last], DEFAULT).unwrap();
        assert_eq!((targets[0].rank, targets[0].alpha), (4, 1.0));
        assert_eq!((targets[1].rank, targets[1].alpha), (2, 3.0));
    }

    #[test]
    fn a_rank_of_its_own_keeps_the_strength() {
        let own = TargetEntry { pattern: "img_in".into(), rank: Some(16), alpha: None };
        let target = &resolve_targets(&table(), std::slice::from_ref(&own), DEFAULT).unwrap()[0];
        assert_eq!((target.alpha, target.scale), (32.0, 2.0));
        let rslora = LoraScaling { rslora: true, ..DEFAULT };
        assert_eq!(resolve_targets(&table(), &["img_in".into()], rslora).unwrap()[0].scale, 4.0);
    }

    #[test]
    fn errors_name_the_entry_and_what_is_near() {
        let fail = |entry: TargetEntry| resolve_targets(&table(), &[entry], DEFAULT).unwrap_err().to_string();
        let error = fail("attn.to_ot.0".into());
        assert!(error.contains("`attn.to_ot.0` matches no module"), "{error}");
        assert!(error.contains("near names: `attn.to_out.0`"), "{error}");
        assert!(error.contains("groups: `entry`, `visual`, `entry.visual`, `qkv`"), "{error}");
        assert!(fail("qkv.visul".into()).contains("near names: `qkv.visual`"));
        assert!(fail("blocks.0".into()).contains("`blocks.0*`"));
        assert!(fail("re:(".into()).contains("not a regular expression"));
        assert!(fail("blocks.[".into()).contains("not a glob"));
        let zero = TargetEntry { pattern: "qkv".into(), rank: Some(0), alpha: None };
        assert!(fail(zero).contains("`qkv`: rank is 0"));
        let negative = TargetEntry { pattern: "qkv".into(), rank: None, alpha: Some(-1.0) };
        assert!(fail(negative).contains("expected a positive number, found -1"));
        assert!(resolve_targets(&table(), &[], DEFAULT).is_err());
        let zero = LoraScaling { rank: 0, ..DEFAULT };
        assert!(resolve_targets(&table(), &["qkv".into()], zero).is_err());
    }
}
