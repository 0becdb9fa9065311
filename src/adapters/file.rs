//! The two files of an adapter.
//!
//! - **Raw**, in checkpoints: A, B and alpha as they are trained, in f32 (`<module>.lora_A.weight`,
//!   `<module>.lora_B.weight`, `<module>.alpha`). Reading it gives back the very bits.
//! - **Exported**, for every tool: `transformer.<module>.lora_A.weight` / `lora_B.weight` with the scale folded into B.
//!   Readers that look at no alpha (ComfyUI for these keys, diffusers without metadata) and readers that take alpha
//!   from the metadata (diffusers: alpha = rank there) then apply the same, right strength.
//!
//! Neither holds a date, a host or a path: their bytes are a function of their content.

use crate::adapters::lora::{LoraAdapter, LoraModule};
use crate::error::{Error, Result};
use crate::io::safetensors::{MappedFile, RawTensor, write};
use candle_core::{DType, Device, Tensor};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Where an exported adapter comes from: what its metadata says beside the ranks. Empty strings are left out.
#[derive(Clone, Debug, Default)]
pub struct Provenance {
    /// `modelspec.title`: the name of the run.
    pub title: String,
    /// `modelspec.architecture`: `qwen-image/lora`.
    pub architecture: String,
    /// `modelspec.resolution`: `1024x1024`.
    pub resolution: String,
    /// The base model as a hub id; a folder's name would be a path of this machine.
    pub base: String,
    /// Fingerprint of the base model's weights.
    pub base_fingerprint: String,
    /// Hash of the dataset.
    pub dataset_hash: String,
    /// The resolved config without `output` and `device`.
    pub config: String,
}

const RAW_FORMAT: &str = "qwen-lora.raw";

/// Writes the raw form, atomically.
pub fn write_raw(path: &Path, adapter: &LoraAdapter) -> Result<()> {
    let mut tensors = Vec::new();
    for (name, module) in &adapter.modules {
        let alpha = Tensor::new(module.alpha as f32, &Device::Cpu)?;
        tensors.push(RawTensor::from_tensor(format!("{name}.lora_A.weight"), &module.a.to_dtype(DType::F32)?)?);
        tensors.push(RawTensor::from_tensor(format!("{name}.lora_B.weight"), &module.b.to_dtype(DType::F32)?)?);
        tensors.push(RawTensor::from_tensor(format!("{name}.alpha"), &alpha)?);
    }
    let rslora = adapter.modules.values().any(|m| m.scale != m.alpha / m.rank() as f64);
    let scaling = if rslora { "rslora" } else { "lora" };
    let metadata = [("format", RAW_FORMAT), ("scaling", scaling)].map(|(k, v)| (k.to_string(), v.to_string()));
    write(path, tensors, &metadata.into())
}

/// Reads the raw form back onto `device`.
///
/// Errors: not a raw adapter of ours, a module with a part missing or of the wrong shape; file and tensor are named.
pub fn read_raw(path: &Path, device: &Device) -> Result<LoraAdapter> {
    let file = MappedFile::open(path)?;
    let metadata = file.metadata();
    if metadata.get("format").map(String::as_str) != Some(RAW_FORMAT) {
        return Err(Error::usage(format!("`{}` is not the adapter of a checkpoint", path.display()))
            .expected(format!("metadata format `{RAW_FORMAT}`"), format!("{:?}", metadata.get("format")))
            .hint("checkpoints hold the raw adapter; the exported one has its scale folded in"));
    }
    let rslora = metadata.get("scaling").is_some_and(|s| s == "rslora");
    let broken = |name: &str, expected: &str, found: String| {
        Error::usage(format!("cannot load `{name}` from `{}`", path.display())).expected(expected, found)
    };
    let part = |name: String, dims: usize| {
        let (_, shape) = file.info(&name).ok_or_else(|| broken(&name, "a tensor", "none of that name".into()))?;
        if shape.len() != dims {
            return Err(broken(&name, &format!("{dims} dimensions"), format!("shape {shape:?}")));
        }
        file.tensor(&name, DType::F32, device)
    };
    let names = file.names();
    let mut adapter = LoraAdapter::default();
    for name in names.iter().filter_map(|n| n.strip_suffix(".lora_A.weight")) {
        let (a, b) = (part(format!("{name}.lora_A.weight"), 2)?, part(format!("{name}.lora_B.weight"), 2)?);
        let alpha = f64::from(part(format!("{name}.alpha"), 0)?.to_scalar::<f32>()?);
        let rank = a.dims()[0];
        if rank == 0 || b.dims()[1] != rank {
            let found = format!("shape {:?}", b.dims());
            return Err(broken(&format!("{name}.lora_B.weight"), &format!("{rank} columns, the rank of A"), found));
        }
        let scale = alpha / if rslora { (rank as f64).sqrt() } else { rank as f64 };
        adapter.modules.insert(name.into(), LoraModule { a, b, alpha, scale });
    }
    if adapter.modules.len() * 3 != names.len() {
        let stray = names.iter().find(|n| {
            [".lora_A.weight", ".lora_B.weight", ".alpha"]
                .iter()
                .all(|end| n.strip_suffix(end).is_none_or(|m| !adapter.modules.contains_key(m)))
        });
        return Err(broken(stray.map_or("", |n| n), "whole modules", "a tensor that belongs to none".into()));
    }
    Ok(adapter)
}

/// Writes the exported form in `dtype` (f32, bf16 or f16), atomically.
///
/// Errors: a value that is not finite, or leaves the range of `dtype` once the scale is folded in.
pub fn write_exported(path: &Path, adapter: &LoraAdapter, dtype: DType, provenance: &Provenance) -> Result<()> {
    let mut tensors = Vec::new();
    for (name, module) in &adapter.modules {
        let folded = (module.b.to_dtype(DType::F32)? * module.scale)?;
        for (end, tensor) in [("lora_A", &module.a), ("lora_B", &folded)] {
            let key = format!("transformer.{name}.{end}.weight");
            let tensor = tensor.to_dtype(dtype)?;
            check_finite(path, &key, &tensor)?;
            tensors.push(RawTensor::from_tensor(key, &tensor)?);
        }
    }
    let ranks: BTreeMap<&str, usize> = adapter.modules.iter().map(|(n, m)| (n.as_str(), m.rank())).collect();
    write(path, tensors, &export_metadata(&ranks, provenance))
}

fn check_finite(path: &Path, key: &str, tensor: &Tensor) -> Result<()> {
    // NaN and infinity survive the sum of magnitudes; f32 has the range for any adapter's sum.
    let sum = tensor.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>()?;
    if sum.is_finite() {
        return Ok(());
    }
    Err(Error::run(format!("cannot write `{key}` to `{}`", path.display()))
        .expected(format!("finite values in {}", tensor.dtype().as_str()), "NaN, or a value out of range")
        .hint("save as f32 or bf16; if it persists the training has diverged: lower the learning rate"))
}

/// Key of the metadata for the base's fingerprint.
pub const BASE_FINGERPRINT: &str = "qwen_lora.base_fingerprint";

/// The fingerprint of the base model that an adapter file names in its metadata; other tools' files name none.
pub fn recorded_base(path: &Path) -> Result<Option<String>> {
    if path.is_dir() {
        return Ok(None);
    }
    Ok(MappedFile::open(path)?.metadata().remove(BASE_FINGERPRINT))
}

/// The metadata of an exported file whose modules have these ranks.
pub fn export_metadata(ranks: &BTreeMap<&str, usize>, provenance: &Provenance) -> BTreeMap<String, String> {
    let mut metadata = BTreeMap::from([
        ("format".to_string(), "pt".to_string()),
        ("lora_adapter_metadata".to_string(), peft_config(ranks).to_string()),
        ("modelspec.sai_model_spec".to_string(), "1.0.1".to_string()),
        ("modelspec.prediction_type".to_string(), "flow".to_string()),
    ]);
    for (key, value) in [
        ("modelspec.title", &provenance.title),
        ("modelspec.architecture", &provenance.architecture),
        ("modelspec.resolution", &provenance.resolution),
        ("qwen_lora.base", &provenance.base),
        (BASE_FINGERPRINT, &provenance.base_fingerprint),
        ("qwen_lora.dataset_hash", &provenance.dataset_hash),
        ("qwen_lora.config", &provenance.config),
    ] {
        if !value.is_empty() {
            metadata.insert(key.into(), value.clone());
        }
    }
    metadata
}

/// What diffusers hands to PEFT's `LoraConfig`: alpha equals the rank everywhere, since the scale is in B.
///
/// With mixed ranks the most frequent one is `r` and the others stand in both patterns: a `rank_pattern` alone would
/// leave their alpha at `r`, and a single `r` fails to load.
/// Source: `get_peft_kwargs` in
/// <https://github.com/huggingface/diffusers/blob/ed6847a1ab3c64570d9fe4df8a1f1d2f06161358/src/diffusers/utils/peft_utils.py>
fn peft_config(ranks: &BTreeMap<&str, usize>) -> serde_json::Value {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    for &rank in ranks.values() {
        *counts.entry(rank).or_default() += 1;
    }
    let common = counts.iter().max_by_key(|(_, count)| **count).map_or(1, |(rank, _)| *rank);
    let mut config = serde_json::Map::from_iter([
        ("transformer.r".to_string(), json!(common)),
        ("transformer.lora_alpha".to_string(), json!(common)),
        ("transformer.target_modules".to_string(), json!(ranks.keys().collect::<Vec<_>>())),
    ]);
    let others: serde_json::Map<_, _> = ranks
        .iter()
        .filter(|&(_, &rank)| rank != common)
        .map(|(name, rank)| (pattern_key(name, ranks), json!(rank)))
        .collect();
    if !others.is_empty() {
        config.insert("transformer.rank_pattern".into(), json!(others));
        config.insert("transformer.alpha_pattern".into(), json!(others));
    }
    serde_json::Value::Object(config)
}

/// A pattern that PEFT matches to `name` and to no other module. PEFT tries `(.*\.)?(pattern)$`, so that a plain name
/// also means every module that ends with it after a dot; only then is the name anchored, since older versions of
/// PEFT know plain names only.
fn pattern_key(name: &str, ranks: &BTreeMap<&str, usize>) -> String {
    let ends: BTreeSet<&str> =
        ranks.keys().flat_map(|other| other.match_indices('.').map(|(dot, _)| &other[dot + 1..])).collect();
    if ends.contains(name) { format!("^{}", name.replace('.', r"\.")) } else { name.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::lora::tests::trained;
    use crate::error::Kind;

    fn bits(tensor: &Tensor) -> Vec<u32> {
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn the_raw_form_gives_back_every_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter.safetensors");
        for rslora in [false, true] {
            let mut adapter = trained(&[4, 2]);
            if rslora {
                adapter.modules.values_mut().for_each(|m| m.scale = m.alpha / (m.rank() as f64).sqrt());
            }
            write_raw(&path, &adapter).unwrap();
            let back = read_raw(&path, &Device::Cpu).unwrap();
            assert_eq!(back.modules.len(), 2);
            for (name, module) in &adapter.modules {
                let read = &back.modules[name];
                assert_eq!((bits(&read.a), bits(&read.b)), (bits(&module.a), bits(&module.b)));
                assert_eq!((read.alpha, read.scale), (module.alpha, module.scale));
            }
        }
    }

    #[test]
    fn broken_raw_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter.safetensors");
        write_exported(&path, &trained(&[4]), DType::F32, &Provenance::default()).unwrap();
        let error = read_raw(&path, &Device::Cpu).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().contains("is not the adapter of a checkpoint"), "{error}");

        let raw = |drop: &str, b: &Tensor| {
            let mut tensors = vec![
                RawTensor::from_tensor("m.lora_A.weight", &Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap()),
                RawTensor::from_tensor("m.lora_B.weight", b),
                RawTensor::from_tensor("m.alpha", &Tensor::new(1f32, &Device::Cpu).unwrap()),
            ]
            .into_iter()
            .collect::<Result<Vec<_>>>()
            .unwrap();
            tensors.retain(|t| t.name != drop);
            write(&path, tensors, &[("format".to_string(), RAW_FORMAT.to_string())].into()).unwrap();
            read_raw(&path, &Device::Cpu).unwrap_err().to_string()
        };
        let good = Tensor::zeros((5, 2), DType::F32, &Device::Cpu).unwrap();
        let misshapen = Tensor::zeros((5, 4), DType::F32, &Device::Cpu).unwrap();
        assert!(raw("m.alpha", &good).contains("cannot load `m.alpha`"));
        assert!(raw("m.lora_A.weight", &good).contains("a tensor that belongs to none"));
        assert!(raw("", &misshapen).contains("expected 2 columns, the rank of A, found shape [5, 4]"));
    }

    #[test]
    fn the_exported_form_applies_the_same_delta_without_alpha() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter.safetensors");
        let adapter = trained(&[4, 2, 4]);
        // Relative to the largest entry: half a unit in the last place for each factor and a few roundings.
        for (dtype, limit) in [(DType::F32, 1e-6), (DType::F16, 2e-3), (DType::BF16, 1.2e-2)] {
            write_exported(&path, &adapter, dtype, &Provenance::default()).unwrap();
            let file = MappedFile::open(&path).unwrap();
            assert_eq!(file.names().len(), 6);
            for (name, module) in &adapter.modules {
                let get = |end: &str| {
                    file.tensor(&format!("transformer.{name}.{end}.weight"), DType::F32, &Device::Cpu).unwrap()
                };
                let delta = get("lora_B").matmul(&get("lora_A")).unwrap();
                let want = module.delta().unwrap();
                let max =
                    |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
                assert!(max(&(delta - &want).unwrap()) <= limit * max(&want), "{name} {dtype:?}");
            }
        }
    }

    #[test]
    fn the_same_adapter_gives_the_same_bytes_and_the_header_is_sorted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter.safetensors");
        let provenance = Provenance {
            title: "anime".into(),
            architecture: "qwen-image/lora".into(),
            base: "Qwen/Qwen-Image".into(),
            base_fingerprint: "f00d".into(),
            dataset_hash: "beef".into(),
            config: "seed: 42\n".into(),
            ..Provenance::default()
        };
        let save = |adapter: &LoraAdapter| {
            write_exported(&path, adapter, DType::F32, &provenance).unwrap();
            std::fs::read(&path).unwrap()
        };
        let first = save(&trained(&[4, 2]));
        assert_eq!(first, save(&trained(&[4, 2])));
        let metadata = MappedFile::open(&path).unwrap().metadata();
        assert_eq!(metadata["qwen_lora.config"], "seed: 42\n");
        assert_eq!(metadata["qwen_lora.dataset_hash"], "beef");
        assert!(!metadata.contains_key("modelspec.resolution"));
        let header = String::from_utf8_lossy(&first[8..]).into_owned();
        let at = |key: &str| header.find(key).unwrap();
        assert!(at("\"__metadata__\"") < at("\"format\"") && at("\"format\"") < at("\"modelspec.title\""));
        assert!(at("\"modelspec.title\"") < at("\"qwen_lora.base\""));
        let folder = dir.path().to_string_lossy().into_owned();
        assert!(!header.contains(&folder));
    }

    #[test]
    fn mixed_ranks_are_told_in_both_patterns() {
        let ranks: BTreeMap<&str, usize> = [("a.x", 4), ("b.x", 4), ("x", 2), ("y.z", 8)].into();
        let config = peft_config(&ranks);
        assert_eq!((&config["transformer.r"], &config["transformer.lora_alpha"]), (&json!(4), &json!(4)));
        assert_eq!(config["transformer.target_modules"], json!(["a.x", "b.x", "x", "y.z"]));
        // `x` alone would also match `a.x` and `b.x`.
        let patterns = json!({"^x": 2, "y.z": 8});
        assert_eq!(config["transformer.rank_pattern"], patterns);
        assert_eq!(config["transformer.alpha_pattern"], patterns);
        let uniform = peft_config(&[("a", 4), ("b", 4)].into());
        assert!(uniform.get("transformer.rank_pattern").is_none());
    }

    #[test]
    fn values_that_the_dtype_cannot_hold_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter.safetensors");
        let mut adapter = trained(&[2]);
        for module in adapter.modules.values_mut() {
            module.scale = 1e7;
        }
        let error = write_exported(&path, &adapter, DType::F16, &Provenance::default()).unwrap_err().to_string();
        assert!(error.contains("transformer.blocks.0.to_q.lora_B.weight"), "{error}");
        assert!(!path.exists());
        write_exported(&path, &adapter, DType::BF16, &Provenance::default()).unwrap();
    }
}
