//! A run that is killed or stopped and then resumed gives the bytes of one that was never interrupted.
#![cfg(unix)]

mod train_common;

use qwen_lora::io::safetensors::MappedFile;
use std::collections::BTreeMap;
use std::path::Path;
use train_common::{Workplace, files, snapshot, stderr, the_error};

/// What must be equal: the adapter, the last checkpoint, the metrics but for their times.
fn assert_same_run(one: &Workplace, other: &Workplace) {
    assert_eq!(one.metrics(), other.metrics());
    let last = |w: &Workplace| snapshot(&w.run("checkpoints/step-000024"));
    assert_eq!(files(&one.run("checkpoints/step-000024")).len(), 3);
    for (name, bytes) in last(one) {
        assert!(last(other)[&name] == bytes, "{} of the last checkpoint differs", name.display());
    }
    let adapter = |w: &Workplace| std::fs::read(w.run("adapter.safetensors")).unwrap();
    assert!(adapter(one) == adapter(other), "the exported adapters differ");
    let config = |w: &Workplace| std::fs::read_to_string(w.run("config.yaml")).unwrap();
    assert_eq!(config(one), config(other));
    for name in files(&other.run("")) {
        assert!(!name.file_name().unwrap().to_string_lossy().starts_with('.'), "{} was left over", name.display());
    }
}

fn uninterrupted(threads: &str) -> Workplace {
    let place = Workplace::new();
    place.train_ok(&["--threads", threads]);
    assert_eq!(place.steps_logged(), 24);
    place
}

/// Killed between two checkpoints, then during saves, again and again.
fn killed(threads: &str) {
    let place = Workplace::new();
    let mut run = place.spawn(&["--threads", threads]);
    assert!(run.wait_until(|| place.steps_logged() >= 6), "killed too late");
    run.kill();
    assert!(place.run("checkpoints/step-000004").exists());

    let saving = |folder: &Path| files(folder).iter().any(|f| f.to_string_lossy().contains(".part"));
    let mut kills = 0;
    while kills < 3 {
        let mut run = place.spawn(&["--threads", threads, "--resume", "auto", "--set", "save.every=1"]);
        if !run.wait_until(|| saving(&place.run("checkpoints"))) {
            break;
        }
        run.kill();
        kills += 1;
    }
    assert!(kills > 0, "no run was killed during a save");
    let output = place.train_ok(&["--threads", threads, "--resume", "auto"]);
    assert!(stderr(&output).contains("going on after step"), "{}", stderr(&output));
    assert_same_run(&uninterrupted(threads), &place);
}

#[test]
fn killed_and_resumed_is_uninterrupted_with_one_thread() {
    killed("1");
}

#[test]
fn killed_and_resumed_is_uninterrupted_with_two_threads() {
    killed("2");
}

/// Three stages that differ in every way: images, resolution, modules, noise levels, learning rate.
const STAGES: &str = "stages=[{name: all, until: 8}, {name: circles, until: 0.75, learning_rate: 0.5, resolution: 48, \
    sigma: [0.1, 0.7], target_modules: [qkv.visual], filter: {captions: ['a ']}}, {name: rest, target_modules: [mlp]}]";

#[test]
fn a_staged_run_resumes_in_the_right_stage_to_the_same_bytes() {
    let staged = ["--threads", "2", "--set", STAGES, "--set", "save.keep=0"];
    let whole = Workplace::new();
    let output = whole.train_ok(&staged);
    let place = Workplace::new();
    for logged in [5, 13] {
        let mut run = place.spawn(&[&staged[..], &["--resume", "auto", "--set", "save.every=1"]].concat());
        assert!(run.wait_until(|| place.steps_logged() >= logged), "killed too late");
        run.kill();
    }
    let resumed = place.train_ok(&[&staged[..], &["--resume", "auto"]].concat());
    let text = stderr(&resumed);
    assert!(text.contains("stage circles: steps 9 to 18, ") && !text.contains("stage all"), "{text}");
    assert_same_run(&whole, &place);

    let stages: Vec<_> = whole.metrics().iter().filter_map(|l| Some(l["stage"].as_str()?.to_string())).collect();
    let expected = [vec!["all"; 8], vec!["circles"; 10], vec!["rest"; 6]].concat();
    assert_eq!(stages, expected);
    let text = stderr(&output);
    for stage in ["all: steps 1 to 8, 6 images\n", "rest: steps 19 to 24, 6 images, 8 of 24 modules\n"] {
        assert!(text.contains(&format!("stage {stage}")), "{text}");
    }
    // The second stage trains its modules and leaves the others, and what the optimizer knows of them, as they were.
    let tensor = |step: u64, file: &str, name: &str| {
        let file = MappedFile::open(&whole.run(&format!("checkpoints/step-{step:06}/{file}.safetensors"))).unwrap();
        file.bytes(name).unwrap().to_vec()
    };
    let (mlp, to_q) =
        ("transformer_blocks.0.img_mlp.net.2.lora_B.weight", "transformer_blocks.0.attn.to_q.lora_B.weight");
    for (name, trained) in [(to_q, true), (mlp, false)] {
        assert_eq!(tensor(8, "adapter", name) != tensor(16, "adapter", name), trained, "{name}");
        let moment = format!("{name}.exp_avg");
        assert_eq!(tensor(8, "optimizer", &moment) != tensor(16, "optimizer", &moment), trained, "{name}");
    }
    let count = |name: &str| tensor(24, "optimizer", &format!("{name}.step"))[0];
    assert_eq!((count(to_q), count(mlp)), (18, 14), "steps that each has learned in");

    let page = std::fs::read_to_string(whole.run("report.html")).unwrap();
    assert!(
        page.contains("<h2>Stages</h2>") && page.matches("class=\"stage\"").count() >= 9,
        "no stages in the report"
    );
    assert!(
        page.contains("<tr><th>circles</th><td>steps 9 to 18, ") && page.contains("resolution 48, 6 of 24 modules")
    );
}

#[test]
fn one_stage_that_changes_nothing_is_the_run_without_stages() {
    let (plain, staged) = (Workplace::new(), Workplace::new());
    let short = ["--threads", "2", "--set", "training.max_steps=8"];
    plain.train_ok(&short);
    // A second one with the same images goes on in the same epoch.
    let stages = "stages=[{name: a, until: 3}, {name: b, sigma: [0, 1]}]";
    staged.train_ok(&[&short[..], &["--set", stages]].concat());
    for file in ["adapter.safetensors", "optimizer.safetensors"] {
        let bytes = |w: &Workplace| std::fs::read(w.run("checkpoints/step-000008").join(file)).unwrap();
        assert!(bytes(&plain) == bytes(&staged), "{file} differs");
    }
}

#[test]
fn ctrl_c_saves_exits_130_and_resumes_to_the_same_bytes() {
    let place = Workplace::new();
    let mut run = place.spawn(&["--threads", "2"]);
    assert!(run.wait_until(|| place.steps_logged() >= 5), "interrupted too late");
    run.signal(libc::SIGINT);
    let error = the_error(&run.output(), 130);
    let saved = *place.checkpoints().last().expect("a checkpoint");
    assert!(error.contains(&format!("stopped after step {saved} of 24; saved")), "{error}");
    assert!(error.contains("hint: continue with `--resume auto`"), "{error}");
    assert_eq!(place.steps_logged(), saved as usize);
    place.train_ok(&["--threads", "2", "--resume", "auto"]);
    assert_same_run(&uninterrupted("2"), &place);
}

/// Ctrl+C before the first step: what is cached stays, and as nothing has been trained the same command starts.
#[test]
fn ctrl_c_while_caching_leaves_no_run_behind() {
    let place = Workplace::new();
    let args = ["--set", "data.resolution=[256, 320]", "--set", "training.max_steps=4", "--set", "evaluation.every=0"];
    let args = [&args[..], &["--set", "training.gradient_accumulation=1", "--set", "training.batch_size=1"]].concat();
    let mut run = place.spawn(&args);
    // Nine captions, the empty one among them, then sixteen latents, one by one.
    let cached = || files(&place.path("runs/.cache")).iter().filter(|f| !f.to_string_lossy().starts_with('.')).count();
    assert!(run.wait_until(|| cached() > 10), "interrupted too late");
    run.signal(libc::SIGINT);
    let error = the_error(&run.output(), 130);
    assert!(error.contains("stopped while filling the caches\nhint: run it again"), "{error}");
    let output = place.train_ok(&args);
    assert!(!stderr(&output).contains("latents: 16 computed, 0 from the cache"), "{}", stderr(&output));
}

/// The terminal is closed while the run goes on (a lost connection): nobody reads what it prints.
#[test]
fn a_closed_terminal_is_no_end_of_the_run() {
    let place = Workplace::new();
    let mut child = place.trainer(&[]).spawn().unwrap();
    drop((child.stderr.take(), child.stdout.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(place.checkpoints().last(), Some(&24));
}

/// The header of a safetensors file as text.
fn header(file: &Path) -> String {
    let bytes = std::fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    String::from_utf8(bytes[8..8 + length].to_vec()).unwrap()
}

#[test]
fn the_adapter_file_does_not_tell_when_or_where_it_was_made() {
    let (one, other) = (Workplace::new(), Workplace::new());
    let short = ["--set", "training.max_steps=4", "--threads", "1"];
    one.train_ok(&[&short[..], &["--set", "output=a/b"]].concat());
    let elsewhere = other.path("else where");
    let elsewhere = elsewhere.to_str().unwrap();
    let (output, cache) = (format!("output={elsewhere}/run"), format!("data.cache_dir={elsewhere}/cache"));
    let images = format!("data.path={}", other.path("images").display());
    let device = "device=cpu";
    other.train_ok(&[&short[..], &["--set", &output, "--set", &cache, "--set", &images, "--set", device]].concat());
    let (one, other) = (one.path("a/b/adapter.safetensors"), other.path("else where/run/adapter.safetensors"));
    assert!(std::fs::read(&one).unwrap() == std::fs::read(&other).unwrap(), "the two adapter files differ");

    let text = header(&other);
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let user = std::env::var("USER").unwrap_or_default();
    let temporary = std::env::temp_dir().display().to_string();
    let words = [elsewhere, &temporary, host.trim(), "cache_dir", "output", "device", "step_s", "date", "hostname"];
    for word in words.into_iter().chain([user.as_str()]).filter(|w| w.len() > 4) {
        assert!(!text.contains(word), "`{word}` is in the header: {text}");
    }
    let metadata: BTreeMap<String, String> =
        serde_json::from_value(serde_json::from_str::<serde_json::Value>(&text).unwrap()["__metadata__"].clone())
            .unwrap();
    let places: Vec<usize> = metadata.keys().map(|key| text.find(&format!("\"{key}\":")).unwrap()).collect();
    assert!(places.is_sorted(), "the keys of the header are not sorted: {text}");
}
