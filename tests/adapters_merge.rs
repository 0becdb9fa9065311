//! Merging into a base: against a merge by hand in f64, in every form of base, and what must not happen.

mod adapters_common;

use adapters_common::{fixture, options, table};
use qwen_lora::adapters::merge::{Base, OutputForm, Weighted};
use qwen_lora::adapters::read::{AdapterFile, Component, ReadOptions};
use qwen_lora::error::Kind;
use qwen_lora::io::Weights;
use qwen_lora::io::safetensors::{MappedFile, RawTensor, write};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::Path;

/// Adapters and weights of a case: the same adapter twice in two spellings, added and subtracted.
const RECIPE: [(&str, f64); 2] = [("kohya_lora_unet", 0.8), ("diffusers_no_metadata", -0.3)];

fn recipe(case: &str) -> Vec<Weighted> {
    let table = table(case);
    let open = |name: &str| {
        AdapterFile::open(&fixture(case).join("lora").join(format!("{name}.safetensors")), &options(&table)).unwrap()
    };
    RECIPE.iter().map(|(name, weight)| Weighted { adapter: open(name), weight: *weight }).collect()
}

/// W + sum of weight * scale * B A, in f64, by name of the weight.
fn by_hand(case: &str) -> BTreeMap<String, Vec<f64>> {
    let weights = Weights::open_folder(&fixture(case).join("pipe/transformer")).unwrap();
    let floats = |name: &str| -> Vec<f64> {
        let file = weights.files().iter().find(|f| f.info(name).is_some()).unwrap();
        file.floats(name).unwrap().into_iter().map(f64::from).collect()
    };
    let mut out: BTreeMap<String, Vec<f64>> = weights.names().map(|n| (n.to_string(), floats(n))).collect();
    for Weighted { adapter, weight } in recipe(case) {
        for (module, entry) in &adapter.transformer {
            let delta = adapter.delta(module, entry).unwrap();
            let qwen_lora::adapters::delta::Factors::Lora { a, b } = &delta.factors else { panic!("a LoRA") };
            let target = out.get_mut(&format!("{module}.weight")).unwrap();
            for i in 0..b.rows {
                for j in 0..a.cols {
                    let product: f64 = (0..a.rows).map(|k| f64::from(b.row(i)[k]) * f64::from(a.row(k)[j])).sum();
                    target[i * a.cols + j] += weight * delta.scale * product;
                }
            }
        }
    }
    out
}

/// Largest distance of merged values from the ones by hand, in units of the dtype's rounding of each value.
fn worst_rounding(files: &[&MappedFile], want: &BTreeMap<String, Vec<f64>>, epsilon: f64) -> f64 {
    let mut worst = 0f64;
    for (name, want) in want {
        let file = files.iter().find(|f| f.info(name).is_some()).unwrap_or_else(|| panic!("{name} is missing"));
        let got = file.floats(name).unwrap();
        assert_eq!(got.len(), want.len(), "{name}");
        let largest = want.iter().fold(0f64, |m, v| m.max(v.abs()));
        for (g, w) in got.iter().zip(want) {
            // Half a unit in the last place of the value, and the rounding of f32 sums of the weight's size.
            let unit = 0.5 * epsilon * w.abs().max(f64::MIN_POSITIVE) + 4.0 * f64::from(f32::EPSILON) * largest;
            worst = worst.max((f64::from(*g) - w).abs() / unit);
        }
    }
    worst
}

fn merge(base: &Path, adapters: &[Weighted], out: &Path, form: OutputForm) -> Result<(), qwen_lora::error::Error> {
    Base::open(base)?.merge(adapters, out, &form, &|_| ()).map(|_| ())
}

#[test]
fn a_pipeline_comes_out_as_a_pipeline_with_the_merged_weights() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["case_a", "case_b"] {
        let out = dir.path().join(case);
        let pipe = fixture(case).join("pipe");
        merge(&pipe, &recipe(case), &out, OutputForm::default()).unwrap();
        let merged = Weights::open_folder(&out.join("transformer")).unwrap();
        let files: Vec<&MappedFile> = merged.files().iter().collect();
        assert!(worst_rounding(&files, &by_hand(case), f64::from(f32::EPSILON)) <= 1.0);
        // Same files, the same index, everything else as it was.
        let names = |root: &Path| {
            let mut names: Vec<String> =
                walk(root).into_iter().map(|p| p.strip_prefix(root).unwrap().display().to_string()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&out), names(&pipe));
        for file in walk(&pipe) {
            let same =
                std::fs::read(&file).unwrap() == std::fs::read(out.join(file.strip_prefix(&pipe).unwrap())).unwrap();
            let weights = file.parent().unwrap().ends_with("transformer") && file.extension().unwrap() == "safetensors";
            // Every shard of these cases holds a weight that changes.
            assert_eq!(same, !weights, "{}", file.display());
        }
        assert!(!dir.path().join(format!(".{case}.part")).exists());
    }
}

fn walk(root: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|p| if p.is_dir() { walk(&p) } else { vec![p] }).collect()
}

#[test]
fn weights_of_zero_or_opposite_sign_give_the_base_back() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = fixture("case_b/pipe");
    let table = table("case_b");
    let open = |weight| {
        let path = fixture("case_b/lora/kohya_lora_unet.safetensors");
        Weighted { adapter: AdapterFile::open(&path, &options(&table)).unwrap(), weight }
    };
    for (name, adapters) in [("zero", vec![open(0.0)]), ("cancelled", vec![open(0.5), open(-0.5)])] {
        let out = dir.path().join(name);
        merge(&pipe, &adapters, &out, OutputForm::default()).unwrap();
        for shard in 1..=4 {
            let shard = format!("transformer/diffusion_pytorch_model-0000{shard}-of-00004.safetensors");
            let (base, merged) =
                (MappedFile::open(&pipe.join(&shard)).unwrap(), MappedFile::open(&out.join(&shard)).unwrap());
            assert_eq!(base.names(), merged.names());
            for tensor in base.names() {
                let (b, m) = (base.floats(&tensor).unwrap(), merged.floats(&tensor).unwrap());
                let worst = b.iter().zip(&m).map(|(b, m)| (b - m).abs()).fold(0.0, f32::max);
                assert!(worst <= if name == "zero" { 0.0 } else { 1e-6 }, "{name} {tensor}: {worst}");
            }
        }
    }
}

#[test]
fn single_files_of_every_type_and_naming_are_merged() {
    let dir = tempfile::tempdir().unwrap();
    let want = by_hand("case_b");
    // A pipeline's shards into one file, in each type.
    for (name, dtype, epsilon) in
        [("f32", None, 1.2e-7), ("bf16", Some(Dtype::BF16), 7.9e-3), ("f16", Some(Dtype::F16), 9.8e-4)]
    {
        let out = dir.path().join(format!("{name}.safetensors"));
        let form = OutputForm { single_file: true, dtype };
        merge(&fixture("case_b/pipe"), &recipe("case_b"), &out, form).unwrap();
        let file = MappedFile::open(&out).unwrap();
        assert_eq!(file.metadata()["format"], "pt");
        assert!(worst_rounding(&[&file], &want, epsilon) <= 1.0, "{name}");
    }
    // An unmerged all-in-one file in bf16 with ComfyUI's prefix and another network beside it.
    let single = dir.path().join("base.safetensors");
    let weights = Weights::open_folder(&fixture("case_b/pipe/transformer")).unwrap();
    let mut tensors: Vec<RawTensor> = weights
        .names()
        .map(|n| {
            let tensor = weights.get(n, weights.shape(n).unwrap(), candle_core::DType::BF16, &candle_core::Device::Cpu);
            RawTensor::from_tensor(format!("model.diffusion_model.{n}"), &tensor.unwrap()).unwrap()
        })
        .collect();
    let stray =
        RawTensor { name: "vae.ids".into(), dtype: Dtype::I64, shape: vec![1], bytes: 7i64.to_le_bytes().into() };
    tensors.push(stray);
    write(&single, tensors, &BTreeMap::new()).unwrap();
    let out = dir.path().join("merged.safetensors");
    merge(&single, &recipe("case_b"), &out, OutputForm::default()).unwrap();
    let (base, merged) = (MappedFile::open(&single).unwrap(), MappedFile::open(&out).unwrap());
    assert_eq!(base.names(), merged.names());
    assert_eq!(merged.bytes("vae.ids").unwrap(), 7i64.to_le_bytes());
    let name = "model.diffusion_model.transformer_blocks.0.attn.to_q.weight";
    assert_eq!(merged.info(name).unwrap().0, Dtype::BF16);
    // The change is added to the base as bf16 holds it, and the sum is rounded once.
    let bare = name.strip_prefix("model.diffusion_model.").unwrap();
    let exact = weights.files().iter().find(|f| f.info(bare).is_some()).unwrap().floats(bare).unwrap();
    for (i, (got, held)) in merged.floats(name).unwrap().iter().zip(base.floats(name).unwrap()).enumerate() {
        let want = want[bare][i] + f64::from(held) - f64::from(exact[i]);
        assert!((f64::from(*got) - want).abs() <= 0.00395 * want.abs() + 1e-7, "{got} {want}");
    }
    assert_ne!(merged.bytes(name).unwrap(), base.bytes(name).unwrap());
    let norm = "model.diffusion_model.txt_norm.weight";
    assert_eq!(merged.bytes(norm).unwrap(), base.bytes(norm).unwrap());
}

#[test]
fn scaled_fp8_and_gguf_bases_are_dequantised_and_merged() {
    use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
    use candle_core::{DType, Device};
    let dir = tempfile::tempdir().unwrap();
    let table = table("case_a");
    let path = fixture("case_a/lora/kohya_lora_unet.safetensors");
    let adapters = || vec![Weighted { adapter: AdapterFile::open(&path, &options(&table)).unwrap(), weight: 1.0 }];
    let weights = Weights::open_folder(&fixture("case_a/pipe/transformer")).unwrap();
    // What the quantised base holds, by name: merged values must be it plus the delta.
    let check = |held: &BTreeMap<String, Vec<f32>>, merged: &MappedFile| {
        let adapter = &adapters()[0].adapter;
        let mut changed = 0;
        for (name, held) in held {
            assert_eq!(merged.info(name).unwrap().0, Dtype::BF16, "{name}");
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let delta = adapter.transformer.get(module).map(|e| adapter.delta(module, e).unwrap().dense().data);
            changed += usize::from(delta.is_some());
            for (i, (got, held)) in merged.floats(name).unwrap().iter().zip(held).enumerate() {
                let want = held + delta.as_ref().map_or(0.0, |d| d[i]);
                assert!((got - want).abs() <= 0.0040 * want.abs() + 1e-6, "{name}[{i}]: {got} {want}");
            }
        }
        assert_eq!(changed, 24);
    };

    // Scaled fp8 as ComfyUI writes it: the 2-D weights, one scale each.
    let (mut tensors, mut held) = (Vec::new(), BTreeMap::new());
    let table8 = qwen_lora::io::fp8::table(qwen_lora::io::fp8::e4m3);
    for name in weights.names() {
        let shape = weights.shape(name).unwrap();
        let values: Vec<f32> =
            weights.get(name, shape, DType::F32, &Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let (bytes, dtype) = if shape.len() == 2 {
            let scale = values.iter().fold(0f32, |m, v| m.max(v.abs())) / 448.0;
            let nearest = |v: &f32| {
                let distance = |b: &u8| (table8[usize::from(*b)] * scale - v).abs();
                (0..=255u8)
                    .filter(|b| !table8[usize::from(*b)].is_nan())
                    .min_by(|a, b| distance(a).total_cmp(&distance(b)))
                    .unwrap()
            };
            let bytes: Vec<u8> = values.iter().map(nearest).collect();
            held.insert(name.to_string(), bytes.iter().map(|b| table8[usize::from(*b)] * scale).collect::<Vec<f32>>());
            let module = name.strip_suffix(".weight").unwrap();
            tensors.push(RawTensor {
                name: format!("{module}.weight_scale"),
                dtype: Dtype::F32,
                shape: vec![],
                bytes: scale.to_le_bytes().into(),
            });
            (bytes, Dtype::F8_E4M3)
        } else {
            (values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(), Dtype::BF16)
        };
        tensors.push(RawTensor { name: name.into(), dtype, shape: shape.into(), bytes });
    }
    let fp8 = dir.path().join("fp8.safetensors");
    write(&fp8, tensors, &BTreeMap::new()).unwrap();
    let out = dir.path().join("from_fp8.safetensors");
    merge(&fp8, &adapters(), &out, OutputForm::default()).unwrap();
    let merged = MappedFile::open(&out).unwrap();
    assert_eq!(merged.names().len(), weights.names().count(), "the scales are gone");
    check(&held, &merged);

    // GGUF: 8-bit blocks where rows are whole blocks, else f16.
    let (mut stored, mut held) = (Vec::new(), BTreeMap::new());
    for name in weights.names() {
        let shape = weights.shape(name).unwrap();
        let tensor = weights.get(name, shape, DType::F32, &Device::Cpu).unwrap();
        let blocks = shape.len() == 2 && shape[1].is_multiple_of(32);
        let quantised = QTensor::quantize(&tensor, if blocks { GgmlDType::Q8_0 } else { GgmlDType::F16 }).unwrap();
        let values = quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        held.insert(name.to_string(), values);
        stored.push((name.to_string(), quantised));
    }
    let gguf = dir.path().join("base.gguf");
    let refs: Vec<(&str, &QTensor)> = stored.iter().map(|(n, t)| (n.as_str(), t)).collect();
    gguf_file::write(&mut std::fs::File::create(&gguf).unwrap(), &[], &refs).unwrap();
    let out = dir.path().join("from_gguf.safetensors");
    merge(&gguf, &adapters(), &out, OutputForm::default()).unwrap();
    check(&held, &MappedFile::open(&out).unwrap());
}

#[test]
fn a_text_encoders_adapter_is_merged_there_or_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = fixture("case_a/pipe");
    let base = Base::open(&pipe).unwrap();
    let text = base.table(Component::TextEncoder).unwrap();
    let module = "model.layers.0.mlp.up_proj";
    let (out_features, in_features) = text.shape(module).unwrap();
    let factor = |name: &str, rows: usize, cols: usize| {
        let bytes = (0..rows * cols).flat_map(|i| ((i % 7) as f32 * 0.1 - 0.2).to_le_bytes()).collect();
        RawTensor {
            name: format!("text_encoder.{module}.{name}.weight"),
            dtype: Dtype::F32,
            shape: vec![rows, cols],
            bytes,
        }
    };
    let path = dir.path().join("text.safetensors");
    write(&path, vec![factor("lora_A", 2, in_features), factor("lora_B", out_features, 2)], &BTreeMap::new()).unwrap();
    let options =
        ReadOptions { table: base.transformer_table(), text_encoder: Some(text), alpha: None, allow_unmatched: false };
    let open = || vec![Weighted { adapter: AdapterFile::open(&path, &options).unwrap(), weight: 1.0 }];
    let out = dir.path().join("merged");
    base.merge(&open(), &out, &OutputForm::default(), &|_| ()).unwrap();
    let delta = open()[0].adapter.delta(module, &open()[0].adapter.text_encoder[module]).unwrap().dense();
    let name = format!("{module}.weight");
    let read =
        |root: &Path| MappedFile::open(&root.join("text_encoder/model.safetensors")).unwrap().floats(&name).unwrap();
    for (i, (got, base)) in read(&out).iter().zip(read(&pipe)).enumerate() {
        assert!((got - base - delta.data[i]).abs() < 1e-6);
    }
    let transformer = "transformer/diffusion_pytorch_model.safetensors";
    let untouched = MappedFile::open(&out.join(transformer)).unwrap();
    let original = MappedFile::open(&pipe.join(transformer)).unwrap();
    assert!(original.names().iter().all(|n| original.bytes(n).unwrap() == untouched.bytes(n).unwrap()));

    let form = OutputForm { single_file: true, ..OutputForm::default() };
    let error = base.merge(&open(), &dir.path().join("one.safetensors"), &form, &|_| ()).unwrap_err().to_string();
    assert!(error.contains("text.safetensors") && error.contains(module), "{error}");
}

#[test]
fn nothing_is_overwritten_and_wrong_outputs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = fixture("case_a/pipe");
    let fail = |out: &Path, form: OutputForm| {
        let error = merge(&pipe, &recipe("case_a"), out, form).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{error}");
        error.to_string()
    };
    let taken = dir.path().join("taken");
    std::fs::write(&taken, "precious").unwrap();
    assert!(fail(&taken, OutputForm::default()).contains("exists"));
    assert_eq!(std::fs::read(&taken).unwrap(), b"precious");
    assert!(fail(&pipe, OutputForm::default()).contains("exists"));
    assert!(fail(&pipe.join("merged"), OutputForm::default()).contains("lies inside the base"));
    assert!(fail(&dir.path().join("absent/merged"), OutputForm::default()).contains("absent"));
    let single = OutputForm { single_file: true, ..OutputForm::default() };
    assert!(fail(&dir.path().join("merged.bin"), single).contains(".safetensors"));
    // A leftover of a killed merge is in nobody's way.
    let leftover = dir.path().join(".merged.part");
    std::fs::create_dir_all(leftover.join("transformer")).unwrap();
    std::fs::write(leftover.join("transformer/half.safetensors"), "x").unwrap();
    let out = dir.path().join("merged");
    merge(&pipe, &recipe("case_a"), &out, OutputForm::default()).unwrap();
    assert!(!leftover.exists() && !out.join("transformer/half.safetensors").exists());
    for (base, why) in
        [(fixture("case_a/lora/kohya_lora_unet.safetensors"), "is an adapter"), (dir.path().join("nothing"), "nothing")]
    {
        let error = Base::open(&base).err().expect("no base").to_string();
        assert!(error.contains(why), "{error}");
    }
}
