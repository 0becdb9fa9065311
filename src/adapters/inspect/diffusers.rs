//! What diffusers does with an adapter file, step by step as its loader does it.

use super::predict::{Prediction, Verdict};
use crate::adapters::read::alpha::PeftConfig;
use crate::adapters::read::key::Part;
use crate::adapters::read::{AdapterFile, ModuleEntry, ModuleTable, count};
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};

const TOOL: &str = "diffusers";

/// Fields that PEFT's `LoraConfig` has; with any other in the metadata, loading fails.
const LORA_CONFIG: [&str; 42] = [
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
    "megatron_core",
    "trainable_token_indices",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "use_dora",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "qalora_group_size",
    "monteclora_config",
    "layer_replication",
    "runtime_config",
    "lora_bias",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
];
/// `LoraConfig`'s own defaults, for metadata that leaves them out.
const DEFAULT_RANK: usize = 8;
const DEFAULT_ALPHA: f64 = 8.0;

/// The outcome of `pipeline.load_lora_weights(FILE)`.
pub fn predict_diffusers(adapter: &AdapterFile, table: &ModuleTable) -> Prediction {
    let file = adapter.file();
    let names = file.names();
    let dropped_norms = names.iter().any(|n| n.contains("dora_scale"));
    let keys: Vec<&String> = names.iter().filter(|n| !n.contains("dora_scale")).collect();
    let any = |test: &dyn Fn(&str) -> bool| keys.iter().any(|k| test(k));
    let is_foreign = any(&|k| k.ends_with(".alpha"))
        || any(&|k| k.starts_with("lora_unet_"))
        || any(&|k| k.starts_with("diffusion_model."))
        || any(&|k| k.contains("default."));
    let converted = if is_foreign { convert(&keys, adapter, table) } else { as_they_are(&keys) };
    let loaded = match converted {
        Ok(loaded) => loaded,
        Err(why) => return Prediction::fails(TOOL, why),
    };
    if loaded.is_empty() {
        let note = "it looks for keys that begin with `transformer.` and finds none: a warning, and nothing is loaded";
        return Prediction::of(TOOL, adapter, &[], note.into());
    }
    let scales = match runtime_scales(adapter, &loaded) {
        Ok(scales) => scales,
        Err(why) => return Prediction::fails(TOOL, why),
    };
    let known: Vec<(&String, f64)> =
        adapter.transformer.keys().filter_map(|name| Some((name, *scales.get(name.as_str())?))).collect();
    let strangers = loaded.keys().filter(|name| !table.contains(name)).count();
    if known.is_empty() {
        return Prediction::fails(TOOL, "conversion makes names of these keys that the model does not have: an error");
    }
    let mut notes = Vec::new();
    let wrong =
        |test: &dyn Fn(f64) -> bool| known.iter().any(|(name, scale)| test(scale / adapter.transformer[*name].scale));
    if wrong(&|s| s < 0.999) && adapter.stated.transformer.is_none() {
        notes.push("alpha is not seen: B A is applied at scale 1".to_string());
    }
    if wrong(&|s| s > 1.001) {
        notes.push("alpha is applied more than once, or for another rank".into());
    }
    if strangers > 0 {
        notes.push(format!("{} not of this model: a warning", count(strangers, "module")));
    }
    if dropped_norms {
        notes.push("DoRA's norms (`dora_scale`) are dropped with a warning".into());
    }
    let mut prediction = Prediction::of(TOOL, adapter, &known, notes.join("; "));
    if (strangers > 0 || dropped_norms) && prediction.verdict == Verdict::Loads {
        prediction.verdict = Verdict::Partly;
    }
    prediction
}

/// Module name (as the model will be asked for it) to the factor that conversion has put into the matrices.
type Loaded = BTreeMap<String, f64>;

/// Keys of other tools, brought to diffusers' form; what is left over is an error.
fn convert(keys: &[&String], adapter: &AdapterFile, table: &ModuleTable) -> Result<Loaded, String> {
    let has_lora_unet = keys.iter().any(|k| k.strip_prefix("diffusion_model.").unwrap_or(k).starts_with("lora_unet_"));
    let renamed: Vec<String> = keys
        .iter()
        .map(|key| {
            let key = key.strip_prefix("diffusion_model.").unwrap_or(key);
            let key = key.strip_prefix("lora_unet_").unwrap_or(key);
            let key = if has_lora_unet {
                let (stem, end) = key.split_once('.').unwrap_or((key, ""));
                format!("{}.{end}", table.unflatten(stem).unwrap_or(stem))
            } else {
                key.to_string()
            };
            key.replace("default.", "")
        })
        .collect();
    let down_up = renamed.iter().any(|k| k.contains(".lora_down.weight") || k.contains(".lora_up.weight"));
    let (a_end, b_end) =
        if down_up { (".lora_down.weight", ".lora_up.weight") } else { (".lora_A.weight", ".lora_B.weight") };
    let stem_of = |key: &str, end: &str| key.strip_suffix(end).map(String::from);
    let present: HashSet<&str> = renamed.iter().map(String::as_str).collect();
    let has = |stem: &str, end: &str| present.contains(format!("{stem}{end}").as_str());
    let mut loaded = Loaded::new();
    for key in &renamed {
        if key.contains(".alpha") {
            continue;
        }
        let is_b = stem_of(key, b_end).is_some_and(|stem| has(&stem, a_end));
        match stem_of(key, a_end) {
            Some(stem) if !has(&stem, b_end) => {
                return Err(format!("`{stem}` has no lora_B: an error"));
            }
            Some(stem) => {
                let entry = adapter.transformer.get(&stem);
                loaded.insert(stem, entry.map_or(1.0, |e| alpha_over_rank(adapter, e)));
            }
            None if is_b => {}
            None => return Err(format!("`{key}` is left over when keys are converted: an error")),
        }
    }
    Ok(loaded)
}

fn alpha_over_rank(adapter: &AdapterFile, entry: &ModuleEntry) -> f64 {
    let alpha = entry.keys.get(&Part::Alpha).and_then(|s| adapter.file().floats(&s.key).ok()?.first().copied());
    alpha.map_or(1.0, |alpha| f64::from(alpha) / entry.rank.unwrap_or(1) as f64)
}

/// Keys taken to be diffusers' own.
fn as_they_are(keys: &[&String]) -> Result<Loaded, String> {
    if !keys.iter().all(|k| k.contains("lora")) {
        return Err("only keys with `lora` in them are accepted: an error".into());
    }
    let ours: HashSet<&str> = keys.iter().filter_map(|k| k.strip_prefix("transformer.")).collect();
    let mut loaded = Loaded::new();
    for key in &ours {
        let stem = key.split(".lora").next().unwrap_or(key);
        let parts = &key[stem.len()..];
        let pair = match parts {
            ".lora_A.weight" => Some(".lora_B.weight"),
            ".lora_B.weight" => Some(".lora_A.weight"),
            ".lora.down.weight" => Some(".lora.up.weight"),
            ".lora.up.weight" => Some(".lora.down.weight"),
            ".lora_magnitude_vector" | ".lora_magnitude_vector.weight" => None,
            ".lora_down.weight" | ".lora_up.weight" => {
                return Err("lora_down/lora_up under `transformer.` names are not understood: an error".into());
            }
            _ => return Err(format!("`{key}` makes a layer that gets no weights: the model cannot run")),
        };
        if pair.is_some_and(|pair| !ours.contains(format!("{stem}{pair}").as_str())) {
            return Err(format!("`{stem}` lacks one of its matrices: the model cannot run"));
        }
        loaded.insert(stem.to_string(), 1.0);
    }
    Ok(loaded)
}

/// The factor that ends up on B A: what conversion has folded in, times PEFT's alpha / r by the metadata.
fn runtime_scales(adapter: &AdapterFile, loaded: &Loaded) -> Result<Loaded, String> {
    let metadata = adapter.file().metadata();
    let Some(text) = metadata.get("lora_adapter_metadata") else { return Ok(loaded.clone()) };
    let Ok(Value::Object(object)) = serde_json::from_str(text) else {
        return Err("`lora_adapter_metadata` is not JSON: an error".into());
    };
    let ours: Vec<&str> = object.keys().filter_map(|k| k.strip_prefix("transformer.")).collect();
    if ours.is_empty() {
        return Err("`lora_adapter_metadata` has no `transformer.` keys: an error".into());
    }
    if let Some(unknown) = ours.iter().find(|k| !LORA_CONFIG.contains(k)) {
        return Err(format!("`lora_adapter_metadata` has `{unknown}`, which PEFT does not know: an error"));
    }
    let config = PeftConfig::from_json(&Value::Object(object), "transformer.").unwrap_or_default();
    let mut out = Loaded::new();
    for (name, folded) in loaded {
        let said = config.rank_of(name).unwrap_or(DEFAULT_RANK);
        if let Some(rank) = adapter.transformer.get(name).and_then(|e| e.rank).filter(|rank| *rank != said) {
            return Err(format!("the metadata says rank {said} for `{name}`, its tensors have {rank}: an error"));
        }
        let alpha = config.alpha_of(name).unwrap_or(DEFAULT_ALPHA);
        let divisor = if config.rslora { (said as f64).sqrt() } else { said as f64 };
        out.insert(name.clone(), folded * alpha / divisor);
    }
    Ok(out)
}
