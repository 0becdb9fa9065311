//! `qwen-lora eval` and what it is made of, against values recorded from the common Python tools by
//! `scripts/eval/make_reference.py` and `make_networks.py`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use qwen_lora::adapters::file::{Provenance, write_exported};
use qwen_lora::adapters::{LoraAdapter, LoraModule};
use qwen_lora::eval::distance::{frechet, kernel_distance};
use qwen_lora::eval::singular::Matrix;
use qwen_lora::eval::ssim::{Window, ms_ssim, psnr, rms_difference, ssim};
use qwen_lora::eval::statistics::{mcnemar, wilson};
use qwen_lora::io::Weights;
use qwen_lora::io::safetensors::{self, RawTensor};
use qwen_lora::model::clip::Clip;
use qwen_lora::model::inception::{self, Inception};
use qwen_lora::model::perceptual::Perceptual;
use qwen_lora::rng::{Purpose, Stream};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/eval").join(name)
}

fn recorded(name: &str) -> Json {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn near(found: f64, expected: &Json, tolerance: f64) {
    let expected = expected.as_f64().unwrap();
    assert!((found - expected).abs() <= tolerance * expected.abs().max(1e-3), "{found}, expected {expected}");
}

fn eval(dir: &Path, args: &[&str]) -> Output {
    let command = Command::new(env!("CARGO_BIN_EXE_qwen-lora")).arg("eval").args(args).current_dir(dir).output();
    command.expect("the binary was built for this test")
}

fn json_of(output: &Output) -> Json {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The cell of a row's metric in a column.
fn cell<'a>(json: &'a Json, metric: &str, column: usize) -> &'a Json {
    let rows = json["rows"].as_array().unwrap();
    let row = rows.iter().find(|row| row["metric"] == metric).unwrap_or_else(|| panic!("no row `{metric}`"));
    &row["cells"][column]
}

#[test]
fn likeness_of_pictures_equals_scikit_image_and_pytorch_msssim() {
    let reference = &recorded("reference.json")["pictures"];
    let (a, b) = (open("crop.png"), open("blurred.png"));
    // Both in f64, in another order of summation.
    near(psnr(&a, &b), &reference["psnr"], 1e-12);
    near(ssim(&a, &b, Window::Uniform7).unwrap(), &reference["ssim_uniform7"], 1e-10);
    near(ssim(&a, &b, Window::Gaussian11).unwrap(), &reference["ssim_gaussian11"], 1e-10);
    // The reference keeps its Gaussian weights in f32.
    near(ms_ssim(&a, &b).unwrap(), &recorded("networks.json")["ms_ssim"], 1e-6);
}

#[test]
fn intervals_and_tests_equal_scipy() {
    let reference = &recorded("reference.json")["statistics"];
    let number = |case: &Json, i: usize| case[i].as_u64().unwrap() as usize;
    for case in reference["wilson"].as_array().unwrap() {
        let (low, high) = wilson(number(case, 0), number(case, 1));
        near(low, &case[2], 1e-9);
        near(high, &case[3], 1e-9);
    }
    for case in reference["mcnemar"].as_array().unwrap() {
        near(mcnemar(number(case, 0), number(case, 1)), &case[2], 1e-9);
    }
    assert_eq!(mcnemar(0, 0), 1.0);
}

/// Two folders with the recorded pictures under one name each.
fn two_folders(dir: &Path) {
    for (folder, name) in [("sharp", "crop.png"), ("soft", "blurred.png")] {
        std::fs::create_dir(dir.join(folder)).unwrap();
        std::fs::copy(fixture(name), dir.join(folder).join("1.png")).unwrap();
    }
}

#[test]
fn folders_are_compared_pair_by_pair() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    two_folders(dir);
    std::fs::copy(fixture("crop.png"), dir.join("sharp/alone.png")).unwrap();
    std::fs::copy(fixture("crop.png"), dir.join("sharp/same.png")).unwrap();
    std::fs::copy(fixture("crop.png"), dir.join("soft/same.png")).unwrap();
    let json = json_of(&eval(dir, &["--images", "soft", "--against", "sharp", "--json", "--quiet"]));
    assert_eq!(json["columns"], serde_json::json!(["soft", "sharp"]));
    let reference = &recorded("reference.json")["pictures"];
    near(cell(&json, "psnr", 0)["value"].as_f64().unwrap(), &reference["psnr"], 1e-12);
    assert_eq!(cell(&json, "psnr", 0)["n"], 1, "the equal pair has no finite PSNR");
    assert_eq!(cell(&json, "psnr", 1), &Json::Null);
    let ssim = cell(&json, "ssim_uniform7", 0);
    near(ssim["value"].as_f64().unwrap(), &((reference["ssim_uniform7"].as_f64().unwrap() + 1.0) / 2.0).into(), 1e-10);
    assert!(ssim["low"].as_f64().unwrap() < ssim["value"].as_f64().unwrap());
    let value = |metric: &str, column: usize| cell(&json, metric, column)["value"].as_f64().unwrap();
    assert!(value("sharpness", 0) < 0.7 * value("sharpness", 1), "a blur is less sharp");
    assert!((value("brightness", 0) - value("brightness", 1)).abs() < 0.01, "and as bright");
    let notes = json["notes"].to_string();
    assert!(notes.contains("2 pairs; without a partner: 0 of soft, 1 of sharp"), "{notes}");
    assert!(notes.contains("1 pairs are equal"), "{notes}");
    // The files say the same.
    let saved: Json = serde_json::from_slice(&std::fs::read(dir.join("eval/results.json")).unwrap()).unwrap();
    assert_eq!(saved["rows"], json["rows"]);
    let csv = std::fs::read_to_string(dir.join("eval/table.csv")).unwrap();
    assert!(csv.lines().any(|l| l.starts_with("ms_ssim,,soft,0.")), "{csv}");
    assert_eq!(std::fs::read_to_string(dir.join("eval/pictures.csv")).unwrap().lines().count(), 1 + 2 + 3);
}

#[test]
fn what_cannot_be_compared_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    two_folders(dir);
    for folder in ["empty", "other", "small", "broken"] {
        std::fs::create_dir(dir.join(folder)).unwrap();
    }
    std::fs::copy(fixture("crop.png"), dir.join("other/2.png")).unwrap();
    image::RgbImage::new(20, 10).save(dir.join("small/1.png")).unwrap();
    std::fs::write(dir.join("broken/1.png"), "no picture").unwrap();
    for (images, against, words) in [
        ("missing", "sharp", &["cannot read the pictures of `missing`", "nothing there"][..]),
        ("sharp", "sharp/1.png", &["sharp/1.png", "a file"]),
        ("sharp", "empty", &["no pictures in `empty`"]),
        ("sharp", "sharp", &["are one folder"]),
        ("sharp", "other", &["no file name in common", "sharp/1.png", "--sets-only"]),
        ("small", "sharp", &["small/1.png", "expected 177x168", "found 20x10"]),
        ("sharp", "broken", &["broken/1.png"]),
    ] {
        let output = eval(dir, &["--images", images, "--against", against, "--quiet"]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{images} {against}: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{images} {against}: {error}");
        assert!(!dir.join("eval").exists());
    }
    // As wholes they need neither names nor sizes in common.
    let json = json_of(&eval(dir, &["--images", "small", "--against", "other", "--sets-only", "--json", "--quiet"]));
    assert!(json["rows"].as_array().unwrap().iter().all(|row| row["metric"] != "psnr"));
}

/// A weight tensor as `formula` of scripts/eval/make_networks.py makes it from its name.
fn formula(name: &str, shape: &[usize]) -> Tensor {
    let seed = name.bytes().fold(0x811C_9DC5u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let last = name.rsplit('.').next().unwrap();
    let fan_in: usize = shape.iter().skip(1).product();
    let value = |i: usize| {
        let mut h = (i as u32).wrapping_add(seed);
        h = (h ^ (h >> 16)).wrapping_mul(0x85EB_CA6B);
        h = (h ^ (h >> 13)).wrapping_mul(0xC2B2_AE35);
        let u = f64::from(h ^ (h >> 16)) / 2f64.powi(32) - 0.5;
        (if last == "running_var" || (last == "weight" && shape.len() == 1) {
            1.0 + 0.5 * u
        } else if name.starts_with("lin") {
            u + 0.5
        } else if last == "weight" && shape.len() > 1 {
            u * (24.0 / fan_in as f64).sqrt()
        } else {
            0.4 * u
        }) as f32
    };
    Tensor::from_vec((0..shape.iter().product()).map(value).collect::<Vec<f32>>(), shape, &Device::Cpu).unwrap()
}

fn write_weights(path: &Path, shapes: impl IntoIterator<Item = (String, Vec<usize>)>) {
    let raw = |(name, shape): (String, Vec<usize>)| RawTensor::from_tensor(&name, &formula(&name, &shape)).unwrap();
    safetensors::write(path, shapes.into_iter().map(raw).collect(), &BTreeMap::new()).unwrap();
}

fn open(name: &str) -> RgbImage {
    image::open(fixture(name)).unwrap().to_rgb8()
}

fn floats(json: &Json) -> Vec<f64> {
    json.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// The largest difference over the largest value.
fn relative_error(found: &[f32], expected: &Json) -> f64 {
    let expected = floats(expected);
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    found.iter().zip(&expected).fold(0.0, |m: f64, (a, b)| m.max((f64::from(*a) - b).abs())) / largest
}

#[test]
fn distances_of_sets_equal_pytorch_fid_and_an_eigenvalue_computation() {
    for case in recorded("reference.json")["sets"].as_array().unwrap() {
        let matrix = |key: &str| {
            let rows: Vec<Vec<f64>> = case[key].as_array().unwrap().iter().map(floats).collect();
            Matrix::new(rows.len(), rows[0].len(), rows.concat())
        };
        let (x, y) = (matrix("x"), matrix("y"));
        let fid = frechet(&x, &y).unwrap().unwrap();
        // Where a covariance is singular, the reference's root and eigenvalues are only good to half the digits.
        let singular = x.rows.min(y.rows) <= x.columns;
        let tolerance = if singular { 1e-7 } else { 1e-12 };
        near(fid, &case["fid_by_eigenvalues"], tolerance);
        near(fid, &case["fid"], if singular { 1e-7 } else { 1e-10 });
        near(kernel_distance(&x, &y).unwrap().unwrap(), &case["kid"], 1e-11);
        assert!(frechet(&x, &x).unwrap().unwrap().abs() < 1e-12);
    }
}

#[test]
fn inception_equals_pytorch_fid_and_refuses_other_weights() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("inception.safetensors");
    write_weights(&path, inception::tensors());
    let network = Inception::load(&Weights::open_file(&path).unwrap()).unwrap();
    let reference = &recorded("networks.json")["inception"];
    let stride = reference["stride"].as_u64().unwrap() as usize;
    for name in ["crop.png", "blurred.png"] {
        let features = network.features(&open(name)).unwrap();
        assert_eq!(features.len(), 2048);
        let strided: Vec<f32> = features.into_iter().step_by(stride).collect();
        // f32 sums over a hundred layers, the batch normalisation folded into the weights here.
        let error = relative_error(&strided, &reference["features"][name]);
        assert!(error < 2e-5, "{name}: {error}");
    }
    // torchvision's own InceptionV3 has 1000 classes; a file cut short lacks a tensor.
    let (mut imagenet, mut cut, mut stranger) = (inception::tensors(), inception::tensors(), inception::tensors());
    imagenet.iter_mut().filter(|(name, _)| name.starts_with("fc.")).for_each(|(_, shape)| shape[0] = 1000);
    cut.remove(0);
    stranger.push(("AuxLogits.fc.weight".into(), vec![1000, 768]));
    let cases = [(imagenet, "fc.weight"), (cut, "Conv2d_1a_3x3.conv.weight"), (stranger, "AuxLogits")];
    for (shapes, word) in cases {
        // Only names and shapes matter here.
        let raw = shapes.into_iter().map(|(name, shape)| {
            RawTensor::from_tensor(name, &Tensor::zeros(shape, DType::BF16, &Device::Cpu).unwrap()).unwrap()
        });
        safetensors::write(&path, raw.collect(), &BTreeMap::new()).unwrap();
        let error = Inception::load(&Weights::open_file(&path).unwrap()).err().expect("refused").to_string();
        assert!(error.contains(word) && error.contains("pt_inception-2015-12-05"), "{error}");
    }
}

#[test]
fn perceptual_distance_equals_lpips() {
    let dir = tempfile::tempdir().unwrap();
    let (body, heads) = (dir.path().join("alexnet.safetensors"), dir.path().join("heads.safetensors"));
    let conv = |n: usize, shape: [usize; 4]| {
        [(format!("features.{n}.weight"), shape.to_vec()), (format!("features.{n}.bias"), vec![shape[0]])]
    };
    let layers = [
        (0, [64, 3, 11, 11]),
        (3, [192, 64, 5, 5]),
        (6, [384, 192, 3, 3]),
        (8, [256, 384, 3, 3]),
        (10, [256, 256, 3, 3]),
    ];
    write_weights(&body, layers.into_iter().flat_map(|(n, shape)| conv(n, shape)));
    let head = |(i, c): (usize, usize)| (format!("lin{i}.model.1.weight"), vec![1, c, 1, 1]);
    write_weights(&heads, [64, 192, 384, 256, 256].into_iter().enumerate().map(head));
    let files = [&body, &heads].map(|p| Weights::open_file(p).unwrap());
    let network = Perceptual::load(&files).unwrap();
    let [a, b] = ["crop.png", "blurred.png"].map(|name| network.look(&open(name)).unwrap());
    near(network.distance(&a, &b).unwrap(), &recorded("networks.json")["lpips"]["distance"], 1e-5);
    assert_eq!(network.distance(&a, &a).unwrap(), 0.0);
    let error = Perceptual::load(&files[..1]).err().expect("no heads").to_string();
    assert!(error.contains("lin0.model.1.weight") && error.contains("alexnet.safetensors"), "{error}");
}

/// The recorded small CLIP model of a kind, as a folder.
fn clip_folder(dir: &Path, kind: &str) -> PathBuf {
    let folder = dir.join(kind);
    std::fs::create_dir(&folder).unwrap();
    for entry in std::fs::read_dir(fixture(kind)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let shapes: BTreeMap<String, Vec<usize>> =
        serde_json::from_value(recorded("networks.json")[kind]["shapes"].clone()).unwrap();
    write_weights(&folder.join("model.safetensors"), shapes);
    folder
}

#[test]
fn clip_models_equal_transformers() {
    let dir = tempfile::tempdir().unwrap();
    for kind in ["clip", "chinese_clip"] {
        let clip = Clip::load(&clip_folder(dir.path(), kind)).unwrap();
        let reference = &recorded("networks.json")[kind];
        for case in reference["texts"].as_array().unwrap() {
            let (features, cut) = clip.text(case["text"].as_str().unwrap()).unwrap();
            let error = relative_error(&features, &case["features"]);
            assert!(error < 1e-5, "{kind}, {}: {error}", case["text"]);
            assert_eq!(cut, case["ids"].as_array().unwrap().len() == 24, "{}", case["text"]);
        }
        for name in ["crop.png", "blurred.png"] {
            let error = relative_error(&clip.image(&open(name)).unwrap(), &reference["images"][name]);
            assert!(error < 1e-5, "{kind}, {name}: {error}");
        }
    }
}

#[test]
fn networks_fill_their_rows_and_missing_ones_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    two_folders(dir);
    std::fs::write(dir.join("soft/1.txt"), "a red cat").unwrap();
    std::fs::write(dir.join("sharp/1.txt"), "一只红色的猫").unwrap();
    let base = ["--images", "soft", "--against", "sharp", "--json", "--quiet"];
    let json = json_of(&eval(dir, &base));
    for (metric, word) in [
        ("anatomy_flagged", "--pose"),
        ("lpips_alex", "--lpips"),
        ("fid", "--inception"),
        ("kid", "--inception"),
        ("clip_score", "--clip"),
    ] {
        let why = cell(&json, metric, 0)["not_measured"].as_str().unwrap();
        assert!(why.contains(word), "{metric}: {why}");
        assert!(cell(&json, metric, 0).get("value").is_none());
    }
    clip_folder(dir, "clip");
    clip_folder(dir, "chinese_clip");
    let json = json_of(&eval(dir, &[&base[..], &["--clip", "clip", "--clip", "chinese_clip"]].concat()));
    let seen = json_of(&eval(dir, &[&base[..], &["--pose", "posenet"]].concat()));
    // Half an astronaut is a person, with two hands at most.
    let (unseen, flagged) = (cell(&seen, "no_person_detected", 1), cell(&seen, "anatomy_flagged", 1));
    assert_eq!((&unseen["value"], &unseen["n"]), (&0.0.into(), &1.into()));
    assert_eq!((&flagged["value"], &flagged["n"]), (&0.0.into(), &1.into()));
    assert_eq!(cell(&seen, "anatomy_flagged", 0)["p_value"], 1.0);
    // Each prompt is scored by the network of its language.
    let reference = recorded("networks.json");
    let expected = |kind: &str, image: &str| {
        let (a, b) = (floats(&reference[kind]["texts"][0]["features"]), floats(&reference[kind]["images"][image]));
        (100.0 * a.iter().zip(&b).map(|(x, y)| x * y).sum::<f64>()).max(0.0)
    };
    let close = |cell: &Json, expected: f64| {
        assert!((cell["value"].as_f64().unwrap() - expected).abs() < 1e-3, "{cell} {expected}")
    };
    close(cell(&json, "clip_score", 0), expected("clip", "blurred.png"));
    close(cell(&json, "chinese_clip_score", 1), expected("chinese_clip", "crop.png"));
    assert!(cell(&json, "clip_score", 1).get("value").is_none());
    let error = eval(dir, &[&base[..], &["--clip", "clip", "--clip", "clip"]].concat());
    assert!(error.status.code() == Some(2) && String::from_utf8_lossy(&error.stderr).contains("two CLIP models"));
    std::fs::write(dir.join("bad.safetensors"), "no weights").unwrap();
    let error = eval(dir, &[&base[..], &["--inception", "bad.safetensors"]].concat());
    assert!(error.status.code() == Some(2) && String::from_utf8_lossy(&error.stderr).contains("bad.safetensors"));
}

/// An exported adapter of rank 2 with a strong effect on two of the tiny model's linears.
fn write_adapter(path: &Path, seed: u64) {
    let tensor = |name: &str, shape: (usize, usize)| {
        let values = Stream::named(seed, name, Purpose::Bench).normals(shape.0 * shape.1, 0.5);
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let module = |name: &str| {
        let (a, b) = (tensor(&format!("{name}.a"), (2, 64)), tensor(&format!("{name}.b"), (64, 2)));
        (name.to_string(), LoraModule { a, b, alpha: 2.0, scale: 1.0 })
    };
    let modules = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0"].map(module);
    let adapter = LoraAdapter { modules: modules.into() };
    write_exported(path, &adapter, DType::F32, &Provenance::default()).unwrap();
}

const TINY: [&str; 9] = ["--model", "synthetic:tiny", "--steps", "2", "--size", "48x32", "--seeds", "7,8", "--quiet"];

#[test]
fn a_model_is_compared_with_its_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_adapter(&dir.join("one.safetensors"), 1);
    write_adapter(&dir.join("two.safetensors"), 2);
    std::fs::write(dir.join("prompts.txt"), "sks cat, on a chair\na dog\n").unwrap();
    let loras = ["--lora", "one.safetensors:0.5", "--lora", "two.safetensors", "--prompts", "prompts.txt", "--json"];
    let args = [&TINY[..], &loras, &["--trigger", "sks", "--class", "black"]].concat();
    let json = json_of(&eval(dir, &args));
    assert_eq!(json["columns"], serde_json::json!(["base", "one:0.5", "two"]));
    // Each picture is the one that `generate` makes of its prompt, seed and adapter.
    let picture =
        |folder: &str, name: &str| image::open(dir.join("eval/images").join(folder).join(name)).unwrap().to_rgb8();
    let generated = Command::new(env!("CARGO_BIN_EXE_qwen-lora"))
        .args(["generate", "--model", "synthetic:tiny", "--steps", "2", "--size", "48x32", "--seed", "8", "--quiet"])
        .args(["--prompt", "black cat, on a chair", "--lora", "one.safetensors:0.5", "--output", "one.png"])
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(generated.status.success(), "{}", String::from_utf8_lossy(&generated.stderr));
    assert_eq!(picture("one_0.5", "003-8.png"), image::open(dir.join("one.png")).unwrap().to_rgb8());
    // Drift is that from the base model's picture of the same prompt and seed; two prompts are without the trigger.
    let row = |metric: &str, part: &str| {
        let rows = json["rows"].as_array().unwrap();
        rows.iter().find(|r| r["metric"] == metric && r["part"] == part).unwrap_or_else(|| panic!("{metric} {part}"))
    };
    let drift = |folder: &str, names: &[&str]| {
        let one = |name: &&str| rms_difference(&picture(folder, name), &picture("base", name));
        names.iter().map(one).sum::<f64>() / names.len() as f64
    };
    let with = drift("two", &["001-7.png", "001-8.png"]);
    let without = drift("two", &["002-7.png", "002-8.png", "004-7.png", "004-8.png"]);
    near(row("pixel_drift", "with trigger")["cells"][2]["value"].as_f64().unwrap(), &with.into(), 1e-12);
    near(row("pixel_drift", "without trigger")["cells"][2]["value"].as_f64().unwrap(), &without.into(), 1e-12);
    near(
        row("bleed", "without trigger, pixels")["cells"][2]["value"].as_f64().unwrap(),
        &(without / with).into(),
        1e-12,
    );
    assert_eq!(row("bleed", "class word, pixels")["cells"][0], Json::Null);
    assert!(row("diversity_ssim", "")["cells"][1]["value"].as_f64().unwrap() > 0.0);
    assert!(row("ms_ssim", "")["cells"][1]["not_measured"].as_str().unwrap().contains("160"));
    let page = std::fs::read_to_string(dir.join("eval/report.html")).unwrap();
    assert_eq!(page.matches("<img ").count(), 4 * 2 * 3);
    assert!(page.contains("sks cat, on a chair") && page.contains("one:0.5"));
    // What is there is not made again, what is not is.
    let time = |name: &str| std::fs::metadata(dir.join("eval/images/two").join(name)).unwrap().modified().unwrap();
    let before = time("001-7.png");
    std::fs::remove_file(dir.join("eval/images/two/002-7.png")).unwrap();
    assert_eq!(json_of(&eval(dir, &args))["rows"], json["rows"]);
    assert_eq!(time("001-7.png"), before);
    // Another weight is another picture.
    let other = [&TINY[..], &["--lora", "one.safetensors:0.6", "--lora", "two.safetensors:0.9"], &loras[4..]].concat();
    let other = json_of(&eval(dir, &other));
    assert_ne!(cell(&other, "pixel_drift", 2)["value"], cell(&json, "pixel_drift", 2)["value"]);
}

#[test]
fn what_cannot_be_generated_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_adapter(&dir.join("one.safetensors"), 1);
    std::fs::write(dir.join("prompts.txt"), "a cat\n").unwrap();
    std::fs::write(dir.join("empty.txt"), "\n").unwrap();
    let lora = ["--lora", "one.safetensors"];
    for (args, words) in [
        ([&TINY[..], &lora].concat(), &["there are no prompts", "--prompts"][..]),
        ([&TINY[..], &lora, &["--prompts", "empty.txt"]].concat(), &["empty.txt", "is empty"]),
        (
            [&TINY[..], &["--lora", "won.safetensors", "--prompts", "prompts.txt"]].concat(),
            &["no adapter at", "one.safetensors"],
        ),
        (
            [&TINY[..], &lora, &["--prompts", "prompts.txt", "--trigger", "sks"]].concat(),
            &["no prompt has the trigger `sks`"],
        ),
        (vec!["--run", "."], &["no run directory", "config.yaml"]),
        (vec!["--quiet"], &["nothing to evaluate", "--images A --against B"]),
    ] {
        let output = eval(dir, &args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{args:?}: {error}");
    }
}

#[test]
fn every_checkpoint_of_a_run_is_a_column() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let set = |text: &str| ["--set".to_string(), text.to_string()];
    let sets = [
        "output=run",
        "training.max_steps=4",
        "training.warmup_steps=1",
        "training.learning_rate=0.05",
        "save.every=2",
        "data.held_out=0",
        "preview.prompts=[a red circle]",
        "preview.steps=2",
        "preview.size=48x32",
    ];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let train = Command::new(env!("CARGO_BIN_EXE_qwen-lora"))
        .args(["train", "--quiet", "--config"])
        .arg(root.join("configs/smoke.yaml"))
        .args(sets.iter().flat_map(|s| set(s)))
        .args(set(&format!("data.path={}", root.join("examples/tiny-drawings").display())))
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(train.status.success(), "{}", String::from_utf8_lossy(&train.stderr));
    let json = json_of(&eval(dir, &["--run", "run", "--seeds", "1,2", "--json", "--quiet"]));
    assert_eq!(json["columns"], serde_json::json!(["base", "step 2", "step 4"]));
    let drift = |i: usize| cell(&json, "pixel_drift", i)["value"].as_f64().unwrap();
    assert!(drift(1) > 0.0 && drift(1) != drift(2), "{} {}", drift(1), drift(2));
    let page = std::fs::read_to_string(dir.join("eval/report.html")).unwrap();
    assert!(page.contains("Over the run") && page.contains("<circle"));
}

/// The page's data, which its script works with.
fn page_data(page: &str) -> Json {
    let line = page.lines().find_map(|l| l.strip_prefix("const data = ")).unwrap();
    serde_json::from_str(line.trim_end_matches(';')).unwrap()
}

#[test]
fn answers_of_the_rating_page_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("a")).unwrap();
    std::fs::create_dir(dir.join("b")).unwrap();
    // Pictures of `a` are bright, those of `b` dark.
    for i in 0..6u8 {
        let image = |level: u8| RgbImage::from_pixel(16, 16, image::Rgb([level; 3]));
        image(200 + i).save(dir.join(format!("a/{i}.png"))).unwrap();
        image(20 + i).save(dir.join(format!("b/{i}.png"))).unwrap();
    }
    let base = ["--images", "a", "--against", "b", "--quiet", "--json"];
    let rate = [&base[..], &["--rate", "--criteria", "手,</script>", "--rate-seed", "5"]].concat();
    json_of(&eval(dir, &rate));
    let page = std::fs::read_to_string(dir.join("eval/rating.html")).unwrap();
    assert_eq!(page.matches("</script>").count(), 1, "a criterion cannot end the script");
    let data = page_data(&page);
    let pairs = data["pairs"].as_array().unwrap();
    let is_bright = |uri: &Json| {
        let bytes = STANDARD.decode(uri.as_str().unwrap().split_once(',').unwrap().1).unwrap();
        image::load_from_memory(&bytes).unwrap().to_rgb8().get_pixel(3, 3).0[0] > 100
    };
    let bright_is_a: Vec<bool> = pairs.iter().map(|p| is_bright(&p["a"])).collect();
    assert!(pairs.iter().zip(&bright_is_a).all(|(p, a)| is_bright(&p["b"]) != *a));
    assert!(bright_is_a.contains(&true) && bright_is_a.contains(&false), "sides are mixed");
    // Someone likes the bright ones, but for one pair, and finds one pair equal.
    let choice = |i: usize| match i {
        4 => "tie",
        _ if bright_is_a[i] != (i == 2) => "A",
        _ => "B",
    };
    let answers: Vec<Json> =
        (0..6).map(|i| serde_json::json!({"pair": i, "criterion": "手", "choice": choice(i)})).collect();
    let mut answers = serde_json::json!({
        "format": 1, "page": data["page"], "seed": data["seed"], "criteria": data["criteria"], "rater": "x", "answers": answers,
    });
    let write = |name: &str, json: &Json| std::fs::write(dir.join(name), json.to_string()).unwrap();
    write("r.json", &answers);
    let json = json_of(&eval(dir, &[&base[..], &["--ratings", "r.json"]].concat()));
    let rows = json["rows"].as_array().unwrap();
    let row = |part: &str| rows.iter().find(|r| r["metric"] == "preferred" && r["part"] == part).unwrap();
    let cell = &row("手")["cells"][0];
    assert_eq!((&cell["value"], &cell["n"], &cell["p_value"]), (&0.8.into(), &5.into(), &0.375.into()));
    let (low, high) = wilson(4, 5);
    assert_eq!((cell["low"].as_f64(), cell["high"].as_f64()), (Some(low), Some(high)));
    assert_eq!(row("</script>")["cells"][0]["not_measured"], "no answers");
    // The same seed makes the same page, another one another.
    json_of(&eval(dir, &rate));
    assert_eq!(std::fs::read_to_string(dir.join("eval/rating.html")).unwrap(), page);
    json_of(&eval(dir, &[&base[..], &["--rate"]].concat()));
    assert_ne!(page_data(&std::fs::read_to_string(dir.join("eval/rating.html")).unwrap())["page"], data["page"]);

    let refused = |args: &[&str], word: &str| {
        let output = eval(dir, &[&base[..], args].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && error.contains(word), "{args:?}: {error}");
    };
    write("none.json", &serde_json::json!({"a": 1}));
    refused(&["--ratings", "none.json"], "holds no ratings");
    refused(&["--ratings", "missing.json"], "missing.json");
    refused(&["--ratings", "r.json", "--ratings", "r.json"], "given twice");
    answers["answers"][0]["pair"] = 6.into();
    write("pair.json", &answers);
    refused(&["--ratings", "pair.json"], "no pair 6");
    answers["page"] = "0123".into();
    write("other.json", &answers);
    refused(&["--ratings", "other.json"], "of another page");
    RgbImage::new(16, 16).save(dir.join("a/0.png")).unwrap();
    refused(&["--ratings", "r.json"], "of another page");
}
