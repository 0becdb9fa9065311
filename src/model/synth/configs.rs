//! The JSON files of a pipeline, with the keys of the published ones.

use super::{Geometry, Preset, SynthOptions, tokenizer};
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// The configs of a pipeline beside the transformer's.
pub struct PipelineConfigs {
    pub model_index: Value,
    pub scheduler: Value,
    pub vae: Value,
    pub text_encoder: Value,
}

impl PipelineConfigs {
    /// For the options' geometry: the published dimensions of autoencoder and text encoder for
    /// [`Preset::QwenImage`], small ones else.
    ///
    /// Errors: a width of the prompt embeddings that the text encoder cannot have.
    pub fn of(options: &SynthOptions) -> Result<Self> {
        let text = match options.preset {
            Preset::QwenImage => TextDims::published(options.geometry.joint_dim)?,
            _ => TextDims::tiny(options.geometry.joint_dim)?,
        };
        Ok(Self {
            model_index: model_index(),
            scheduler: scheduler(),
            vae: vae(if options.preset == Preset::QwenImage { 96 } else { 8 }),
            text_encoder: text.config(),
        })
    }
}

/// Writes a JSON file, indented as the Python tools do.
pub fn save(path: &Path, json: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(json).expect("a JSON value has a text") + "\n";
    std::fs::write(path, text).map_err(|e| Error::io("write", path, e))
}

const DIFFUSERS_VERSION: &str = "0.35.0";

fn model_index() -> Value {
    json!({
        "_class_name": "QwenImagePipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    })
}

fn scheduler() -> Value {
    json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "invert_sigmas": false,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "shift_terminal": 0.02,
        "stochastic_sampling": false,
        "time_shift_type": "exponential",
        "use_beta_sigmas": false,
        "use_dynamic_shifting": true,
        "use_exponential_sigmas": false,
        "use_karras_sigmas": false,
    })
}

/// The transformer's config.
pub fn transformer(geometry: &Geometry) -> Value {
    json!({
        "_class_name": "QwenImageTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": geometry.head_dim,
        "axes_dims_rope": geometry.axes,
        "guidance_embeds": false,
        "in_channels": 64,
        "joint_attention_dim": geometry.joint_dim,
        "num_attention_heads": geometry.num_heads,
        "num_layers": geometry.num_layers,
        "out_channels": 16,
        "patch_size": 2,
    })
}

/// The real statistics of the latents, whatever the width of the network.
fn vae(base_dim: usize) -> Value {
    json!({
        "_class_name": "AutoencoderKLQwenImage",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attn_scales": [],
        "base_dim": base_dim,
        "dim_mult": [1, 2, 4, 4],
        "dropout": 0.0,
        "latents_mean": [
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921
        ],
        "latents_std": [
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160
        ],
        "num_res_blocks": 2,
        "temperal_downsample": [false, true, true],
        "z_dim": 16,
    })
}

/// Dimensions of the text encoder that the prompt embeddings leave open.
struct TextDims {
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    vision: Value,
    /// Ids of end of text, end of turn, vision start, vision end, image and video.
    tokens: [usize; 6],
}

impl TextDims {
    fn published(hidden: usize) -> Result<Self> {
        if hidden == 0 || !hidden.is_multiple_of(128) {
            return Err(Error::usage("the width of the prompt embeddings does not fit the text encoder")
                .expected("a multiple of 128 (its heads' width)", hidden));
        }
        let heads = hidden / 128;
        Ok(Self {
            hidden,
            intermediate: 18_944,
            layers: 28,
            heads,
            kv_heads: [4, 2, 1].into_iter().find(|kv| heads.is_multiple_of(*kv)).expect("1 divides every number"),
            vocab: 152_064,
            vision: json!({
                "depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu", "hidden_size": 1280,
                "in_channels": 3, "in_chans": 3, "intermediate_size": 3420, "model_type": "qwen2_5_vl",
                "num_heads": 16, "out_hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2,
                "spatial_patch_size": 14, "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 112
            }),
            tokens: [151_643, 151_645, 151_652, 151_653, 151_655, 151_656],
        })
    }

    fn tiny(hidden: usize) -> Result<Self> {
        if hidden == 0 || !hidden.is_multiple_of(16) {
            return Err(Error::usage("the width of the prompt embeddings does not fit the tiny text encoder")
                .expected("a multiple of 16 (four heads whose halves are even)", hidden));
        }
        let id = |token: &str| tokenizer::special_id(token);
        Ok(Self {
            hidden,
            intermediate: hidden * 7 / 4,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            vocab: tokenizer::vocab_size().next_multiple_of(16),
            vision: json!({
                "depth": 1, "fullatt_block_indexes": [0], "hidden_act": "silu", "hidden_size": 32, "in_channels": 3,
                "intermediate_size": 48, "model_type": "qwen2_5_vl", "num_heads": 2, "out_hidden_size": hidden,
                "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 4,
                "window_size": 56
            }),
            tokens: [
                id("<|endoftext|>"),
                id("<|im_end|>"),
                id("<|vision_start|>"),
                id("<|vision_end|>"),
                id("<|image_pad|>"),
                id("<|video_pad|>"),
            ],
        })
    }

    /// `config.json` in the flat layout of the published repositories.
    fn config(&self) -> Value {
        let [end_of_text, end_of_turn, vision_start, vision_end, image, video] = self.tokens;
        // The frequencies of a head are dealt out to time, height and width as 2:3:3.
        let half = self.hidden / self.heads / 2;
        let (time, height) = (half / 4, (half - half / 4) / 2);
        json!({
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "attention_dropout": 0.0,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_turn,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "image_token_id": image,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 128_000,
            "max_window_layers": 28,
            "model_type": "qwen2_5_vl",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {
                "mrope_section": [time, height, half - time - height], "rope_type": "default", "type": "default"
            },
            "rope_theta": 1_000_000.0,
            "sliding_window": 32_768,
            "tie_word_embeddings": false,
            "transformers_version": "4.53.1",
            "use_cache": true,
            "use_sliding_window": false,
            "video_token_id": video,
            "vision_config": self.vision,
            "vision_end_token_id": vision_end,
            "vision_start_token_id": vision_start,
            "vision_token_id": 151_654.min(self.vocab - 1),
            "vocab_size": self.vocab,
        })
    }
}
