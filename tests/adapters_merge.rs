//! Merging into a base: against a merge by hand in f64, in every form of base, and what must not happen.

mod adapters_common;
mod quantised_common;

use adapters_common::{contents, copy_tree, fixture, floats, mixed_adapter, normals, options, run, run_ok, table};
use quantised_common::{Scales, write_fp8, write_gguf};
use qwen_lora::adapters::merge::{Base, OutputForm, Weighted};
use qwen_lora::adapters::read::{AdapterFile, Component, ReadOptions};
use qwen_lora::error::Kind;
use qwen_lora::io::Weights;
use qwen_lora::io::checkpoint::CheckpointFile;
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
        let mut files = weights.files().iter().filter_map(CheckpointFile::safetensors);
        let file = files.find(|f| f.info(name).is_some()).unwrap();
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
        let files: Vec<&MappedFile> = merged.files().iter().filter_map(CheckpointFile::safetensors).collect();
        assert!(worst_rounding(&files, &by_hand(case), f64::from(f32::EPSILON)) <= 1.0);
        // Same files, the same index, everything else as it was.
        let (before, after) = (contents(&pipe), contents(&out));
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (name, bytes) in before {
            let weights = name.starts_with("transformer") && name.extension().unwrap() == "safetensors";
            // Every shard of these cases holds a weight that changes.
            assert_eq!(bytes == after[&name], !weights, "{}", name.display());
        }
        assert!(!dir.path().join(format!(".{case}.part")).exists());
    }
}

#[test]
fn untouched_parts_are_hard_links_and_a_transformers_folder_is_a_base_too() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let pipe = dir.path().join("pipe");
    copy_tree(&fixture("case_b/pipe"), &pipe);
    let before = contents(&pipe);
    let lora = |name: &str| fixture("case_b/lora").join(name).to_str().unwrap().to_string();
    let (one, two) = (lora("kohya_lora_unet.safetensors"), lora("comfy_diffusion_model_AB_alpha.safetensors"));
    let merge = |base: &str, out: &str| {
        run_ok(["merge", base, &one, &two, "--weights", "-0.3,0.8", "--out", out]);
        contents(Path::new(out))
    };
    let merged = merge(pipe.to_str().unwrap(), &path("merged"));
    let inode = |root: &Path, name: &Path| std::fs::metadata(root.join(name)).unwrap().ino();
    let mut linked = 0;
    for name in before.keys() {
        let same = inode(&pipe, name) == inode(&dir.path().join("merged"), name);
        let written = name.starts_with("transformer") && name.to_string_lossy().contains("safetensors");
        assert_eq!(same, !written, "{}", name.display());
        linked += usize::from(same);
    }
    assert!(linked > 8);
    assert_eq!(contents(&pipe), before, "the base is as it was");
    // The same weights from the transformer's folder alone.
    let alone = merge(pipe.join("transformer").to_str().unwrap(), &path("transformer"));
    assert_eq!(alone.len(), 6);
    alone.iter().for_each(|(name, bytes)| assert_eq!(*bytes, merged[&Path::new("transformer").join(name)]));
    // Both files hold one adapter, so that half of it is left.
    let half = path("half");
    run_ok(["merge", pipe.to_str().unwrap(), &one, "--weights", "0.5", "--out", &half]);
    let shard = "transformer/diffusion_pytorch_model-00001-of-00004.safetensors";
    let (a, b) =
        (MappedFile::open(&dir.path().join("merged").join(shard)), MappedFile::open(&Path::new(&half).join(shard)));
    let (a, b) = (a.unwrap(), b.unwrap());
    for name in a.names() {
        let (a, b) = (a.floats(&name).unwrap(), b.floats(&name).unwrap());
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-6), "{name}");
    }
}

#[test]
fn five_spellings_merge_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = fixture("case_a/pipe").to_str().unwrap().to_string();
    let merge = |name: &str, more: &[&str]| {
        let adapter = fixture("case_a/lora").join(format!("{name}.safetensors"));
        let out = dir.path().join(format!("{name}{}.safetensors", more.len()));
        let args = ["merge", &pipe, adapter.to_str().unwrap(), "--single-file", "--out", out.to_str().unwrap()];
        let (code, _, err) = run([&args[..], more].concat());
        assert_eq!(code, 0, "{err}");
        (std::fs::read(out).unwrap(), err)
    };
    let (want, _) = merge("diffusers_with_metadata", &[]);
    for name in ["diffusers_minimal_metadata", "kohya_lora_unet", "comfy_diffusion_model_AB_alpha"] {
        let (got, err) = merge(name, &[]);
        assert!(got == want && !err.contains("warning"), "{name}: {err}");
    }
    let (weaker, err) = merge("diffusers_no_metadata", &[]);
    assert!(weaker != want && err.contains("no alpha is stored") && err.contains("`--alpha`"), "{err}");
    let (given, err) = merge("diffusers_no_metadata", &["--alpha", "8"]);
    assert!(given == want && !err.contains("warning"), "{err}");
}

#[test]
fn keys_that_cannot_be_used_stop_a_merge_unless_they_may_be_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let pipe = fixture("case_a/pipe").to_str().unwrap().to_string();
    let source = MappedFile::open(&fixture("case_a/lora/kohya_lora_unet.safetensors")).unwrap();
    let raw = |name: String| {
        let (dtype, shape) = source.info(&name).unwrap();
        let bytes = source.bytes(&name).unwrap().to_vec();
        // One module is misspelt, another has lost its B.
        let name = name.replace("blocks_0_attn_to_q.", "blocks_0_attn_to_qq.");
        RawTensor { dtype, shape: shape.to_vec(), bytes, name }
    };
    let kept = |t: &RawTensor| t.name != "lora_unet_transformer_blocks_1_attn_to_k.lora_up.weight";
    let adapter = path("odd.safetensors");
    write(Path::new(&adapter), source.names().into_iter().map(raw).filter(kept).collect(), &BTreeMap::new()).unwrap();
    let merge =
        |more: &[&str], out: &str| run([&["merge", &pipe, &adapter, "--single-file", "--out", out][..], more].concat());
    let (code, _, err) = merge(&[], &path("no.safetensors"));
    assert!(code == 2 && err.contains("4 keys of"), "{err}");
    assert!(err.contains("attn_to_qq.alpha` names no module") && err.contains("the nearest is"), "{err}");
    assert!(err.contains("has no lora_B beside it") && err.contains("--allow-unmatched"), "{err}");
    assert!(!Path::new(&path("no.safetensors")).exists());
    let (code, out, err) = merge(&["--allow-unmatched"], &path("yes.safetensors"));
    assert!(code == 0 && out.contains("22 weights changed"), "{out}");
    assert_eq!(err.matches("warning: left out:").count(), 4, "{err}");
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
    let mut files = weights.files().iter().filter_map(CheckpointFile::safetensors);
    let exact = files.find(|f| f.info(bare).is_some()).unwrap().floats(bare).unwrap();
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
    use candle_core::quantized::GgmlDType;
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
    let fp8 = dir.path().join("fp8.safetensors");
    let held = write_fp8(&weights, &fp8, Scales::OfMatrix, "");
    let out = dir.path().join("from_fp8.safetensors");
    merge(&fp8, &adapters(), &out, OutputForm::default()).unwrap();
    let merged = MappedFile::open(&out).unwrap();
    assert_eq!(merged.names().len(), weights.names().count(), "the scales are gone");
    check(&held, &merged);

    // GGUF: 8-bit blocks where rows are whole blocks, else f16.
    let gguf = dir.path().join("base.gguf");
    let held = write_gguf(&weights, &gguf, GgmlDType::Q8_0, "");
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
    // Where nothing holds it, every verb says its name, and leaves it out only when told to and if something is left.
    let (transformer, text) = (pipe.join("transformer"), path.to_str().unwrap().to_string());
    let transformer = transformer.to_str().unwrap();
    let none = dir.path().join("none.safetensors");
    let none = none.to_str().unwrap();
    for args in [
        vec!["merge", transformer, &text, "--out", none],
        vec!["merge", "--into-adapter", &text, &text, "--out", none],
        vec!["convert", &text, none, "--to", "diffusers"],
    ] {
        let (code, _, err) = run(&args);
        assert!(code == 2 && err.contains("also adapts the text encoder") && err.contains(module), "{args:?}: {err}");
        let (code, _, err) = run([&args[..], &["--allow-unmatched"]].concat());
        assert!(code == 2 && err.contains("also adapts the text encoder"), "nothing would be left: {args:?}: {err}");
    }
    assert!(!Path::new(none).exists());
    let both = dir.path().join("both.safetensors");
    let name = "transformer.transformer_blocks.0.attn.to_q";
    let transformer_part = [
        floats(&format!("{name}.lora_A.weight"), &[2, 48], &normals(1, 96)),
        floats(&format!("{name}.lora_B.weight"), &[48, 2], &normals(2, 96)),
    ];
    let text_part = [factor("lora_A", 2, in_features), factor("lora_B", out_features, 2)];
    write(&both, transformer_part.into_iter().chain(text_part).collect(), &BTreeMap::new()).unwrap();
    let both = both.to_str().unwrap();
    for (i, args) in [
        vec!["merge", transformer, both],
        vec!["merge", pipe.to_str().unwrap(), both, "--single-file"],
        vec!["merge", "--into-adapter", both, both],
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(if i == 0 { "left".to_string() } else { format!("left{i}.safetensors") });
        let (code, _, err) = run([&args[..], &["--allow-unmatched", "--out", out.to_str().unwrap()]].concat());
        assert!(code == 0 && err.contains("left out: 1 module of the text encoder"), "{args:?}: {err}");
    }
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

#[test]
fn a_merged_base_runs_as_the_base_with_the_adapters_at_run_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let case = fixture("case_b");
    let (pipe, case) = (case.join("pipe").to_str().unwrap().to_string(), case.to_str().unwrap().to_string());
    let one = fixture("case_b/lora/kohya_lora_unet.safetensors").to_str().unwrap().to_string();
    let two = path("two.safetensors");
    mixed_adapter(Path::new(&two), &table("case_b"));
    let weights = "--weights=0.7,-0.4";
    run_ok(["merge", &pipe, &one, &two, weights, "--out", &path("merged")]);
    run_ok(["merge", "--into-adapter", &one, &two, weights, "--out", &path("concat.safetensors")]);
    run_ok(["merge", &pipe, &path("concat.safetensors"), "--out", &path("concat_merged")]);
    // The transformer's output for recorded inputs, on its own and with adapters at run time.
    let verify = |model: &str, adapters: &[&str], name: &str| {
        let output = path(&format!("{name}.out"));
        let mut args = vec!["verify", "--model", model, "--reference", &case, "--output", &output, "--json"];
        args.extend(adapters.iter().flat_map(|a| ["--adapter", a]));
        // The merged model does not reproduce the recorded values of the base: that is the point.
        let (code, _, err) = run(args);
        assert!(code == 0 || adapters.is_empty(), "{err}");
        let file = MappedFile::open(Path::new(&output)).unwrap();
        let key = if adapters.is_empty() { "tf.b2_mask.output" } else { "adapter.output" };
        file.floats(key).unwrap()
    };
    let want = verify(&pipe, &[&format!("{one}:0.7"), &format!("{two}:-0.4")], "run_time");
    let worst = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let concat = path("concat.safetensors");
    for (model, adapters) in
        [(&path("merged"), &[][..]), (&pipe, &[concat.as_str()][..]), (&path("concat_merged"), &[][..])]
    {
        let got = verify(model, adapters, "got");
        assert!(worst(&got, &want) < 1e-5 * largest, "{model}: {} of {largest}", worst(&got, &want));
    }
    // Both adapters do something, the second as much with the other sign.
    for other in [vec![format!("{one}:0.7")], vec![format!("{one}:0.7"), format!("{two}:0.4")]] {
        let other = verify(&pipe, &other.iter().map(String::as_str).collect::<Vec<_>>(), "other");
        assert!(worst(&other, &want) > 0.01 * largest);
    }
}

#[test]
fn other_kinds_of_adapter_are_merged_as_they_are_defined() {
    let dir = tempfile::tempdir().unwrap();
    let base = Base::open(&fixture("case_a/pipe")).unwrap();
    let table = base.transformer_table();
    // 192 rows: more than one block of rows; the norms of columns need a pass over all of them.
    let wide = "transformer_blocks.0.img_mlp.net.0.proj";
    let square = "transformer_blocks.0.attn.to_q";
    let files: [(&str, &str, Vec<RawTensor>); 4] = [
        (
            "lokr",
            square,
            vec![
                floats(&format!("lycoris_{}.lokr_w1", square.replace('.', "_")), &[4, 4], &normals(1, 16)),
                floats(&format!("lycoris_{}.lokr_w2", square.replace('.', "_")), &[12, 12], &normals(2, 144)),
            ],
        ),
        (
            "loha",
            square,
            vec![
                floats(&format!("{square}.hada_w1_a"), &[48, 2], &normals(3, 96)),
                floats(&format!("{square}.hada_w1_b"), &[2, 48], &normals(4, 96)),
                floats(&format!("{square}.hada_w2_a"), &[48, 2], &normals(5, 96)),
                floats(&format!("{square}.hada_w2_b"), &[2, 48], &normals(6, 96)),
                floats(&format!("{square}.alpha"), &[], &[3.0]),
            ],
        ),
        (
            "dora_rows",
            wide,
            vec![
                floats(&format!("{wide}.lora_A.weight"), &[2, 48], &normals(7, 96)),
                floats(&format!("{wide}.lora_B.weight"), &[192, 2], &normals(8, 384)),
                floats(&format!("{wide}.lora_magnitude_vector"), &[192], &normals(9, 192)),
            ],
        ),
        (
            "dora_columns",
            wide,
            vec![
                floats(&format!("{wide}.lora_A.weight"), &[2, 48], &normals(10, 96)),
                floats(&format!("{wide}.lora_B.weight"), &[192, 2], &normals(11, 384)),
                floats(&format!("{wide}.dora_scale"), &[1, 48], &normals(12, 48)),
            ],
        ),
    ];
    let mut all = Vec::new();
    let mut changes: BTreeMap<&str, Vec<f32>> = BTreeMap::new();
    for ((name, module, tensors), weight) in files.into_iter().zip([0.5f32, -1.5, 0.75, 0.25]) {
        let path = dir.path().join(format!("{name}.safetensors"));
        write(&path, tensors, &BTreeMap::new()).unwrap();
        let adapter = AdapterFile::open(&path, &options(table)).unwrap();
        let change = adapter
            .delta(module, &adapter.transformer[module])
            .unwrap()
            .change_of(&base.weight(module).unwrap().unwrap());
        let sum = changes.entry(module).or_insert_with(|| vec![0.0; change.data.len()]);
        sum.iter_mut().zip(&change.data).for_each(|(s, c)| *s += weight * c);
        all.push(Weighted { adapter, weight: f64::from(weight) });
    }
    // All together: DoRA refers to the base, not to what the others have made of it.
    let out = dir.path().join("merged.safetensors");
    base.merge(&all, &out, &OutputForm { single_file: true, dtype: None }, &|_| ()).unwrap();
    let merged = MappedFile::open(&out).unwrap();
    for (module, change) in changes {
        let before = base.weight(module).unwrap().unwrap();
        let got = merged.floats(&format!("{module}.weight")).unwrap();
        for (i, ((got, before), change)) in got.iter().zip(&before.data).zip(&change).enumerate() {
            assert!((got - before - change).abs() < 2e-6 * (1.0 + before.abs() + change.abs()), "{module}[{i}]");
        }
    }
}

#[test]
fn tensors_that_straddle_windows_of_the_output_are_merged_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    // Windows are of 2 MiB. Three bytes at the front leave nothing aligned, neither rows nor values.
    let odd = RawTensor { name: "a.ids".into(), dtype: Dtype::U8, shape: vec![3], bytes: vec![1, 2, 3] };
    let wide = floats("b.0.weight", &[1100, 1000], &normals(70, 1_100_000));
    let bytes = normals(71, 1_501_500).iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    let narrow = RawTensor { name: "b.1.weight".into(), dtype: Dtype::BF16, shape: vec![1500, 1001], bytes };
    let copied = floats("c.bias", &[1_300_001], &normals(72, 1_300_001));
    write(&path("base.safetensors"), vec![odd, wide, narrow, copied], &BTreeMap::new()).unwrap();
    let lora = vec![
        floats("b.0.lora_A.weight", &[2, 1000], &normals(73, 2000)),
        floats("b.0.lora_B.weight", &[1100, 2], &normals(74, 2200)),
        floats("b.1.lora_A.weight", &[3, 1001], &normals(75, 3003)),
        floats("b.1.lora_B.weight", &[1500, 3], &normals(76, 4500)),
        floats("b.1.dora_scale", &[1500, 1], &normals(77, 1500)),
    ];
    write(&path("lora.safetensors"), lora, &BTreeMap::new()).unwrap();
    let base = Base::open(&path("base.safetensors")).unwrap();
    let open = || AdapterFile::open(&path("lora.safetensors"), &options(base.transformer_table())).unwrap();
    let out = path("merged.safetensors");
    let written = std::sync::atomic::AtomicUsize::new(0);
    let progress = |bytes| {
        written.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
    };
    let adapters = [Weighted { adapter: open(), weight: -0.5 }];
    base.merge(&adapters, &out, &OutputForm::default(), &progress).unwrap();
    assert_eq!(written.into_inner() as u64, std::fs::metadata(&out).unwrap().len());
    let (before, after) = (MappedFile::open(&path("base.safetensors")).unwrap(), MappedFile::open(&out).unwrap());
    for name in ["a.ids", "c.bias"] {
        assert_eq!(before.bytes(name).unwrap(), after.bytes(name).unwrap());
    }
    let adapter = open();
    for (module, rounding) in [("b.0", 1e-6), ("b.1", 0.004)] {
        let change = adapter.delta(module, &adapter.transformer[module]).unwrap();
        let change = change.change_of(&base.weight(module).unwrap().unwrap());
        let name = format!("{module}.weight");
        let (before, after) = (before.floats(&name).unwrap(), after.floats(&name).unwrap());
        for (i, ((after, before), change)) in after.iter().zip(&before).zip(&change.data).enumerate() {
            let want = before - 0.5 * change;
            assert!((after - want).abs() <= rounding * want.abs() + 1e-6, "{name}[{i}]: {after} {want}");
        }
    }
}
