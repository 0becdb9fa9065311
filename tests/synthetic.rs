//! `synthetic:tiny` is a model to train on: its networks run on each other's outputs at about unit size, and an
//! adapter on it learns.

use candle_core::{DType, Device, Tensor};
use qwen_lora::adapters::{Init, LoraAdapter, LoraScaling, TargetEntry, resolve_targets};
use qwen_lora::kernels::cpu;
use qwen_lora::model::source::{ModelSource, ModelSpec, PipelineFolder};
use qwen_lora::model::synth;
use qwen_lora::model::text_encoder::{Residency, TextEncoder, TextEncoderConfig};
use qwen_lora::model::tokenizer::PromptTokenizer;
use qwen_lora::model::transformer::{BaseWeights, Checkpointing, Precision, QwenImageTransformer, TransformerConfig};
use qwen_lora::model::vae::{Vae, VaeConfig, pack};
use qwen_lora::prompt::TEXT_TO_IMAGE;
use qwen_lora::rng::{Purpose, Stream};
use qwen_lora::train::step::{NoisyBatch, evaluate, forward_backward};
use qwen_lora::train::trainable::Trainable;
use tempfile::TempDir;

fn pipeline() -> (TempDir, PipelineFolder) {
    let dir = tempfile::tempdir().unwrap();
    let place = synth::tiny_in(dir.path()).unwrap();
    let pipeline = ModelSource::resolve(&ModelSpec::new(place.to_str().unwrap())).unwrap();
    (dir, pipeline)
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn root_mean_square(t: &Tensor) -> f64 {
    let values = values(t);
    (values.iter().map(|v| f64::from(v * v)).sum::<f64>() / values.len() as f64).sqrt()
}

fn assert_near_unit(what: &str, t: &Tensor) {
    let size = root_mean_square(t);
    assert!((0.3..3.0).contains(&size), "{what}: {size}");
}

/// Two pictures of 64 x 64 pixels: a disc on a gradient, and stripes.
fn pictures() -> Tensor {
    let pixel = |b: usize, c: usize, y: f32, x: f32| match b {
        0 if (x - 30.0).hypot(y - 25.0) < 15.0 => 0.9 - 0.6 * c as f32,
        0 => x / 32.0 - 1.0 + 0.2 * c as f32,
        _ => ((x + 2.0 * y) / (4.0 + c as f32)).sin(),
    };
    let at = |i: usize| pixel(i / 12288, i / 4096 % 3, (i / 64 % 64) as f32, (i % 64) as f32).clamp(-1.0, 1.0);
    Tensor::from_vec((0..2 * 12288).map(at).collect(), (2, 3, 64, 64), &Device::Cpu).unwrap()
}

/// Packed latents (2, 16, 64) and prompt features (2, T, 64) with their lengths, all from the pipeline itself.
fn dataset(pipeline: &PipelineFolder) -> (Tensor, Tensor, Vec<usize>) {
    let vae_config = VaeConfig::from_file(&pipeline.vae.config).unwrap();
    let vae = Vae::from_weights(vae_config.clone(), &pipeline.vae.open().unwrap()).unwrap();
    let posterior = vae.encode(&pictures()).unwrap();
    let latents = vae_config.normalize(&posterior.mean).unwrap();
    assert_near_unit("latents", &latents);
    let decoded = vae.decode(&posterior.mean).unwrap();
    assert!((0.05..0.9).contains(&root_mean_square(&decoded)), "decoded pixels: {}", root_mean_square(&decoded));

    let tokenizer = PromptTokenizer::load(&pipeline.tokenizer).unwrap();
    let text_config = TextEncoderConfig::from_file(&pipeline.text_encoder.config).unwrap();
    let weights = pipeline.text_encoder.open().unwrap();
    let encoder = TextEncoder::from_weights(text_config, weights, Residency::Streamed).unwrap();
    let prompt = |text: &str| tokenizer.encode_prompt(&TEXT_TO_IMAGE, text).unwrap();
    let prompts = [prompt("a disc on a gradient"), prompt("条纹 stripes")];
    let prefix = tokenizer.num_prefix_tokens(&TEXT_TO_IMAGE).unwrap();
    let features = encoder.encode(&prompts, |_| ()).unwrap();
    let features: Vec<Tensor> = features.iter().map(|f| f.narrow(0, prefix, f.dims()[0] - prefix).unwrap()).collect();
    features.iter().for_each(|f| assert_near_unit("prompt features", f));
    let lengths: Vec<usize> = features.iter().map(|f| f.dims()[0]).collect();
    let longest = *lengths.iter().max().unwrap();
    let padded: Vec<Tensor> = features.iter().map(|f| f.pad_with_zeros(0, 0, longest - f.dims()[0]).unwrap()).collect();
    (pack(&latents).unwrap(), Tensor::stack(&padded, 0).unwrap(), lengths)
}

#[test]
fn an_adapter_on_the_tiny_pipeline_lowers_the_held_out_loss() {
    let (_dir, pipeline) = pipeline();
    let (latents, prompt_embeds, lengths) = dataset(&pipeline);
    let config = TransformerConfig::from_file(&pipeline.transformer.config).unwrap();
    let mut model = QwenImageTransformer::from_weights(
        config.clone(),
        &pipeline.transformer.open().unwrap(),
        Precision::uniform(DType::F32),
        &Device::Cpu,
        BaseWeights::Frozen,
    )
    .unwrap();
    let batch = |step: u64, purpose: Purpose| {
        let mut stream = Stream::new(1, step, 0, purpose);
        let noise = stream.normals(latents.elem_count(), 1.0);
        let noise = Tensor::from_vec(noise, latents.shape(), &Device::Cpu).unwrap();
        let sigmas = (0..2).map(|_| (0.05 + 0.9 * stream.uniform()) as f32).collect();
        let shapes = vec![(1, 4, 4)];
        NoisyBatch::mix(&latents, &noise, prompt_embeds.clone(), lengths.clone(), sigmas, vec![1.0; 2], shapes).unwrap()
    };
    let held_out = |model: &QwenImageTransformer| {
        (0..8).map(|i| evaluate(model, &batch(i, Purpose::HeldOut)).unwrap().mean).sum::<f64>() / 8.0
    };
    let before = held_out(&model);

    let entries = ["qkv", "mlp", "fusion"].map(|p| TargetEntry { pattern: p.into(), rank: None, alpha: None });
    let scaling = LoraScaling { rank: 8, alpha: 8.0, rslora: false };
    let targets = resolve_targets(&config.modules(), &entries, scaling).unwrap();
    let adapter = LoraAdapter::init(&targets, Init::Gaussian, 5, &Device::Cpu).unwrap();
    let trainable = Trainable::attach(&mut model, &adapter).unwrap();
    assert_eq!(held_out(&model), before, "B = 0 changes nothing");
    // RMSProp in its plainest form: the smallest optimizer that copes with gradients of different sizes.
    let mut squares: Vec<Vec<f32>> = trainable.leaves().iter().map(|l| vec![0.0; l.tensor().elem_count()]).collect();
    for step in 0..40 {
        let batch = batch(step, Purpose::Noise);
        let (_, mut gradients) = forward_backward(&model, &batch, Checkpointing::Full).unwrap();
        let grads = trainable.take_gradients(&mut gradients);
        for ((leaf, grad), squares) in trainable.leaves().iter().zip(grads).zip(&mut squares) {
            let Some(grad) = grad else { continue };
            let delta = values(&grad).into_iter().zip(squares).map(|(g, s)| {
                *s = 0.9 * *s + 0.1 * g * g;
                -5e-3 * g / (s.sqrt() + 1e-8)
            });
            let delta = Tensor::from_vec(delta.collect::<Vec<f32>>(), leaf.dims(), &Device::Cpu).unwrap();
            cpu::add_assign(leaf.tensor(), &delta).unwrap();
        }
    }
    let after = held_out(&model);
    eprintln!("held-out loss {before:.3} -> {after:.3}");
    assert!(after < 0.9 * before, "{before} -> {after}");
    assert!((1.0..4.0).contains(&before), "near the variance of what is to be predicted: {before}");
}
