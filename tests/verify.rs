//! Every recorded value of the reference cases is reproduced, and what is not reproduced is seen.

use candle_core::{DType, Device, Tensor};
use qwen_lora::cli::verify::{VerifyArgs, VerifyDtype, run as verify_command};
use qwen_lora::config::{BaseDtype, DeviceChoice};
use qwen_lora::io::Weights;
use qwen_lora::io::safetensors::{MappedFile, RawTensor, write};
use qwen_lora::kernels::route::composed_only;
use qwen_lora::kernels::{Value, backward};
use qwen_lora::model::text_encoder::{PromptEncoder, Residency, TextEncoder, TextEncoderConfig};
use qwen_lora::model::tokenizer::PromptTokenizer;
use qwen_lora::model::transformer::Precision;
use qwen_lora::model::vae::{Tiling, Vae, VaeConfig};
use qwen_lora::prompt::TEXT_TO_IMAGE;
use qwen_lora::rng::{Purpose, Stream};
use qwen_lora::verify::{self, Case};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn reference(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference").join(case)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn randn(item: u64, shape: &[usize]) -> Tensor {
    let values = Stream::new(11, 0, item, Purpose::Bench).normals(shape.iter().product(), 1.0);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The largest difference over the largest magnitude of `b`.
fn relative_error(a: &Tensor, b: &Tensor) -> f32 {
    let (a, b) = (values(a), values(b));
    assert_eq!(a.len(), b.len());
    let top = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    a.iter().zip(&b).fold(0f32, |m, (x, y)| m.max((x - y).abs())) / top
}

#[test]
fn both_reference_cases_are_reproduced() {
    for name in ["case_a", "case_b"] {
        let folder = reference(name);
        let case = Case::open(&folder.join("pipe"), &folder, None).unwrap();
        let (report, computed) = verify::run(&case, |_| {}).unwrap();
        assert!(report.ok(), "{name}\n{report}");
        assert!(report.rows.len() <= computed.len());
        for stage in ["scheduler", "image", "tokenizer", "text", "vae", "pipeline"] {
            assert!(report.rows.iter().any(|r| r.stage == stage), "{stage} of {name} was not replayed");
        }
    }
}

#[test]
fn composed_ops_reproduce_the_recorded_transformer_and_training() {
    // What runs on a GPU where no kernel takes part; and bf16 within its wider limits.
    let case = edited("case_a", |name, t| ["tf.", "lora."].iter().any(|p| name.starts_with(p)).then_some(t));
    let int8 = Precision::of(BaseDtype::Int8, DType::F32);
    for precision in [Precision::uniform(DType::F32), Precision::uniform(DType::BF16), int8] {
        let mut case = Case::open(&reference("case_a").join("pipe"), case.path(), None).unwrap();
        case.precision = precision;
        let (report, _) = composed_only(|| verify::run(&case, |_| {}).unwrap());
        assert!(report.ok() && report.rows.len() > 50, "{precision:?}\n{report}");
    }
}

#[test]
fn int8_weights_stay_within_their_limits_and_are_seen() {
    for name in ["case_a", "case_b"] {
        let folder = reference(name);
        let mut case = Case::open(&folder.join("pipe"), &folder, None).unwrap();
        case.precision = Precision::of(BaseDtype::Int8, DType::F32);
        let (report, _) = verify::run(&case, |_| {}).unwrap();
        assert!(report.ok(), "{name}\n{report}");
        let output = report.rows.iter().find(|r| r.name.starts_with("tf.") && r.name.ends_with(".output")).unwrap();
        assert!(output.relative > 1e-4, "the weights are not in int8: {output:?}");
    }
}

/// The case's golden tensors, changed by `edit`, in a new folder with the rest of the case.
fn edited(case: &str, edit: impl Fn(&str, Tensor) -> Option<Tensor>) -> tempfile::TempDir {
    let (from, dir) = (reference(case), tempfile::tempdir().unwrap());
    let golden = MappedFile::open(&from.join("golden.safetensors")).unwrap();
    let mut raw = Vec::new();
    for name in golden.names() {
        let is_integer = golden.info(&name).unwrap().0 == safetensors::Dtype::I64;
        let dtype = if is_integer { DType::I64 } else { DType::F32 };
        if let Some(tensor) = edit(&name, golden.tensor(&name, dtype, &Device::Cpu).unwrap()) {
            raw.push(RawTensor::from_tensor(&name, &tensor).unwrap());
        }
    }
    write(&dir.path().join("golden.safetensors"), raw, &BTreeMap::new()).unwrap();
    for file in ["golden.json", "image.png"] {
        std::fs::copy(from.join(file), dir.path().join(file)).unwrap();
    }
    dir
}

#[test]
fn a_deviation_is_named_an_absent_stage_skipped_and_a_missing_part_reported() {
    let stages = ["sched.", "img.", "vae."];
    let case = edited("case_a", |name, tensor| match name {
        "vae.logvar" => Some((tensor * 1.0001).unwrap()),
        n if stages.iter().any(|s| n.starts_with(s)) => Some(tensor),
        _ => None,
    });
    let open = |model: &Path| Case::open(model, case.path(), None).unwrap();
    let (report, _) = verify::run(&open(&reference("case_a").join("pipe")), |_| {}).unwrap();
    let off: Vec<&str> = report.rows.iter().filter(|r| !r.ok).map(|r| r.name.as_str()).collect();
    assert_eq!(off, ["vae.logvar"]);
    assert!(report.skipped.contains(&"text") && report.skipped.contains(&"pipeline"), "{:?}", report.skipped);
    assert!(!report.ok());

    // A model folder with nothing but a scheduler: what can run runs.
    let model = tempfile::tempdir().unwrap();
    std::fs::create_dir(model.path().join("scheduler")).unwrap();
    let config = "scheduler/scheduler_config.json";
    std::fs::copy(reference("case_a").join("pipe").join(config), model.path().join(config)).unwrap();
    let (report, _) = verify::run(&open(model.path()), |_| {}).unwrap();
    assert_eq!(report.failed.iter().map(|(stage, _)| *stage).collect::<Vec<_>>(), ["vae"]);
    assert!(report.rows.iter().any(|r| r.stage == "scheduler") && report.rows.iter().all(|r| r.ok));
    assert!(!report.ok());
}

const CAPTIONS: [&str; 4] =
    ["a red fox", "", "一只猫 🙂 and a long tail of words, a blue circle, a green square", "snow"];

#[test]
fn a_prompt_is_the_same_alone_in_a_batch_streamed_and_resident() {
    for name in ["case_a", "case_b"] {
        let model = reference(name).join("pipe");
        let tokenizer = PromptTokenizer::load(&model.join("tokenizer")).unwrap();
        let encode = |residency, captions: &[&str]| {
            let text_encoder = TextEncoder::load(&model.join("text_encoder"), residency).unwrap();
            PromptEncoder::new(&tokenizer, &text_encoder, TEXT_TO_IMAGE).encode(captions, |_| {}).unwrap()
        };
        let batch = encode(Residency::Streamed, &CAPTIONS);
        let resident = encode(Residency::Resident(DType::F32), &CAPTIONS);
        let rounded = encode(Residency::Resident(DType::BF16), &CAPTIONS);
        for (i, caption) in CAPTIONS.iter().enumerate() {
            let alone = encode(Residency::Streamed, &[caption]).remove(0);
            assert!(relative_error(&batch[i], &alone) < 2e-6, "{caption:?}");
            assert_eq!(values(&batch[i]), values(&resident[i]));
            // Weights of 8 bits of mantissa: about 2^-9 relative error each.
            let error = relative_error(&rounded[i], &batch[i]);
            assert!(error > 1e-5 && error < 5e-2, "{caption:?} in bf16: {error}");
        }
    }
}

#[test]
fn weights_named_as_newer_transformers_does_load_without_vision_tower_and_head() {
    let folder = reference("case_a").join("pipe/text_encoder");
    let weights = Weights::open_folder(&folder).unwrap();
    let config = TextEncoderConfig::from_file(&folder.join("config.json")).unwrap();
    weights.check(&config.tensors(), |_| false).unwrap();
    let renamed = tempfile::tempdir().unwrap();
    let raw = config.language_model_tensors().into_iter().map(|(name, shape)| {
        let tensor = weights.get(&name, &shape, DType::F32, &Device::Cpu).unwrap();
        RawTensor::from_tensor(name.replacen("model.", "model.language_model.", 1), &tensor).unwrap()
    });
    write(&renamed.path().join("model.safetensors"), raw.collect(), &BTreeMap::new()).unwrap();
    std::fs::copy(folder.join("config.json"), renamed.path().join("config.json")).unwrap();
    let hidden = |folder: &Path| {
        let text_encoder = TextEncoder::load(folder, Residency::Streamed).unwrap();
        text_encoder.encode(&[vec![5, 7, 11, 13]], |_| {}).unwrap().remove(0)
    };
    assert_eq!(values(&hidden(&folder)), values(&hidden(renamed.path())));

    let text_encoder = TextEncoder::load(&folder, Residency::Streamed).unwrap();
    let error = text_encoder.encode(&[vec![5, 416]], |_| {}).unwrap_err().to_string();
    assert!(error.contains("found row 416") && error.contains("do not belong together"), "{error}");
}

/// A smooth picture with a few edges.
fn picture(height: usize, width: usize) -> Tensor {
    let pixel = |i: usize| {
        let (c, y, x) = (i / (height * width), i / width % height, i % width);
        let wave = (x as f32 / 9.0 + c as f32).sin() * (y as f32 / (7.0 + c as f32)).cos();
        0.6 * wave + if (x / 20 + y / 28) % 2 == 0 { 0.3 } else { -0.3 }
    };
    let values: Vec<f32> = (0..3 * height * width).map(pixel).collect();
    Tensor::from_vec(values, (1, 3, height, width), &Device::Cpu).unwrap()
}

/// The autoencoder of case_a made local, as a trained one nearly is and a random one is not: the attention adds
/// nothing, and the outer taps of every convolution are a thirtieth of what they were.
fn local_vae() -> tempfile::TempDir {
    let (folder, dir) = (reference("case_a").join("pipe/vae"), tempfile::tempdir().unwrap());
    let weights = Weights::open_folder(&folder).unwrap();
    let config = VaeConfig::from_file(&folder.join("config.json")).unwrap();
    let edit = |(name, shape): (String, Vec<usize>)| {
        let mut data = values(&weights.get(&name, &shape, DType::F32, &Device::Cpu).unwrap());
        if name.contains("attentions.0.proj") {
            data.fill(0.0);
        } else if shape.len() >= 4 && shape.ends_with(&[3, 3]) {
            data.iter_mut().enumerate().filter(|(i, _)| i % 9 != 4).for_each(|(_, w)| *w *= 0.03);
        }
        RawTensor::from_tensor(name, &Tensor::from_vec(data, shape, &Device::Cpu).unwrap()).unwrap()
    };
    let raw = config.tensors().into_iter().map(edit).collect();
    write(&dir.path().join("diffusion_pytorch_model.safetensors"), raw, &BTreeMap::new()).unwrap();
    std::fs::copy(folder.join("config.json"), dir.path().join("config.json")).unwrap();
    dir
}

#[test]
fn tiles_give_nearly_the_whole_image_without_seams_and_small_images_exactly() {
    let folder = local_vae();
    let (height, width) = (96, 160);
    let tiling = Tiling { above: height * width - 1, size: 64, stride: 48 };
    let load = |tiling| Vae::load(folder.path()).unwrap().with_tiling(tiling).unwrap();
    let (whole, tiled) = (load(Tiling { above: height * width, ..tiling }), load(tiling));
    let rms = |x: &Tensor| x.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let pixels = picture(height, width);
    let latents = whole.encode(&pixels).unwrap().mean;
    let error = rms(&(tiled.encode(&pixels).unwrap().mean - &latents).unwrap()) / rms(&latents);
    assert!(error > 1e-4 && error < 0.03, "tiles see zeros beyond their borders, which matters little: {error}");

    let latents = whole.config().denormalize(&randn(3, latents.dims())).unwrap();
    let (a, b) = (whole.decode(&latents).unwrap(), tiled.decode(&latents).unwrap());
    assert_eq!(b.dims(), [1, 3, height, width]);
    let difference = (&b - &a).unwrap();
    assert!(rms(&difference) < 0.01 * rms(&a), "{}", rms(&difference) / rms(&a));
    // A seam would be a step in the difference between the two, at the columns where tiles start and end (48, 64, 96,
    // 112).
    let step = |x: &Tensor, column: usize| {
        rms(&(x.narrow(3, column, 1).unwrap() - x.narrow(3, column - 1, 1).unwrap()).unwrap())
    };
    for column in (8..width).step_by(8) {
        let (extra, own) = (step(&difference, column), step(&a, column));
        assert!(extra < 0.1 * own, "a seam at column {column}: {extra} {own}");
    }

    let small = picture(64, 64);
    let (a, b) = (whole.encode(&small).unwrap().mean, tiled.encode(&small).unwrap().mean);
    assert_eq!(values(&a), values(&b));
    assert_eq!(values(&whole.decode(&a).unwrap()), values(&tiled.decode(&b).unwrap()));
}

#[test]
fn a_loss_on_decoded_pixels_reaches_the_latent() {
    let vae = Vae::load(&reference("case_b").join("pipe/vae")).unwrap();
    let latents = vae.config().denormalize(&randn(0, &[1, 16, 3, 4])).unwrap();
    let seed = randn(1, &[1, 3, 24, 32]);
    let leaf = Value::leaf(latents.clone());
    let image = vae.decode_value(&leaf).unwrap();
    assert_eq!(values(image.tensor()), values(&vae.decode(&latents).unwrap()));
    let grad = backward(vec![(image, seed.clone())]).unwrap().take(&leaf).unwrap();
    // Along a random direction and along the gradient itself.
    for direction in [randn(2, latents.dims()), grad.clone()] {
        let length = values(&direction).iter().map(|v| v * v).sum::<f32>().sqrt();
        let direction = (direction / f64::from(length)).unwrap();
        let along = |by: f64| {
            let moved = (&latents + (&direction * by).unwrap()).unwrap();
            let product = (vae.decode(&moved).unwrap() * &seed).unwrap();
            values(&product).iter().map(|&v| f64::from(v)).sum::<f64>()
        };
        let numeric = (along(1e-2) - along(-1e-2)) / 2e-2;
        let dot: f64 = values(&grad).iter().zip(values(&direction)).map(|(g, d)| f64::from(g * d)).sum();
        // In f32, over a step that cannot be small: the curvature leaves a part in a thousand.
        assert!((dot - numeric).abs() < 2e-3 * f64::from(values(&grad).iter().map(|g| g * g).sum::<f32>().sqrt()));
    }
}

#[test]
fn the_command_writes_what_it_computed_and_fails_on_a_deviation() {
    let args = |reference: PathBuf, output: &Path, json| VerifyArgs {
        model: self::reference("case_b").join("pipe"),
        reference,
        adapters: vec![],
        output: Some(output.into()),
        device: DeviceChoice::Cpu,
        dtype: VerifyDtype::F32,
        json,
    };
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("computed.safetensors");
    let only = |kept: &'static str| edited("case_b", move |name, t| name.starts_with(kept).then_some(t));
    let images = only("img.");
    verify_command(&args(images.path().into(), &output, true)).unwrap();
    let (computed, golden) =
        (MappedFile::open(&output).unwrap(), MappedFile::open(&images.path().join("golden.safetensors")).unwrap());
    assert_eq!(computed.names(), golden.names());
    for name in golden.names() {
        assert_eq!(computed.info(&name), golden.info(&name), "dtype and shape of {name}");
    }

    let wrong = edited("case_b", |name, t| name.starts_with("sched.train.").then(|| (t + 0.01).unwrap()));
    let error = verify_command(&args(wrong.path().into(), &output, false)).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("0 of 2 values within limits"), "{error}");
    assert!(MappedFile::open(&output).unwrap().info("sched.train.sigmas").is_some(), "written all the same");

    let error = verify_command(&args(dir.path().join("nowhere"), &output, false)).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("golden.safetensors"), "{error}");
}
