//! The base model in int8, and quantised files as base models: what a run on them computes, and what is refused.

mod quantised_common;
mod train_common;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use quantised_common::{Held, Scales, write_fp8, write_gguf, write_held};
use qwen_lora::io::Weights;
use qwen_lora::io::safetensors::{MappedFile, RawTensor, write};
use qwen_lora::model::synth;
use std::collections::BTreeMap;
use train_common::{Workplace, assert_says, the_error};

fn losses(place: &Workplace) -> Vec<f64> {
    place.metrics().iter().filter_map(|line| line["loss"].as_f64()).collect()
}

/// The transformer of the tiny pipeline.
fn tiny(place: &Workplace) -> Weights {
    let pipeline = synth::tiny_in(&place.path("models")).unwrap();
    Weights::open_folder(&pipeline.join("transformer")).unwrap()
}

/// Settings that put `file` in the place of the tiny pipeline's transformer.
fn on(file: &str, dtype: &str) -> String {
    format!("model={{path: synthetic:tiny, transformer: {file}, dtype: {dtype}}}")
}

const INT8: [&str; 4] = ["--threads", "2", "--set", "model.dtype=int8"];

#[test]
fn int8_trains_as_f32_does_and_resumes_to_the_same_bytes() {
    let f32 = Workplace::new();
    f32.train_ok(&["--threads", "2"]);
    let whole = Workplace::new();
    whole.train_ok(&INT8);
    let (ours, theirs) = (losses(&whole), losses(&f32));
    assert!(ours != theirs, "int8 changes nothing");
    let off = ours.iter().zip(&theirs).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
    eprintln!("losses of 24 steps are off by {off:.1e} at most");
    assert!(ours.len() == theirs.len() && off < 2e-3, "{ours:?} {theirs:?}");

    let place = Workplace::new();
    let mut run = place.spawn(&INT8);
    assert!(run.wait_until(|| place.steps_logged() >= 6), "killed too late");
    run.kill();
    place.train_ok(&[&INT8[..], &["--resume", "auto"]].concat());
    assert_eq!(place.metrics(), whole.metrics());
    for file in ["adapter.safetensors", "checkpoints/step-000024/optimizer.safetensors", "config.yaml"] {
        assert!(std::fs::read(place.run(file)).unwrap() == std::fs::read(whole.run(file)).unwrap(), "{file}");
    }
    let config = std::fs::read_to_string(whole.run("config.yaml")).unwrap();
    assert_says(&config, &["dtype: int8"]);

    // With the modulation read from the disk it is the same int8.
    let streamed = Workplace::new();
    streamed.train_ok(&[&INT8[..], &["--set", "model.modulation=streamed"]].concat());
    assert_eq!(streamed.metrics(), whole.metrics());
}

/// What a run of four steps leaves: its losses and its adapter.
type Trained = (Vec<f64>, BTreeMap<String, Vec<f32>>);

#[test]
fn quantised_files_train_as_the_values_that_they_hold() {
    let place = Workplace::new();
    let weights = tiny(&place);
    // All in one place, so that prompts and pictures are encoded once.
    let four_steps = |file: &str, dtype: &str| -> Trained {
        let (model, output) = (on(file, dtype), format!("output=runs/{file}-{dtype}"));
        let sets = ["training.max_steps=4", "training.warmup_steps=1", "data.held_out=0", &model, &output];
        place.train_ok(&sets.iter().flat_map(|set| ["--set", set]).chain(["--threads", "2"]).collect::<Vec<_>>());
        let run = place.path(&output["output=".len()..]);
        let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64();
        let adapter = MappedFile::open(&run.join("checkpoints/step-000004/adapter.safetensors")).unwrap();
        let values = |n: String| (n.clone(), adapter.floats(&n).unwrap());
        std::fs::remove_dir_all(&run).unwrap();
        (metrics.lines().filter_map(loss).collect(), adapter.names().into_iter().map(values).collect())
    };
    let prefix = "model.diffusion_model.";
    let path = |name: &str| place.path(name);
    let files: [(&str, Held, &[&str]); 5] = [
        ("q8.gguf", write_gguf(&weights, &path("q8.gguf"), GgmlDType::Q8_0, ""), &["int8"]),
        ("q4k.gguf", write_gguf(&weights, &path("q4k.gguf"), GgmlDType::Q4K, prefix), &["bf16"]),
        ("q5.gguf", write_gguf(&weights, &path("q5.gguf"), GgmlDType::Q5_0, ""), &[]),
        ("fp8.safetensors", write_fp8(&weights, &path("fp8.safetensors"), Scales::OfMatrix, prefix), &["int8"]),
        ("rows.safetensors", write_fp8(&weights, &path("rows.safetensors"), Scales::OfRow, ""), &[]),
    ];
    let mut seen = Vec::new();
    for (file, held, dtypes) in &files {
        write_held(&weights, &path("held.safetensors"), held);
        let plain = four_steps("held.safetensors", "f32");
        assert!(four_steps(file, "auto") == plain, "{file}");
        // Held in another type: as what the file holds would be.
        for dtype in *dtypes {
            let quantised = four_steps(file, dtype);
            assert!(quantised == four_steps("held.safetensors", dtype), "{file} in {dtype}");
            // Blocks of 8 bits are what int8 is.
            assert_eq!(quantised == plain, *file == "q8.gguf", "{file} in {dtype}");
        }
        assert_eq!(plain.0.len(), 4);
        assert!(!seen.contains(&plain.0), "{file} is like another");
        seen.push(plain.0);
    }
}

#[test]
fn a_picture_of_a_quantised_file_is_made_again_from_itself() {
    let place = Workplace::new();
    let weights = tiny(&place);
    let held = write_gguf(&weights, &place.path("q8.gguf"), GgmlDType::Q8_0, "");
    write_held(&weights, &place.path("held.safetensors"), &held);
    let sets =
        ["training.max_steps=4", "training.warmup_steps=1", &on("q8.gguf", "int8"), "training.learning_rate=0.02"];
    place.train_ok(&sets.iter().flat_map(|set| ["--set", set]).collect::<Vec<_>>());
    let lora = place.run("adapter.safetensors").display().to_string();
    let common = ["generate", "--steps", "2", "--size", "48x32", "--quiet"];
    let draw = |args: &[&str]| {
        let output = place.command(&[&common[..], args].concat()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", train_common::stderr(&output));
    };
    let first = ["--model", "synthetic:tiny", "--prompt", "a cat"];
    let made = |name: &str, args: &[&str]| {
        draw(&[&first[..], args, &["--output", name]].concat());
        image::open(place.path(name)).unwrap().to_rgb8().into_raw()
    };
    let int8 = ["--transformer", "q8.gguf", "--dtype", "int8"];
    let with = made("with.png", &[&int8[..], &["--lora", &lora]].concat());
    assert_ne!(with, made("without.png", &int8), "the adapter does nothing");
    assert_eq!(with, made("held.png", &["--transformer", "held.safetensors", "--dtype", "f32", "--lora", &lora]));
    assert_ne!(with, made("own.png", &["--dtype", "f32", "--lora", &lora]));
    draw(&["--from", "with.png", "--output", "again.png"]);
    assert_eq!(std::fs::read(place.path("again.png")).unwrap(), std::fs::read(place.path("with.png")).unwrap());
}

#[test]
fn what_cannot_be_held_or_trained_is_refused_before_anything_is_written() {
    let place = Workplace::new();
    let weights = tiny(&place);
    write_fp8(&weights, &place.path("bare.safetensors"), Scales::None, "");
    let refused = |sets: &[&str]| {
        let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        let error = the_error(&place.train(&args), 2);
        assert!(!place.run("").exists());
        error
    };
    for dtype in ["auto", "int8"] {
        let error = refused(&[&on("bare.safetensors", dtype)]);
        assert_says(&error, &["cannot load `img_in.weight` from `", "bare.safetensors`", "expected f32, bf16, f16"]);
        assert_says(
            &error,
            &["found fp8 without `img_in.weight_scale`", "a bare cast to fp8", "hint: ", "dtype: int8"],
        );
    }
    let error = refused(&["model.dtype=int8", "training.mode=full"]);
    assert_says(&error, &["`training.mode: full` trains weights in f32", "found int8"]);
    let error = refused(&["model.dtype=int4"]);
    assert_says(&error, &["model.dtype", "`int8`"]);

    // A weight that is no number is found where it is quantised.
    let broken = "transformer_blocks.1.attn.to_v.weight";
    let raw = weights.names().map(|n| {
        let shape = weights.shape(n).unwrap();
        let mut raw = RawTensor::from_tensor(n, &weights.get(n, shape, DType::F32, &Device::Cpu).unwrap()).unwrap();
        if n == broken {
            raw.bytes[4 * (64 * 5 + 3)..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }
        raw
    });
    write(&place.path("nan.safetensors"), raw.collect(), &BTreeMap::new()).unwrap();
    let args = ["--set", &on("nan.safetensors", "int8")];
    let error = the_error(&place.train(&args), 2);
    assert_says(
        &error,
        &[&format!("cannot hold `{broken}` in int8"), "found NaN in row 5", "nan.safetensors", "hint: "],
    );
}
