//! `inspect`: its predictions against what diffusers was seen to do, and its findings.

mod adapters_common;

use adapters_common::{fixture, floats, normals, options, run, run_ok, table};
use qwen_lora::adapters::inspect::{Inspection, Model, Verdict, inspect};
use qwen_lora::adapters::read::{AdapterFile, ReadOptions};
use qwen_lora::io::safetensors::{MappedFile, RawTensor, write};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn look(path: &Path, alpha: Option<f64>) -> Inspection {
    let table = table("case_a");
    let adapter = AdapterFile::survey(path, &ReadOptions { alpha, ..options(&table) }).unwrap();
    let model = Model { num_blocks: Some(2), no_gradient: &|_| false };
    inspect(&adapter, &table, &|_| None, None, &model).unwrap()
}

/// `tests/fixtures/adapters/diffusers` was recorded by `scripts/adapters/diffusers_outcomes.py`.
fn recorded(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapters/diffusers").join(name)
}

#[test]
fn diffusers_does_with_every_recorded_file_what_is_predicted() {
    let outcomes: Value = serde_json::from_str(&std::fs::read_to_string(recorded("outcomes.json")).unwrap()).unwrap();
    let outcomes = outcomes["outcomes"].as_object().unwrap();
    assert_eq!(outcomes.len(), 54);
    for (name, outcome) in outcomes {
        // The files mean scale 2. Those that store no alpha need to be told, unless their scale is folded into B.
        let folded = matches!(
            name.as_str(),
            "transformer_ab_folded" | "dora_vector" | "dora_vector_weight" | "with_text_encoder"
        );
        let inspection = look(&recorded(&format!("{name}.safetensors")), (!folded).then_some(8.0));
        let prediction = inspection.tools.iter().find(|p| p.tool == "diffusers").unwrap();
        if outcome.get("error").is_some() {
            assert_eq!(prediction.verdict, Verdict::Fails, "{name}: {prediction:?}, recorded {outcome}");
            assert!(!prediction.note.is_empty(), "{name}");
            continue;
        }
        assert_eq!(outcome["modules"], prediction.modules, "{name}: {prediction:?}");
        let mut strength: Vec<f64> =
            outcome["strength"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
        match name.as_str() {
            // Alpha 8 at rank 2 is what these are told to mean here, 4 is what their writer meant.
            "mixed_ranks_rank_pattern" => strength = vec![1.0],
            "mixed_ranks" => strength = vec![0.25, 0.5],
            _ => {}
        }
        assert_eq!(prediction.strength, strength, "{name}: {prediction:?}");
        let verdict = match prediction.verdict {
            Verdict::Nothing => prediction.modules == 0,
            Verdict::Fails => false,
            // What is passed over is warned of.
            Verdict::Partly => outcome["warned"] == true,
            Verdict::Loads => outcome["warned"] == false,
        };
        assert!(verdict, "{name}: {prediction:?}, recorded {outcome}");
    }
}

/// What diffusers 0.42.1 really does with adapters whose alpha over rank is 2, row by row, and what `inspect` says. The
/// files mean scale 2; those that do not say so are told with `--alpha`.
#[test]
fn the_table_of_what_diffusers_does_is_what_inspect_prints() {
    let base = fixture("case_a/pipe");
    // What, files, `--alpha`; verdict, strength, a word of the note.
    type Row = (&'static str, &'static [&'static str], Option<&'static str>, &'static str, &'static str, &'static str);
    let rows: [Row; 7] = [
        ("diffusers keys, metadata", &["transformer_ab_metadata"], None, "loads", "as meant", ""),
        ("the same without metadata", &["transformer_ab"], Some("8"), "loads", "x 0.5", "alpha is not seen"),
        ("scale folded into B", &["transformer_ab_folded"], None, "loads", "as meant", ""),
        (
            "diffusers keys with alpha keys",
            &["transformer_ab_alpha", "transformer_downup_alpha"],
            None,
            "fails",
            "-",
            "an error",
        ),
        (
            "alpha keys under other prefixes or none",
            &[
                "diffusion_model_ab_alpha",
                "diffusion_model_downup_alpha",
                "lora_unet_downup_alpha",
                "bare_ab_alpha",
                "bare_downup_alpha",
            ],
            None,
            "loads",
            "as meant",
            "",
        ),
        ("no prefix or PEFT's, no alpha", &["bare_ab", "peft_ab"], Some("8"), "loads nothing", "-", "a warning"),
        ("alpha keys and metadata", &["diffusion_model_ab_alpha_metadata"], None, "loads", "x 2", "more than once"),
    ];
    for (row, files, alpha, verdict, strength, note) in rows {
        for name in files {
            let path = recorded(&format!("{name}.safetensors"));
            let mut args = vec!["inspect", path.to_str().unwrap(), "--base", base.to_str().unwrap()];
            args.extend(alpha.iter().flat_map(|a| ["--alpha", a]));
            let out = run_ok(args);
            let line = out.lines().find(|l| l.trim_start().starts_with("diffusers ")).unwrap();
            let line = line.trim_start().strip_prefix("diffusers").unwrap().trim_start();
            let rest = line.strip_prefix(verdict).unwrap_or_else(|| panic!("{row}, {name}: {line}")).trim_start();
            let rest = rest.strip_prefix(strength).unwrap_or_else(|| panic!("{row}, {name}: {line}")).trim();
            assert!(rest.contains(note) && rest.is_empty() == note.is_empty(), "{row}, {name}: {line}");
        }
    }
}

#[test]
fn other_tools_are_predicted_by_their_rules() {
    let of = |name: &str, alpha| {
        let inspection = look(&recorded(&format!("{name}.safetensors")), alpha);
        inspection.tools.into_iter().map(|p| (p.tool, (p.verdict, p.strength))).collect::<BTreeMap<_, _>>()
    };
    use Verdict::{Loads, Nothing, Partly};
    for (name, alpha, comfyui, diffsynth, musubi) in [
        ("transformer_ab_metadata", None, (Loads, vec![0.5]), (Nothing, vec![]), (Nothing, vec![])),
        ("transformer_ab_folded", None, (Loads, vec![1.0]), (Nothing, vec![]), (Nothing, vec![])),
        ("transformer_ab_alpha", None, (Loads, vec![1.0]), (Nothing, vec![]), (Nothing, vec![])),
        ("diffusion_model_ab_alpha", None, (Loads, vec![1.0]), (Loads, vec![1.0]), (Nothing, vec![])),
        ("diffusion_model_ab_alpha_metadata", None, (Loads, vec![1.0]), (Loads, vec![1.0]), (Nothing, vec![])),
        ("lora_unet_downup_alpha", None, (Loads, vec![1.0]), (Nothing, vec![]), (Loads, vec![1.0])),
        ("lora_unet_downup", Some(8.0), (Loads, vec![0.5]), (Nothing, vec![]), (Loads, vec![0.5])),
        ("bare_downup_alpha", None, (Loads, vec![1.0]), (Loads, vec![1.0]), (Nothing, vec![])),
        ("bare_default", Some(8.0), (Loads, vec![0.5]), (Loads, vec![0.5]), (Nothing, vec![])),
        ("bare_default0", Some(8.0), (Nothing, vec![]), (Loads, vec![0.5]), (Nothing, vec![])),
        ("peft_ab_alpha", None, (Nothing, vec![]), (Nothing, vec![]), (Nothing, vec![])),
        ("lycoris_downup_alpha", None, (Loads, vec![1.0]), (Nothing, vec![]), (Nothing, vec![])),
        ("lora_transformer_downup_alpha", None, (Nothing, vec![]), (Nothing, vec![]), (Nothing, vec![])),
        ("lokr_lycoris", None, (Loads, vec![1.0]), (Nothing, vec![]), (Nothing, vec![])),
        ("lokr_lora_unet", None, (Loads, vec![1.0]), (Nothing, vec![]), (Loads, vec![1.0])),
        ("loha_lora_unet", None, (Loads, vec![1.0]), (Nothing, vec![]), (Loads, vec![1.0])),
        ("dora_scale", None, (Loads, vec![1.0]), (Nothing, vec![]), (Partly, vec![1.0])),
        ("dora_vector", None, (Partly, vec![1.0]), (Nothing, vec![]), (Nothing, vec![])),
    ] {
        let tools = of(name, alpha);
        assert_eq!(tools["ComfyUI"], comfyui, "{name}");
        assert_eq!(tools["DiffSynth-Studio"], diffsynth, "{name}");
        assert_eq!(tools["musubi-tuner"], musubi, "{name}");
    }
}

#[test]
fn a_whole_model_is_told_in_a_few_lines() {
    let path = fixture("case_a/pipe/transformer/diffusion_pytorch_model.safetensors");
    let out = run_ok(["inspect", path.to_str().unwrap()]);
    assert!(out.contains("error: these are the weights of a whole model, not an adapter [no_adapter]"), "{out}");
    assert!(out.lines().count() < 15 && out.contains("more of this kind") && !out.contains("ComfyUI"), "{out}");
    assert_eq!(run(["inspect", path.to_str().unwrap(), "--strict"]).0, 1);
}

fn inspect_json(path: &Path, base: &Path) -> Value {
    let args = ["inspect", path.to_str().unwrap(), "--base", base.to_str().unwrap(), "--json"];
    serde_json::from_str(&run_ok(args)).unwrap()
}

fn codes(inspection: &Value) -> Vec<String> {
    inspection["lints"].as_array().unwrap().iter().map(|l| l["code"].as_str().unwrap().to_string()).collect()
}

/// The recorded adapter of case_b (three blocks, rank 3, alpha 4.5), its tensors changed by `edit`.
fn edited(path: &Path, edit: impl Fn(RawTensor) -> Option<RawTensor>) {
    let source = MappedFile::open(&fixture("case_b/lora/diffusers_minimal_metadata.safetensors")).unwrap();
    let raw = |name: String| {
        let (dtype, shape) = source.info(&name).unwrap();
        RawTensor { dtype, shape: shape.to_vec(), bytes: source.bytes(&name).unwrap().to_vec(), name }
    };
    let tensors = source.names().into_iter().map(raw).filter_map(edit).collect();
    write(path, tensors, &source.metadata()).unwrap();
}

#[test]
fn findings_are_made_and_a_sound_file_has_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let pipe = fixture("case_b/pipe");
    let of = |edit: &dyn Fn(RawTensor) -> Option<RawTensor>| {
        edited(&path, edit);
        inspect_json(&path, &pipe)
    };
    let sound = of(&Some);
    // ComfyUI sees no metadata: alpha is lost there. Nothing else, though the last block's text side is all zero.
    assert_eq!(codes(&sound), ["alpha_ignored"]);
    let group = &sound["groups"][0];
    assert_eq!((group["ranks"].to_string(), group["alphas"].to_string()), ("[3]".into(), "[4.5]".into()));
    let groups: Vec<(String, u64)> = sound["groups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|g| (g["name"].as_str().unwrap().into(), g["modules"].as_u64().unwrap()))
        .collect();
    assert_eq!(groups, [("qkv".into(), 18), ("fusion".into(), 6), ("mlp".into(), 12)]);

    let zeroed = |t: RawTensor, which: &str| {
        let bytes = if t.name.contains(which) && t.name.contains("lora_B") { vec![0; t.bytes.len()] } else { t.bytes };
        Some(RawTensor { bytes, ..t })
    };
    assert!(codes(&of(&|t| zeroed(t, "lora_B"))).contains(&"all_zero".into()));
    let some = of(&|t| zeroed(t, "0.attn.to_q"));
    assert!(codes(&some).contains(&"b_zero".into()), "{some}");

    let nan = of(&|mut t| {
        if t.name.ends_with("1.attn.to_k.lora_A.weight") {
            t.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }
        Some(t)
    });
    let text = nan["lints"][0]["text"].as_str().unwrap();
    assert_eq!((codes(&nan)[0].as_str(), text.contains("blocks.1.attn.to_k")), ("not_finite", true), "{nan}");

    let swapped = of(&|mut t| {
        if t.name.contains("0.img_mlp.net.2") {
            t.name = if t.name.contains("lora_A") {
                t.name.replace("lora_A", "lora_B")
            } else {
                t.name.replace("lora_B", "lora_A")
            };
        }
        Some(t)
    });
    assert!(codes(&swapped).contains(&"a_b_swapped".into()), "{swapped}");

    let strange = of(&|mut t| {
        t.name = t.name.replace("0.attn.to_q", "0.attn.to_x");
        Some(t)
    });
    assert!(codes(&strange).contains(&"key_not_read".into()));

    let last = of(&|t| (!t.name.contains("transformer_blocks.2.")).then_some(t));
    let finding = last["lints"].as_array().unwrap().iter().find(|l| l["code"] == "last_block_missing").expect("a gap");
    let text = finding["text"].as_str().unwrap();
    assert!(text.starts_with("block 2 of 3 lacks") && text.contains("attn.to_q"), "{text}");
    // The text side of the last block gets no gradient: tools may leave it out.
    assert!(!text.contains("to_add_out") && !text.contains("txt_mlp") && !text.contains("add_q_proj"), "{text}");
    let text_side = of(&|t| {
        let side = ["to_add_out", "txt_mlp", "add_q_proj"].iter().any(|p| {
            t.name.contains(&format!("transformer_blocks.2.attn.{p}"))
                || t.name.contains(&format!("transformer_blocks.2.{p}"))
        });
        (!side).then_some(t)
    });
    assert_eq!(codes(&text_side), ["alpha_ignored"]);
}

#[test]
fn strength_is_the_norm_of_the_change_relative_to_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let (a, b) = (normals(1, 2 * 48), normals(2, 48 * 2));
    let name = "transformer.transformer_blocks.1.attn.to_q";
    write(
        &path,
        vec![
            floats(&format!("{name}.lora_A.weight"), &[2, 48], &a),
            floats(&format!("{name}.lora_B.weight"), &[48, 2], &b),
        ],
        &BTreeMap::new(),
    )
    .unwrap();
    let inspection = inspect_json(&path, &fixture("case_a/pipe"));
    let base = MappedFile::open(&fixture("case_a/pipe/transformer/diffusion_pytorch_model.safetensors")).unwrap();
    let base = base.floats("transformer_blocks.1.attn.to_q.weight").unwrap();
    let norm = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let mut delta = vec![0f32; 48 * 48];
    for i in 0..48 {
        for j in 0..48 {
            delta[48 * i + j] = (0..2).map(|k| b[2 * i + k] * a[48 * k + j]).sum();
        }
    }
    let strength = &inspection["strength"][0];
    assert_eq!((strength["block"].as_u64(), strength["part"].as_str()), (Some(1), Some("attn.to_q")));
    assert!((strength["norm"].as_f64().unwrap() / norm(&delta) - 1.0).abs() < 1e-5);
    assert!((strength["relative"].as_f64().unwrap() / (norm(&delta) / norm(&base)) - 1.0).abs() < 1e-5);
}

#[test]
fn the_page_holds_the_map_and_escapes_what_the_file_says() {
    let dir = tempfile::tempdir().unwrap();
    let (path, page) = (dir.path().join("<b>.safetensors"), dir.path().join("page.html"));
    let metadata = [("modelspec.title".to_string(), "<script>alert(1)</script>".to_string())].into();
    let source = MappedFile::open(&fixture("case_a/lora/kohya_lora_unet.safetensors")).unwrap();
    let raw = |name: String| {
        let (dtype, shape) = source.info(&name).unwrap();
        RawTensor { dtype, shape: shape.to_vec(), bytes: source.bytes(&name).unwrap().to_vec(), name }
    };
    write(&path, source.names().into_iter().map(raw).collect(), &metadata).unwrap();
    let out = run_ok(["inspect", path.to_str().unwrap(), "--html", page.to_str().unwrap()]);
    assert!(out.contains("24 x LoRA") && out.contains("kohya") && out.contains("musubi-tuner       loads"), "{out}");
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(!html.contains("<script>") && html.contains("&lt;script&gt;"));
    assert_eq!(html.matches("rgba(var(--heat)").count() - 1, 24, "a square for each module, and the scale");
    assert!(!html.contains("http"), "nothing from outside");
    // A sound file passes --strict, a broken one does not.
    let broken = dir.path().join("broken.safetensors");
    edited(&broken, |mut t| {
        t.name = t.name.replace("0.attn.to_q", "0.attn.to_x");
        Some(t)
    });
    assert_eq!(run(["inspect", broken.to_str().unwrap(), "--strict"]).0, 1);
    assert_eq!(run(["inspect", path.to_str().unwrap(), "--strict"]).0, 0);
}
