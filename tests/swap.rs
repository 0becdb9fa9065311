//! Blocks that wait in host memory compute what they compute on the device, bit for bit: here on the CPU, where the copies
//! are made on the spot.

mod model_common;
mod train_common;

use candle_core::{DType, Device};
use model_common::{adapter, randn, small_transformer, values};
use qwen_lora::config::BaseDtype;
use qwen_lora::kernels::route::composed_only;
use qwen_lora::model::transformer::{Checkpointing, Placement, Precision, QwenImageTransformer};
use qwen_lora::train::step::{NoisyBatch, evaluate, forward_backward};
use qwen_lora::train::trainable::Trainable;
use std::path::PathBuf;
use train_common::{Workplace, assert_says, stderr, stdout, the_error};

const BLOCKS: usize = 5;
const CHECKPOINTING: [Checkpointing; 3] = [Checkpointing::None, Checkpointing::Selective, Checkpointing::Full];

fn batch(i: u64) -> NoisyBatch {
    let (latents, noise, text) =
        (randn(3 * i, &[2, 15, 64]), randn(3 * i + 1, &[2, 15, 64]), randn(3 * i + 2, &[2, 6, 20]));
    let sigmas = vec![0.2 + 0.1 * i as f32, 0.7];
    NoisyBatch::mix(&latents, &noise, text, vec![4, 6], sigmas, vec![1.0; 2], vec![(1, 3, 5)]).unwrap()
}

/// A network with an adapter whose B is not zero, and the number of its weights that are on the device as floats.
fn network(precision: Precision, placement: Placement, targets: &[&str]) -> (QwenImageTransformer, Trainable, usize) {
    let config = small_transformer(BLOCKS);
    let mut model = QwenImageTransformer::random_placed(config.clone(), 1, precision, &Device::Cpu, placement).unwrap();
    let floats = model.parameters().len();
    let trainable = Trainable::attach(&mut model, &adapter(&config, targets)).unwrap();
    (model, trainable, floats)
}

/// Losses and gradients of two steps and the loss of a measurement between them.
fn run(
    (model, trainable, _): &(QwenImageTransformer, Trainable, usize),
    c: Checkpointing,
) -> (Vec<f64>, Vec<Vec<f32>>) {
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    for i in 0..2 {
        let (loss, mut grads) = forward_backward(model, &batch(i), c).unwrap();
        losses.extend([loss.mean, evaluate(model, &batch(i + 5)).unwrap().mean]);
        // The last block's text is read by nobody: two of its linears get no gradient.
        gradients.extend(trainable.take_gradients(&mut grads).iter().flatten().map(values));
    }
    assert!(losses.iter().all(|l| l.is_finite()) && gradients.iter().flatten().any(|g| *g != 0.0));
    (losses, gradients)
}

#[test]
fn swapped_blocks_change_no_bit_of_losses_and_gradients() {
    let bf16 = Precision { weights: DType::BF16, int8: false, compute: DType::F32 };
    let int8 = Precision::of(BaseDtype::Int8, DType::F32);
    for precision in [Precision::uniform(DType::F32), bf16, int8] {
        for streamed_modulation in [false, true] {
            let more: &[&str] = if streamed_modulation { &[] } else { &["modulation"] };
            let targets = [&["qkv", "mlp", "fusion"], more].concat();
            let resident = network(precision, Placement { streamed_modulation, swapped_blocks: 0 }, &targets);
            let expected = run(&resident, Checkpointing::None);
            for swapped_blocks in 3..=BLOCKS {
                let swapped = network(precision, Placement { streamed_modulation, swapped_blocks }, &targets);
                // The matrices of these blocks are not among the weights that are held.
                let linears = if streamed_modulation { 12 } else { 14 };
                let gone = if precision.int8 { 0 } else { linears * swapped_blocks };
                assert_eq!(resident.2 - swapped.2, gone);
                for c in CHECKPOINTING {
                    assert!(run(&swapped, c) == expected, "{precision}, {swapped_blocks} blocks, {c:?}");
                }
            }
        }
    }
}

/// The path that a GPU takes, on the CPU: there the dense weight of an op may be the buffer itself.
#[test]
fn composed_ops_read_swapped_blocks_as_they_are() {
    for precision in [Precision::uniform(DType::F32), Precision::of(BaseDtype::Int8, DType::F32)] {
        let [resident, swapped] = [0, 4].map(|swapped_blocks| {
            network(precision, Placement { streamed_modulation: false, swapped_blocks }, &["qkv", "mlp", "modulation"])
        });
        for c in CHECKPOINTING {
            let [resident, swapped] = [&resident, &swapped].map(|n| composed_only(|| run(n, c)));
            assert!(resident == swapped, "{precision}, {c:?}");
        }
    }
}

/// A workplace with a tiny model of four blocks in `four`, and the arguments to train on it for eight steps.
fn four_blocks() -> (Workplace, Vec<&'static str>) {
    let place = Workplace::new();
    let made = place.command(&["synth", "--preset", "tiny", "--layers", "4", "--out", "four"]).output().unwrap();
    assert!(made.status.success(), "{}", stderr(&made));
    (place, vec!["--threads", "2", "--set", "model.path=four", "--set", "training.max_steps=8"])
}

#[test]
fn a_run_with_swapped_blocks_that_is_stopped_and_resumed_gives_the_bytes_of_one_without() {
    let (plain, args) = four_blocks();
    let more = ["--set", "preview={every: 4, prompts: [a cat], steps: 2, size: 32x32}"];
    let args = [&args[..], &more, &["--set", "training.checkpointing=selective"]].concat();
    plain.train_ok(&args);

    let (place, _) = four_blocks();
    let args = [&args[..], &["--set", "model.blocks_to_swap=3"]].concat();
    // The process takes more than that, so that the run ends after its first step.
    let stopped = place.train(&[&args[..], &["--set", "training.memory=15MB"]].concat());
    assert_says(&the_error(&stopped, 1), &["stopped after step 1"]);
    assert_says(&stderr(&stopped), &["modulation resident, 3 blocks swapped"]);
    place.train_ok(&[&args[..], &["--resume", "auto"]].concat());
    assert_eq!(place.metrics(), plain.metrics());
    let (ours, theirs) = (place.snapshot(), plain.snapshot());
    for name in ["adapter.safetensors", "checkpoints/step-000008/optimizer.safetensors", "samples/step-000008/1-0.png"]
    {
        assert!(ours[&PathBuf::from(name)] == theirs[&PathBuf::from(name)], "{name} differs");
    }
    let config = std::fs::read_to_string(place.run("config.yaml")).unwrap();
    assert_says(&config, &["blocks_to_swap: 3"]);
}

#[test]
fn a_number_of_blocks_that_cannot_be_swapped_is_refused_before_anything_is_written() {
    let (place, args) = four_blocks();
    let refused = |set: &[&str]| {
        let sets: Vec<&str> = set.iter().flat_map(|set| ["--set", *set]).collect();
        the_error(&place.train(&[&args[..], &sets].concat()), 2)
    };
    for n in ["1", "2", "5"] {
        let error = refused(&[format!("model.blocks_to_swap={n}").as_str()]);
        assert_says(&error, &["swapping two or fewer saves nothing", "0, or from 3 to 4", &format!("found {n}")]);
    }
    let table =
        place.train(&[&args[..], &["--dry-run", "--memory", "24GB", "--set", "model.blocks_to_swap=9"]].concat());
    assert_says(&the_error(&table, 2), &["0, or from 3 to 4"]);
    // A size is that of a card, whether this machine has one or not; of a CPU only if the config says so.
    let planned = |device: &str| {
        let device = format!("device={device}");
        let args = [&args[..], &["--dry-run", "--memory", "1MB", "--set", &device]].concat();
        stdout(&place.train_ok(&args)).matches(", in host memory").count()
    };
    assert_eq!(["auto", "cuda:3", "cpu"].map(planned), [4, 4, 0]);
    assert_says(&refused(&["model.blocks_to_swap=3", "training.mode=full"]), &["what waits in host memory is frozen"]);
    assert_says(&refused(&["model.blocks_to_swap=-1"]), &["`auto` or a whole number of 0 or more"]);
    assert!(!place.path("runs").exists());

    // On the CPU the memory of the machine is the device's: the two buffers come on top.
    let dry = |n: &str| -> serde_json::Value {
        let swap = format!("model.blocks_to_swap={n}");
        let output = place.train_ok(&[&args[..], &["--dry-run", "--json", "--set", &swap]].concat());
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["found"].take()
    };
    let (none, three) = (dry("0"), dry("3"));
    assert_eq!((&none["blocks_to_swap"], &three["blocks_to_swap"]), (&0.into(), &3.into()));
    let weights = |found: &serde_json::Value| found["memory_bytes"]["weights"].as_u64().unwrap();
    let block = (weights(&three) - weights(&none)) / 2;
    assert!(block > 0 && 4 * block < weights(&none), "{three}");
}
