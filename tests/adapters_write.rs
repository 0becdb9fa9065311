//! Writing and reading back, in every spelling; conversion between them.

mod adapters_common;

use adapters_common::{deltas, fixture, floats, normals, options, run, run_ok, table, worst};
use proptest::prelude::*;
use qwen_lora::adapters::delta::{Delta, Factors, Magnitude};
use qwen_lora::adapters::matrix::Matrix;
use qwen_lora::adapters::merge::Base;
use qwen_lora::adapters::read::{AdapterFile, Component, ModuleEntry, ModuleTable, ReadOptions};
use qwen_lora::io::floats::{narrow, widened};
use qwen_lora::io::safetensors::{MappedFile, RawTensor, write};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[test]
fn conversions_keep_the_change_and_round_trips_keep_the_bits() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for case in ["case_a", "case_b"] {
        let table = table(case);
        let strict = options(&table);
        let source = fixture(case).join("lora/kohya_lora_unet.safetensors");
        let want = deltas(&source, &strict);
        let convert = |from: &Path, to: &str| -> PathBuf {
            let name = format!("{case}-{}-{to}", from.file_stem().unwrap().to_str().unwrap());
            let out = at(&if to == "peft" { name } else { format!("{name}.safetensors") });
            run_ok(["convert", from.to_str().unwrap(), out.to_str().unwrap(), "--to", to]);
            out
        };
        for to in ["diffusers", "comfyui", "kohya", "peft", "diffsynth"] {
            let out = convert(&source, to);
            // case_a's scale is 2, which folds without rounding; case_b's is 1.5.
            let limit = if case == "case_a" { 0.0 } else { 3e-7 };
            assert!(worst(&deltas(&out, &strict), &want) <= limit, "{case} {to}");
            let back = convert(&out, "kohya");
            assert!(worst(&deltas(&back, &strict), &want) <= limit, "{case} {to} and back");
            if matches!(to, "comfyui" | "kohya" | "peft") {
                // Alpha stays apart from the matrices there: every bit comes back.
                let (first, last) = (MappedFile::open(&source).unwrap(), MappedFile::open(&back).unwrap());
                assert_eq!(first.names(), last.names());
                for name in first.names() {
                    assert_eq!(first.bytes(&name).unwrap(), last.bytes(&name).unwrap(), "{case} {to} {name}");
                }
            }
        }
    }
}

#[test]
fn metadata_that_would_be_taken_for_the_scale_stays_behind() {
    let dir = tempfile::tempdir().unwrap();
    let table = table("case_a");
    let path = dir.path().join("in.safetensors");
    let name = "lora_unet_transformer_blocks_0_attn_to_q";
    let tensors = vec![
        floats(&format!("{name}.lora_down.weight"), &[4, 48], &normals(1, 4 * 48)),
        floats(&format!("{name}.lora_up.weight"), &[48, 4], &normals(2, 48 * 4)),
        floats(&format!("{name}.alpha"), &[], &[8.0]),
    ];
    let metadata = [("ss_network_alpha", "8"), ("ss_network_dim", "4"), ("ss_steps", "100"), ("modelspec.title", "x")];
    write(&path, tensors, &metadata.map(|(k, v)| (k.to_string(), v.to_string())).into()).unwrap();
    let want = deltas(&path, &options(&table));
    for to in ["diffsynth", "diffusers", "comfyui"] {
        let out = dir.path().join(format!("{to}.safetensors"));
        run_ok(["convert", path.to_str().unwrap(), out.to_str().unwrap(), "--to", to]);
        assert_eq!(worst(&deltas(&out, &options(&table)), &want), 0.0, "{to}");
        let kept = MappedFile::open(&out).unwrap().metadata();
        assert!(!kept.contains_key("ss_network_alpha") && kept["ss_steps"] == "100" && kept["modelspec.title"] == "x");
        assert_eq!(kept.contains_key("lora_adapter_metadata"), to == "diffusers");
    }
}

#[test]
fn other_kinds_stay_where_they_are_read_and_become_loras_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let table = table("case_a");
    let pipe = fixture("case_a/pipe");
    let path = |name: &str| dir.path().join(name);
    let name = "transformer_blocks.0.attn.to_q";
    let flat = format!("lycoris_{}", name.replace('.', "_"));
    let lokr = vec![
        floats(&format!("{flat}.lokr_w1"), &[4, 4], &normals(1, 16)),
        floats(&format!("{flat}.lokr_w2_a"), &[12, 2], &normals(2, 24)),
        floats(&format!("{flat}.lokr_w2_b"), &[2, 12], &normals(3, 24)),
        floats(&format!("{flat}.alpha"), &[], &[1.0]),
    ];
    write(&path("lokr.safetensors"), lokr, &BTreeMap::new()).unwrap();
    let want = deltas(&path("lokr.safetensors"), &options(&table));
    let run_convert = |from: &str, out: &str, more: &[&str]| {
        let (from, out) = (path(from), path(out));
        let mut args = vec!["convert", from.to_str().unwrap(), out.to_str().unwrap()];
        args.extend(more);
        run(args)
    };
    let keys = |file: &str| MappedFile::open(&path(file)).unwrap().names();
    assert_eq!(run_convert("lokr.safetensors", "c.safetensors", &["--to", "comfyui"]).0, 0);
    assert!(keys("c.safetensors").contains(&format!("diffusion_model.{name}.lokr_w1")));
    assert_eq!(worst(&deltas(&path("c.safetensors"), &options(&table)), &want), 0.0);
    // 4 x 4 and rank 2: rank 8 holds it all, rank 3 tells what it loses.
    let (code, out, _) = run_convert("lokr.safetensors", "d.safetensors", &["--to", "diffusers", "--rank", "8"]);
    assert!(code == 0 && out.contains("no energy lost"), "{out}");
    assert!(worst(&deltas(&path("d.safetensors"), &options(&table)), &want) < 1e-5);
    let (_, out, _) = run_convert("lokr.safetensors", "e.safetensors", &["--to", "diffsynth", "--rank", "3", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    let lost = report["made_into_lora"][0]["energy_lost"].as_f64().unwrap();
    let got = &deltas(&path("e.safetensors"), &options(&table))[name];
    let mut rest = want[name].clone();
    rest.add_scaled(got, -1.0);
    assert!((rest.energy() / want[name].energy() - lost).abs() < 1e-5 && lost > 0.001, "{lost}");

    // DoRA: as it is for ComfyUI and PEFT, as LoRA only with its base.
    let dora = vec![
        floats(&format!("diffusion_model.{name}.lora_A.weight"), &[2, 48], &normals(4, 96)),
        floats(&format!("diffusion_model.{name}.lora_B.weight"), &[48, 2], &normals(5, 96)),
        floats(&format!("diffusion_model.{name}.dora_scale"), &[48, 1], &normals(6, 48)),
        floats(&format!("diffusion_model.{name}.alpha"), &[], &[3.0]),
    ];
    write(&path("dora.safetensors"), dora, &BTreeMap::new()).unwrap();
    let magnitude = |file: &Path| {
        let adapter = AdapterFile::open(file, &options(&table)).unwrap();
        match adapter.delta(name, &adapter.transformer[name]).unwrap().magnitude {
            Some(Magnitude::Rows(values)) => values,
            other => panic!("norms of rows, not {other:?}"),
        }
    };
    assert_eq!(run_convert("dora.safetensors", "p", &["--to", "peft"]).0, 0);
    let config = std::fs::read_to_string(path("p").join("adapter_config.json")).unwrap();
    assert!(config.contains("\"use_dora\": true"));
    assert_eq!(magnitude(&path("p")), magnitude(&path("dora.safetensors")));
    // PEFT refuses norms in a column: it wants a vector.
    let norms = format!("base_model.model.{name}.lora_magnitude_vector");
    assert_eq!(MappedFile::open(&path("p").join("adapter_model.safetensors")).unwrap().info(&norms).unwrap().1, [48]);
    let (code, _, err) = run_convert("dora.safetensors", "f.safetensors", &["--to", "diffusers"]);
    assert!(code == 2 && err.contains("DoRA") && err.contains("--base"), "{err}");
    let base = ["--to", "diffusers", "--rank", "48", "--base", pipe.to_str().unwrap()];
    assert_eq!(run_convert("dora.safetensors", "f.safetensors", &base).0, 0);
    let adapter = AdapterFile::open(&path("dora.safetensors"), &options(&table)).unwrap();
    let weight = MappedFile::open(&pipe.join("transformer/diffusion_pytorch_model.safetensors")).unwrap();
    let weight = Matrix::new(48, 48, weight.floats(&format!("{name}.weight")).unwrap());
    let change = adapter.delta(name, &adapter.transformer[name]).unwrap().change_of(&weight);
    let got = deltas(&path("f.safetensors"), &options(&table));
    assert!(worst(&got, &[(name.to_string(), change)].into()) < 1e-5);
}

#[test]
fn outputs_are_never_overwritten_and_bad_input_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("in.safetensors");
    std::fs::copy(fixture("case_a/lora/kohya_lora_unet.safetensors"), &source).unwrap();
    let whole = std::fs::read(&source).unwrap();
    let path = source.to_str().unwrap();
    let fail = |args: &[&str], why: &str| {
        let (code, _, err) = run(args);
        assert!(code == 2 && err.contains(why), "{args:?}: {code} {err}");
    };
    fail(&["convert", path, path, "--to", "diffusers"], "is the input");
    let taken = dir.path().join("taken.safetensors");
    std::fs::write(&taken, "precious").unwrap();
    fail(&["convert", path, taken.to_str().unwrap(), "--to", "kohya"], "exists");
    let out = dir.path().join("out.safetensors");
    let out = out.to_str().unwrap();
    fail(&["convert", path, &out.replace(".safetensors", ".bin"), "--to", "kohya"], "ends with .safetensors");
    fail(&["convert", path, out, "--to", "peft"], "a folder's name");
    fail(&["convert", path, out, "--to", "kohya", "--alpha=-1"], "a positive number");
    let pipe = fixture("case_b/pipe");
    fail(&["convert", path, out, "--to", "kohya", "--base", pipe.to_str().unwrap()], "the model has (40, 40)");
    let pipe = fixture("case_a/pipe");
    let pipe = pipe.to_str().unwrap();
    fail(&["merge", pipe, path, path, "--weights", "0.5", "--out", out], "2 weights, one for each adapter, found 1");
    fail(&["merge", pipe, path, "--single-file", "--out", path], "is the input");
    fail(&["merge", "--into-adapter", path, path, "--method", "svd", "--out", out], "wants a rank");
    fail(&["merge", "--into-adapter", path, path, "--method", "linear", "--weights=1,-1", "--out", out], "add up to 0");
    fail(
        &["merge", "--into-adapter", path, path, "--method", "dare", "--density", "0", "--out", out],
        "a share above 0",
    );
    fail(&["extract", pipe, pipe, "--rank", "4", "--out", out], "do not differ");
    // Another model's adapter, by name and shape.
    let other = fixture("case_b/lora/comfy_diffusion_model_AB_alpha.safetensors");
    fail(&["merge", pipe, other.to_str().unwrap(), "--out", out], "this is no adapter, or one for another model");
    fail(&["merge", path, path, "--out", out], "is an adapter");
    fail(&["merge", pipe, pipe, "--out", out], "adapter of a usual name");
    fail(&["merge", pipe, "--out", out], "no adapter to merge");
    fail(&["merge", pipe, path, "--weights", "nan", "--out", out], "finite numbers");
    let edit = |name: &str, bytes: Vec<u8>| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_string()
    };
    // A header said to be 8 bytes shorter or longer than it is; one whose text says nonsense.
    let length = u64::from_le_bytes(*whole.first_chunk().unwrap());
    let said = |length: u64| [&length.to_le_bytes()[..], &whole[8..]].concat();
    let text = std::str::from_utf8(&whole[8..8 + length as usize]).unwrap();
    let changed = |from: &str, to: &str| {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text);
        [&(changed.len() as u64).to_le_bytes()[..], changed.as_bytes(), &whole[8 + length as usize..]].concat()
    };
    let entry = |key: &str| {
        let entry = &text[text.find(&format!("\"{key}\"")).unwrap()..];
        entry[..=entry.find('}').unwrap()].to_string()
    };
    let begins = |key: &str| {
        let entry = entry(key);
        entry[entry.find('[').unwrap()..].rsplit_once("data_offsets").unwrap().1.trim_end_matches('}').to_string()
    };
    let (first, second) =
        ["q", "k"].map(|to| format!("lora_unet_transformer_blocks_0_attn_to_{to}.lora_up.weight")).into();
    for (bytes, why) in [
        (said(length - 8), "is not a whole safetensors file"),
        (said(length + 8), "is not a whole safetensors file"),
        (said(whole.len() as u64), "as its first eight bytes say"),
        (changed(&begins(&first), &begins(&second)), "overlaps another tensor"),
        (changed("{", &format!("{{{},", entry(&first))), "twice"),
        (whole[..whole.len() - 1].to_vec(), "as its header says"),
        (whole[..100].to_vec(), "a file of 100 bytes"),
        (vec![], "the file is empty"),
        ([&(10u64 << 30).to_le_bytes()[..], &[b' '; 1016][..]].concat(), "a header of 10737418240 bytes"),
        ([&(u64::MAX).to_le_bytes()[..], &[b' '; 16][..]].concat(), "a header of 18446744073709551615 bytes"),
    ] {
        let bad = edit("bad.safetensors", bytes);
        fail(&["convert", &bad, out, "--to", "kohya"], why);
        fail(&["merge", pipe, &bad, "--out", out], why);
        fail(&["merge", &bad, path, "--out", out], why);
        fail(&["merge", "--into-adapter", path, &bad, "--out", out], why);
        fail(&["inspect", &bad], why);
        fail(&["extract", pipe, &bad, "--rank", "4", "--out", out], why);
    }
    assert!(!Path::new(out).exists());
    assert_eq!((std::fs::read(&source).unwrap(), std::fs::read(&taken).unwrap()), (whole, b"precious".to_vec()));
}

/// How a test spells an adapter.
#[derive(Clone, Copy, Debug)]
struct Spelling {
    prefix: &'static str,
    flat: bool,
    a: &'static str,
    b: &'static str,
    alpha: Where,
}

/// Where a spelling keeps alpha.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Where {
    Keys,
    Metadata,
    /// `adapter_config.json` beside the file.
    Config,
    Folded,
}

const fn spelling(prefix: &'static str, flat: bool, a: &'static str, b: &'static str, alpha: Where) -> Spelling {
    Spelling { prefix, flat, a, b, alpha }
}

/// diffusers with and without metadata, PEFT (three forms), kohya, ai-toolkit, diffusion-pipe, DiffSynth (two forms),
/// SimpleTuner, OneTrainer (two forms), Lightning.
const SPELLINGS: [Spelling; 14] = [
    spelling("transformer.", false, "lora_A.weight", "lora_B.weight", Where::Metadata),
    spelling("transformer.", false, "lora_A.weight", "lora_B.weight", Where::Folded),
    spelling("base_model.model.", false, "lora_A.weight", "lora_B.weight", Where::Config),
    spelling("base_model.model.", false, "lora_A.weight", "lora_B.weight", Where::Keys),
    spelling("base_model.model.", false, "lora_A.default.weight", "lora_B.default.weight", Where::Folded),
    spelling("lora_unet_", true, "lora_down.weight", "lora_up.weight", Where::Keys),
    spelling("diffusion_model.", false, "lora_A.weight", "lora_B.weight", Where::Keys),
    spelling("diffusion_model.", false, "lora_A.weight", "lora_B.weight", Where::Config),
    spelling("", false, "lora_A.default.weight", "lora_B.default.weight", Where::Folded),
    spelling("", false, "lora_A.default_0.default.weight", "lora_B.default_0.default.weight", Where::Folded),
    spelling("lycoris_", true, "lora_down.weight", "lora_up.weight", Where::Keys),
    spelling("lora_transformer_", true, "lora_down.weight", "lora_up.weight", Where::Keys),
    spelling("transformer.", false, "lora_down.weight", "lora_up.weight", Where::Keys),
    spelling("", false, "lora_down.weight", "lora_up.weight", Where::Keys),
];

/// Kinds of adapter of one module.
#[derive(Clone, Copy, Debug)]
enum Form {
    Lora { rank: usize },
    Loha { rank: usize },
    Lokr { rank: usize, split: usize, full_w1: bool, full_w2: bool },
}

fn forms() -> impl Strategy<Value = Form> {
    prop_oneof![
        (1usize..6).prop_map(|rank| Form::Lora { rank }),
        (1usize..4).prop_map(|rank| Form::Loha { rank }),
        (1usize..3, prop_oneof![Just(2usize), Just(4)], any::<bool>(), any::<bool>())
            .prop_map(|(rank, split, full_w1, full_w2)| Form::Lokr { rank, split, full_w1, full_w2 }),
    ]
}

fn modules(table: &ModuleTable) -> Vec<(String, (usize, usize))> {
    table.names().filter_map(|n| Some((n.to_string(), table.shape(n)?))).collect()
}

/// DoRA's norms, if a module has them.
#[derive(Clone, Copy, Debug)]
enum Norms {
    None,
    Rows,
    Columns,
}

/// Random values that `dtype` holds exactly.
fn exact(item: u64, rows: usize, cols: usize, dtype: Dtype) -> Matrix {
    let mut bytes = vec![0; rows * cols * dtype.bitsize() / 8];
    narrow(&normals(item, rows * cols), dtype, &mut bytes);
    Matrix::new(rows, cols, widened(&bytes, dtype))
}

/// A tensor of a file, of one of the types that adapters come in.
fn typed(name: String, shape: &[usize], values: &[f32], dtype: Dtype) -> RawTensor {
    let mut bytes = vec![0; values.len() * dtype.bitsize() / 8];
    narrow(values, dtype, &mut bytes);
    RawTensor { name, dtype, shape: shape.into(), bytes }
}

/// Factors of a form with random values, as named parts, and the delta that they mean at `alpha`.
fn make(
    form: Form,
    (out, width): (usize, usize),
    alpha: f64,
    item: u64,
    dtype: Dtype,
) -> (Vec<(&'static str, Matrix)>, Delta) {
    let random = |k: u64, rows: usize, cols: usize| exact(item * 8 + k, rows, cols, dtype);
    match form {
        Form::Lora { rank } => {
            let (a, b) = (random(0, rank, width), random(1, out, rank));
            let parts = vec![("A", a.clone()), ("B", b.clone())];
            (parts, Delta { factors: Factors::Lora { a, b }, scale: alpha / rank as f64, magnitude: None })
        }
        Form::Loha { rank } => {
            let w1 = (random(0, out, rank), random(1, rank, width));
            let w2 = (random(2, out, rank), random(3, rank, width));
            let parts = [("hada_w1_a", &w1.0), ("hada_w1_b", &w1.1), ("hada_w2_a", &w2.0), ("hada_w2_b", &w2.1)];
            let parts = parts.map(|(n, m)| (n, m.clone())).to_vec();
            (parts, Delta { factors: Factors::Loha { w1, w2 }, scale: alpha / rank as f64, magnitude: None })
        }
        Form::Lokr { rank, split, full_w1, full_w2 } => {
            let mut parts = Vec::new();
            let mut side = |names: [&'static str; 3], full: bool, rows: usize, cols: usize, k: u64| {
                if full {
                    let m = random(k, rows, cols);
                    parts.push((names[0], m.clone()));
                    return m;
                }
                let (a, b) = (random(k, rows, rank), random(k + 1, rank, cols));
                let product = a.product(&b);
                parts.extend([(names[1], a), (names[2], b)]);
                product
            };
            let w1 = side(["lokr_w1", "lokr_w1_a", "lokr_w1_b"], full_w1, split, split, 0);
            let w2 = side(["lokr_w2", "lokr_w2_a", "lokr_w2_b"], full_w2, out / split, width / split, 2);
            // With two full factors there is no rank, and nobody applies alpha.
            let scale = if full_w1 && full_w2 { 1.0 } else { alpha / rank as f64 };
            (parts, Delta { factors: Factors::Lokr { w1, w2 }, scale, magnitude: None })
        }
    }
}

/// What an adapter changes the weights of `base` by, norms included.
fn changes(path: &Path, base: &Base) -> BTreeMap<String, Matrix> {
    let adapter = AdapterFile::open(path, &options(base.transformer_table())).unwrap();
    let change = |(name, entry): (&String, &ModuleEntry)| {
        let weight = base.weight(name).unwrap().unwrap();
        (name.clone(), adapter.delta(name, entry).unwrap().change_of(&weight))
    };
    adapter.transformer.iter().map(change).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Any adapter in any spelling is read as the change it means; written by `convert` for any tool and read again, it
    /// is the same change: exactly where that tool knows its kind, by an SVD that loses nothing where it does not.
    #[test]
    fn read_write_read_in_every_spelling(
        which in 0..SPELLINGS.len(),
        picks in proptest::collection::btree_map(
            0usize..33,
            (forms(), 1u32..64, prop_oneof![3 => Just(Norms::None), 1 => Just(Norms::Rows), 1 => Just(Norms::Columns)]),
            1..4,
        ),
        dtype in prop_oneof![Just(Dtype::F32), Just(Dtype::BF16), Just(Dtype::F16)],
        to in prop_oneof![Just("diffusers"), Just("comfyui"), Just("kohya"), Just("peft"), Just("diffsynth")],
    ) {
        let spelling = SPELLINGS[which];
        let pipe = fixture("case_a/pipe");
        let base = Base::open(&pipe).unwrap();
        let all = modules(&table("case_a"));
        let (mut tensors, mut want, mut alphas) = (Vec::new(), BTreeMap::new(), serde_json::Map::new());
        let mut ranks = serde_json::Map::new();
        for (&pick, &(form, alpha, norms)) in &picks {
            let (name, shape) = &all[pick];
            let alpha = f64::from(alpha) / 4.0;
            // Alpha in the metadata or nowhere is a thing of LoRA files.
            let form = match (spelling.alpha, form) {
                (Where::Keys, form) => form,
                (_, Form::Loha { rank } | Form::Lokr { rank, .. } | Form::Lora { rank }) => Form::Lora { rank },
            };
            let (parts, mut delta) = make(form, *shape, alpha, pick as u64, dtype);
            let stem = format!("{}{}", spelling.prefix, if spelling.flat { name.replace('.', "_") } else { name.clone() });
            for (part, mut matrix) in parts {
                let end = match part { "A" => spelling.a, "B" => spelling.b, other => other };
                let mut stored = dtype;
                if part == "B" && spelling.alpha == Where::Folded {
                    (matrix, stored) = (matrix.scaled(delta.scale), Dtype::F32);
                }
                tensors.push(typed(format!("{stem}.{end}"), &[matrix.rows, matrix.cols], &matrix.data, stored));
            }
            if spelling.alpha == Where::Keys {
                tensors.push(floats(&format!("{stem}.alpha"), &[], &[alpha as f32]));
            }
            let norm = |n: usize| normals(900 + pick as u64, n).iter().map(|v| 1.0 + v.abs()).collect::<Vec<f32>>();
            delta.magnitude = match norms {
                Norms::None => None,
                Norms::Rows => Some(Magnitude::Rows(norm(shape.0))),
                Norms::Columns => Some(Magnitude::Columns(norm(shape.1))),
            };
            match &delta.magnitude {
                None => {}
                // PEFT knows norms of rows as a vector; everyone else writes a column or a row.
                Some(Magnitude::Rows(v)) if spelling.prefix == "base_model.model." => {
                    tensors.push(floats(&format!("{stem}.lora_magnitude_vector.weight"), &[v.len()], v));
                }
                Some(Magnitude::Rows(v)) => tensors.push(floats(&format!("{stem}.dora_scale"), &[v.len(), 1], v)),
                Some(Magnitude::Columns(v)) => tensors.push(floats(&format!("{stem}.dora_scale"), &[1, v.len()], v)),
            }
            if let Form::Lora { rank } = form {
                ranks.insert(name.clone(), rank.into());
                alphas.insert(name.clone(), alpha.into());
            }
            want.insert(name.clone(), delta.change_of(&base.weight(name).unwrap().unwrap()));
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let prefix = if spelling.alpha == Where::Metadata { "transformer." } else { "" };
        let config = serde_json::json!({
            format!("{prefix}r"): 999, format!("{prefix}lora_alpha"): 999,
            format!("{prefix}rank_pattern"): ranks, format!("{prefix}alpha_pattern"): alphas,
        });
        let metadata = match spelling.alpha {
            Where::Metadata => [("lora_adapter_metadata".to_string(), config.to_string())].into(),
            _ => BTreeMap::new(),
        };
        if spelling.alpha == Where::Config {
            std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        }
        write(&path, tensors, &metadata).unwrap();
        // With a config beside it, the folder is the adapter.
        let source = if spelling.alpha == Where::Config { dir.path() } else { path.as_path() };
        prop_assert!(worst(&changes(source, &base), &want) < 2e-6);
        let written = tempfile::tempdir().unwrap();
        let out = written.path().join(if to == "peft" { "y" } else { "y.safetensors" });
        let (from, out_text, pipe) = (source.to_str().unwrap(), out.to_str().unwrap(), pipe.to_str().unwrap());
        let args = ["convert", from, out_text, "--to", to, "--base", pipe, "--rank", "48", "--dtype", "f32", "--json"];
        let report: serde_json::Value = serde_json::from_str(&run_ok(args)).unwrap();
        let made = report["made_into_lora"].as_array().unwrap();
        // 48 is the width of the model: no change of a weight has a higher rank.
        prop_assert!(made.iter().all(|m| m["energy_lost"].as_f64().unwrap() < 1e-8), "{report}");
        let limit = if made.is_empty() { 2e-6 } else { 2e-5 };
        let error = worst(&changes(&out, &base), &want);
        prop_assert!(error < limit, "{error}");
    }

    /// Whatever bytes replace a part of a real file, reading ends with an adapter or an error, never otherwise.
    #[test]
    fn corrupt_files_are_errors_or_adapters(
        name in prop_oneof![Just("kohya_lora_unet"), Just("diffusers_with_metadata")],
        at in 0usize..3000,
        bytes in proptest::collection::vec(any::<u8>(), 1..12),
        cut in proptest::option::of(0usize..60000),
    ) {
        let table = table("case_a");
        let mut file = std::fs::read(fixture(&format!("case_a/lora/{name}.safetensors"))).unwrap();
        file[at..at + bytes.len()].copy_from_slice(&bytes);
        file.truncate(cut.unwrap_or(usize::MAX));
        let options = ReadOptions { allow_unmatched: true, ..options(&table) };
        if let Ok(adapter) = AdapterFile::from_bytes(Path::new("x"), file, None, &options) {
            for (name, entry) in adapter.modules(Component::Transformer) {
                if let Ok(delta) = adapter.delta(name, entry) {
                    prop_assert_eq!(delta.shape(), entry.shape);
                }
            }
        }
    }
}

/// Kept so that the raw form of checkpoints stays readable by the general reader too.
#[test]
fn raw_checkpoints_and_exports_of_ours_mean_the_same() {
    use qwen_lora::adapters::file::{Provenance, write_exported, write_raw};
    use qwen_lora::adapters::{Init, LoraAdapter, LoraScaling, resolve_targets};
    use qwen_lora::model::transformer::TransformerConfig;
    let dir = tempfile::tempdir().unwrap();
    let config = TransformerConfig::from_file(&fixture("case_a/pipe/transformer/config.json")).unwrap();
    let entries =
        ["qkv".into(), qwen_lora::adapters::TargetEntry { pattern: "img_in".into(), rank: Some(3), alpha: Some(5.0) }];
    for rslora in [false, true] {
        let targets =
            resolve_targets(&config.modules(), &entries, LoraScaling { rank: 4, alpha: 6.0, rslora }).unwrap();
        let mut adapter = LoraAdapter::init(&targets, Init::Gaussian, 1, &candle_core::Device::Cpu).unwrap();
        for (i, module) in adapter.modules.values_mut().enumerate() {
            let (rows, rank) = module.b.dims2().unwrap();
            module.b =
                candle_core::Tensor::from_vec(normals(i as u64, rows * rank), (rows, rank), &candle_core::Device::Cpu)
                    .unwrap();
        }
        let (raw, exported) = (dir.path().join("raw.safetensors"), dir.path().join("exported.safetensors"));
        write_raw(&raw, &adapter).unwrap();
        write_exported(&exported, &adapter, candle_core::DType::F32, &Provenance::default()).unwrap();
        let table = table("case_a");
        let strict = options(&table);
        let warnings = AdapterFile::open(&exported, &strict).unwrap().warnings;
        assert_eq!(warnings, Vec::<String>::new());
        assert!(worst(&deltas(&exported, &strict), &deltas(&raw, &strict)) < 3e-7, "rslora {rslora}");
    }
}
