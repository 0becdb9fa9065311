//! Attention never holds a full score matrix, and int8 weights are never there as floats: memory, counted byte by byte.

mod block_memory;

use block_memory::{Counting, HEADS, RealBlock, WIDTH, peak_bytes};
use candle_core::{DType, Device, Tensor};
use qwen_lora::config::BaseDtype;
use qwen_lora::kernels::attention::{Stream, TextLengths, joint_attention};
use qwen_lora::kernels::int8::Int8Matrix;
use qwen_lora::kernels::linear::Linear;
use qwen_lora::kernels::weight::Weight;
use qwen_lora::kernels::{Value, backward};
use qwen_lora::model::synth::{self, Geometry, Preset, SynthOptions};
use qwen_lora::model::transformer::{BaseWeights, Checkpointing, Precision, QwenImageTransformer};
use qwen_lora::rng::{self, Purpose};
use std::sync::Mutex;

#[global_allocator]
static COUNTING: Counting = Counting;

/// The counts are those of the whole process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// 32 x 32 image tokens and 128 text tokens.
const SIDE: usize = 32;
const TEXT: usize = 128;
const TOKENS: usize = SIDE * SIDE + TEXT;

/// One (S, D) activation in f32: 14 MB.
const ACTIVATION: usize = TOKENS * WIDTH * 4;
/// The scores of all heads in f32: 127 MB.
const SCORES: usize = HEADS * TOKENS * TOKENS * 4;

/// Runs `f` on two threads, on any machine: each thread holds tiles of its own.
fn on_two_threads<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap().install(f)
}

/// Attention alone. Its output is one activation and the gradients of queries, keys and values are three, held twice
/// while the heads are put together: seven activations at most. One more is granted for what two threads work on: a
/// head's rows and a tile of scores each. A full score matrix would be nine activations on top.
#[test]
fn attention_holds_tiles_of_scores_only() {
    let (peak, gradient) = on_two_threads(|| {
        let random = |item: u64, tokens: usize| {
            let values = rng::Stream::new(5, 0, item, Purpose::Bench).normals(tokens * WIDTH, 1.0);
            Tensor::from_vec(values, (1, tokens, WIDTH), &Device::Cpu).unwrap()
        };
        let values: Vec<Value> =
            (0..6).map(|i| Value::leaf(random(i, if i < 3 { TEXT } else { SIDE * SIDE }))).collect();
        let seeds = [random(6, TEXT), random(7, SIDE * SIDE)];
        let (gradient, peak) = peak_bytes(|| {
            let text = Stream { q: &values[0], k: &values[1], v: &values[2] };
            let image = Stream { q: &values[3], k: &values[4], v: &values[5] };
            let outputs = joint_attention(text, image, HEADS, &TextLengths::new(&[TEXT])).unwrap();
            let mut gradients = backward(outputs.into_iter().zip(seeds).collect()).unwrap();
            values.iter().map(|v| gradients.take(v).unwrap()).collect::<Vec<_>>()
        });
        (peak, gradient[1].abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap())
    });
    assert!(gradient.is_finite() && gradient > 0.0, "{gradient}");
    let bound = 8 * ACTIVATION;
    assert!(SCORES > bound, "with the scores the limit would be passed");
    assert!(peak < bound, "attention held {peak} bytes, more than {bound}");
}

/// A whole block with adapters on all its linears. With 4096 + 512 tokens it must stay below 2 GB, and everything but
/// the weights grows with the tokens: here, with a quarter of them, the limit is 500 MB. It holds 323 MB at most, 22.9
/// activations; with recompute, 319 MB, because with one block the whole of it is computed again for its backward
/// pass. The scores and their gradients would add 255 MB. `selective` runs on a quarter of the tokens, to save time.
#[test]
fn a_block_at_the_real_width_stays_within_its_share_of_2_gb() {
    let [none, full, selective] = on_two_threads(|| {
        let block = RealBlock::new();
        [
            block.run(SIDE, TEXT, Checkpointing::None),
            block.run(SIDE, TEXT, Checkpointing::Full),
            block.run(SIDE / 2, TEXT / 4, Checkpointing::Selective),
        ]
    });
    for (measured, limit) in [(&none, 500_000_000), (&full, 500_000_000), (&selective, 125_000_000)] {
        assert!(measured.peak_bytes < limit, "the block held {} bytes, more than {limit}", measured.peak_bytes);
        assert!(measured.gradients.iter().all(|g| g.is_finite()) && measured.gradients.iter().any(|g| *g != 0.0));
    }
    assert!(none.gradients == full.gradients, "recompute changed a gradient");
}

/// A network in int8 is read strip by strip: beside it there is a strip of f32 for each of two threads, of 1 MiB each, and
/// no weight as a whole. The largest has 25 MB in f32.
#[test]
fn an_int8_network_is_loaded_without_a_second_copy_of_any_weight() {
    let dir = tempfile::tempdir().unwrap();
    let geometry = Geometry { num_layers: 2, num_heads: 8, head_dim: 128, axes: [16, 56, 56], joint_dim: 128 };
    let options = SynthOptions { geometry, ..SynthOptions::preset(Preset::QwenImage) };
    if let Err(e) = on_two_threads(|| synth::write(&options, &dir.path().join("pipe"))) {
        assert!(e.to_string().contains("no sparse files"), "{e}");
        return eprintln!("SKIPPED: {e}");
    }
    let precision = Precision::of(BaseDtype::Int8, DType::F32);
    let folder = dir.path().join("pipe/transformer");
    let (floats, peak) = on_two_threads(|| {
        let load = || QwenImageTransformer::load(&folder, precision, &Device::Cpu, BaseWeights::Frozen).unwrap();
        let (model, peak) = peak_bytes(load);
        let floats: usize = model.parameters().iter().map(|(_, v)| 4 * v.tensor().elem_count()).sum();
        (floats, peak)
    });
    let d = 8 * 128;
    // Per block 36 D x D in matrices; the ends are 3 + a little.
    let matrices = 2 * 36 * d * d;
    let held = matrices + matrices / 16;
    assert!(floats < held / 4, "{floats} bytes of floats");
    // What a test before this one frees meanwhile is not added.
    assert!(peak > held, "{peak} bytes are too few for {held}");
    assert!(peak < held + floats + (4 << 20), "{peak} bytes for {}", held + floats);
}

/// The product with an int8 weight of 64 MiB in f32, forward and backward, takes a panel of 8 MiB beside what the product
/// with the same weight in f32 takes, and the copy of it in tiles that the product of a panel of 512 rows makes (2 MB here).
#[test]
fn a_product_with_int8_weights_widens_a_panel_at_a_time() {
    let n = 4096;
    let read = |first: usize, out: &mut [f32]| {
        out.iter_mut().enumerate().for_each(|(i, w)| *w = ((first + i) % 251) as f32 - 125.0);
        Ok(())
    };
    let [int8, f32] = on_two_threads(|| {
        let held = Int8Matrix::from_rows("w", (n, n), read).unwrap();
        let float = Value::constant(held.dequantise(DType::F32).unwrap());
        [Weight::Int8(held), float.into()].map(|weight| {
            let x = Value::leaf(Tensor::ones((2, n), DType::F32, &Device::Cpu).unwrap());
            let layer = Linear { weight, bias: None, lora: None };
            let (_, peak) = peak_bytes(|| {
                let y = layer.forward(&x).unwrap();
                let seed = y.tensor().clone();
                backward(vec![(y, seed)]).unwrap().take(&x).unwrap()
            });
            peak
        })
    });
    assert!(int8 < f32 + (12 << 20), "{int8} bytes, {f32} with f32");
}
