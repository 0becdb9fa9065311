//! Sets of pictures made for the evaluation: every prompt with every seed, by the base model and with each adapter.
//!
//! Pictures go to files with their recipes in them, and those that are there with the same recipe are not made again:
//! an evaluation that was interrupted goes on, and one with more networks costs no new pictures.

use crate::error::{Error, Result};
use crate::eval::pictures::{Part, Picture, Set};
use crate::io::png;
use crate::sample::recipe::KEYWORD;
use crate::sample::{Generator, LoraUse, Recipe};
use candle_core::Device;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The name of the column and folder without adapters.
pub const BASE: &str = "base";

/// A column: its name and its adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct Variant {
    /// Title of the column.
    pub name: String,
    /// What is applied; nothing for the base model.
    pub loras: Vec<LoraUse>,
}

impl Variant {
    /// The base model and `adapters`, under names of their own.
    pub fn beside_base(adapters: Vec<Variant>) -> Vec<Self> {
        let mut variants = vec![Self { name: BASE.into(), loras: Vec::new() }];
        for mut variant in adapters {
            let name = variant.name.clone();
            let taken =
                |variants: &[Self], name: &str| variants.iter().any(|v| folder_name(&v.name) == folder_name(name));
            let mut number = 2;
            while taken(&variants, &variant.name) {
                variant.name = format!("{name} ({number})");
                number += 1;
            }
            variants.push(variant);
        }
        variants
    }
}

/// A prompt of the evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// The text.
    pub text: String,
    /// What it has to do with the trigger, if one is known.
    pub part: Option<Part>,
}

/// Sorts prompts by the trigger. For each prompt with it, the same prompt with the class word in its place, if there
/// is one, and the same without it are added, unless they are there.
///
/// Errors (usage): no prompt has the trigger.
pub fn by_trigger(prompts: &[String], trigger: Option<&str>, class: Option<&str>) -> Result<Vec<Prompt>> {
    let Some(trigger) = trigger.map(str::trim).filter(|t| !t.is_empty()) else {
        return Ok(prompts.iter().map(|text| Prompt { text: text.clone(), part: None }).collect());
    };
    let class = class.map(str::trim).filter(|c| !c.is_empty());
    if !prompts.iter().any(|p| p.contains(trigger)) {
        return Err(Error::usage(format!("no prompt has the trigger `{trigger}`"))
            .hint("prompts with it show what was learned; those without are added by themselves"));
    }
    let mut all: Vec<Prompt> = Vec::new();
    let mut put = |text: String, part: Part| {
        if !text.is_empty() && !all.iter().any(|p| p.text == text) {
            all.push(Prompt { text, part: Some(part) });
        }
    };
    for text in prompts {
        if text.contains(trigger) {
            put(text.clone(), Part::Trigger);
        } else if class.is_some_and(|c| text.contains(c)) {
            put(text.clone(), Part::Class);
        } else {
            put(text.clone(), Part::NoTrigger);
        }
    }
    for text in prompts.iter().filter(|p| p.contains(trigger)) {
        if let Some(class) = class {
            put(tidy(&text.replace(trigger, class)), Part::Class);
        }
        put(tidy(&text.replace(trigger, "")), Part::NoTrigger);
    }
    Ok(all)
}

/// Without the double spaces and lonely commas that a word leaves behind.
fn tidy(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let text = text.replace(" ,", ",").replace(",,", ",").replace("，，", "，");
    text.trim_matches([' ', ',', '，', '、']).to_string()
}

/// Makes the pictures of all variants in folders of `folder`, `batch_size` at a time. `settings` has everything but
/// prompts and adapters. Gives the sets and what the user should know.
///
/// Errors: those of [`Generator::open`] and [`Generator::run`].
pub fn make(
    settings: &Recipe,
    variants: &[Variant],
    prompts: &[Prompt],
    folder: &Path,
    run: &Run,
) -> Result<(Vec<Set>, Vec<String>)> {
    let pairs = variants.iter().flat_map(|v| prompts.iter().map(move |p| (v, p)));
    let (routed, texts) = pairs.clone().map(|(v, p)| (v.loras.clone(), p.text.clone())).unzip();
    let recipe = Recipe { prompts: texts, routed, ..settings.clone() };
    let generator = Generator::open(recipe, run.offline, run.device.clone())?;
    let recipe = generator.recipe().clone();
    let places: Vec<PathBuf> =
        pairs.clone().enumerate().map(|(i, (v, _))| place(folder, v, i % prompts.len())).collect();
    let path = |i: usize, seed: u64| places[i].with_file_name(format!("{}-{seed}.png", file_stem(&places[i])));

    let there = |&i: &usize| {
        let made_of = |seed| recipe.single(i, seed, None).to_text();
        let is_there =
            |&seed: &u64| matches!(png::read_text(&path(i, seed), KEYWORD), Ok(Some(t)) if t == made_of(seed));
        recipe.seeds.iter().all(is_there)
    };
    let missing: Vec<usize> = (0..recipe.prompts.len()).filter(|i| !there(i)).collect();
    for parent in missing.iter().filter_map(|&i| places[i].parent()).collect::<BTreeSet<_>>() {
        std::fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
    }
    if !missing.is_empty() {
        let rest = Recipe {
            prompts: missing.iter().map(|&i| recipe.prompts[i].clone()).collect(),
            routed: missing.iter().map(|&i| recipe.routed[i].clone()).collect(),
            ..recipe.clone()
        };
        Generator::open(rest, run.offline, run.device.clone())?.run(run.batch_size, run.quiet, |image| {
            let i = missing[image.job.prompt];
            let text = recipe.single(i, image.job.seed, None).to_text();
            png::write(&path(i, image.job.seed), &image.pixels, &[(KEYWORD, &text)])
        })?;
    }
    let set = |(v, variant): (usize, &Variant)| {
        let picture = |p: usize, seed: u64| {
            let path = path(v * prompts.len() + p, seed);
            let (prompt, part) = (Some(prompts[p].text.clone()), prompts[p].part);
            Picture { key: file_stem(&path), path, prompt, group: Some(p), part }
        };
        let all = (0..prompts.len()).flat_map(|p| recipe.seeds.iter().map(move |&seed| (p, seed)));
        Set { name: variant.name.clone(), pictures: all.map(|(p, seed)| picture(p, seed)).collect() }
    };
    Ok((variants.iter().enumerate().map(set).collect(), generator.notes().to_vec()))
}

/// How pictures are made.
#[derive(Clone, Debug)]
pub struct Run {
    /// What the transformer computes on.
    pub device: Device,
    /// Images that go through the transformer together.
    pub batch_size: usize,
    /// Take a hub model from the local cache only.
    pub offline: bool,
    /// Show no progress.
    pub quiet: bool,
}

/// Where pictures of a prompt go, without seed and extension.
fn place(folder: &Path, variant: &Variant, prompt: usize) -> PathBuf {
    folder.join(folder_name(&variant.name)).join(format!("{:03}", prompt + 1))
}

fn folder_name(name: &str) -> String {
    let safe = |c: char| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    name.chars().map(safe).collect::<String>().trim_start_matches('.').to_string()
}

fn file_stem(path: &Path) -> String {
    path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_prompt_with_the_trigger_gets_its_twins_without() {
        let prompts = ["sks cat, on a chair", "a dog", "a cat"].map(String::from);
        let texts = |class: Option<&str>| -> Vec<(String, Part)> {
            by_trigger(&prompts, Some("sks"), class).unwrap().into_iter().map(|p| (p.text, p.part.unwrap())).collect()
        };
        let pair = |text: &str, part| (text.to_string(), part);
        let (with, class, without) = (Part::Trigger, Part::Class, Part::NoTrigger);
        assert_eq!(
            texts(None),
            [pair(&prompts[0], with), pair("a dog", without), pair("a cat", without), pair("cat, on a chair", without)]
        );
        assert_eq!(texts(Some("a black"))[3], pair("a black cat, on a chair", class));
        let chinese = by_trigger(&["水墨，一只猫".into(), "一只猫".into()], Some("水墨"), None).unwrap();
        assert_eq!(chinese.len(), 2, "the twin is there already");
        assert!(by_trigger(&prompts, Some("nothing"), None).is_err());
        assert!(by_trigger(&prompts, None, None).unwrap().iter().all(|p| p.part.is_none()));
    }

    #[test]
    fn columns_have_names_of_their_own() {
        let variant = |name: &str| Variant { name: name.into(), loras: Vec::new() };
        let names: Vec<String> = Variant::beside_base(vec![variant("a"), variant("base"), variant("a")])
            .into_iter()
            .map(|v| v.name)
            .collect();
        assert_eq!(names, ["base", "a", "base (2)", "a (2)"]);
        assert_eq!(folder_name("../x:0.8"), "_x_0.8");
    }
}
