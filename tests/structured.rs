//! Runs with the structured loss: what it adds, that it is off where it is off, that it resumes to the same bytes.

mod train_common;

use candle_core::{Device, Tensor};
use qwen_lora::io::safetensors::{RawTensor, write};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::Path;
use train_common::{Workplace, assert_says, snapshot, stderr};

/// A pose network that sees someone in any picture: brightness and darkness, at a quarter of the size. What a random
/// autoencoder decodes shows nobody to a real one.
fn write_network(path: &Path, bias: f32) {
    let taps = |sign: f32| vec![sign * 0.4; 3 * 9];
    let weight: Vec<f32> = [taps(1.0), taps(-1.0)].concat();
    let tensor = |name: &str, values: &[f32], shape: &[usize]| {
        RawTensor::from_tensor(name, &Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
    };
    let tensors = vec![tensor("layers.0.weight", &weight, &[2, 3, 3, 3]), tensor("layers.0.bias", &[bias, bias], &[2])];
    let json = r#"{"kind": "heatmap", "stride": 4, "keypoints": ["head", "left_hand"],
        "layers": [{"name": "layers.0", "stride": 4, "kernel": 3, "relu": false}]}"#;
    write(path, tensors, &BTreeMap::from([("pose_network".to_string(), json.to_string())])).unwrap();
}

/// The recipe with the structured loss on that network, at noise levels where it acts.
fn workplace(bias: f32) -> Workplace {
    let place = Workplace::new();
    write_network(&place.path("net.safetensors"), bias);
    place
}

const ON: [&str; 8] = [
    "--set",
    "data.pose_loss_weight=0.8",
    "--set",
    "pose=net.safetensors",
    "--set",
    "training.max_steps=8",
    "--set",
    "loss.crop=48",
];

fn steps(place: &Workplace) -> Vec<Json> {
    place.metrics().into_iter().filter(|line| line.get("loss").is_some()).collect()
}

fn adapter(place: &Workplace) -> BTreeMap<String, Vec<u8>> {
    let file = qwen_lora::io::safetensors::MappedFile::open(&place.run("adapter.safetensors")).unwrap();
    file.names().into_iter().map(|n| (n.clone(), file.bytes(&n).unwrap().to_vec())).collect()
}

#[test]
fn terms_act_are_logged_and_resume_to_the_same_bytes() {
    let whole = workplace(1.0);
    let output = whole.train_ok(&ON);
    let said = stderr(&output);
    assert_says(&said, &["pose maps: ", "finds someone in ", "counted: hands"]);
    let lines = steps(&whole);
    let fired: u64 = lines.iter().map(|l| l["structured"]["fired"].as_u64().unwrap()).sum();
    let samples: u64 = lines.iter().map(|l| l["samples"].as_u64().unwrap()).sum();
    assert!(fired > 0 && fired < samples, "{fired} of {samples}");
    for line in &lines {
        let terms = &line["structured"];
        if terms["fired"] == 0 {
            assert!(terms.get("pose").is_none() && terms["added"] == 0.0, "{line}");
            continue;
        }
        for key in ["pose", "count", "reconstruction", "gate", "grad_norm_reconstruction", "grad_norm_structured"] {
            let value = terms[key].as_f64().unwrap();
            assert!(value.is_finite() && value >= 0.0, "{key}: {line}");
        }
        assert!(terms["pose"].as_f64().unwrap() > 0.0 && terms["grad_norm_structured"].as_f64().unwrap() > 0.0);
        // Pose and count have 0.8 * 0.3 of what a sample's reconstruction weighs, as far as the gate is open.
        let added = terms["added"].as_f64().unwrap();
        assert!(added > 0.0 && added < 3.0 * terms["reconstruction"].as_f64().unwrap(), "{line}");
    }
    let page = std::fs::read_to_string(whole.run("report.html")).unwrap();
    assert!(page.contains("Pose term") && page.contains("Count term") && page.contains("% of the samples"));

    // The running means are part of the checkpoint: a run that stops after step 4 goes on as if it had not.
    let cut = workplace(1.0);
    let mut run = cut.spawn(&[&ON[..], &["--set", "save.every=1"]].concat());
    assert!(run.wait_until(|| cut.steps_logged() >= 4), "killed too late");
    run.kill();
    cut.train_ok(&[&ON[..], &["--resume", "auto"]].concat());
    assert_eq!(steps(&whole), steps(&cut));
    assert!(adapter(&whole) == adapter(&cut), "the resumed adapter differs");
    let last = |w: &Workplace| snapshot(&w.run("checkpoints/step-000008"));
    assert!(last(&whole) == last(&cut), "the last checkpoints differ");

    // Another network under the same name is another run.
    write_network(&cut.path("net.safetensors"), 1.5);
    std::fs::remove_dir_all(cut.run("checkpoints/step-000008")).unwrap();
    let refused = cut.train(&[&ON[..], &["--resume", "auto"]].concat());
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    assert_says(&stderr(&refused), &["the run was trained with another pose network"]);
}

/// Four ways to a structured loss that never acts: each gives the plain run's adapter and losses, bit for bit.
#[test]
fn where_it_does_not_act_the_run_is_the_plain_one() {
    let plain = workplace(1.0);
    plain.train_ok(&["--set", "training.max_steps=8"]);
    assert!(plain.metrics().iter().all(|line| line.get("structured").is_none()));
    let shut = ["--set", "loss.gate={from: 1, to: 1, taper: 0}"];
    let zero = ["--set", "loss.weights={reconstruction: 0.5, pose: 0, count: 0}"];
    for (what, bias, extra) in
        [("shut gate", 1.0, shut), ("no weight", 1.0, zero), ("nobody there", -20.0, ["--set", "seed=7"])]
    {
        let place = workplace(bias);
        let output = place.train_ok(&[&ON[..], &extra].concat());
        let said = stderr(&output);
        match what {
            "nobody there" => assert_says(&said, &["finds nobody in any of the", "the run is a plain one"]),
            _ => assert!(!said.contains("finds nobody"), "{said}"),
        }
        let strip = |place: &Workplace| -> Vec<Json> {
            let mut lines = place.metrics();
            lines.iter_mut().for_each(|l| drop(l.as_object_mut().unwrap().remove("structured")));
            lines
        };
        assert_eq!(strip(&plain), strip(&place), "{what}");
        assert!(adapter(&plain) == adapter(&place), "{what}: the adapter differs");
    }
}

/// The file as it is handed out, but for the model, the network and the sizes.
#[test]
fn the_anime_recipe_runs_whole_and_a_stage_can_leave_the_terms_out() {
    let run = |sets: &[&str]| {
        let place = workplace(1.0);
        std::fs::copy(train_common::package().join("configs/anime.yaml"), place.path("anime.yaml")).unwrap();
        let small = [
            "model=synthetic:tiny",
            "output=runs/recipe",
            "data.path=images",
            "data.resolution=64",
            "training.batch_size=2",
            "training.max_steps=10",
            "training.warmup_steps=2",
            "training.learning_rate=1e-3",
            "evaluation.every=0",
            "pose=net.safetensors",
            "loss.crop=48",
        ];
        let sets = small.iter().chain(sets).flat_map(|set| ["--set", set]);
        let args: Vec<&str> = ["train", "--config", "anime.yaml"].into_iter().chain(sets).collect();
        let output = place.command(&args).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        (steps(&place), stderr(&output))
    };
    let fired = |line: &Json| line["structured"]["fired"].as_u64().unwrap();
    let losses = |lines: &[Json]| lines.iter().map(|line| line["loss"].as_f64().unwrap()).collect::<Vec<_>>();

    let (lines, said) = run(&[]);
    let stages: Vec<&str> = lines.iter().map(|line| line["stage"].as_str().unwrap()).collect();
    assert_eq!(stages, [vec!["global"; 4], vec!["limbs"; 3], vec!["hands"; 3]].concat());
    assert!(lines.iter().map(fired).sum::<u64>() > 0);
    assert_says(&said, &["stage limbs: steps 5 to 7, ", "hands x 6", "persons were found in "]);

    let low = ["flow.sigma_min=0.1", "flow.sigma_max=0.5"];
    let without = "stages=[{name: a, until: 6, loss: {pose: 0, count: 0}}, {name: b, loss: {count: 0}}]";
    let (lines, said) = run(&[&low[..], &[without]].concat());
    assert!(lines[..6].iter().all(|l| fired(l) == 0) && lines[6..].iter().any(|l| fired(l) > 0), "{lines:?}");
    assert_says(&said, &["stage a: steps 1 to 6, 8 images, loss 0.7 reconstruction + 0 pose + 0 count"]);
    let (plain, _) = run(&[&low[..], &["stages=[]", "data.pose_loss_weight=0"]].concat());
    assert_eq!(losses(&lines)[..6], losses(&plain)[..6], "a stage without the terms is trained as without them");
    assert_ne!(losses(&lines)[6..], losses(&plain)[6..]);
}
