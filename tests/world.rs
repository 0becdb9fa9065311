//! The drawn world as a user meets it: pictures, scores, and a built-in model that learns a character.

use std::path::Path;
use std::process::Command;

/// Standard output of a successful run in `dir`.
fn run(dir: &Path, args: &[&str]) -> String {
    let program = Command::new(env!("CARGO_BIN_EXE_qwen-lora")).args(args).current_dir(dir).output();
    let output = program.expect("the binary was built for this test");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

fn bytes(dir: &tempfile::TempDir, name: &str) -> Vec<u8> {
    std::fs::read(dir.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[test]
fn world_score_keeps_what_it_checked() {
    let dir = tempfile::tempdir().unwrap();
    let world = |args: &[&str]| run(dir.path(), &[&["world"], args].concat());

    let model = ["score", "--model", "synthetic:tiny", "--steps", "1", "--guidance", "1", "--device", "cpu", "--quiet"];
    let rest = ["--split", "held-out", "--count", "6", "--out", "made", "--sheet", "sheet.png", "--json"];
    let mut score = json(&world(&[&model[..], &rest].concat()));
    assert_eq!(score["pictures"], 6);
    let distance = score.as_object_mut().and_then(|score| score.remove("distance")).unwrap();
    assert!(distance["to_drawn"].as_f64() > distance["of_drawn_to_drawn"].as_f64(), "{distance}");
    // Random weights draw nothing of what is asked for.
    assert_eq!(score["shares"]["all attributes"]["hits"], 0);
    assert_eq!(json(&world(&["check", "made", "--json"])), score);
    assert_eq!(image::open(dir.path().join("sheet.png")).unwrap().to_rgb8().len(), 10 * 132 * 132 * 3);
    let asked: Vec<_> = world(&["prompts", "--split", "held-out", "--count", "6"]).lines().map(json).collect();
    let index = String::from_utf8(bytes(&dir, "made/index.jsonl")).unwrap();
    for (asked, made) in asked.iter().zip(index.lines().map(json)) {
        assert_eq!([&asked["prompt"], &asked["scene"]], [&made["caption"], &made["scene"]]);
    }

    // Drawn pictures are what they say, and the same whenever they are drawn.
    for out in ["a", "b"] {
        world(&["draw", "--out", out, "--count", "40", "--seed", "3", "--trigger", "kubo"]);
    }
    assert_eq!(bytes(&dir, "a/index.jsonl"), bytes(&dir, "b/index.jsonl"));
    assert_eq!(bytes(&dir, "a/000039.png"), bytes(&dir, "b/000039.png"));
    assert!(String::from_utf8(bytes(&dir, "a/000000.txt")).unwrap().starts_with("kubo, "));
    let drawn = json(&world(&["check", "a", "--json"]));
    assert_eq!(drawn["shares"]["all attributes"]["hits"], 40);
}

#[test]
fn world_score_wants_prompts_and_a_batch() {
    for flag in ["--count", "--batch-size"] {
        let program = Command::new(env!("CARGO_BIN_EXE_qwen-lora"))
            .args(["world", "score", "--model", "synthetic:tiny", flag, "0"])
            .output()
            .expect("the binary was built for this test");
        let message = String::from_utf8_lossy(&program.stderr).into_owned();
        assert_eq!(program.status.code(), Some(2), "{message}");
        assert!(message.contains(&format!("`{flag}` is 0")), "{message}");
    }
}

/// `configs/demo.yaml` in short: the figure that the trigger calls puts on its hat, and others change less.
#[test]
fn the_built_in_world_learns_a_character() {
    let dir = tempfile::tempdir().unwrap();
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (config, images) = (package.join("configs/demo.yaml"), package.join("examples/hats"));
    let data = format!("data.path={}", images.display());
    let short = ["training.max_steps=150", "preview.every=0", "evaluation.every=0", "save.every=150", "output=run"];
    let set = short.iter().copied().chain([data.as_str()]).flat_map(|setting| ["--set", setting]);
    let train: Vec<&str> = ["train", "--quiet", "--config", config.to_str().unwrap()].into_iter().chain(set).collect();
    run(dir.path(), &train);

    let hat = |args: &[&str]| {
        let fixed = ["world", "score", "--model", "synthetic:world", "--split", "held-out", "--kind", "figures"];
        let small = ["--count", "16", "--steps", "10", "--quiet", "--json"];
        json(&run(dir.path(), &[&fixed[..], &small, args].concat()))["styles"]["hat"].as_f64().unwrap()
    };
    let adapter = ["--lora", "run/adapter.safetensors"];
    let (before, with, without) =
        (hat(&["--trigger", "kubo"]), hat(&[&adapter[..], &["--trigger", "kubo"]].concat()), hat(&adapter));
    assert!(with > before + 0.3, "hat with the trigger: {before} before, {with} after");
    assert!(without < with, "hat without the trigger: {without}, with it {with}");
}
