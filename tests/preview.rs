//! Previews and the report, as a run of the binary makes them.

use std::path::Path;
use std::process::{Command, Output};

/// Trains the smoke config for 6 steps into `dir/<name>`.
fn train(dir: &Path, name: &str, extra: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen-lora"));
    command.args(["train", "--config", "configs/smoke.yaml", "--threads", "1", "--set", "training.max_steps=6"]);
    command.args(["--set", "training.warmup_steps=1", "--set", "evaluation.every=3", "--set", "save.every=3"]);
    command.arg("--set").arg(format!("output={}", dir.join(name).display()));
    let output = command.args(extra).output().expect("the binary was built for this test");
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

const PREVIEW: [&str; 8] = [
    "--set",
    "preview.prompts=[a red circle, 一只<猫>]",
    "--set",
    "preview.seeds=[5]",
    "--set",
    "preview.steps=2",
    "--set",
    "preview.size=48x32",
];

fn previews<'a>(every: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&PREVIEW[..], &["--set", every], more].concat()
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn previews_show_base_and_adapter_and_leave_the_training_alone() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    train(dir, "with", &previews("preview.every=2", &[]));
    train(dir, "without", &[]);
    assert_eq!(bytes(&dir.join("with/adapter.safetensors")), bytes(&dir.join("without/adapter.safetensors")));
    let optimizer = "checkpoints/step-000006/optimizer.safetensors";
    assert_eq!(bytes(&dir.join("with").join(optimizer)), bytes(&dir.join("without").join(optimizer)));
    assert!(!dir.join("without/samples").exists());

    let samples = dir.join("with/samples");
    let open = |name: &str| image::open(samples.join(name)).unwrap_or_else(|e| panic!("{name}: {e}")).to_rgb8();
    for step in ["step-000002", "step-000004", "step-000006"] {
        for picture in ["1-5.png", "2-5.png"] {
            let (base, trained) = (open(&format!("base/{picture}")), open(&format!("{step}/{picture}")));
            assert_eq!((base.dimensions(), trained.dimensions()), ((48, 32), (48, 32)));
            assert_ne!(base, trained, "{step}/{picture}: the adapter does not show");
        }
        assert!(open(&format!("{step}.png")).width() > 2 * 48);
    }
    assert_ne!(open("step-000002/1-5.png"), open("step-000006/1-5.png"));

    // The base pictures are those of `generate`.
    let output = Command::new(env!("CARGO_BIN_EXE_qwen-lora"))
        .args(["generate", "--model", "synthetic:tiny", "--prompt", "a red circle", "--seed", "5", "--steps", "2"])
        .args(["--size", "48x32", "--threads", "1", "--quiet", "--output"])
        .arg(dir.join("base.png"))
        .status()
        .unwrap();
    assert!(output.success());
    assert_eq!(image::open(dir.join("base.png")).unwrap().to_rgb8(), open("base/1-5.png"));
    // So are those of the adapter, from the exported file.
    let lora = dir.join("with/adapter.safetensors");
    let output = Command::new(env!("CARGO_BIN_EXE_qwen-lora"))
        .args(["generate", "--model", "synthetic:tiny", "--prompt", "a red circle", "--seed", "5", "--steps", "2"])
        .args(["--size", "48x32", "--threads", "1", "--quiet", "--lora"])
        .arg(&lora)
        .arg("--output")
        .arg(dir.join("adapter.png"))
        .status()
        .unwrap();
    assert!(output.success());
    assert_eq!(image::open(dir.join("adapter.png")).unwrap().to_rgb8(), open("step-000006/1-5.png"));

    let page = String::from_utf8(bytes(&dir.join("with/report.html"))).unwrap();
    for word in ["id=\"loss\"", "id=\"held-out\"", "id=\"learning-rate\"", "id=\"speed\"", "一只&lt;猫&gt;", "rank: 8"]
    {
        assert!(page.contains(word), "{word}");
    }
    assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 8, "base and three steps for two prompts");
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("src=\"/"));
    let page = String::from_utf8(bytes(&dir.join("without/report.html"))).unwrap();
    assert!(page.contains("id=\"loss\"") && !page.contains("<img"));
}

#[test]
fn previews_may_be_turned_on_and_off_when_a_run_is_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    train(dir, "plain", &[]);
    train(dir, "run", &[]);
    // Back to step 3, with pictures of a later step that will never be.
    std::fs::remove_dir_all(dir.join("run/checkpoints/step-000006")).unwrap();
    std::fs::create_dir_all(dir.join("run/samples/step-000099")).unwrap();
    train(dir, "run", &previews("preview.every=5", &["--resume", "auto"]));
    assert_eq!(bytes(&dir.join("run/adapter.safetensors")), bytes(&dir.join("plain/adapter.safetensors")));
    let samples = dir.join("run/samples");
    assert!(samples.join("base/1-5.png").exists() && samples.join("step-000005.png").exists());
    assert!(!samples.join("step-000099").exists());
}

#[test]
fn a_preview_that_fails_is_a_note() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("run")).unwrap();
    std::fs::write(dir.join("run/samples"), "in the way").unwrap();
    let output = train(dir, "run", &previews("preview.every=3", &["--resume", "auto"]));
    let notes = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(notes.contains("note: no pictures of the base model"), "{notes}");
    assert!(notes.contains("note: no pictures after step 3"), "{notes}");
    assert!(dir.join("run/adapter.safetensors").is_file() && dir.join("run/report.html").is_file());
    train(dir, "plain", &[]);
    assert_eq!(bytes(&dir.join("run/adapter.safetensors")), bytes(&dir.join("plain/adapter.safetensors")));
}

#[test]
fn in_full_fine_tuning_the_base_is_the_model_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    train(dir, "full", &previews("preview.every=6", &["--set", "training.mode=full"]));
    train(dir, "lora", &previews("preview.every=6", &[]));
    let base = |run: &str| bytes(&dir.join(run).join("samples/base/1-5.png"));
    assert_eq!(base("full"), base("lora"));
    assert_ne!(bytes(&dir.join("full/samples/step-000006/1-5.png")), base("full"));
}
