//! The run directory: when a run starts, continues or is refused, and that a refusal changes nothing.

mod train_common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use train_common::{OUTPUT, Workplace, assert_says, stderr, stdout, the_error};

const SHORT: [&str; 4] = ["--set", "training.max_steps=8", "--set", "training.gradient_accumulation=1"];

fn with<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&SHORT[..], args].concat()
}

/// A run that was ended after its first checkpoint, at step 4 of 8.
fn unfinished() -> Workplace {
    let place = finished();
    std::fs::remove_dir_all(place.run("checkpoints/step-000008")).unwrap();
    place
}

fn finished() -> Workplace {
    let place = Workplace::new();
    place.train_ok(&SHORT);
    assert_eq!(place.checkpoints(), [4, 8]);
    place
}

/// Exit code 2, one error, and the run directory as it was; the error.
fn refused(place: &Workplace, args: &[&str]) -> String {
    let before = place.snapshot();
    let error = the_error(&place.train(&with(args)), 2);
    assert_unchanged(&before, place);
    error
}

fn assert_unchanged(before: &BTreeMap<PathBuf, Vec<u8>>, place: &Workplace) {
    let after = place.snapshot();
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    for (name, bytes) in before {
        assert!(bytes == &after[name], "{} was changed", name.display());
    }
}

#[test]
fn an_absent_or_empty_folder_starts_a_run_with_and_without_resume() {
    for (resume, make) in [(&[][..], false), (&["--resume", "auto"][..], false), (&[][..], true)] {
        let place = Workplace::new();
        if make {
            std::fs::create_dir_all(place.path(OUTPUT)).unwrap();
        }
        // Without `output` in the config it is runs/<name of the config file>, from the current folder.
        let output = place.train_ok(&with(resume));
        assert_says(&stdout(&output), &["done: 8 steps", "runs/recipe/adapter.safetensors (24 modules", "\nnext: "]);
        assert_eq!((place.steps_logged(), place.checkpoints()), (8, vec![4, 8]));
        let names: Vec<_> = place.snapshot().into_keys().filter(|n| !n.starts_with("checkpoints")).collect();
        assert_eq!(names, ["adapter.safetensors", "config.yaml", "metrics.jsonl", "report.html"].map(PathBuf::from));
    }
}

#[test]
fn an_unfinished_run_is_refused_or_continued() {
    let place = unfinished();
    let error = refused(&place, &[]);
    assert_says(&error, &["there is a run in `runs/recipe`", "last checkpoint is at step 4 of 8", "`--resume auto`"]);

    let output = place.train_ok(&with(&["--resume", "auto"]));
    assert_says(&stderr(&output), &["going on after step 4"]);
    // The lines of steps 5 to 8 were there already: they are cut, not doubled.
    assert_eq!(place.metrics(), finished().metrics());
    assert_eq!(place.checkpoints(), [4, 8]);
}

#[test]
fn a_run_without_checkpoint_is_refused_or_started_again() {
    let place = finished();
    std::fs::remove_dir_all(place.run("checkpoints")).unwrap();
    assert_says(&refused(&place, &[]), &["there is a run in `runs/recipe`", "no whole checkpoint", "`--resume auto`"]);
    let error = refused(&place, &["--resume", "auto", "--set", "lora.rank=8"]);
    assert_says(&error, &["has another config", "lora.rank: 4 -> 8"]);
    place.train_ok(&with(&["--resume", "auto"]));
    // The measurement before the first step stands there once.
    assert_eq!(place.metrics(), finished().metrics());
}

#[test]
fn a_finished_run_is_refused_or_left_alone() {
    let place = finished();
    let error = refused(&place, &[]);
    assert_says(&error, &["there is a finished run in `runs/recipe`", "another `output`"]);
    assert!(!error.contains("--resume"), "there is nothing to continue: {error}");
    let before = place.snapshot();
    let output = place.train_ok(&with(&["--resume", "auto"]));
    assert_says(
        &stdout(&output),
        &["the run in `runs/recipe` is finished: 8 steps", "runs/recipe/adapter.safetensors"],
    );
    assert_unchanged(&before, &place);
    let output = place.train_ok(&with(&["--resume", "auto", "--json"]));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&json["outcome"], &json["steps"]), (&"already finished".into(), &8.into()));
}

#[test]
fn another_config_is_refused_with_the_differences() {
    let changes = [
        "--set",
        "training.learning_rate=1e-3",
        "--set",
        "lora.rank=8",
        "--set",
        "data.resolution=64",
        "--set",
        "seed=8",
    ];
    for place in [unfinished(), finished()] {
        refused(&place, &changes);
        let error = refused(&place, &[&changes[..], &["--resume", "auto"]].concat());
        assert_says(&error, &["has another config", "seed: 7 -> 8", "lora.rank: 4 -> 8", "training.learning_rate: "]);
        assert_says(&error, &["data.resolution: [48, 64] -> 64"]);
    }
    // More steps are another course of the learning rate, even for a finished run.
    let place = finished();
    let longer = ["--resume", "auto", "--set", "training.max_steps=12"];
    assert_says(&refused(&place, &longer), &["training.max_steps: 8 -> 12"]);
}

#[test]
fn what_does_not_reach_the_weights_may_change() {
    let place = unfinished();
    let changes =
        ["--set", "save.every=1", "--set", "save.keep=0", "--set", "evaluation.every=0", "--set", "data.prefetch=5"];
    place.train_ok(&with(&[&changes[..], &["--resume", "auto"]].concat()));
    assert_eq!(place.checkpoints(), [4, 5, 6, 7, 8]);
    assert!(std::fs::read_to_string(place.run("config.yaml")).unwrap().contains("prefetch: 5"));
}

#[test]
fn another_dataset_is_refused() {
    for place in [unfinished(), finished()] {
        let caption = place.path("images/01-red-circle.txt");
        let before = std::fs::read(&caption).unwrap();
        std::fs::write(&caption, "something else").unwrap();
        refused(&place, &[]);
        let error = refused(&place, &["--resume", "auto"]);
        assert_says(
            &error,
            &["the run in `runs/recipe` has another dataset", "images or captions", "another `output`"],
        );
        std::fs::write(&caption, before).unwrap();
        place.train_ok(&with(&["--resume", "auto"]));
    }
}

#[test]
fn another_base_model_is_refused() {
    let place = unfinished();
    let make = ["synth", "--preset", "tiny", "--out", "models/tiny", "--seed", "5"];
    assert!(place.command(&make).status().unwrap().success());
    let error = refused(&place, &["--resume", "auto", "--set", "model=models/tiny"]);
    assert_says(&error, &["has another config", "model.path: synthetic:tiny -> "]);
    // A folder of the same name with other weights in it.
    let place = Workplace::new();
    assert!(place.command(&make).status().unwrap().success());
    place.train_ok(&with(&["--set", "model=models/tiny"]));
    std::fs::remove_dir_all(place.path("models/tiny")).unwrap();
    assert!(place.command(&[&make[..6], &["6"]].concat()).status().unwrap().success());
    let error = refused(&place, &["--resume", "auto", "--set", "model=models/tiny"]);
    assert_says(&error, &["has another base model"]);
}

#[test]
fn a_damaged_newest_checkpoint_gives_way_to_the_one_before() {
    let whole = finished();
    let damages = [
        ("adapter.safetensors", true),
        ("adapter.safetensors", false),
        ("optimizer.safetensors", false),
        ("state.json", false),
    ];
    for (file, cut) in damages {
        let place = Workplace::new();
        place.train_ok(&with(&["--set", "save.every=2", "--set", "save.keep=0"]));
        std::fs::remove_dir_all(place.run("checkpoints/step-000008")).unwrap();
        let damaged = place.run("checkpoints/step-000006").join(file);
        let mut bytes = std::fs::read(&damaged).unwrap();
        match cut {
            true => bytes.truncate(bytes.len() / 2),
            // A digit of the state, or a number of the tensors: what is read would be sound and wrong.
            false => {
                let at = match file {
                    "state.json" => bytes.windows(9).position(|w| w == b"\"step\": 6").unwrap() + 8,
                    _ => bytes.len() - 3,
                };
                bytes[at] ^= 1;
            }
        }
        std::fs::write(&damaged, &bytes).unwrap();
        let output = place.train_ok(&with(&["--resume", "auto", "--set", "save.keep=0"]));
        assert_says(
            &stderr(&output),
            &["note: a newer checkpoint is damaged and not used", file, "going on after step 4"],
        );
        assert_eq!(place.metrics(), whole.metrics());
        let adapter = |w: &Workplace| std::fs::read(w.run("checkpoints/step-000008/adapter.safetensors")).unwrap();
        assert!(adapter(&place) == adapter(&whole));
    }
}

#[test]
fn without_any_whole_checkpoint_the_damage_is_named() {
    let place = unfinished();
    std::fs::write(place.run("checkpoints/step-000004/optimizer.safetensors"), "").unwrap();
    let error = refused(&place, &["--resume", "auto"]);
    assert_says(
        &error,
        &[
            "no checkpoint in `runs/recipe/checkpoints` is whole\n  ",
            "step-000004/optimizer.safetensors` is damaged: its checksum is not",
            "hint: put",
        ],
    );
}

#[test]
fn the_newest_checkpoints_stay() {
    for (keep, expected) in [("1", vec![8]), ("3", vec![4, 6, 8]), ("0", vec![2, 4, 6, 8])] {
        let place = Workplace::new();
        place.train_ok(&with(&["--set", "save.every=2", "--set", &format!("save.keep={keep}")]));
        assert_eq!(place.checkpoints(), expected);
    }
    // The last step always writes one.
    let place = Workplace::new();
    place.train_ok(&with(&["--set", "save.every=0"]));
    assert_eq!(place.checkpoints(), [8]);
}

#[test]
fn a_folder_of_something_else_is_not_called_a_run() {
    let place = Workplace::new();
    std::fs::create_dir_all(place.path(OUTPUT)).unwrap();
    std::fs::write(place.run("letter.odt"), "dear").unwrap();
    assert_says(&refused(&place, &[]), &["`runs/recipe` is not empty and holds no run", "another `output`"]);
    let place = Workplace::new();
    std::fs::create_dir_all(place.path("runs")).unwrap();
    std::fs::write(place.path(OUTPUT), "a file").unwrap();
    assert_says(&the_error(&place.train(&SHORT), 2), &["`runs/recipe"]);
}

#[test]
fn a_dry_run_reports_and_writes_nothing() {
    let place = Workplace::new();
    let output = place.train_ok(&["--dry-run"]);
    let text = stdout(&output);
    assert_says(&text, &["images      8 with 8 different captions", "4 held out", "24 steps, 6.0 epochs"]);
    assert_says(&text, &["in 24 modules", "memory      ", " weights ", "dry run: nothing was written"]);
    assert!(!place.path("runs").exists());
    let json = place.train_ok(&["--dry-run", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&json["outcome"], &json["found"]["images"]), (&"dry run".into(), &8.into()));
    assert!(!place.path("runs").exists());

    let fits = place.train_ok(&["--dry-run", "--memory", "24GB"]);
    assert_says(
        &stdout(&fits),
        &["in 21.6 GB", "nine tenths", "fits           f32   f32    none           resident    "],
    );
    assert_says(&stdout(&fits), &["runs        in bf16"]);
    let json = place.train_ok(&["--dry-run", "--memory", "1.5MB", "--set", "device=cpu", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let (memory, budget) = (&json["found"]["memory_bytes"], &json["found"]["budget"]);
    // A parameter of the tiny model is an f32; the recipe checkpoints fully.
    assert_eq!(memory["weights"].as_u64(), json["found"]["base_params"].as_u64().map(|n| 4 * n));
    let choices = budget["choices"].as_array().unwrap();
    let ways = |c: &serde_json::Value| {
        ["base", "dtype", "checkpointing", "modulation"].map(|way| c[way].as_str().unwrap().to_string())
    };
    let full = choices.iter().find(|c| ways(c) == ["f32", "f32", "full", "resident"]).unwrap();
    assert_eq!(full["total_bytes"], memory["total"]);
    assert_eq!(json["found"]["base"], "f32");
    assert_eq!((&budget["available_bytes"], choices.len()), (&1_350_000.into(), 24));
    assert!(choices.iter().all(|c| c["fits"] == (c["total_bytes"].as_u64() <= Some(1_350_000))));
}

/// Counted are 3.6, 3.3 and 3.0 MB with checkpointing none, selective and full; the process itself takes more than that.
#[test]
fn a_run_that_may_take_so_much_memory_chooses_what_fits_and_stops_when_it_takes_more() {
    let place = Workplace::new();
    let nothing = the_error(&place.train(&with(&["--set", "training.memory=1.5MB"])), 2);
    assert_says(
        &nothing,
        &["a training step does not fit into the 1.5 MB of `training.memory`", "too large      f32   f32    full"],
    );
    assert_says(&nothing, &["hint: a smaller `data.resolution`"]);
    assert!(!place.path("runs").exists());
    let resident = ["--set", "training.memory=3.4MB", "--set", "model.modulation=resident"];
    let floats = ["--set", "model.dtype=f32"];
    let keys =
        [&floats[..], &resident, &["--set", "training.dtype=f32", "--set", "training.checkpointing=none"]].concat();
    let error = the_error(&place.train(&with(&keys)), 2);
    assert_says(
        &error,
        &["hint: `--set training.dtype=f32 --set training.checkpointing=none --set model.modulation=streamed` fits"],
    );

    // bf16 would fit with checkpointing none, but f32 comes first.
    let output = place.train(&with(&resident));
    let error = the_error(&output, 1);
    assert_says(&stderr(&output), &["within the 3.4 MB that the run may take: f32, checkpointing selective"]);
    assert_says(&error, &["stopped after step 1: the run took more memory", "at most 3.4 MB", "checkpointing=full"]);
    assert_eq!((place.steps_logged(), place.checkpoints()), (1, vec![1]));
    let config = std::fs::read_to_string(place.run("config.yaml")).unwrap();
    assert_says(&config, &["checkpointing: selective", "memory: 3400000B", "dtype: auto"]);

    // What was chosen stays; free memory is enough for all of it.
    let output = place.train_ok(&with(&["--resume", "auto", "--set", "training.memory=auto"]));
    assert_says(&stderr(&output), &["going on after step 1", "that the run may take: f32, checkpointing selective"]);
    let raw = |w: &Workplace| std::fs::read(w.run("checkpoints/step-000008/adapter.safetensors")).unwrap();
    assert!(raw(&place) == raw(&finished()), "the limit reached the weights");
}

/// Counted are 2.6 MB and more in f32, about 2.2 MB with weights in int8.
#[test]
fn int8_weights_are_chosen_where_no_floats_fit_and_stay_when_the_run_goes_on() {
    let place = Workplace::new();
    let f32s = ["--set", "training.dtype=f32"];
    let small = [&f32s[..], &["--set", "training.memory=2.4MB"]].concat();
    let stopped = place.train(&with(&small));
    assert_says(&stderr(&stopped), &["that the run may take: f32 with weights in int8, checkpointing "]);
    assert_says(&the_error(&stopped, 1), &["stopped after step 1"]);
    let config = std::fs::read_to_string(place.run("config.yaml")).unwrap();
    assert_says(&config, &["  dtype: int8", "  dtype: f32"]);
    // There is room for floats now.
    let output = place.train_ok(&with(&[&f32s[..], &["--resume", "auto", "--set", "training.memory=auto"]].concat()));
    assert_says(&stderr(&output), &["going on after step 1", "that the run may take: f32 with weights in int8"]);
    let named = Workplace::new();
    named.train_ok(&with(&[&f32s[..], &["--set", "model.dtype=int8"]].concat()));
    let raw = |w: &Workplace| std::fs::read(w.run("checkpoints/step-000008/adapter.safetensors")).unwrap();
    assert!(raw(&place) == raw(&named));
    assert!(raw(&place) != raw(&finished()), "floats were trained on");

    // A run that began with floats is not told to take other weights, a new one is.
    let begun = refused(&unfinished(), &["--resume", "auto", "--set", "training.memory=2.4MB"]);
    assert_says(&begun, &["a training step does not fit into the 2.4 MB", "hint: a smaller `data.resolution`"]);
    let kept = ["--set", "model.dtype=f32", "--set", "training.memory=1.75MB"];
    let fits = "hint: `--set model.dtype=int8 --set training.dtype=bf16 --set training.checkpointing=full \
                --set model.modulation=resident` fits";
    assert_says(&refused(&Workplace::new(), &kept), &["fits           int8  bf16   full", fits]);
}

/// A window of the tiny model has two batches: the weights are read again and again, between them for the held-out loss.
#[test]
fn modulation_that_is_streamed_from_the_disk_changes_no_bit() {
    let place = Workplace::new();
    let preview = ["--set", "preview={every: 4, prompts: [a cat], steps: 2, size: 32x32}"];
    let streamed = place.train_ok(&with(&[&preview[..], &["--set", "model.modulation=streamed"]].concat()));
    assert_says(&stderr(&streamed), &[" modulation "]);
    let plain = Workplace::new();
    plain.train_ok(&with(&preview));
    assert_eq!(place.metrics(), plain.metrics());
    let (ours, theirs) = (place.snapshot(), plain.snapshot());
    for name in ["adapter.safetensors", "checkpoints/step-000008/optimizer.safetensors", "samples/step-000008/1-0.png"]
    {
        assert!(ours[&PathBuf::from(name)] == theirs[&PathBuf::from(name)], "{name} differs");
    }

    let place = Workplace::new();
    let adapted = ["--set", "model.modulation=streamed", "--set", "lora.target_modules=[qkv, modulation.text]"];
    let error = the_error(&place.train(&with(&adapted)), 2);
    assert_says(&error, &["`model.modulation: streamed` leaves weights on the disk that this run trains"]);
}

#[test]
fn images_that_are_left_out_are_named_with_the_reason_and_stay_where_they_are() {
    let place = Workplace::new();
    let drawings = place.path("images");
    let small = image::RgbImage::from_pixel(40, 90, image::Rgb([9, 9, 9]));
    std::fs::create_dir(drawings.join("b")).unwrap();
    small.save(drawings.join("b/small.png")).unwrap();
    std::fs::write(drawings.join("b/small.txt"), "something small").unwrap();
    let before = train_common::snapshot(&drawings);
    let output = place.train_ok(&with(&["--set", "data.filter.min_size=48"]));
    assert_says(&stderr(&output), &["note: `data.filter.min_size` leaves out 1 image: b/small.png"]);
    let filtered = std::fs::read_to_string(place.run("filtered.jsonl")).unwrap();
    assert_eq!(
        filtered,
        "{\"path\":\"b/small.png\",\"rule\":\"min_size\",\"limit\":48,\"found\":40,\
         \"reason\":\"it has 40x90 pixels; both sides must have 48 or more\"}\n"
    );
    assert_eq!(before, train_common::snapshot(&drawings));
    // What is left out is as if it were not there.
    let adapter = |w: &Workplace| std::fs::read(w.run("checkpoints/step-000008/adapter.safetensors")).unwrap();
    assert!(adapter(&place) == adapter(&finished()));

    let place = Workplace::new();
    let error = refused(&place, &["--set", "data.filter.min_size=5000"]);
    assert_says(&error, &["`data.filter` leaves out all of the 8 images", "01-red-circle.png: it has ", "hint: "]);
}
