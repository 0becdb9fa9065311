//! Adapters as they are found: the recorded five spellings, and files that cannot be used.

mod adapters_common;
#[path = "../fuzz/fuzz_targets/reader/mod.rs"]
mod reader;

use adapters_common::{deltas, fixture, options, table, worst};
use qwen_lora::adapters::read::{AdapterFile, AlphaSource, ReadOptions};

#[test]
fn five_spellings_of_one_adapter_are_one_adapter() {
    // case_a: rank 4, alpha 8; case_b: rank 3, alpha 4.5, other widths and blocks.
    for (case, alpha) in [("case_a", 8.0), ("case_b", 4.5)] {
        let table = table(case);
        let strict = options(&table);
        let open = |name: &str, options: &ReadOptions| {
            let path = fixture(case).join("lora").join(format!("{name}.safetensors"));
            let adapter = AdapterFile::open(&path, options).unwrap();
            assert!(adapter.problems.is_empty());
            let sources: Vec<AlphaSource> = adapter.entries().map(|e| e.alpha_source).collect();
            assert!(sources.windows(2).all(|w| w[0] == w[1]), "{sources:?}");
            (deltas(&path, options), sources[0], adapter.warnings)
        };
        let (want, source, warnings) = open("diffusers_with_metadata", &strict);
        assert_eq!((source, warnings.len(), want.is_empty()), (AlphaSource::Metadata, 0, false));
        for (name, source) in [
            ("diffusers_minimal_metadata", AlphaSource::Metadata),
            ("kohya_lora_unet", AlphaSource::Key),
            ("comfy_diffusion_model_AB_alpha", AlphaSource::Key),
        ] {
            let (got, found, warnings) = open(name, &strict);
            assert_eq!((found, warnings), (source, vec![]), "{name}");
            assert_eq!(worst(&got, &want), 0.0, "{name}");
        }
        // Without metadata and alpha keys the alpha is lost: scale 1 as in diffusers, and said.
        let (weaker, source, warnings) = open("diffusers_no_metadata", &strict);
        assert_eq!(source, AlphaSource::Assumed);
        assert!(warnings[0].contains("no alpha is stored") && warnings[0].contains("--alpha"), "{warnings:?}");
        let rank = if case == "case_a" { 4.0 } else { 3.0 };
        let restored = weaker.iter().map(|(name, delta)| (name.clone(), delta.clone().scaled(alpha / rank))).collect();
        assert!(worst(&restored, &want) < 1e-6);
        let (given, source, warnings) =
            open("diffusers_no_metadata", &ReadOptions { alpha: Some(alpha), ..options(&table) });
        assert_eq!((source, warnings), (AlphaSource::Given, vec![]));
        assert_eq!(worst(&given, &want), 0.0);
    }
}

#[test]
fn an_adapter_of_another_model_is_refused_with_the_reasons() {
    let table = table("case_b");
    let path = fixture("case_a/lora/kohya_lora_unet.safetensors");
    let error = AdapterFile::open(&path, &options(&table)).err().expect("the widths differ").to_string();
    assert!(error.contains("holds no adapter that can be used"), "{error}");
    assert!(error.contains("is for a weight of shape (48, 48), the model has (40, 40)"), "{error}");

    // The third block of case_b does not exist in case_a; with unknown widths that is all that is wrong.
    let config = fixture("case_a/pipe/transformer/config.json");
    let modules = qwen_lora::model::transformer::TransformerConfig::from_file(&config).unwrap().modules();
    let names = qwen_lora::adapters::read::ModuleTable::names_only(&modules);
    let path = fixture("case_b/lora/kohya_lora_unet.safetensors");
    let error = AdapterFile::open(&path, &options(&names)).err().expect("a block too many").to_string();
    assert!(error.contains("36 keys of"), "{error}");
    assert!(error.contains("`lora_unet_transformer_blocks_2_attn_add_k_proj.alpha` names no module"), "{error}");
    assert!(error.contains("--allow-unmatched"), "{error}");
    let lenient = AdapterFile::open(&path, &ReadOptions { allow_unmatched: true, ..options(&names) }).unwrap();
    assert_eq!((lenient.transformer.len(), lenient.problems.len()), (24, 36));
}

#[test]
fn a_whole_model_is_not_an_adapter() {
    let table = table("case_a");
    let path = fixture("case_a/pipe/transformer/diffusion_pytorch_model.safetensors");
    let error = AdapterFile::open(&path, &options(&table)).err().expect("no adapter").to_string();
    assert!(error.contains("weights of a whole model"), "{error}");
    let error = AdapterFile::open(&fixture("case_a/lora"), &options(&table)).err().expect("a folder of five");
    assert!(error.to_string().contains("found 5 safetensors files"), "{error}");
}

/// Inputs of the fuzzer that are kept: what it found, and a small set that reaches what it reached.
#[test]
fn kept_inputs_of_the_fuzzer_end_with_an_adapter_or_an_error() {
    let kept = adapters_common::contents(
        &std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapters/fuzz"),
    );
    assert!(!kept.is_empty());
    for (name, bytes) in kept {
        println!("{}", name.display());
        reader::read(&bytes);
    }
}
