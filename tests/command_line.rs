//! Exit codes and error output of the binary.

use std::process::{Command, Output, Stdio};

fn qwen_lora(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qwen-lora")).args(args).output().expect("the binary was built for this test")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn exit_codes_and_errors() {
    let help = qwen_lora(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    let version = qwen_lora(&["--version"]);
    assert_eq!(String::from_utf8_lossy(&version.stdout).trim(), concat!("qwen-lora ", env!("CARGO_PKG_VERSION")));

    for args in [&[][..], &["cofnig"], &["config"], &["config", "a.yaml", "--unknown"]] {
        let output = qwen_lora(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }

    let wrong = qwen_lora(&["config", "configs/smoke.yaml", "--set", "lora.rank=0"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert_eq!(
        stderr(&wrong),
        "error: wrong value for `lora.rank` in `--set lora.rank=0`\n  \
         expected a whole number from 1 to 3072, found 0\n"
    );
    assert!(wrong.stdout.is_empty());
}

#[test]
fn a_config_that_cannot_train_is_printed_and_refused() {
    let output = qwen_lora(&["config", "configs/anime.yaml", "--set", "device=cuda:7"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stdout).contains("pose_loss_weight: 0.8"));
    assert!(stderr(&output).contains("or use `device: cpu`"), "{}", stderr(&output));
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_qwen-lora"))
        .args(["config", "--reference"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
}

#[test]
fn a_training_run_goes_on_when_nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let output = format!("output={}", dir.path().join("run").display());
    let mut child = Command::new(env!("CARGO_BIN_EXE_qwen-lora"))
        .args(["train", "--config", "configs/smoke.yaml", "--set", &output])
        .args(["--set", "training.max_steps=2", "--set", "training.warmup_steps=0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(dir.path().join("run/adapter.safetensors").is_file());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_qwen-lora"))
        .args(["config", "configs/smoke.yaml"])
        .stdout(full)
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn pose_draws_what_it_sees_and_says_it_as_json() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let output = qwen_lora(&["pose", "examples/photos/astronaut.jpg", "--json", "--out", out]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((json["network"].as_str(), json["counted"].as_str()), (Some("posenet"), Some("limb ends")));
    let picture = &json["pictures"][0];
    assert_eq!(picture["counts"]["persons"], 1);
    let nose = &picture["persons"][0]["keypoints"]["nose"];
    assert!(nose["score"].as_f64().unwrap() > 0.9 && nose["y"].as_f64().unwrap() < 200.0, "{nose}");
    let drawn = image::open(folder.path().join("astronaut.pose.png")).unwrap().to_rgb8();
    assert!(drawn.width() == 512 && drawn.height() > 512, "a line of text above the picture");

    let wrong = qwen_lora(&["pose", "examples/photos/astronaut.jpg", "--network", "posnet", "--no-pictures"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("did you mean `posenet`?"), "{}", stderr(&wrong));
}

#[test]
fn the_benchmark_times_the_parts_of_a_step_and_the_self_test_passes_on_the_cpu() {
    let shape = "--layers 1 --heads 2 --head-dim 32 --axes 8,12,12 --joint-dim 32 --grid 4,4 --text 8 --rank 2";
    let bench = |more: &str| {
        let line = format!("bench {shape} --steps 2 --warmup 1 {more}");
        qwen_lora(&line.split_whitespace().collect::<Vec<_>>())
    };
    for more in ["--device cpu", "--device cpu --dtype bf16 --checkpointing full --composed"] {
        let output = bench(more);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key} in {report}"));
        let phases = report["phase_s"].as_object().unwrap();
        for phase in ["noising", "forward", "loss", "backward", "clipping", "optimizer"] {
            assert!(phases[phase].as_f64().unwrap() >= 0.0, "{phase}");
        }
        let sum: f64 = phases.values().map(|s| s.as_f64().unwrap()).sum();
        assert!(sum > 0.0 && sum <= 1.5 * number("step_s_max"), "{report}");
        assert!(number("model_tflops") > 0.0 && number("model_share") <= number("gemm_share"), "{report}");
        assert_eq!(report["device"], "cpu");
    }
    // A window of this model has two steps: the tables are made twice, and give the numbers of the weights.
    for dtype in ["f32", "int8"] {
        let report = |modulation: &str| -> serde_json::Value {
            let output = bench(&format!("--device cpu --dtype {dtype} --modulation {modulation}"));
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
            serde_json::from_slice(&output.stdout).unwrap()
        };
        let [resident, streamed] = ["resident", "streamed"].map(report);
        assert_eq!((&resident["modulation"], &streamed["modulation"]), (&"resident".into(), &"streamed".into()));
        for loss in ["loss_first", "loss_last"] {
            assert!(resident[loss].as_f64() == streamed[loss].as_f64(), "{resident} {streamed}");
        }
        assert!(streamed["forecast_mb"].as_f64() < resident["forecast_mb"].as_f64(), "{resident} {streamed}");
    }
    let four = shape.replace("--layers 1", "--layers 4");
    let report = |swapped: usize| -> serde_json::Value {
        let line = format!("bench {four} --steps 2 --warmup 1 --device cpu --blocks-to-swap {swapped}");
        let output = qwen_lora(&line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let [none, three] = [0, 3].map(report);
    assert_eq!(three["blocks_to_swap"], 3);
    assert!(none["loss_last"].as_f64() == three["loss_last"].as_f64(), "{none} {three}");
    let output = bench("--device cpu --blocks-to-swap 2");
    assert!(stderr(&output).contains("more than there are blocks"), "{}", stderr(&output));
    let output = bench("--device cpu --modulation streamed --targets modulation");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("`--modulation streamed` leaves out weights"), "{}", stderr(&output));
    let output = qwen_lora(&["kernels", "--device", "cpu"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("all within their limits"));
    assert!(stderr(&output).contains("composed ops are compared"), "{}", stderr(&output));
    #[cfg(not(feature = "cuda"))]
    {
        let output = bench("--device cuda:0");
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("--features cuda"), "{}", stderr(&output));
    }
}
