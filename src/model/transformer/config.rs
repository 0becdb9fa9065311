//! `transformer/config.json`, the tensors it implies, and the linears that can carry adapters.

use crate::adapters::target::ModuleInfo;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Dimensions and switches of a `QwenImageTransformer2DModel`, as published in `transformer/config.json`.
///
/// Source: <https://github.com/huggingface/diffusers/blob/v0.35.1/src/diffusers/models/transformers/transformer_qwenimage.py#L417>
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TransformerConfig {
    /// Latent pixels on a side of one image token.
    #[serde(default = "default_patch_size")]
    pub patch_size: usize,
    /// Channels of a packed latent token: 16 latent channels x 2 x 2.
    pub in_channels: usize,
    /// Latent channels of the prediction; a token predicts `patch_size^2` times as many.
    pub out_channels: usize,
    /// Double-stream blocks.
    pub num_layers: usize,
    /// Width of one attention head; the sum of `axes_dims_rope`.
    pub attention_head_dim: usize,
    /// Attention heads; the width of the model is heads x head width.
    pub num_attention_heads: usize,
    /// Width of the text encoder's features.
    pub joint_attention_dim: usize,
    /// Rotary dimensions of the frame, height and width axes; each even.
    pub axes_dims_rope: [usize; 3],
    /// Condition-image tokens are modulated as at time 0 (Qwen-Image-Edit-2511).
    #[serde(default)]
    pub zero_cond_t: bool,
    /// The time embedding takes a second, two-way condition (Qwen-Image-Layered).
    #[serde(default)]
    pub use_additional_t_cond: bool,
    /// Rotary positions number layers, with the condition image at frame -1 (Qwen-Image-Layered).
    #[serde(default)]
    pub use_layer3d_rope: bool,
}

fn default_patch_size() -> usize {
    2
}

/// Width of the sinusoidal time features that enter `timestep_embedder.linear_1`.
pub const TIME_FEATURES: usize = 256;

impl TransformerConfig {
    /// Reads and checks `config.json`. Other keys of the file are ignored, as the published ones carry stale fields.
    ///
    /// Errors: unreadable or malformed file, another model class, dimensions that do not fit together.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e).into_usage())?;
        let wrong = |detail: String| {
            Error::usage(format!("`{}` is not a Qwen-Image transformer", path.display())).detail(detail)
        };
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        if let Some(class) = json.get("_class_name").and_then(|c| c.as_str())
            && class != "QwenImageTransformer2DModel"
        {
            return Err(wrong(format!("expected class QwenImageTransformer2DModel, found {class}"))
                .hint("Qwen-Image, Qwen-Image-2512, -Edit and -Layered have this class; Qwen-Image-2.1 is another architecture"));
        }
        if json.get("guidance_embeds").and_then(|g| g.as_bool()) == Some(true) {
            return Err(wrong(
                "`guidance_embeds: true` is not supported: no published Qwen-Image model uses it".into(),
            ));
        }
        let config: Self = serde_json::from_value(json).map_err(|e| wrong(e.to_string()))?;
        config.check().map_err(wrong)?;
        Ok(config)
    }

    /// The published model's dimensions, 20.4 billion parameters.
    pub fn qwen_image() -> Self {
        Self {
            patch_size: 2,
            in_channels: 64,
            out_channels: 16,
            num_layers: 60,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 3584,
            axes_dims_rope: [16, 56, 56],
            zero_cond_t: false,
            use_additional_t_cond: false,
            use_layer3d_rope: false,
        }
    }

    /// Checks that the dimensions fit together; `Err` says how they do not.
    pub fn check(&self) -> std::result::Result<(), String> {
        let sum: usize = self.axes_dims_rope.iter().sum();
        if sum != self.attention_head_dim {
            return Err(format!("axes_dims_rope adds up to {sum}, attention_head_dim is {}", self.attention_head_dim));
        }
        if self.axes_dims_rope.iter().any(|d| d % 2 != 0) {
            return Err(format!("axes_dims_rope {:?} has an odd entry", self.axes_dims_rope));
        }
        let positive = [
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("num_layers", self.num_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("joint_attention_dim", self.joint_attention_dim),
        ];
        match positive.iter().find(|(_, v)| *v == 0) {
            Some((name, _)) => Err(format!("{name} is 0")),
            None => Ok(()),
        }
    }

    /// Width of both streams.
    pub fn dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Values that one image token predicts.
    pub fn token_out(&self) -> usize {
        self.patch_size * self.patch_size * self.out_channels
    }

    /// Name and shape of every tensor in the published layout, in the order of the model.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (dim, head) = (self.dim(), self.attention_head_dim);
        let mut out: Vec<(String, Vec<usize>)> = Vec::new();
        for module in self.modules() {
            out.push((format!("{}.weight", module.name), vec![module.out_features, module.in_features]));
            out.push((format!("{}.bias", module.name), vec![module.out_features]));
        }
        out.push(("txt_norm.weight".into(), vec![self.joint_attention_dim]));
        if self.use_additional_t_cond {
            out.push(("time_text_embed.addition_t_embedding.weight".into(), vec![2, dim]));
        }
        for block in 0..self.num_layers {
            for norm in ["norm_q", "norm_k", "norm_added_q", "norm_added_k"] {
                out.push((format!("transformer_blocks.{block}.attn.{norm}.weight"), vec![head]));
            }
        }
        out
    }

    /// Every linear of the network, in order, with the groups of `target_modules` that it belongs to.
    ///
    /// `qkv`, `mlp` and `fusion` are the twelve targets per block that the peers train; `modulation` and `entry` are
    /// the other linears of the blocks and of the ends; the time embedding and `norm_out` are in no group.
    pub fn modules(&self) -> Vec<ModuleInfo> {
        let dim = self.dim();
        let mut out = Vec::new();
        let mut add = |name: String, in_features, out_features, groups: &[&'static str]| {
            out.push(ModuleInfo { name, in_features, out_features, groups: groups.to_vec() });
        };
        add("img_in".into(), self.in_channels, dim, &["entry", "entry.visual", "visual"]);
        add("txt_in".into(), self.joint_attention_dim, dim, &["entry", "entry.text", "text"]);
        add("time_text_embed.timestep_embedder.linear_1".into(), TIME_FEATURES, dim, &[]);
        add("time_text_embed.timestep_embedder.linear_2".into(), dim, dim, &[]);
        for block in 0..self.num_layers {
            for (name, in_features, out_features, groups) in BLOCK_LINEARS {
                let name = format!("transformer_blocks.{block}.{name}");
                add(name, in_features * dim, out_features * dim, groups);
            }
        }
        add("norm_out.linear".into(), dim, 2 * dim, &[]);
        add("proj_out".into(), dim, self.token_out(), &["entry", "entry.visual", "visual"]);
        out
    }
}

/// The linears of one block: name, inputs and outputs in units of the model's width, groups.
const BLOCK_LINEARS: [(&str, usize, usize, &[&str]); 14] = [
    ("img_mod.1", 1, 6, &["modulation", "modulation.visual", "visual"]),
    ("txt_mod.1", 1, 6, &["modulation", "modulation.text", "text"]),
    ("attn.to_q", 1, 1, &["qkv", "qkv.visual", "visual"]),
    ("attn.to_k", 1, 1, &["qkv", "qkv.visual", "visual"]),
    ("attn.to_v", 1, 1, &["qkv", "qkv.visual", "visual"]),
    ("attn.add_q_proj", 1, 1, &["qkv", "qkv.text", "text"]),
    ("attn.add_k_proj", 1, 1, &["qkv", "qkv.text", "text"]),
    ("attn.add_v_proj", 1, 1, &["qkv", "qkv.text", "text"]),
    ("attn.to_out.0", 1, 1, &["fusion", "fusion.visual", "visual"]),
    ("attn.to_add_out", 1, 1, &["fusion", "fusion.text", "text"]),
    ("img_mlp.net.0.proj", 1, 4, &["mlp", "mlp.visual", "visual"]),
    ("img_mlp.net.2", 4, 1, &["mlp", "mlp.visual", "visual"]),
    ("txt_mlp.net.0.proj", 1, 4, &["mlp", "mlp.text", "text"]),
    ("txt_mlp.net.2", 4, 1, &["mlp", "mlp.text", "text"]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_dimensions_give_the_published_tensors() {
        let config = TransformerConfig::qwen_image();
        let tensors = config.tensors();
        assert_eq!(tensors.len(), 1933);
        let params: usize = tensors.iter().map(|(_, s)| s.iter().product::<usize>()).sum();
        assert_eq!(params, 20_430_401_088);
        let in_group = |g: &str| config.modules().iter().filter(|m| m.groups.contains(&g)).count();
        assert_eq!(in_group("qkv") + in_group("mlp") + in_group("fusion"), 720);
        assert_eq!([in_group("modulation"), in_group("entry"), in_group("qkv.visual")], [120, 3, 180]);
    }
}
