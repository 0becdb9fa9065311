//! Writing adapters in the spelling that a tool reads, with the scale where that tool looks for it.
//!
//! | format | keys | scale |
//! |---|---|---|
//! | diffusers | `transformer.<m>.lora_A.weight` | folded into B; metadata with alpha = rank |
//! | comfyui | `diffusion_model.<m>.lora_A.weight` | `.alpha` keys |
//! | kohya | `lora_unet_<m_>.lora_down.weight` | `.alpha` keys |
//! | peft | folder: `base_model.model.<m>.lora_A.weight` | `adapter_config.json` |
//! | diffsynth | `<m>.lora_A.default.weight` | folded into B: DiffSynth takes no alpha |
//!
//! Alpha keys and metadata never stand in one file: diffusers would apply both.

use crate::adapters::file::{Provenance, export_metadata};
use crate::adapters::matrix::Matrix;
use crate::adapters::merge::base::check_new;
use crate::adapters::read::Part;
use crate::error::{Error, Result};
use crate::io::atomic::{part_path, rename_synced};
use crate::io::floats::narrow;
use crate::io::safetensors::{RawTensor, write};
use safetensors::Dtype;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// Who shall read the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// diffusers; ComfyUI reads it too.
    Diffusers,
    /// ComfyUI.
    ComfyUi,
    /// kohya's scripts and musubi-tuner.
    Kohya,
    /// PEFT: a folder with `adapter_model.safetensors` and `adapter_config.json`.
    Peft,
    /// DiffSynth-Studio.
    DiffSynth,
}

/// One module as it will be written.
#[derive(Clone, Debug)]
pub struct OutModule {
    /// Dotted name.
    pub name: String,
    /// Factors, and DoRA's norms: shape and values.
    pub parts: BTreeMap<Part, (Vec<usize>, Vec<f32>)>,
    /// The factor on the product of the factors.
    pub scale: f64,
    /// Inner dimension; `None` for a LoKr of two full factors.
    pub rank: Option<usize>,
    /// Alpha as it was stored, kept where it still means the scale.
    pub alpha: Option<f64>,
    /// Storage type.
    pub dtype: Dtype,
}

impl OutModule {
    /// A plain LoRA: B (out, r) and A (r, in).
    pub fn lora(name: &str, b: Matrix, a: Matrix, scale: f64, alpha: Option<f64>, dtype: Dtype) -> Self {
        let rank = Some(a.rows);
        let parts = [(Part::LoraA, (vec![a.rows, a.cols], a.data)), (Part::LoraB, (vec![b.rows, b.cols], b.data))];
        Self { name: name.into(), parts: parts.into(), scale, rank, alpha, dtype }
    }

    /// Whether it is a LoRA without norms, which every format holds.
    pub fn is_plain_lora(&self) -> bool {
        self.parts.keys().all(|p| matches!(p, Part::LoraA | Part::LoraB))
    }

    fn is_lora(&self) -> bool {
        self.parts.contains_key(&Part::LoraA)
    }

    /// The alpha that, over the rank, is the scale.
    fn alpha_out(&self, rank: usize) -> f64 {
        let stored = self.alpha.filter(|alpha| alpha / rank as f64 == self.scale);
        stored.unwrap_or(self.scale * rank as f64)
    }

    /// Multiplies the scale into the factor that starts at zero in training.
    fn fold(&mut self) {
        let part = if self.is_lora() { Part::LoraB } else { Part::LokrW1 };
        if let Some((_, values)) = self.parts.get_mut(&part) {
            values.iter_mut().for_each(|v| *v = (f64::from(*v) * self.scale) as f32);
            self.scale = 1.0;
            self.alpha = None;
        }
    }
}

impl Format {
    /// Whether this format holds the module as it is: LoRA everywhere, the rest only where its readers know it.
    pub fn holds(self, module: &OutModule) -> bool {
        match self {
            Self::ComfyUi | Self::Kohya => true,
            Self::Diffusers | Self::DiffSynth => module.is_plain_lora(),
            // PEFT's DoRA has norms of rows only.
            Self::Peft => {
                let rows = |(shape, _): &(Vec<usize>, Vec<f32>)| shape.len() == 1 || shape[1] == 1;
                module.is_lora() && module.parts.get(&Part::Magnitude).is_none_or(rows)
            }
        }
    }

    fn key(self, module: &str, part: Part) -> String {
        let down_up = matches!(self, Self::Kohya);
        let end = match (self, part) {
            (Self::DiffSynth, Part::LoraA) => "lora_A.default.weight",
            (Self::DiffSynth, Part::LoraB) => "lora_B.default.weight",
            (_, Part::LoraA) => {
                if down_up {
                    "lora_down.weight"
                } else {
                    "lora_A.weight"
                }
            }
            (_, Part::LoraB) => {
                if down_up {
                    "lora_up.weight"
                } else {
                    "lora_B.weight"
                }
            }
            (Self::Peft, Part::Magnitude) => "lora_magnitude_vector",
            (_, other) => other.text(),
        };
        match self {
            Self::Diffusers => format!("transformer.{module}.{end}"),
            Self::ComfyUi => format!("diffusion_model.{module}.{end}"),
            Self::Kohya => format!("lora_unet_{}.{end}", module.replace('.', "_")),
            Self::Peft => format!("base_model.model.{module}.{end}"),
            Self::DiffSynth => format!("{module}.{end}"),
        }
    }
}

/// Writes `modules` for the readers of `format`. `dtype` overrides the modules' own; `metadata` is what the source
/// said, of which everything about the scale and the old file is left out.
///
/// Errors: `out` exists, or is a file name where a folder is written; a module that the format does not hold; a value
/// that is not finite in the type written.
pub fn write_adapter(
    out: &Path,
    format: Format,
    modules: Vec<OutModule>,
    dtype: Option<Dtype>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    check_new(out)?;
    let file_name = out.extension().is_some_and(|e| e == "safetensors");
    if file_name == (format == Format::Peft) {
        let expected = if format == Format::Peft { "a folder's name" } else { "a name that ends with .safetensors" };
        return Err(Error::usage(format!("`{}` is no name for this output", out.display()))
            .expected(expected, out.display())
            .hint("PEFT adapters are folders, all others are single files"));
    }
    if let Some(module) = modules.iter().find(|m| !format.holds(m)) {
        let parts: Vec<&str> = module.parts.keys().map(|p| p.text()).collect();
        return Err(Error::usage(format!("{format:?} has no form for the adapter of `{}`", module.name))
            .expected("a LoRA", parts.join(", ")));
    }
    let encoded = encode(format, modules, dtype, metadata)?;
    let Some(config) = encoded.config else { return write(out, encoded.tensors, &encoded.metadata) };
    let part = part_path(out);
    let _ = std::fs::remove_dir_all(&part);
    std::fs::create_dir(&part).map_err(|e| Error::io("create the folder", &part, e))?;
    write(&part.join("adapter_model.safetensors"), encoded.tensors, &encoded.metadata)?;
    let text = format!("{config:#}\n");
    crate::io::write_atomic(&part.join("adapter_config.json"), |f| std::io::Write::write_all(f, text.as_bytes()))?;
    rename_synced(&part, out)
}

/// A file's content.
struct Encoded {
    tensors: Vec<RawTensor>,
    metadata: BTreeMap<String, String>,
    /// `adapter_config.json`
    config: Option<serde_json::Value>,
}

fn encode(
    format: Format,
    mut modules: Vec<OutModule>,
    dtype: Option<Dtype>,
    metadata: &BTreeMap<String, String>,
) -> Result<Encoded> {
    let mut tensors = Vec::new();
    for module in &mut modules {
        let keeps_alpha = matches!(format, Format::ComfyUi | Format::Kohya) && module.rank.is_some();
        if keeps_alpha {
            let rank = module.rank.expect("checked above");
            let bytes = (module.alpha_out(rank) as f32).to_le_bytes().to_vec();
            let name = format.key(&module.name, Part::Alpha);
            tensors.push(RawTensor { name, dtype: Dtype::F32, shape: vec![], bytes });
        } else if format != Format::Peft && module.scale != 1.0 {
            module.fold();
        }
        let dtype = dtype.unwrap_or(module.dtype);
        for (part, (shape, values)) in &module.parts {
            // PEFT's norms are a vector, everyone else's a matrix of one column or row.
            let vector = [values.len()];
            let shape = if format == Format::Peft && *part == Part::Magnitude { &vector[..] } else { shape };
            tensors.push(tensor(format.key(&module.name, *part), dtype, shape, values)?);
        }
    }
    let mut kept = carried_over(metadata);
    let ranks: BTreeMap<&str, usize> = modules.iter().filter_map(|m| Some((m.name.as_str(), m.rank?))).collect();
    if format == Format::Diffusers {
        let export = export_metadata(&ranks, &Provenance::default());
        kept.extend(export.into_iter().filter(|(k, _)| k == "lora_adapter_metadata"));
    }
    kept.insert("format".into(), "pt".into());
    let config = (format == Format::Peft).then(|| peft_config(&modules));
    Ok(Encoded { tensors, metadata: kept, config })
}

fn tensor(name: String, dtype: Dtype, shape: &[usize], values: &[f32]) -> Result<RawTensor> {
    let mut bytes = vec![0; values.len() * dtype.bitsize() / 8];
    narrow(values, dtype, &mut bytes);
    if dtype == Dtype::F16 && crate::io::floats::widened(&bytes, dtype).iter().any(|v| !v.is_finite()) {
        return Err(Error::run(format!("`{name}` does not fit into f16"))
            .expected("magnitudes below 65504", "larger ones")
            .hint("write bf16 or f32"));
    }
    Ok(RawTensor { name, dtype, shape: shape.to_vec(), bytes })
}

/// The metadata of the source without what was true of the old file only, or would be taken for the scale.
fn carried_over(metadata: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    const STALE: [&str; 9] = [
        "format",
        "scaling",
        "lora_adapter_metadata",
        "ss_network_alpha",
        "ss_network_dim",
        "ss_network_module",
        "ss_network_args",
        "sshs_model_hash",
        "sshs_legacy_hash",
    ];
    metadata.iter().filter(|(k, _)| !STALE.contains(&k.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// PEFT's configuration: the scale as alpha, with patterns for the modules that differ from the rest.
fn peft_config(modules: &[OutModule]) -> serde_json::Value {
    let most = |values: Vec<f64>| {
        let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
        values.iter().for_each(|v| *counts.entry(v.to_bits()).or_default() += 1);
        counts.into_iter().max_by_key(|(_, n)| *n).map_or(1.0, |(bits, _)| f64::from_bits(bits))
    };
    let rank = |m: &OutModule| m.rank.unwrap_or(1);
    let common_rank = most(modules.iter().map(|m| rank(m) as f64).collect()) as usize;
    let common_alpha = most(modules.iter().map(|m| m.alpha_out(rank(m))).collect());
    // Anchored, so that one name cannot match another's end; dots escaped, since PEFT takes keys as expressions.
    let key = |m: &OutModule| format!("^{}", m.name.replace('.', r"\."));
    let ranks: serde_json::Map<_, _> =
        modules.iter().filter(|m| rank(m) != common_rank).map(|m| (key(m), json!(rank(m)))).collect();
    let alphas: serde_json::Map<_, _> = modules
        .iter()
        .filter(|m| m.alpha_out(rank(m)) != common_alpha)
        .map(|m| (key(m), json!(m.alpha_out(rank(m)))))
        .collect();
    json!({
        "peft_type": "LORA",
        "task_type": null,
        "inference_mode": true,
        "bias": "none",
        "fan_in_fan_out": false,
        "r": common_rank,
        "lora_alpha": common_alpha,
        "lora_dropout": 0.0,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": modules.iter().map(|m| &m.name).collect::<Vec<_>>(),
        "use_dora": modules.iter().any(|m| m.parts.contains_key(&Part::Magnitude)),
        "use_rslora": false,
    })
}
