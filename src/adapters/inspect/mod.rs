//! Looking into an adapter file: what it is, who will load it and at what strength, where it acts, what is wrong.

mod diffusers;
mod html;
mod lint;
mod predict;
mod strength;
mod text;

pub use html::page;
pub use lint::{Level, Lint, Model};
pub use predict::{Prediction, Verdict};
pub use strength::{Strength, block_of};

use crate::adapters::convert::BaseWeight;
use crate::adapters::file::BASE_FINGERPRINT;
use crate::adapters::read::{AdapterFile, ModuleTable, Part, PartStyle, Prefix};
use crate::error::Result;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// All that is known of an adapter file.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// The file's path.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// Whose spelling it is.
    pub spelling: String,
    /// LoRA, LoHa, LoKr, DoRA: number of modules of each.
    pub kinds: BTreeMap<String, usize>,
    /// Storage types of the factors.
    pub dtypes: BTreeSet<String>,
    /// Numbers in all factors.
    pub params: usize,
    /// Where the scale is stored.
    pub alpha_from: BTreeSet<&'static str>,
    /// Ranks, alphas and scales by group of modules.
    pub groups: Vec<Group>,
    /// Modules of the text encoder.
    pub text_encoder_modules: usize,
    /// What the metadata says of the base and the training, in the words of its keys.
    pub trained_on: BTreeMap<String, String>,
    /// All metadata.
    pub metadata: BTreeMap<String, String>,
    /// Who loads it.
    pub tools: Vec<Prediction>,
    /// Strength by module.
    pub strength: Vec<Strength>,
    /// What is wrong.
    pub lints: Vec<Lint>,
}

/// The modules of one group.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// Its name in `target_modules`, or `other`.
    pub name: String,
    /// Number of modules.
    pub modules: usize,
    /// Distinct ranks.
    pub ranks: BTreeSet<usize>,
    /// Distinct alphas, as stored; none if none is.
    pub alphas: Vec<f64>,
    /// Distinct scales.
    pub scales: Vec<f64>,
}

/// Inspects an adapter that was read with [`AdapterFile::survey`]. `group_of` names the group of a module.
///
/// Errors: the base cannot be read.
pub fn inspect(
    adapter: &AdapterFile,
    table: &ModuleTable,
    group_of: &dyn Fn(&str) -> Option<String>,
    base: Option<&BaseWeight>,
    model: &Model,
) -> Result<Inspection> {
    let path = adapter.path();
    let bytes = adapter.file().num_bytes();
    let metadata = adapter.file().metadata();
    let strength = strength::strengths(adapter, base)?;
    let tools = predict::predict(adapter, table);
    let lints = lint::lints(adapter, table, &strength, &tools, model);
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for entry in adapter.entries() {
        let kind = format!("{:?}", entry.kind).replace("Lora", "LoRA").replace("Loha", "LoHa").replace("Lokr", "LoKr");
        let name = if entry.dora { format!("DoRA ({kind})") } else { kind };
        *kinds.entry(name).or_default() += 1;
    }
    let factor_keys = adapter.entries().flat_map(|e| e.keys.iter()).filter(|(p, _)| !matches!(p, Part::Alpha));
    let params =
        factor_keys.filter_map(|(_, source)| Some(adapter.file().info(&source.key)?.1.iter().product::<usize>())).sum();
    Ok(Inspection {
        file: path.display().to_string(),
        bytes,
        spelling: spelling(adapter, &metadata),
        kinds,
        dtypes: adapter.entries().map(|e| format!("{:?}", e.dtype)).collect(),
        params,
        alpha_from: adapter.entries().map(|e| e.alpha_source.text()).collect(),
        groups: groups(adapter, group_of),
        text_encoder_modules: adapter.text_encoder.len(),
        trained_on: trained_on(&metadata),
        metadata,
        tools,
        strength,
        lints,
    })
}

fn groups(adapter: &AdapterFile, group_of: &dyn Fn(&str) -> Option<String>) -> Vec<Group> {
    let mut order: Vec<Group> = Vec::new();
    for (name, entry) in &adapter.transformer {
        let group = group_of(name).unwrap_or_else(|| "other".into());
        let at = order.iter().position(|g| g.name == group).unwrap_or_else(|| {
            let fresh = Group { name: group, modules: 0, ranks: BTreeSet::new(), alphas: vec![], scales: vec![] };
            order.push(fresh);
            order.len() - 1
        });
        let group = &mut order[at];
        group.modules += 1;
        group.ranks.extend(entry.rank);
        for (values, value) in [(&mut group.alphas, entry.alpha), (&mut group.scales, Some(entry.scale))] {
            if let Some(value) = value.filter(|v| !values.contains(v)) {
                values.push(value);
            }
        }
    }
    order
}

/// Whose spelling the keys have.
fn spelling(adapter: &AdapterFile, metadata: &BTreeMap<String, String>) -> String {
    if metadata.get("format").is_some_and(|f| f == "qwen-lora.raw") {
        return "qwen-lora checkpoint (raw)".into();
    }
    if metadata.keys().any(|k| k.starts_with("qwen_lora.")) {
        return "qwen-lora export (diffusers keys, scale folded in)".into();
    }
    let of = |(prefix, style): &(Prefix, PartStyle)| match (prefix, style) {
        (_, PartStyle::Alpha | PartStyle::DoraScale | PartStyle::MagnitudeVector) => None,
        (Prefix::Peft, _) => Some("PEFT"),
        (Prefix::LoraUnet, _) => Some("kohya / musubi-tuner"),
        (Prefix::LoraTransformer, _) => Some("OneTrainer"),
        (Prefix::Lycoris, _) => Some("LyCORIS (SimpleTuner)"),
        (Prefix::DiffusionModel, _) => Some("ComfyUI (ai-toolkit, diffusion-pipe)"),
        (Prefix::Transformer, PartStyle::DownUp) => Some("OneTrainer"),
        (Prefix::Transformer, _) => Some("diffusers"),
        (Prefix::Bare, PartStyle::AbNamed) => Some("DiffSynth-Studio"),
        (Prefix::Bare, PartStyle::DownUp) => Some("bare names with lora_down/up (Lightning)"),
        (Prefix::Bare, _) => Some("bare names"),
        (Prefix::TextEncoder, _) => Some("text encoder"),
    };
    let names: BTreeSet<&str> = adapter.spellings().iter().filter_map(of).collect();
    match names.len() {
        0 => "none known".into(),
        _ => names.into_iter().collect::<Vec<_>>().join(" + "),
    }
}

/// Metadata about the base and the training, apart from what is about the file.
fn trained_on(metadata: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    const TELLING: [&str; 14] = [
        "modelspec.title",
        "modelspec.architecture",
        "modelspec.resolution",
        "qwen_lora.base",
        BASE_FINGERPRINT,
        "qwen_lora.dataset_hash",
        "ss_sd_model_name",
        "ss_base_model_version",
        "ss_network_module",
        "ss_num_train_images",
        "ss_steps",
        "ss_learning_rate",
        "base_model",
        "software",
    ];
    TELLING.iter().filter_map(|k| Some((k.to_string(), metadata.get(*k)?.clone()))).collect()
}
