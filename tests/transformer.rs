//! What must hold of the transformer whatever its weights: batches, recompute, merging, which gradients exist.

mod model_common;

use candle_core::{DType, Device, Tensor};
use model_common::{randn, small_transformer, values};
use qwen_lora::adapters::LoraAdapter;
use qwen_lora::kernels::route::composed_only;
use qwen_lora::kernels::{cpu, no_grad};
use qwen_lora::model::transformer::{
    BaseWeights, Checkpointing, Inputs, Precision, QwenImageTransformer, TransformerConfig,
};
use qwen_lora::train::step::{NoisyBatch, evaluate, forward_backward};
use qwen_lora::train::trainable::Trainable;

const TEXT: usize = 6;
const GRID: (usize, usize) = (3, 5);

fn config() -> TransformerConfig {
    small_transformer(3)
}

fn model(base: BaseWeights) -> QwenImageTransformer {
    QwenImageTransformer::random(config(), 1, Precision::uniform(DType::F32), &Device::Cpu, base).unwrap()
}

/// Samples `first..first + lengths.len()` of one set, so that batches of different sizes hold the same samples.
fn batch(first: usize, lengths: &[usize], text_tokens: usize) -> NoisyBatch {
    let stack = |kind: u64, shape: &[usize]| {
        let one = |b: usize| randn(10 * kind + (first + b) as u64, shape);
        Tensor::stack(&(0..lengths.len()).map(one).collect::<Vec<_>>(), 0).unwrap()
    };
    let text = stack(3, &[TEXT, 20]).narrow(1, 0, text_tokens).unwrap();
    let sigmas = (0..lengths.len()).map(|b| 0.2 + 0.25 * (first + b) as f32).collect();
    let (tokens, shapes) = (GRID.0 * GRID.1, vec![(1, GRID.0, GRID.1)]);
    let (latents, noise) = (stack(1, &[tokens, 64]), stack(2, &[tokens, 64]));
    NoisyBatch::mix(&latents, &noise, text, lengths.to_vec(), sigmas, vec![1.0; lengths.len()], shapes).unwrap()
}

fn adapter(names: &[&str]) -> LoraAdapter {
    model_common::adapter(&config(), names)
}

const ALL: [&str; 5] = ["qkv", "mlp", "fusion", "modulation", "entry"];

fn gradients(
    model: &QwenImageTransformer,
    trainable: &Trainable,
    batch: &NoisyBatch,
    c: Checkpointing,
) -> Vec<Option<Vec<f32>>> {
    let (_, mut gradients) = forward_backward(model, batch, c).unwrap();
    trainable.take_gradients(&mut gradients).iter().map(|g| g.as_ref().map(values)).collect()
}

/// The largest difference, over the largest value of `b`.
fn relative(a: &[f32], b: &[f32]) -> f32 {
    let top = b.iter().fold(1e-30f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0f32, |m, (x, y)| m.max((x - y).abs())) / top
}

#[test]
fn a_batch_equals_its_samples_one_by_one() {
    let mut model = model(BaseWeights::Frozen);
    let trainable = Trainable::attach(&mut model, &adapter(&ALL)).unwrap();
    let lengths = [4, 6, 2];
    let together = gradients(&model, &trainable, &batch(0, &lengths, 6), Checkpointing::None);
    let loss = evaluate(&model, &batch(0, &lengths, 6)).unwrap().per_sample;
    let mut summed: Vec<Option<Vec<f32>>> = vec![None; together.len()];
    for (i, &length) in lengths.iter().enumerate() {
        let single = batch(i, &[length], length);
        assert!((evaluate(&model, &single).unwrap().mean / loss[i] - 1.0).abs() < 1e-6);
        for (sum, grad) in summed.iter_mut().zip(gradients(&model, &trainable, &single, Checkpointing::None)) {
            if let Some(grad) = grad {
                let sum = sum.get_or_insert_with(|| vec![0.0; grad.len()]);
                sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g / 3.0);
            }
        }
    }
    for ((name, a), b) in trainable.names().iter().zip(&together).zip(&summed) {
        assert_eq!(a.is_some(), b.is_some(), "{name}");
        if let (Some(a), Some(b)) = (a, b) {
            // Two orders of summing three f32 gradients.
            assert!(relative(a, b) < 1e-5, "{name}: {}", relative(a, b));
        }
    }
}

#[test]
fn padding_is_never_looked_at() {
    let model = model(BaseWeights::Frozen);
    let clean = batch(0, &[4, 6], 6);
    let mut junk = batch(0, &[4, 6], 6);
    let mut text = values(&junk.prompt_embeds);
    text[4 * 20..6 * 20].fill(7.0);
    junk.prompt_embeds = Tensor::from_vec(text, (2, 6, 20), &Device::Cpu).unwrap();
    assert_eq!(evaluate(&model, &clean).unwrap().per_sample, evaluate(&model, &junk).unwrap().per_sample);
}

#[test]
fn checkpointing_changes_no_bit_of_any_gradient() {
    let mut model = model(BaseWeights::Frozen);
    let trainable = Trainable::attach(&mut model, &adapter(&ALL)).unwrap();
    let batch = batch(0, &[4, 6], 6);
    let [none, selective, full] = [Checkpointing::None, Checkpointing::Selective, Checkpointing::Full]
        .map(|c| gradients(&model, &trainable, &batch, c));
    assert_eq!(none, selective);
    assert_eq!(none, full);
}

#[test]
fn merged_weights_equal_the_adapter_at_run_time() {
    let batch = batch(0, &[4, 6], 6);
    let adapter = adapter(&ALL);
    let mut adapted = model(BaseWeights::Frozen);
    Trainable::attach(&mut adapted, &adapter).unwrap();
    let merged = model(BaseWeights::Frozen);
    let plain = evaluate(&merged, &batch).unwrap().mean;
    for (name, value) in merged.parameters() {
        if let Some(module) = name.strip_suffix(".weight").and_then(|n| adapter.modules.get(n)) {
            cpu::add_assign(value.tensor(), &module.delta().unwrap()).unwrap();
        }
    }
    let (at_run_time, merged) = (evaluate(&adapted, &batch).unwrap().mean, evaluate(&merged, &batch).unwrap().mean);
    assert!((at_run_time / plain - 1.0).abs() > 0.01, "the adapter must matter for this test to mean anything");
    assert!((at_run_time / merged - 1.0).abs() < 1e-5, "{at_run_time} {merged}");
}

#[test]
fn every_adapter_tensor_that_can_learn_has_a_gradient_and_frozen_weights_stay() {
    let mut model = model(BaseWeights::Frozen);
    let before: Vec<Vec<f32>> = model.parameters().iter().map(|(_, v)| values(v.tensor())).collect();
    let trainable = Trainable::attach(&mut model, &adapter(&ALL)).unwrap();
    let all = gradients(&model, &trainable, &batch(0, &[4, 6], 6), Checkpointing::Full);
    for (name, grad) in trainable.names().iter().zip(&all) {
        // Nobody reads what the last block makes of the text: no gradient where only that text depends on a module, and
        // a gradient of zeros for the queries that it attends with.
        let last = |module: &str| name.starts_with(&format!("transformer_blocks.2.{module}"));
        let is_zero = |g: &Vec<f32>| g.iter().all(|&v| v == 0.0);
        if last("attn.to_add_out") || last("txt_mlp") {
            assert!(grad.is_none(), "{name}");
        } else if last("attn.add_q_proj") {
            assert!(grad.as_ref().is_some_and(is_zero), "{name}");
        } else {
            assert!(grad.as_ref().is_some_and(|g| !is_zero(g)), "{name}");
        }
    }
    assert!(model.parameters().iter().all(|(_, v)| !v.needs_grad()));
    let after: Vec<Vec<f32>> = model.parameters().iter().map(|(_, v)| values(v.tensor())).collect();
    assert_eq!(before, after);
}

#[test]
fn all_weights_can_be_trained_and_their_gradients_equal_differences() {
    let model = model(BaseWeights::Trained);
    let trainable = Trainable::all_weights(&model);
    let batch = batch(0, &[4, 6], 6);
    let none = gradients(&model, &trainable, &batch, Checkpointing::None);
    assert_eq!(none, gradients(&model, &trainable, &batch, Checkpointing::Full));
    let mut missing = Vec::new();
    for ((name, grad), leaf) in trainable.names().iter().zip(&none).zip(trainable.leaves()) {
        let Some(grad) = grad else {
            missing.push(name.as_str());
            continue;
        };
        // Along its own gradient the f32 loss moves by far more than its rounding while no weight moves far.
        let expected = grad.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
        let direction: Vec<f32> = grad.iter().map(|g| (f64::from(*g) / expected.max(1e-30)) as f32).collect();
        let step = 1e-3 / expected.max(0.01);
        let moved = |by: f64| {
            let delta = direction.iter().map(|d| (f64::from(*d) * by) as f32).collect::<Vec<_>>();
            let delta = Tensor::from_vec(delta, leaf.dims(), &Device::Cpu).unwrap();
            cpu::add_assign(leaf.tensor(), &delta).unwrap();
            evaluate(&model, &batch).unwrap().mean
        };
        let up = moved(step);
        let down = moved(-2.0 * step);
        moved(step);
        let numeric = (up - down) / (2.0 * step);
        assert!((numeric - expected).abs() < 0.02 * expected.abs() + 2e-3, "{name}: {numeric} {expected}");
    }
    assert!(missing.iter().all(
        |n| n.starts_with("transformer_blocks.2.attn.to_add_out") || n.starts_with("transformer_blocks.2.txt_mlp")
    ));
    assert_eq!(missing.len(), 6);
}

#[test]
fn a_model_without_adapters_records_nothing() {
    let model = model(BaseWeights::Frozen);
    let batch = batch(0, &[4], 6);
    let inputs = Inputs {
        hidden_states: &batch.noisy,
        encoder_hidden_states: &batch.prompt_embeds,
        text_lengths: &batch.text_lengths,
        timesteps: &batch.sigmas,
        image_shapes: &batch.image_shapes,
        additional_t_cond: None,
    };
    assert!(!model.forward(inputs, Checkpointing::None).unwrap().needs_grad());
    assert!(!no_grad(|| model.forward(inputs, Checkpointing::Full)).unwrap().needs_grad());
}

#[test]
fn composed_ops_train_as_the_kernels_do() {
    let mut model = model(BaseWeights::Frozen);
    let trainable = Trainable::attach(&mut model, &adapter(&ALL)).unwrap();
    let batch = batch(0, &[4, 6], 6);
    let kernels = gradients(&model, &trainable, &batch, Checkpointing::None);
    let composed = composed_only(|| gradients(&model, &trainable, &batch, Checkpointing::None));
    let again = composed_only(|| gradients(&model, &trainable, &batch, Checkpointing::Full));
    assert_eq!(composed, again, "recompute changes no bit here either");
    for ((name, a), b) in trainable.names().iter().zip(&composed).zip(&kernels) {
        assert_eq!(a.is_some(), b.is_some(), "{name}");
        if let (Some(a), Some(b)) = (a, b) {
            assert!(relative(a, b) < 2e-5, "{name}: {}", relative(a, b));
        }
    }
}
