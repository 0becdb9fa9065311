//! Which tools load an adapter file, and at what strength. Each tool's rules are followed key by key.
//!
//! Sources: diffusers 0.42.1 (`_convert_non_diffusers_qwen_lora_to_diffusers` and `load_lora_adapter`; every rule is
//! held against recorded outcomes, `scripts/adapters/diffusers_outcomes.py`); ComfyUI's `comfy/lora.py` and
//! `comfy/weight_adapter`; `lora_utils.py` of musubi-tuner
//! (<https://github.com/kohya-ss/musubi-tuner/blob/30c658c4f4b0bf05038b3346eff9670259b10fc7/src/musubi_tuner/utils/lora_utils.py>);
//! DiffSynth-Studio's `GeneralLoRALoader`
//! (<https://github.com/modelscope/DiffSynth-Studio/blob/237d17873336f45267ec6bfe267e56d5b2a4bf7d/diffsynth/utils/lora/general.py>).

use super::diffusers::predict_diffusers;
use crate::adapters::read::key::{Part, PartStyle, Prefix};
use crate::adapters::read::{AdapterFile, Kind, ModuleEntry, ModuleTable};
use serde::Serialize;

/// What a tool does with the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every module is loaded.
    Loads,
    /// Some modules, or only a part of what they are.
    Partly,
    /// Nothing is loaded, with a warning at most.
    Nothing,
    /// Loading ends with an error.
    Fails,
}

/// What a tool does with the file, and the strength that comes of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// The tool.
    pub tool: &'static str,
    /// Whether it loads the file.
    pub verdict: Verdict,
    /// Modules loaded.
    pub modules: usize,
    /// The strengths at which modules are loaded, over the one meant: 1 is right. Distinct values, rising.
    pub strength: Vec<f64>,
    /// Why, where something is not as it should be.
    pub note: String,
}

impl Prediction {
    /// Everything is loaded at the strength meant.
    pub fn is_right(&self) -> bool {
        self.verdict == Verdict::Loads && self.strength.iter().all(|s| (s - 1.0).abs() < 1e-3)
    }

    /// A prediction from the factors that a tool applies to the modules it loads.
    pub(super) fn of(tool: &'static str, adapter: &AdapterFile, applied: &[(&String, f64)], note: String) -> Self {
        let total = adapter.transformer.len();
        let mut strength: Vec<f64> = applied
            .iter()
            .filter_map(|(name, scale)| Some(scale / adapter.transformer.get(*name)?.scale))
            .map(|s| (s * 1e4).round() / 1e4)
            .filter(|s| s.is_finite())
            .collect();
        strength.sort_by(f64::total_cmp);
        strength.dedup();
        let verdict = match applied.len() {
            0 => Verdict::Nothing,
            n if n < total => Verdict::Partly,
            _ => Verdict::Loads,
        };
        Self { tool, verdict, modules: applied.len(), strength, note }
    }

    /// A prediction that loading fails.
    pub(super) fn fails(tool: &'static str, note: impl Into<String>) -> Self {
        Self { tool, verdict: Verdict::Fails, modules: 0, strength: vec![], note: note.into() }
    }
}

/// The predictions for every tool.
pub fn predict(adapter: &AdapterFile, table: &ModuleTable) -> Vec<Prediction> {
    vec![
        predict_diffusers(adapter, table),
        predict_comfyui(adapter),
        predict_diffsynth(adapter),
        predict_musubi(adapter),
    ]
}

fn rank(entry: &ModuleEntry) -> f64 {
    entry.rank.unwrap_or(1) as f64
}

/// The scale of a tool that reads alpha keys and nothing else.
fn key_scale(adapter: &AdapterFile, entry: &ModuleEntry) -> f64 {
    let Some(source) = entry.keys.get(&Part::Alpha) else { return 1.0 };
    if entry.rank.is_none() {
        return 1.0;
    }
    adapter.file().floats(&source.key).ok().and_then(|v| v.first().copied()).map_or(1.0, f64::from) / rank(entry)
}

/// Whether every factor of the module (not alpha, not norms) is spelled in a way that `knows` accepts.
fn factors_are(entry: &ModuleEntry, knows: impl Fn(Prefix, PartStyle) -> bool) -> bool {
    let factors = entry.keys.iter().filter(|(part, _)| !matches!(part, Part::Alpha | Part::Magnitude));
    factors.map(|(_, source)| source).all(|s| knows(s.prefix, s.style))
}

fn predict_comfyui(adapter: &AdapterFile) -> Prediction {
    const TOOL: &str = "ComfyUI";
    let knows = |prefix, style| {
        use PartStyle::{Ab, AbNamed, AbPlain, DotDownUp, DownUp, Lycoris};
        use Prefix::{Bare, DiffusionModel, LoraUnet, Transformer};
        matches!(prefix, Bare | Transformer | DiffusionModel | LoraUnet | Prefix::Lycoris)
            && matches!(style, Ab | AbNamed | AbPlain | DownUp | DotDownUp | Lycoris)
    };
    // Of named adapters it knows the name `default` alone.
    let known_name = |entry: &ModuleEntry| {
        entry.keys.values().all(|s| {
            s.style != PartStyle::AbNamed || s.key.ends_with(".default.weight") && !s.key.contains(".default_")
        })
    };
    let loaded: Vec<(&String, f64)> = adapter
        .transformer
        .iter()
        .filter(|(_, e)| factors_are(e, knows) && known_name(e))
        .map(|(name, e)| (name, key_scale(adapter, e)))
        .collect();
    let lost_norms = adapter
        .transformer
        .values()
        .any(|e| e.keys.get(&Part::Magnitude).is_some_and(|s| s.style == PartStyle::MagnitudeVector));
    let passed_over = "it warns `lora key not loaded` for keys of this spelling";
    let note = if lost_norms { "DoRA's norms are lost: it knows them as `dora_scale` only" } else { passed_over };
    finish(TOOL, adapter, &loaded, lost_norms, note)
}

fn predict_diffsynth(adapter: &AdapterFile) -> Prediction {
    const TOOL: &str = "DiffSynth-Studio";
    let knows = |prefix, style| {
        matches!(prefix, Prefix::Bare | Prefix::DiffusionModel)
            && matches!(style, PartStyle::Ab | PartStyle::AbNamed | PartStyle::DownUp)
    };
    let loaded: Vec<(&String, f64)> = adapter
        .transformer
        .iter()
        .filter(|(_, e)| e.kind == Kind::Lora && !e.dora && factors_are(e, knows))
        .map(|(name, e)| (name, key_scale(adapter, e)))
        .collect();
    let note = "it fuses plain LoRAs under bare or `diffusion_model.` names, and passes over the rest without a word";
    finish(TOOL, adapter, &loaded, false, note)
}

fn predict_musubi(adapter: &AdapterFile) -> Prediction {
    const TOOL: &str = "musubi-tuner";
    let knows = |prefix, style| prefix == Prefix::LoraUnet && matches!(style, PartStyle::DownUp | PartStyle::Lycoris);
    let loaded: Vec<(&String, f64)> = adapter
        .transformer
        .iter()
        .filter(|(_, e)| factors_are(e, knows))
        .map(|(name, e)| (name, key_scale(adapter, e)))
        .collect();
    let lost_norms = !loaded.is_empty() && adapter.transformer.values().any(|e| e.dora);
    let passed_over = "it takes `lora_unet_` names with lora_down/lora_up (its own convert_lora.py makes them)";
    let note = if lost_norms { "DoRA's norms are lost" } else { passed_over };
    finish(TOOL, adapter, &loaded, lost_norms, note)
}

/// A prediction for a tool that takes alpha from keys alone. `note` is why not everything is loaded as it is.
fn finish(
    tool: &'static str,
    adapter: &AdapterFile,
    loaded: &[(&String, f64)],
    lost_norms: bool,
    note: &str,
) -> Prediction {
    let mut prediction = Prediction::of(tool, adapter, loaded, String::new());
    if lost_norms && prediction.verdict == Verdict::Loads {
        prediction.verdict = Verdict::Partly;
    }
    if prediction.verdict != Verdict::Loads {
        prediction.note = note.into();
    } else if !prediction.is_right() {
        prediction.note = "it takes alpha from keys only: B A is applied at scale 1".into();
    }
    prediction
}
