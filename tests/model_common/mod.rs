//! A small transformer, an adapter for it, and numbers to run it on.

use candle_core::{Device, Tensor};
use qwen_lora::adapters::{Init, LoraAdapter, LoraScaling, TargetEntry, resolve_targets};
use qwen_lora::model::transformer::TransformerConfig;
use qwen_lora::rng::{Purpose, Stream};

/// Heads of an odd width, and text of another width than the image.
pub fn small_transformer(num_layers: usize) -> TransformerConfig {
    TransformerConfig {
        patch_size: 2,
        in_channels: 64,
        out_channels: 16,
        num_layers,
        attention_head_dim: 12,
        num_attention_heads: 2,
        joint_attention_dim: 20,
        axes_dims_rope: [4, 4, 4],
        zero_cond_t: false,
        use_additional_t_cond: false,
        use_layer3d_rope: false,
    }
}

/// Standard normal numbers; another `item`, others.
pub fn randn(item: u64, shape: &[usize]) -> Tensor {
    let n = shape.iter().product();
    Tensor::from_vec(Stream::new(2, 0, item, Purpose::Bench).normals(n, 1.0), shape, &Device::Cpu).unwrap()
}

/// All of them, in order.
pub fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// An adapter on `names` whose B is not zero and whose alpha is not its rank.
pub fn adapter(config: &TransformerConfig, names: &[&str]) -> LoraAdapter {
    let entry = |name: &&str| TargetEntry { pattern: name.to_string(), rank: None, alpha: None };
    let entries: Vec<_> = names.iter().map(entry).collect();
    let scaling = LoraScaling { rank: 3, alpha: 4.5, rslora: false };
    let targets = resolve_targets(&config.modules(), &entries, scaling).unwrap();
    let mut adapter = LoraAdapter::init(&targets, Init::Gaussian, 5, &Device::Cpu).unwrap();
    for (i, module) in adapter.modules.values_mut().enumerate() {
        module.b = (randn(100 + i as u64, module.b.dims()) * 0.2).unwrap();
    }
    adapter
}
