//! A transformer's weights written as the community quantises them, and what such a file then holds.
#![allow(dead_code)] // each test binary uses a part

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use qwen_lora::io::Weights;
use qwen_lora::io::fp8;
use qwen_lora::io::safetensors::{RawTensor, write};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::Path;

/// The values of each tensor, by its name in the model.
pub type Held = BTreeMap<String, Vec<f32>>;

/// The scales of an fp8 file.
#[derive(Clone, Copy, PartialEq)]
pub enum Scales {
    /// None: a bare cast.
    None,
    /// `X.weight_scale`, one for each matrix.
    OfMatrix,
    /// `X.scale_weight`, one for each row, as older files have it.
    OfRow,
}

fn values(weights: &Weights, name: &str) -> Vec<f32> {
    let tensor = weights.get(name, weights.shape(name).unwrap(), DType::F32, &Device::Cpu).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Matrices in fp8 (e4m3), the rest in bf16, with `prefix` before every name.
pub fn write_fp8(weights: &Weights, path: &Path, scales: Scales, prefix: &str) -> Held {
    let table = fp8::table(fp8::e4m3);
    let mut codes: Vec<(f32, u8)> =
        (0..=255u8).map(|b| (table[usize::from(b)], b)).filter(|(v, _)| !v.is_nan()).collect();
    codes.sort_by(|a, b| a.0.total_cmp(&b.0));
    let nearest = |v: f32| {
        let above = codes.partition_point(|c| c.0 < v).min(codes.len() - 1);
        let below = above.saturating_sub(1);
        if (codes[above].0 - v).abs() < (v - codes[below].0).abs() { codes[above].1 } else { codes[below].1 }
    };
    let (mut tensors, mut held) = (Vec::new(), Held::new());
    for name in weights.names() {
        let (shape, values) = (weights.shape(name).unwrap(), values(weights, name));
        let mut add = |name: String, dtype, shape: Vec<usize>, bytes| {
            tensors.push(RawTensor { name: format!("{prefix}{name}"), dtype, shape, bytes });
        };
        if shape.len() != 2 {
            let rounded: Vec<half::bf16> = values.iter().map(|v| half::bf16::from_f32(*v)).collect();
            held.insert(name.into(), rounded.iter().map(|v| v.to_f32()).collect());
            let bytes = rounded.iter().flat_map(|v| v.to_le_bytes()).collect();
            add(name.into(), Dtype::BF16, shape.into(), bytes);
            continue;
        }
        let group = if scales == Scales::OfRow { shape[1] } else { values.len() };
        let largest = |g: &[f32]| g.iter().fold(1e-30f32, |m, v| m.max(v.abs()));
        let scale = |g: &[f32]| if scales == Scales::None { 1.0 } else { largest(g) / 448.0 };
        let (mut bytes, mut all, mut of) = (Vec::new(), Vec::new(), Vec::new());
        for group in values.chunks(group) {
            let scale = scale(group);
            of.extend(scale.to_le_bytes());
            bytes.extend(group.iter().map(|v| nearest(v / scale)));
            all.extend(bytes[bytes.len() - group.len()..].iter().map(|b| table[usize::from(*b)] * scale));
        }
        held.insert(name.into(), all);
        let module = name.strip_suffix(".weight").unwrap();
        match scales {
            Scales::None => {}
            Scales::OfMatrix => add(format!("{module}.weight_scale"), Dtype::F32, vec![], of),
            Scales::OfRow => add(format!("{module}.scale_weight"), Dtype::F32, vec![shape[0], 1], of),
        }
        add(name.into(), Dtype::F8_E4M3, shape.into(), bytes);
    }
    write(path, tensors, &BTreeMap::new()).unwrap();
    held
}

/// Matrices whose rows are whole blocks of `dtype` in that, else in 8-bit blocks, else f16; the rest in f32.
pub fn write_gguf(weights: &Weights, path: &Path, dtype: GgmlDType, prefix: &str) -> Held {
    let (mut stored, mut held) = (Vec::new(), Held::new());
    for name in weights.names() {
        let shape = weights.shape(name).unwrap();
        let tensor = Tensor::from_vec(values(weights, name), shape, &Device::Cpu).unwrap();
        let fits = |dtype: &GgmlDType| shape[1].is_multiple_of(dtype.block_size());
        let dtype = match shape.len() {
            2 => [dtype, GgmlDType::Q8_0].into_iter().find(fits).unwrap_or(GgmlDType::F16),
            _ => GgmlDType::F32,
        };
        let quantised = QTensor::quantize(&tensor, dtype).unwrap();
        let values = quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        held.insert(name.into(), values);
        stored.push((format!("{prefix}{name}"), quantised));
    }
    let refs: Vec<(&str, &QTensor)> = stored.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let architecture = gguf_file::Value::String("qwen_image".into());
    let metadata = [("general.architecture", &architecture)];
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &refs).unwrap();
    held
}

/// The same values as a plain file in f32.
pub fn write_held(weights: &Weights, path: &Path, held: &Held) {
    let raw = held.iter().map(|(name, values)| RawTensor {
        name: name.clone(),
        dtype: Dtype::F32,
        shape: weights.shape(name).unwrap().into(),
        bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    });
    write(path, raw.collect(), &BTreeMap::new()).unwrap();
}
