//! One transformer block at the real width (24 heads of 128, axes 16, 56, 56), and an allocator that counts what its
//! forward and backward passes hold. Letters: S tokens of text and image together, D = 3072.

use candle_core::{DType, Device, Tensor};
use qwen_lora::adapters::{Init, LoraAdapter, LoraScaling, TargetEntry, resolve_targets};
use qwen_lora::kernels::backward;
use qwen_lora::model::transformer::{
    BaseWeights, Checkpointing, Inputs, Precision, QwenImageTransformer, TransformerConfig,
};
use qwen_lora::rng::{Purpose, Stream};
use qwen_lora::train::trainable::Trainable;
use rayon::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system's allocator, counting live bytes and their peak.
pub struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    PEAK.fetch_max(LIVE.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Runs `f`; gives its result and the most bytes that were live in it beyond those that were live before.
pub fn peak_bytes<R>(f: impl FnOnce() -> R) -> (R, usize) {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = f();
    (result, PEAK.load(Relaxed) - before)
}

/// Attention heads.
pub const HEADS: usize = 24;
/// Width of the model.
pub const WIDTH: usize = 24 * 128;

/// A transformer of one block and an adapter on all its linears.
pub struct RealBlock {
    model: QwenImageTransformer,
    trainable: Trainable,
}

/// What one forward and backward pass took.
pub struct Measured {
    /// Bytes beyond weights and inputs.
    pub peak_bytes: usize,
    /// All gradients of the adapter, one after the other.
    pub gradients: Vec<f32>,
}

impl RealBlock {
    /// With pseudo-random weights in f32, made quickly: 340 million of them.
    pub fn new() -> Self {
        let config = TransformerConfig {
            patch_size: 2,
            in_channels: 64,
            out_channels: 16,
            num_layers: 1,
            attention_head_dim: WIDTH / HEADS,
            num_attention_heads: HEADS,
            joint_attention_dim: 64,
            axes_dims_rope: [16, 56, 56],
            zero_cond_t: false,
            use_additional_t_cond: false,
            use_layer3d_rope: false,
        };
        let weight = |_: &str, shape: &[usize]| {
            let scale = match shape {
                [_, inputs] => (3.0 / *inputs as f32).sqrt(),
                _ => return Ok(Tensor::ones(shape, DType::F32, &Device::Cpu)?),
            };
            let n: usize = shape.iter().product();
            let values = (0..n as u32).into_par_iter().with_min_len(1 << 16).map(|i| {
                let bits = i.wrapping_mul(0x9E37_79B1) ^ (i >> 7).wrapping_mul(0x85EB_CA6B);
                scale * ((bits >> 8) as f32 / (1 << 23) as f32 - 1.0)
            });
            Ok(Tensor::from_vec(values.collect::<Vec<f32>>(), shape, &Device::Cpu)?)
        };
        let precision = Precision::uniform(DType::F32);
        let mut model =
            QwenImageTransformer::build(config.clone(), precision, &Device::Cpu, BaseWeights::Frozen, weight).unwrap();
        let entries =
            ["qkv", "mlp", "fusion"].map(|name| TargetEntry { pattern: name.into(), rank: None, alpha: None });
        let scaling = LoraScaling { rank: 16, alpha: 16.0, rslora: false };
        let targets = resolve_targets(&config.modules(), &entries, scaling).unwrap();
        let mut adapter = LoraAdapter::init(&targets, Init::Gaussian, 1, &Device::Cpu).unwrap();
        // B = 0 would leave A without gradient.
        for module in adapter.modules.values_mut() {
            module.b = (module.b.ones_like().unwrap() * 1e-3).unwrap();
        }
        let trainable = Trainable::attach(&mut model, &adapter).unwrap();
        Self { model, trainable }
    }

    /// Forward and backward for `side` x `side` image tokens and `text` text tokens, all of them computed: the text is
    /// not dropped at the end, as it is after the last block of a whole network.
    pub fn run(&self, side: usize, text: usize, checkpointing: Checkpointing) -> Measured {
        let random = |item: u64, shape: &[usize]| {
            let values = Stream::new(3, 0, item, Purpose::Bench).normals(shape.iter().product(), 1.0);
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let (image, prompt, seed) =
            (random(1, &[1, side * side, 64]), random(2, &[1, text, 64]), random(3, &[1, side * side, 64]));
        let inputs = Inputs {
            hidden_states: &image,
            encoder_hidden_states: &prompt,
            text_lengths: &[text],
            timesteps: &[0.6],
            image_shapes: &[(1, side, side)],
            additional_t_cond: None,
        };
        let (gradients, peak_bytes) = peak_bytes(|| {
            let prediction = self.model.forward_observed(inputs, checkpointing, false, &mut |_, _| {}).unwrap();
            let mut gradients = backward(vec![(prediction, seed)]).unwrap();
            self.trainable.take_gradients(&mut gradients)
        });
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        Measured { peak_bytes, gradients: gradients.iter().flatten().flat_map(values).collect() }
    }
}
