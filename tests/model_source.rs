//! `model:`: what a name means, which folders are accepted, and in which words the others are refused.

use qwen_lora::io::Weights;
use qwen_lora::model::source::{ModelSource, ModelSpec, PipelineFolder, Synthetic};
use qwen_lora::model::synth::{self, Geometry, Precision, Preset, SynthOptions};
use qwen_lora::model::text_encoder::TextEncoderConfig;
use qwen_lora::model::transformer::TransformerConfig;
use qwen_lora::model::vae::VaeConfig;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tempfile::TempDir;

/// The tiny pipeline, made once.
fn pristine() -> &'static Path {
    static DIR: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = DIR.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = synth::tiny_in(dir.path()).unwrap();
        (dir, path)
    });
    path
}

/// A copy that a test may spoil.
fn pipeline() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(pristine(), dir.path());
    dir
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            std::fs::copy(from, to).unwrap();
        }
    }
}

fn spec(path: &Path) -> ModelSpec {
    ModelSpec::new(path.to_str().unwrap())
}

fn refused(spec: &ModelSpec) -> String {
    let error = ModelSource::resolve(spec).expect_err("this must be refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

/// Every tensor that the three configs imply is there, and no other.
fn assert_loads(pipeline: &PipelineFolder) {
    let check = |weights: Weights, tensors: Vec<(String, Vec<usize>)>| {
        weights.check(&tensors, |_| false).unwrap();
        assert_eq!(weights.names().count(), tensors.len());
    };
    let PipelineFolder { transformer, vae, text_encoder, .. } = pipeline;
    check(transformer.open().unwrap(), TransformerConfig::from_file(&transformer.config).unwrap().tensors());
    check(vae.open().unwrap(), VaeConfig::from_file(&vae.config).unwrap().tensors());
    check(text_encoder.open().unwrap(), TextEncoderConfig::from_file(&text_encoder.config).unwrap().tensors());
}

#[test]
fn a_name_is_a_folder_if_it_exists_then_a_hub_id_and_else_an_error() {
    // Tests run in the package's folder, whose `src/model` has the form of a hub id.
    assert_eq!(ModelSource::parse("src/model").unwrap(), ModelSource::Folder("src/model".into()));
    assert!(matches!(ModelSource::parse("src/model-of-the-hub").unwrap(), ModelSource::Hub(_)));
    assert!(matches!(ModelSource::parse("Qwen/Qwen-Image").unwrap(), ModelSource::Hub(_)));
    assert_eq!(ModelSource::parse("synthetic:tiny").unwrap(), ModelSource::Synthetic(Synthetic::Tiny));
    assert_eq!(ModelSource::parse("synthetic:world").unwrap(), ModelSource::Synthetic(Synthetic::World));
    let error = |text: &str| ModelSource::parse(text).unwrap_err().to_string();
    assert_says(&error("./src/modle"), &["no model at `./src/modle`", "nearest name there is `model`"]);
    assert_says(&error("Qwen-Image"), &["no model at", "hub id (owner/name)"]);
    assert_says(
        &error("synthetic:large"),
        &["no synthetic model `large`", "expected synthetic:tiny or synthetic:world"],
    );
    assert_says(&error("src/error.rs"), &["is a file", "transformer: FILE"]);
    let with_revision = ModelSpec { revision: Some("main".into()), ..ModelSpec::new("src/model") };
    assert_says(&refused(&with_revision), &["`revision: main` has no meaning"]);
}

#[test]
fn the_built_in_world_is_unpacked_whole_and_again_when_it_was_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let place = synth::world_in(dir.path()).unwrap();
    assert_loads(&ModelSource::resolve(&spec(&place)).unwrap());
    let weights = place.join("transformer/diffusion_pytorch_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..1000]).unwrap();
    assert_eq!(synth::world_in(dir.path()).unwrap(), place);
    assert_eq!(std::fs::read(&weights).unwrap(), whole);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn the_tiny_pipeline_is_whole_and_so_are_variants_of_it() {
    assert_loads(&ModelSource::resolve(&spec(pristine())).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let geometry = Geometry { num_layers: 3, num_heads: 2, head_dim: 32, axes: [8, 12, 12], joint_dim: 96 };
    let options = SynthOptions { geometry, precision: Precision::Bf16, seed: 5, ..SynthOptions::preset(Preset::Tiny) };
    let written = synth::write(&options, &dir.path().join("other")).unwrap();
    let other = ModelSource::resolve(&spec(&dir.path().join("other"))).unwrap();
    assert_loads(&other);
    assert_eq!(TransformerConfig::from_file(&other.transformer.config).unwrap().dim(), 64);
    let num_tensors = |n: &qwen_lora::model::source::NetworkFiles| n.open().unwrap().names().count();
    let sum = num_tensors(&other.transformer) + num_tensors(&other.vae) + num_tensors(&other.text_encoder);
    assert_eq!((written.num_tensors, written.num_files), (sum, 3));
    // Nothing is overwritten, and nothing is left beside.
    let again = synth::write(&options, &dir.path().join("other")).unwrap_err().to_string();
    assert_says(&again, &["other` is there and is not empty"]);
    let odd = Geometry { joint_dim: 40, ..geometry };
    let error = synth::write(&SynthOptions { geometry: odd, ..options }, &dir.path().join("odd")).unwrap_err();
    assert_says(&error.to_string(), &["a multiple of 16", "found 40"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_tiny_pipeline_is_made_once_kept_while_whole_and_made_again_when_broken() {
    let dir = tempfile::tempdir().unwrap();
    // Two processes may begin at once: both get the same whole folder.
    let places: Vec<PathBuf> = std::thread::scope(|scope| {
        let makers: Vec<_> = (0..3).map(|_| scope.spawn(|| synth::tiny_in(dir.path()).unwrap())).collect();
        makers.into_iter().map(|m| m.join().unwrap()).collect()
    });
    let place = &places[0];
    assert!(places.iter().all(|p| p == place));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    let bytes = |file: &str| std::fs::read(place.join(file)).unwrap();
    let weights = "transformer/diffusion_pytorch_model.safetensors";
    assert_eq!(bytes(weights), std::fs::read(pristine().join(weights)).unwrap(), "the same everywhere");

    let whole = bytes(weights);
    let modified = |file: &str| std::fs::metadata(place.join(file)).unwrap().modified().unwrap();
    let first = modified(weights);
    assert_eq!(&synth::tiny_in(dir.path()).unwrap(), place);
    assert_eq!(modified(weights), first, "a whole copy is left alone");
    std::fs::write(place.join(weights), &whole[..whole.len() / 2]).unwrap();
    synth::tiny_in(dir.path()).unwrap();
    assert_eq!(bytes(weights), whole);
    std::fs::remove_file(place.join("tokenizer/merges.txt")).unwrap();
    synth::tiny_in(dir.path()).unwrap();
    assert!(!bytes("tokenizer/merges.txt").is_empty());
}

#[test]
fn the_values_of_the_tiny_pipeline_do_not_change_unseen() {
    // Whoever changes these raises `VERSION` in src/model/synth/cached.rs: caches hold copies under its hash.
    let open = |part: &str| Weights::open_folder(&pristine().join(part)).unwrap();
    let first = |part: &str, name: &str, shape: &[usize]| {
        let (dtype, device) = (candle_core::DType::F32, &candle_core::Device::Cpu);
        let values = open(part).get(name, shape, dtype, device).unwrap().flatten_all().unwrap();
        values.to_vec1::<f32>().unwrap()[0]
    };
    let values = [
        first("transformer", "proj_out.weight", &[64, 64]),
        first("vae", "encoder.conv_in.weight", &[8, 3, 3, 3, 3]),
        first("text_encoder", "model.norm.weight", &[64]),
    ];
    let expected = [0.063_797_34, 0.371_312_02, 1.041_016_5];
    for (value, expected) in values.iter().zip(expected) {
        assert!((value - expected).abs() < 1e-6, "{values:?}");
    }
}

#[test]
fn each_missing_piece_is_named() {
    for (gone, says) in [
        ("transformer", &["no whole `transformer/`", "found no such folder"][..]),
        ("vae/diffusion_pytorch_model.safetensors", &["no whole `vae/`", "expected *.safetensors, found config.json"]),
        ("text_encoder/config.json", &["no whole `text_encoder/`", "expected config.json, found model.safetensors"]),
        ("tokenizer/merges.txt", &["no whole `tokenizer/`", "vocab.json and merges.txt", "found added_tokens.json"]),
        ("scheduler/scheduler_config.json", &["no whole `scheduler/`", "found an empty folder"]),
    ] {
        let dir = pipeline();
        let path = dir.path().join(gone);
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
        let error = refused(&spec(dir.path()));
        assert_says(&error, says);
        assert_says(&error, &["hint: the download is incomplete"]);
    }
    // The parts say themselves what they are.
    let dir = pipeline();
    std::fs::remove_file(dir.path().join("model_index.json")).unwrap();
    assert_loads(&ModelSource::resolve(&spec(dir.path())).unwrap());
}

#[test]
fn models_of_other_families_are_called_by_name() {
    for (file, from, to, says) in [
        ("model_index.json", "QwenImagePipeline", "FluxPipeline", &["FluxPipeline (FLUX.1)", "Qwen/Qwen-Image"][..]),
        ("model_index.json", "QwenImagePipeline", "QwenImage21Pipeline", &["Qwen-Image-2.1", "single-stream"]),
        ("model_index.json", "QwenImagePipeline", "Novel", &["expected a Qwen-Image pipeline, found Novel"]),
        ("transformer/config.json", "QwenImageTransformer2DModel", "QwenImage21Transformer2DModel", &["2.1"]),
        ("vae/config.json", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21", &["vae/config.json", "2.1"]),
        (
            "text_encoder/config.json",
            "\"model_type\": \"qwen2_5_vl\",\n  \"num_attention",
            "\"model_type\": \"qwen3_vl\",\n  \"num_attention",
            &["text_encoder/config.json", "2.1"],
        ),
        ("scheduler/scheduler_config.json", "FlowMatchEulerDiscreteScheduler", "DDIMScheduler", &["DDIMScheduler"]),
    ] {
        let dir = pipeline();
        let path = dir.path().join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file}");
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        assert_says(&refused(&spec(dir.path())), says);
    }
    for class in ["QwenImageEditPlusPipeline", "QwenImageLayeredPipeline"] {
        let dir = pipeline();
        std::fs::write(dir.path().join("model_index.json"), format!(r#"{{"_class_name": "{class}"}}"#)).unwrap();
        ModelSource::resolve(&spec(dir.path())).unwrap();
    }
}

#[test]
fn a_folder_that_is_no_pipeline_is_told_what_it_is() {
    let dir = pipeline();
    let part = |name: &str| refused(&spec(&dir.path().join(name)));
    assert_says(
        &part("transformer"),
        &["one network alone: QwenImageTransformer2DModel", "path: Qwen/Qwen-Image, transformer: /"],
    );
    assert_says(&part("vae"), &["one network alone: AutoencoderKLQwenImage (Qwen-Image)", "vae: /"]);
    assert_says(&part("text_encoder"), &["Qwen2_5_VLForConditionalGeneration", "text_encoder: /"]);
    assert_says(&part("tokenizer"), &["not a model in the diffusers layout", "found added_tokens.json, merges.txt"]);

    let folder = tempfile::tempdir().unwrap();
    let say = || refused(&spec(folder.path()));
    assert_says(&say(), &["not a model", "found an empty folder"]);
    let put = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    put("qwen_image_bf16.safetensors", b"");
    assert_says(&say(), &["found qwen_image_bf16.safetensors", "transformer: FILE"]);
    put("adapter_config.json", b"{}");
    assert_says(&say(), &["it holds a LoRA", "wants the base model"]);
    let outer = tempfile::tempdir().unwrap();
    copy(pristine(), &outer.path().join("inner"));
    assert_says(&refused(&spec(outer.path())), &["did you mean", "inner"]);
}

#[test]
fn parts_can_be_replaced_by_files_and_folders() {
    let (base, other) = (pipeline(), pipeline());
    let file = other.path().join("transformer/diffusion_pytorch_model.safetensors");
    // What is replaced need not be there.
    std::fs::remove_file(base.path().join("transformer/diffusion_pytorch_model.safetensors")).unwrap();
    let with = |path: &Path| ModelSpec { transformer: Some(path.into()), ..spec(base.path()) };

    let by_file = ModelSource::resolve(&with(&file)).unwrap();
    assert_eq!(by_file.transformer.weights, file);
    assert_eq!(by_file.transformer.config, base.path().join("transformer/config.json"));
    assert_eq!(by_file.vae.weights, base.path().join("vae"));
    assert_loads(&by_file);
    let folder = other.path().join("transformer");
    let by_folder = ModelSource::resolve(&with(&folder)).unwrap();
    assert_eq!(
        (by_folder.transformer.weights, by_folder.transformer.config),
        (folder.clone(), folder.join("config.json"))
    );
    assert_eq!(ModelSource::resolve(&with(other.path())).unwrap().transformer.weights, folder);
    std::fs::remove_file(folder.join("config.json")).unwrap();
    let without_config = ModelSource::resolve(&with(&folder)).unwrap().transformer;
    assert_eq!((without_config.weights, without_config.config), (folder, by_file.transformer.config));

    assert_says(
        &refused(&with(&other.path().join("transfromer"))),
        &["`model.transformer`", "nearest", "`transformer`"],
    );
    let vae = ModelSpec { vae: Some(other.path().join("none")), ..with(&file) };
    assert_says(&refused(&vae), &["`model.vae`: nothing at"]);
}

#[test]
fn parts_of_different_models_do_not_pass_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let options = SynthOptions::preset(Preset::Tiny);
    let geometry = Geometry { joint_dim: 96, ..options.geometry };
    synth::write(&SynthOptions { geometry, ..options }, &dir.path().join("wide")).unwrap();
    let mixed = ModelSpec { text_encoder: Some(dir.path().join("wide")), ..spec(pristine()) };
    let error = refused(&mixed);
    assert_says(&error, &["do not fit together", "width of the prompt embeddings: 64 in", "96 in", "text_encoder"]);
    let base = pipeline();
    let config = base.path().join("vae/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut json = json.as_object().unwrap().clone();
    for key in ["latents_mean", "latents_std"] {
        json[key].as_array_mut().unwrap().truncate(8);
    }
    json["z_dim"] = 8.into();
    std::fs::write(&config, serde_json::Value::Object(json).to_string()).unwrap();
    assert_says(&refused(&spec(base.path())), &["channels of a packed latent: 64 in", "32 in"]);
}
