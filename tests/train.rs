//! What a run makes: the smoke config, full fine-tuning, bf16 weights, per-target ranks, reports, exported adapters.

mod train_common;

use candle_core::{DType, Device, Tensor};
use qwen_lora::io::safetensors::MappedFile;
use serde_json::Value as Json;
use std::path::Path;
use train_common::{Workplace, assert_says, package, stderr, stdout};

fn held_out_losses(metrics: &[Json]) -> Vec<f64> {
    metrics.iter().filter_map(|line| line["held_out_loss"].as_f64()).collect()
}

fn losses(metrics: &[Json]) -> Vec<f64> {
    metrics.iter().filter_map(|line| line["loss"].as_f64()).collect()
}

/// The shape of a tensor in a file; none if it is not there.
fn shape(file: &Path, name: &str) -> Option<Vec<usize>> {
    MappedFile::open(file).unwrap().info(name).map(|(_, shape)| shape.to_vec())
}

#[test]
fn the_smoke_config_lowers_the_held_out_loss_and_says_what_was_made() {
    let place = Workplace::new();
    let config = package().join("configs/smoke.yaml");
    let images = format!("data.path={}", package().join("examples/tiny-drawings").display());
    let args = ["train", "--config", config.to_str().unwrap(), "--set", &images, "--set", "output=runs/recipe"];
    let output = place.command(&args).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let held_out = held_out_losses(&place.metrics());
    assert_eq!(held_out.len(), 7);
    assert!(held_out[6] < 0.95 * held_out[0], "{held_out:?}");
    let text = stdout(&output);
    assert_says(
        &text,
        &["done: 120 steps in ", "held-out loss ", "runs/recipe/adapter.safetensors (24 modules, 0.1 MiB)"],
    );
    assert_says(
        &text,
        &["runs/recipe/metrics.jsonl", "checkpoints/step-000120", "\nnext: ", "pipe.load_lora_weights("],
    );
    assert_says(&stderr(&output), &["prompt embeddings: 13 computed, 0 from the cache", "step 120/120  loss "]);
}

#[test]
fn quiet_says_nothing_and_json_one_object() {
    let place = Workplace::new();
    let output = place.train_ok(&["--json", "--quiet"]);
    let json: Json = serde_json::from_str(&stdout(&output)).expect("one JSON object and nothing else");
    assert_eq!((&json["outcome"], &json["steps"]), (&"finished".into(), &24.into()));
    assert_eq!(json["product"], "runs/recipe/adapter.safetensors");
    assert_eq!(stderr(&output), "");
    let last = held_out_losses(&place.metrics()).pop();
    assert_eq!(json["held_out_loss_last"].as_f64(), last);
    let output = Workplace::new().train_ok(&["--quiet"]);
    assert_eq!((stdout(&output), stderr(&output)), (String::new(), String::new()));
}

#[test]
fn a_caption_that_is_cut_is_named_with_its_image_from_the_cache_too() {
    let place = Workplace::new();
    std::fs::write(place.path("images/04-house.txt"), "word ".repeat(60)).unwrap();
    let args =
        ["--set", "data.max_sequence_length=128", "--set", "training.max_steps=1", "--set", "training.warmup_steps=0"];
    for output in ["output=runs/one", "output=runs/two"] {
        let text = stderr(&place.train_ok(&[&args[..], &["--set", output]].concat()));
        let notes: Vec<&str> = text.lines().filter(|line| line.contains("is cut")).collect();
        assert_eq!(notes.len(), 1, "{text}");
        assert_says(
            notes[0],
            &["note: the caption of 04-house.png is cut: it has ", "`data.max_sequence_length` keeps 128"],
        );
    }
}

/// White: the left half.
fn half_masks(place: &Workplace, folder: &str, name: impl Fn(&str) -> String) {
    for drawing in train_common::files(&place.path("images")) {
        let stem = drawing.to_str().unwrap().strip_suffix(".png");
        if let Some(stem) = stem.filter(|stem| !stem.ends_with(".mask")) {
            let (width, height) = image::image_dimensions(place.path("images").join(&drawing)).unwrap();
            let mask =
                image::GrayImage::from_fn(width, height, |x, _| image::Luma([if x < width / 2 { 255 } else { 0 }]));
            let path = place.path(folder).join(name(stem));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            mask.save(path).unwrap();
        }
    }
}

#[test]
fn masks_beside_the_images_or_in_a_folder_weigh_the_loss() {
    let args = ["--set", "training.max_steps=4", "--set", "evaluation.every=4", "--threads", "2"];
    let run = |place: &Workplace, sets: &[&str]| {
        let output = place.train_ok(&[&args[..], sets].concat());
        let raw = std::fs::read(place.run("checkpoints/step-000004/adapter.safetensors")).unwrap();
        (raw, losses(&place.metrics()), held_out_losses(&place.metrics()), stderr(&output))
    };
    let plain = run(&Workplace::new(), &[]);

    // Masks that are not asked for are no images either.
    let beside = || {
        let place = Workplace::new();
        half_masks(&place, "images", |stem| format!("{stem}.mask.png"));
        place
    };
    let unused = run(&beside(), &[]);
    assert!(plain.0 == unused.0 && plain.1 == unused.1);
    assert_says(&unused.3, &["note: masks of 8 images are not used, as `data.masks` is `none`"]);

    let masked = run(&beside(), &["--set", "data.masks=beside"]);
    assert!(masked.0 != plain.0 && masked.1 != plain.1, "masks change nothing");
    assert_eq!(masked.2[0], plain.2[0], "the held-out loss is that of whole images");
    let place = Workplace::new();
    half_masks(&place, "masks", |stem| format!("{stem}.png"));
    assert!(run(&place, &["--set", "data.masks=masks"]).0 == masked.0, "the same masks elsewhere");
    // White masks are none.
    let place = beside();
    for file in train_common::files(&place.path("images")).iter().filter(|f| f.to_str().unwrap().contains(".mask")) {
        let path = place.path("images").join(file);
        let (width, height) = image::image_dimensions(&path).unwrap();
        // A smaller mask of the same shape will do.
        image::GrayImage::from_pixel(width / 2, height / 2, image::Luma([255])).save(path).unwrap();
    }
    assert!(run(&place, &["--set", "data.masks=beside"]).0 == plain.0, "white everywhere is no mask");
    let one = place.path("images/04-house.mask.png");
    image::GrayImage::from_pixel(50, 80, image::Luma([255])).save(&one).unwrap();
    let error = train_common::the_error(&place.train(&["--set", "data.masks=beside", "--set", "output=runs/b"]), 2);
    assert_says(&error, &["04-house.mask.png` has another shape than its image", "expected 128x96", "found 50x80"]);
    let none = train_common::the_error(&Workplace::new().train(&["--set", "data.masks=beside"]), 2);
    assert_says(&none, &["no image has one", "01-red-circle.mask.png", "hint: "]);
}

#[test]
fn all_weights_are_trained_and_written_as_a_transformer_that_loads() {
    let place = Workplace::new();
    let full = ["--set", "training.mode=full", "--set", "training.learning_rate=5e-4"];
    let output = place.train_ok(&full);
    assert_says(
        &stdout(&output),
        &["transformer  runs/recipe/transformer", "in place of the base model's `transformer`"],
    );
    assert!(!place.run("adapter.safetensors").exists());
    let trained = held_out_losses(&place.metrics());
    assert!(trained.last() < trained.first(), "{trained:?}");

    // A new adapter on the trained transformer starts where the training has ended.
    let again = ["--set", "model.transformer=runs/recipe/transformer", "--set", "output=runs/again"];
    place.train_ok(&[&again[..], &["--set", "training.max_steps=4"]].concat());
    let text = std::fs::read_to_string(place.path("runs/again/metrics.jsonl")).unwrap();
    let first: Json = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let (before, after) = (first["held_out_loss"].as_f64().unwrap(), *trained.last().unwrap());
    assert!((before - after).abs() < 1e-5 * after, "{before} is not {after}");
}

#[cfg(unix)]
#[test]
fn full_training_resumes_to_the_same_bytes() {
    let full = ["--set", "training.mode=full", "--set", "save.every=1", "--set", "save.keep=1", "--threads", "2"];
    let place = Workplace::new();
    let mut run = place.spawn(&full);
    assert!(run.wait_until(|| place.steps_logged() >= 5), "killed too late");
    run.kill();
    place.train_ok(&[&full[..], &["--resume", "auto"]].concat());
    let whole = Workplace::new();
    whole.train_ok(&full);
    assert_eq!(place.metrics(), whole.metrics());
    assert!(place.snapshot().len() == 8 && place.checkpoints() == [24], "{:?}", place.snapshot().keys());
    // Metrics and page hold times.
    let timed = |name: &std::path::Path| name.ends_with("metrics.jsonl") || name.ends_with("report.html");
    for (name, bytes) in whole.snapshot().iter().filter(|(name, _)| !timed(name)) {
        assert!(*bytes == place.snapshot()[name], "{} differs", name.display());
    }
}

#[test]
fn bf16_weights_train_an_f32_adapter() {
    let run = |dtype: &[&str]| {
        let place = Workplace::new();
        place.train_ok(&[&["--set", "training.max_steps=8"], dtype].concat());
        place
    };
    let f32 = run(&[]);
    for dtype in ["model.dtype=bf16", "training.dtype=bf16"] {
        let place = run(&["--set", dtype]);
        let (ours, theirs) = (losses(&place.metrics()), losses(&f32.metrics()));
        assert_ne!(ours, theirs, "{dtype} changes nothing");
        // bf16 has 8 bits: the losses of noise agree to a few parts in a hundred.
        let near = ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 0.03 * b);
        assert!(ours.len() == theirs.len() && near, "{dtype}: {ours:?} {theirs:?}");
        let file = MappedFile::open(&place.run("adapter.safetensors")).unwrap();
        assert!(file.names().iter().all(|n| file.info(n).unwrap().0 == safetensors::Dtype::F32));
    }
    let place = run(&["--set", "save.dtype=bf16"]);
    let file = MappedFile::open(&place.run("adapter.safetensors")).unwrap();
    assert!(file.names().iter().all(|n| file.info(n).unwrap().0 == safetensors::Dtype::BF16));
    let raw = MappedFile::open(&place.run("checkpoints/step-000008/adapter.safetensors")).unwrap();
    assert!(raw.names().iter().all(|n| raw.info(n).unwrap().0 == safetensors::Dtype::F32));
}

/// Targets of other ranks than the rest, on `case_a` with photos and captions in English and Chinese: the exported
/// file and the checkpoint's raw adapter are one and the same adapter.
#[test]
fn per_target_ranks_and_the_exported_file_is_the_checkpoints_adapter() {
    let case = package().join("tests/fixtures/reference/case_a");
    let place = Workplace::new();
    let (model, images) = (format!("model={}", case.join("pipe").display()), package().join("examples/photos"));
    let images = format!("data.path={}", images.display());
    let targets = "lora.target_modules=[qkv, {name: mlp, rank: 3, alpha: 12}, {name: attn.to_out.0, rank: 8}]";
    let sets = [&model, &images, targets, "data.held_out=0", "data.resolution=64", "training.max_steps=6"];
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    place.train_ok(&args);
    let (exported, checkpoint) = (place.run("adapter.safetensors"), place.run("checkpoints/step-000006"));
    let rank = |module: &str| {
        let name = format!("transformer.transformer_blocks.1.{module}.lora_A.weight");
        shape(&exported, &name).unwrap_or_else(|| panic!("no {name}"))[0]
    };
    assert_eq!([rank("attn.to_q"), rank("img_mlp.net.2"), rank("attn.to_out.0")], [4, 3, 8]);

    let output_of = |adapter: &Path| {
        let file = place.path("output.safetensors");
        let paths = [&case.join("pipe"), &case, adapter, &file].map(|p: &Path| p.to_str().unwrap().to_string());
        let [model, reference, adapter, output] = &paths;
        let args =
            ["verify", "--json", "--model", model, "--reference", reference, "--adapter", adapter, "--output", output];
        let verified = place.command(&args).output().unwrap();
        assert!(verified.status.success(), "{}", stderr(&verified));
        let file = MappedFile::open(&file).unwrap();
        ["adapter.output", "tf.b2_mask.output"].map(|n| file.tensor(n, DType::F32, &Device::Cpu).unwrap())
    };
    let ([from_file, base], [from_checkpoint, _]) = (output_of(&exported), output_of(&checkpoint));
    let distance = |a: &Tensor, b: &Tensor| {
        let largest = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        largest((a - b).unwrap()) / largest(b.clone())
    };
    let (apart, moved) = (distance(&from_file, &from_checkpoint), distance(&from_file, &base));
    assert!(moved > 1e-3, "the adapter does nothing: {moved}");
    assert!(apart < 1e-5 && apart < moved / 100.0, "the file's output differs by {apart} from the checkpoint's");
}

/// Three photos: two of people, one of a picture without any.
fn with_people() -> Workplace {
    let place = Workplace::new();
    std::fs::remove_dir_all(place.path("images")).unwrap();
    train_common::copy(&package().join("examples/photos"), &place.path("images"));
    for name in ["12-night.png", "12-night.txt"] {
        std::fs::copy(package().join("examples/tiny-drawings").join(name), place.path("images").join(name)).unwrap();
    }
    place
}

#[test]
fn people_are_found_once_and_choose_and_weigh_the_images() {
    let short =
        ["--set", "training.max_steps=6", "--set", "data.held_out=0", "--set", "data.resolution=64", "--threads", "2"];
    let run = |place: &Workplace, name: &str, sets: &[&str]| {
        let output = place.train_ok(&[&short[..], &["--set", &format!("output=runs/{name}")], sets].concat());
        let raw =
            std::fs::read(place.path(&format!("runs/{name}/checkpoints/step-000006/adapter.safetensors"))).unwrap();
        (raw, stderr(&output))
    };
    let place = with_people();
    let (plain, _) = run(&place, "plain", &[]);
    let (filtered, text) = run(&place, "filtered", &["--set", "data.filter.require_person=true"]);
    assert!(filtered != plain);
    assert_says(&text, &["note: `data.filter.require_person` leaves out 1 image: 12-night.png"]);
    let lines = std::fs::read_to_string(place.path("runs/filtered/filtered.jsonl")).unwrap();
    assert_says(&lines, &["\"path\":\"12-night.png\",\"rule\":\"require_person\"", "no person was found in it"]);
    assert_eq!(lines.lines().count(), 1);

    // The preset: an even first stage, and weights in the others, where people are.
    let (staged, text) = run(&place, "staged", &["--set", "stages=progressive"]);
    assert_says(
        &text,
        &["note: persons were found in 2 of 3 images", "stage hands: steps 5 to 6, 3 images, limbs x 2, hands x 6"],
    );
    assert!(staged != plain, "the weights change nothing");
    let at = |name: &str| place.path(&format!("runs/{name}/metrics.jsonl"));
    let losses = |name: &str| {
        let text = std::fs::read_to_string(at(name)).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Json>(line).unwrap());
        lines.filter_map(|line| line["loss"].as_f64()).collect::<Vec<_>>()
    };
    let (even, weighed) = (losses("plain"), losses("staged"));
    assert!(even[..2] == weighed[..2] && even[2..] != weighed[2..], "{even:?} {weighed:?}");

    // A stage of images with people only; and where there is nobody, weights do nothing and say so.
    let people = "stages=[{name: a, until: 2}, {name: b, filter: {require_person: true}}]";
    assert_says(&run(&place, "chosen", &["--set", people]).1, &["stage b: steps 3 to 6, 2 images"]);
    let drawings = Workplace::new();
    let error = drawings.train(&["--set", "data.filter.require_person=true"]);
    assert_says(
        &train_common::the_error(&error, 2),
        &["`data.filter` leaves out all of the 8 images", "no person was found"],
    );
    let (even, _) = run(&drawings, "plain", &[]);
    let (weighed, text) = run(&drawings, "weighed", &["--set", "regions.hands=5"]);
    assert!(even == weighed);
    assert_says(&text, &["no person was found in any of the 8 images: the weights of `regions` do nothing"]);
}
