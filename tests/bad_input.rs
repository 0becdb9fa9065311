//! Bad input gets one clear error on standard error: what, where, what was found, what was expected, what to do.
//! Exit code 2 if nothing was started, 1 if the run failed, and the last checkpoint whole.

mod train_common;

use std::path::{Path, PathBuf};
use std::process::Command;
use train_common::{Workplace, assert_says, copy, files, stderr, the_error};

const SHORT: [&str; 4] = ["--set", "training.max_steps=4", "--set", "training.gradient_accumulation=1"];

/// Refused before anything is written, in these words.
fn assert_refused(place: &Workplace, args: &[&str], says: &[&str]) {
    let before = files(&place.path(""));
    let error = the_error(&place.train(&[&SHORT[..], args].concat()), 2);
    assert_says(&error, says);
    let mut after = files(&place.path(""));
    after.retain(|name| !name.starts_with("runs/.cache"));
    assert_eq!(before, after, "something was written");
    // An extra file or folder would make the next run a resumed one: with sound input the same command just starts.
    assert!(!place.run("config.yaml").exists());
}

fn with_config(from: &str, to: &str) -> Workplace {
    let place = Workplace::new();
    let text = train_common::RECIPE.replacen(from, to, 1);
    assert_ne!(text, train_common::RECIPE);
    std::fs::write(place.path("recipe.yaml"), text).unwrap();
    place
}

#[test]
fn the_config_file() {
    let place = with_config("learning_rate", "learning_rte");
    assert_refused(&place, &[], &["unknown key `training.learning_rte`", "recipe.yaml", "learning_rate"]);
    let place = with_config("batch_size: 2", "batch_size: many");
    assert_refused(&place, &[], &["wrong value for `training.batch_size`", "expected a whole number", "found", "many"]);
    let place = with_config("rank: 4", "rank: 0");
    assert_refused(&place, &[], &["wrong value for `lora.rank`", "expected a whole number from 1", "found 0"]);
    let place = with_config("{path: images,", "{path: [images],");
    assert_refused(&place, &[], &["`data.path`", "recipe.yaml"]);
    let place = with_config("seed: 7", "seed: {");
    assert_refused(&place, &[], &["`recipe.yaml` is not a valid config file"]);
    let place = with_config("save:", "stages: [{resolution: 512}]\nsave:");
    assert_refused(&place, &[], &["`stages.0.name` is missing", "recipe.yaml"]);

    let place = Workplace::new();
    let config = |place: &Workplace, name: &str| place.command(&["train", "--config", name]).output().unwrap();
    let error = the_error(&config(&place, "recpe.yaml"), 2);
    assert_says(&error, &["cannot read the config file `recpe.yaml`", "No such file"]);
    std::fs::write(place.path("latin.yaml"), b"model: caf\xe9\n").unwrap();
    assert_says(&the_error(&config(&place, "latin.yaml"), 2), &["`latin.yaml` is not UTF-8", "offset 10"]);
    assert_refused(&place, &["--set", "lora.rnk=4"], &["lora.rnk", "rank"]);
    assert_refused(&place, &["--threads", "0"], &["`--threads` is 0"]);
    let usage = |args: &[&str]| stderr(&place.train(args));
    assert_says(&usage(&["--dry-run", "--memory", "24"]), &["`24` is no size of memory", "such as 24GB or 16GiB"]);
    assert_says(&usage(&["--memory", "24GB"]), &["--dry-run"]);
    let sizes = ["expected `auto` or a size such as `24GB` or `16GiB`", "found 24"];
    assert_refused(
        &place,
        &["--set", "training.memory=24"],
        &[&["wrong value for `training.memory`"], &sizes[..]].concat(),
    );
    let open = ["--set", "training.checkpointing=auto"];
    assert_refused(&place, &open, &["needs to know how much memory there is", "hint: `training.memory: auto`"]);
}

#[test]
fn the_structured_loss() {
    let place = Workplace::new();
    let on = ["--set", "data.pose_loss_weight=1"];
    let refused = |sets: &[&str], says: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        assert_refused(&place, &[&on[..], &sets].concat(), says);
    };
    let zeros = "loss.weights={reconstruction: 0, pose: 0, count: 0}";
    refused(&[zeros], &["the weights of the loss are all 0", "one of `loss.weights` above 0"]);
    refused(
        &["loss.gate={from: 0.6, to: 0.5}"],
        &["the gate of the structured loss is empty", "`loss.gate.to` is 0.5"],
    );
    refused(&["loss.every=0"], &["`loss.every`", "found 0"]);
    refused(&["pose=posnet"], &["no pose network `posnet`", "did you mean `posenet`?"]);

    // Weights of another network: PoseNet's in the place of a heatmap network, of OpenPose, of a tiny decoder.
    let posenet = train_common::package().join("assets/posenet_mv1_075.safetensors");
    std::fs::copy(posenet, place.path("other.safetensors")).unwrap();
    refused(&["pose=other.safetensors"], &["`other.safetensors` is not a heatmap network", "`pose_network`"]);
    refused(
        &["pose={network: openpose, body: other.safetensors}"],
        &["`conv1_2.weight`", "weights of another network"],
    );
    refused(&["loss.decoder=other.safetensors"], &["`decoder.1.weight` of the tiny decoder", "taew2_1"]);
}

#[test]
fn targets() {
    let place = Workplace::new();
    let error = "lora.target_modules=[qkv, attn.to_qq]";
    assert_refused(&place, &["--set", error], &["attn.to_qq", "to_q"]);
    assert_refused(&place, &["--set", "lora.target_modules=[]"], &["lora.target_modules", "found"]);
    assert_refused(&place, &["--set", "lora.target_modules=['re:(']"], &["re:("]);
}

#[test]
fn stages() {
    let place = Workplace::new();
    let refused = |stages: &str, says: &[&str]| assert_refused(&place, &["--set", &format!("stages={stages}")], says);
    refused("[{name: a, until: 2}, {name: b, until: 3}]", &["no stage covers the steps after 3, up to 4", "hint: "]);
    refused("[{name: a, until: 2}, {name: b, until: 2}]", &["the stage `b` has no steps", "`a`, ends after step 2"]);
    let modules = |pattern: &str| format!("[{{name: a, target_modules: [{pattern}]}}]");
    refused(
        &modules("attn.to_qq"),
        &["stages.0.target_modules: `attn.to_qq` matches no module", "`attn.to_q`", "stage `a`"],
    );
    refused(&modules("modulation"), &["matches no module that this run trains", "hint: a stage trains a part of"]);
    refused("[{name: a, target_modules: []}]", &["`stages.0.target_modules` is empty", "stage `a`"]);
    let none = "[{name: a, until: 2}, {name: b, filter: {paths: ['hands/*']}}]";
    refused(none, &["the stage `b` has no image to train on", "selects none of the images", "hint: widen"]);
    refused("[{name: a, filter: {paths: ['a[']}}]", &["`a[` in a stage's `filter.paths` is not a glob"]);
}

#[test]
fn modes_that_do_not_go_together() {
    let place = Workplace::new();
    let full = ["--set", "training.mode=full", "--set", "model.dtype=bf16"];
    assert_refused(&place, &full, &["`training.mode: full` trains weights in f32", "found bf16", "hint: "]);
    assert_refused(&place, &["--set", "device=cuda:0"], &["this build cannot compute on `device: cuda:0`", "hint: "]);
}

#[test]
fn the_dataset() {
    let place = Workplace::new();
    std::fs::create_dir(place.path("none")).unwrap();
    assert_refused(&place, &["--set", "data.path=none"], &["no images in `none`", "check `data.path`"]);
    assert_refused(
        &place,
        &["--set", "data.path=nowhere"],
        &["cannot read the dataset `nowhere`", "found nothing there", "hint: "],
    );

    let image = |place: &Workplace| place.path("images/04-house.png");
    let place = Workplace::new();
    std::fs::write(image(&place), "").unwrap();
    assert_refused(&place, &[], &["images/04-house.png", "the file is empty", "hint: "]);
    std::fs::write(image(&place), "not a picture").unwrap();
    assert_refused(&place, &[], &["images/04-house.png", "expected a jpg, png or webp file"]);

    let place = Workplace::new();
    std::fs::write(place.path("images/04-house.txt"), b"a caf\xe9").unwrap();
    assert_refused(&place, &[], &["images/04-house.txt", "UTF-8"]);
    std::fs::remove_file(place.path("images/04-house.txt")).unwrap();
    assert_refused(&place, &[], &["1 image without a caption in `images`", "04-house.png", "data.default_caption"]);
}

/// The pixels are decoded only when they are cached. With the image mended the same command starts, nothing resumed.
#[test]
fn a_cut_image_is_named_and_the_same_command_works_when_it_is_whole_again() {
    let place = Workplace::new();
    let image = place.path("images/04-house.png");
    let whole = std::fs::read(&image).unwrap();
    std::fs::write(&image, &whole[..whole.len() / 2]).unwrap();
    assert_refused(&place, &[], &["cannot read the image `images/04-house.png`", "hint: "]);
    std::fs::write(&image, whole).unwrap();
    let output = place.train_ok(&SHORT);
    assert_says(&stderr(&output), &["from the cache"]);
}

/// A tiny pipeline of its own in `model/`, for a test to spoil.
fn with_model() -> Workplace {
    let place = Workplace::new();
    // Any use of the synthetic model puts it into the cache that all tests share.
    place.train_ok(&["--dry-run", "--quiet"]);
    let shared = Path::new(env!("CARGO_TARGET_TMPDIR")).join("xdg/qwen-lora");
    let tiny = |name: &PathBuf| name.to_string_lossy().starts_with("synthetic-tiny-");
    let names = std::fs::read_dir(&shared).unwrap().map(|e| PathBuf::from(e.unwrap().file_name()));
    copy(&shared.join(names.into_iter().find(tiny).expect("it was just made")), &place.path("model"));
    place
}

const MODEL: [&str; 2] = ["--set", "model=./model"];

/// The one weight file of a network.
fn weights(place: &Workplace, part: &str) -> PathBuf {
    let folder = place.path("model").join(part);
    let mut names = files(&folder);
    names.retain(|n| n.extension().is_some_and(|e| e == "safetensors"));
    folder.join(names.first().expect("a network has weights"))
}

#[test]
fn broken_weights_are_named_before_anything_is_computed() {
    let place = with_model();
    for part in ["transformer", "vae", "text_encoder"] {
        let file = weights(&place, part);
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let whole = std::fs::read(&file).unwrap();
        let mut corrupt = whole.clone();
        corrupt[8..40].fill(b'#');
        for (bytes, says) in
            [(&whole[..whole.len() - 100], "bytes, as its header says"), (&corrupt[..], "hint: "), (b"", "empty")]
        {
            std::fs::write(&file, bytes).unwrap();
            assert_refused(&place, &MODEL, &[part, &name, "is not a whole safetensors file", says]);
            assert!(!place.path("runs/.cache").exists(), "captions or images were encoded with a broken {part} beside");
        }
        std::fs::write(&file, whole).unwrap();
    }
    place.train_ok(&[&SHORT[..], &MODEL].concat());
}

#[test]
fn a_missing_part_is_named() {
    for part in ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"] {
        let place = with_model();
        std::fs::remove_dir_all(place.path("model").join(part)).unwrap();
        assert_refused(&place, &MODEL, &[part, "model"]);
    }
    let place = with_model();
    std::fs::remove_file(weights(&place, "vae")).unwrap();
    assert_refused(&place, &MODEL, &["vae", "safetensors"]);
    let place = with_model();
    std::fs::write(place.path("model/transformer/config.json"), "{").unwrap();
    assert_refused(&place, &MODEL, &["transformer/config.json"]);
}

/// Overwrites the first number of a tensor of f32.
fn poke(file: &Path, tensor: &str, value: f32) {
    let mut bytes = std::fs::read(file).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    assert_eq!(json[tensor]["dtype"], "F32");
    let at = header + json[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn a_loss_that_is_not_finite_names_step_and_images() {
    let place = with_model();
    poke(&weights(&place, "transformer"), "proj_out.bias", f32::INFINITY);
    let error = the_error(&place.train(&[&SHORT[..], &MODEL].concat()), 1);
    assert_says(
        &error,
        &["the loss is inf at step 1\n", "images: ", ".png", "there is no checkpoint yet", "hint: lower"],
    );
    assert!(!place.run("adapter.safetensors").exists());
}

#[test]
fn a_run_that_diverges_stops_and_keeps_the_last_checkpoint() {
    let place = Workplace::new();
    let wild = ["--set", "training.learning_rate=1", "--set", "training.lr_scheduler=constant", "--set"];
    let args = [&wild[..], &["training.warmup_steps=0", "--set", "save.every=1", "--set", "lora.alpha=1e20"]].concat();
    let error = the_error(&place.train(&args), 1);
    let last = *place.checkpoints().last().expect("the first step went well");
    assert_says(&error, &[&format!("at step {}", last + 1), "images: ", ".png"]);
    assert_says(&error, &[&format!("the last checkpoint: runs/recipe/checkpoints/step-{last:06}\n")]);
    assert_eq!(place.steps_logged(), last as usize);

    // The checkpoint is whole: the run goes on from it, to the same end, and leaves it as it was.
    let before = place.snapshot();
    assert_eq!(the_error(&place.train(&[&args[..], &["--resume", "auto"]].concat()), 1), error);
    assert!(before == place.snapshot());
}

#[test]
fn a_vae_that_makes_infinities_is_named_with_the_image() {
    let place = with_model();
    poke(&weights(&place, "vae"), "quant_conv.bias", f32::INFINITY);
    let error = the_error(&place.train(&[&SHORT[..], &MODEL].concat()), 1);
    assert!(!place.run("config.yaml").exists());
    assert_says(&error, &["the VAE made NaN or infinity of `0", ".png`", "hint: the VAE's weights"]);
}

#[test]
fn a_text_encoder_that_makes_infinities_is_named_with_the_caption() {
    let place = with_model();
    poke(&weights(&place, "text_encoder"), "model.norm.weight", f32::NAN);
    let error = the_error(&place.train(&[&SHORT[..], &MODEL].concat()), 1);
    assert_says(
        &error,
        &["the text encoder made NaN or infinity of the caption `", "hint: the text encoder's weights"],
    );
    assert!(!place.run("config.yaml").exists());
}

/// The export comes before the checkpoint: a run whose last export failed is not taken for a finished one.
#[test]
fn no_checkpoint_says_finished_before_the_adapter_is_exported() {
    let place = Workplace::new();
    std::fs::create_dir_all(place.run("adapter.safetensors")).unwrap();
    let args = [&SHORT[..], &["--resume", "auto", "--quiet"]].concat();
    let error = the_error(&place.train(&args), 1);
    assert_says(&error, &["cannot write `runs/recipe/adapter.safetensors`"]);
    assert!(place.checkpoints().is_empty());
    assert!(!place.run(".adapter.safetensors.part").exists());
    std::fs::remove_dir(place.run("adapter.safetensors")).unwrap();
    place.train_ok(&args);
    assert!(place.run("adapter.safetensors").is_file() && place.checkpoints() == [4]);
}

/// A disk that is full in the middle of a save. A limit on the size of files makes the same writes fail.
#[cfg(unix)]
#[test]
fn a_write_that_fails_leaves_the_last_checkpoint_whole_and_no_half_file() {
    let place = Workplace::new();
    let args = ["--set", "save.every=2", "--set", "save.keep=0", "--threads", "2"];
    let mut run = place.spawn(&args);
    assert!(run.wait_until(|| place.run("checkpoints/step-000002").exists()), "interrupted too late");
    run.signal(libc::SIGINT);
    the_error(&run.output(), 130);
    let before = place.snapshot();
    let saved = place.checkpoints();

    // Larger than the adapter's files, smaller than the optimizer's: the checkpoint is cut in its middle.
    let size = |file: &str| std::fs::metadata(place.run("checkpoints/step-000002").join(file)).unwrap().len();
    let blocks = (size("adapter.safetensors") + size("optimizer.safetensors")) / 2 / 512;
    let mut shell = Command::new("sh");
    // Without the trap the signal that goes with the error would end the process.
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let train = ["train", "--config", "recipe.yaml", "--resume", "auto", "--quiet"];
    let shell = place.set_up(&mut shell).args(["-c", &script, env!("CARGO_BIN_EXE_qwen-lora")]).args(train).args(args);
    let error = the_error(&shell.output().unwrap(), 1);
    assert_says(&error, &["cannot write `runs/recipe/checkpoints/.step-", "File too large", "hint: "]);

    assert_eq!(place.checkpoints(), saved);
    for (name, bytes) in place.snapshot() {
        let hidden = name.components().any(|c| c.as_os_str().to_string_lossy().starts_with('.'));
        assert!(!hidden, "{} was left over", name.display());
        if name.starts_with("checkpoints") {
            assert!(before[&name] == bytes, "{} was changed", name.display());
        }
    }
    // With room again the run goes on, to the bytes of one that never stopped.
    place.train_ok(&[&args[..], &["--resume", "auto"]].concat());
    let whole = Workplace::new();
    whole.train_ok(&args);
    assert_eq!(place.metrics(), whole.metrics());
    let adapter = |w: &Workplace| std::fs::read(w.run("adapter.safetensors")).unwrap();
    assert!(adapter(&place) == adapter(&whole));
}
