//! `text_encoder/config.json` in both of its layouts, and the names and shapes of the tensors that belong to it.

use crate::error::Result;
use crate::io::JsonObject;
use std::path::Path;

/// Dimensions of a `Qwen2_5_VLForConditionalGeneration`.
///
/// Source: <https://github.com/huggingface/transformers/blob/aa0dc95c2f288788c2cf06eb3e17bb182cea66d0/src/transformers/models/qwen2_5_vl/configuration_qwen2_5_vl.py>
#[derive(Clone, Debug, PartialEq)]
pub struct TextEncoderConfig {
    /// Width of the residual stream, and of the prompt embeddings.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the output head is the embedding table, so that the file has no `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// The vision tower, which prompts without images never use.
    pub vision: Option<VisionConfig>,
}

/// Dimensions of the vision tower, as far as they decide the shapes of its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Number of blocks.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Width of what the merger hands to the language model.
    pub out_hidden_size: usize,
    /// Image channels.
    pub in_channels: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Frames of a patch.
    pub temporal_patch_size: usize,
    /// Side, in patches, of the square that the merger makes one token of.
    pub spatial_merge_size: usize,
}

impl TextEncoderConfig {
    /// Reads `text_encoder/config.json`: flat, as transformers 4.5x and the published repositories have it, or nested
    /// under `text_config` with `rope_parameters`, as newer ones write it.
    ///
    /// Errors: another model type, a missing key, a value of the wrong type, an option that is not implemented.
    pub fn from_file(path: &Path) -> Result<Self> {
        let json = JsonObject::open(path)?;
        let model_type: String = json.get_or("model_type", "qwen2_5_vl".into())?;
        if !model_type.starts_with("qwen2_5_vl") {
            let error = json.bad_value("model_type", "qwen2_5_vl", &model_type);
            return Err(if model_type.starts_with("qwen3_vl") {
                error.hint("this is the text encoder of Qwen-Image-2.1, another architecture")
            } else {
                error
            });
        }
        let vision = json.section("vision_config")?.map(|v| VisionConfig::from_json(&v)).transpose()?;
        let tie_word_embeddings = json.get_or("tie_word_embeddings", false)?;
        let nested = json.section("text_config")?.filter(|t| t.has("hidden_size"));
        let text = nested.unwrap_or(json);
        let positive = |key: &str| match text.get::<usize>(key)? {
            0 => Err(text.bad_value(key, "at least 1", 0)),
            value => Ok(value),
        };
        let hidden_size = positive("hidden_size")?;
        let num_attention_heads = positive("num_attention_heads")?;
        let num_key_value_heads = positive("num_key_value_heads")?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads {num_attention_heads}");
            return Err(text.bad_value("num_key_value_heads", expected, num_key_value_heads));
        }
        let head_dim = text.get_or("head_dim", hidden_size / num_attention_heads)?;
        if head_dim == 0 || head_dim % 2 == 1 {
            return Err(text.bad_value("head_dim", "an even number", head_dim));
        }
        let activation: String = text.get_or("hidden_act", "silu".into())?;
        if activation != "silu" {
            return Err(text.bad_value("hidden_act", "silu", activation));
        }
        if text.get_or("use_sliding_window", false)? {
            return Err(text.bad_value("use_sliding_window", "false", "true: sliding windows are not implemented"));
        }
        Ok(Self {
            hidden_size,
            intermediate_size: positive("intermediate_size")?,
            num_hidden_layers: positive("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: positive("vocab_size")?,
            rms_norm_eps: text.get_or("rms_norm_eps", 1e-6)?,
            rope_theta: rope_theta(&text)?,
            tie_word_embeddings,
            vision,
        })
    }

    /// Every tensor of the published layout, with its shape: the language model under `model.`, `lm_head.weight`
    /// unless it is tied, and the vision tower under `visual.` where the config has one.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = self.language_model_tensors();
        if !self.tie_word_embeddings {
            list.push(("lm_head.weight".into(), vec![self.vocab_size, self.hidden_size]));
        }
        list.extend(self.vision.iter().flat_map(VisionConfig::tensors));
        list
    }

    /// The tensors that a prompt needs: `model.embed_tokens`, `model.layers.*`, `model.norm`.
    pub fn language_model_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = vec![("model.embed_tokens.weight".into(), vec![self.vocab_size, self.hidden_size])];
        for layer in 0..self.num_hidden_layers {
            list.extend(self.layer_tensors().into_iter().map(|(n, s)| (format!("model.layers.{layer}.{n}"), s)));
        }
        list.push(("model.norm.weight".into(), vec![self.hidden_size]));
        list
    }

    /// The tensors of one decoder layer.
    pub(super) fn layer_tensors(&self) -> [(&'static str, Vec<usize>); 12] {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        [
            ("input_layernorm.weight", vec![hidden]),
            ("self_attn.q_proj.weight", vec![queries, hidden]),
            ("self_attn.q_proj.bias", vec![queries]),
            ("self_attn.k_proj.weight", vec![keys, hidden]),
            ("self_attn.k_proj.bias", vec![keys]),
            ("self_attn.v_proj.weight", vec![keys, hidden]),
            ("self_attn.v_proj.bias", vec![keys]),
            ("self_attn.o_proj.weight", vec![hidden, queries]),
            ("post_attention_layernorm.weight", vec![hidden]),
            ("mlp.gate_proj.weight", vec![inner, hidden]),
            ("mlp.up_proj.weight", vec![inner, hidden]),
            ("mlp.down_proj.weight", vec![hidden, inner]),
        ]
    }
}

/// The rotary base, from `rope_parameters` (nested layout) or the flat `rope_theta`; kinds of scaling other than the
/// three-axis positions of Qwen2.5-VL, which text alone does not use, are refused.
fn rope_theta(text: &JsonObject) -> Result<f64> {
    let mut theta = text.optional("rope_theta")?;
    for section in ["rope_parameters", "rope_scaling"] {
        let Some(rope) = text.section(section)? else { continue };
        for key in ["rope_type", "type"] {
            let kind: String = rope.get_or(key, "default".into())?;
            if !["default", "mrope"].contains(&kind.as_str()) {
                return Err(rope.bad_value(key, "default or mrope", kind));
            }
        }
        theta = rope.optional("rope_theta")?.or(theta);
    }
    match theta {
        Some(theta) if theta > 0.0 => Ok(theta),
        Some(theta) => Err(text.bad_value("rope_theta", "a positive number", theta)),
        None => text.get("rope_theta"),
    }
}

impl VisionConfig {
    fn from_json(json: &JsonObject) -> Result<Self> {
        Ok(Self {
            depth: json.get("depth")?,
            hidden_size: json.get("hidden_size")?,
            intermediate_size: json.get("intermediate_size")?,
            out_hidden_size: json.get("out_hidden_size")?,
            // The first published configs call it in_chans.
            in_channels: json.get_or("in_channels", json.get_or("in_chans", 3)?)?,
            patch_size: json.get("patch_size")?,
            temporal_patch_size: json.get_or("temporal_patch_size", 2)?,
            spatial_merge_size: json.get_or("spatial_merge_size", 2)?,
        })
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, inner, patch) = (self.hidden_size, self.intermediate_size, self.patch_size);
        let merged = hidden * self.spatial_merge_size.pow(2);
        let mut list = vec![(
            "visual.patch_embed.proj.weight".into(),
            vec![hidden, self.in_channels, self.temporal_patch_size, patch, patch],
        )];
        for block in 0..self.depth {
            let of_block = [
                ("norm1.weight", vec![hidden]),
                ("attn.qkv.weight", vec![3 * hidden, hidden]),
                ("attn.qkv.bias", vec![3 * hidden]),
                ("attn.proj.weight", vec![hidden, hidden]),
                ("attn.proj.bias", vec![hidden]),
                ("norm2.weight", vec![hidden]),
                ("mlp.gate_proj.weight", vec![inner, hidden]),
                ("mlp.gate_proj.bias", vec![inner]),
                ("mlp.up_proj.weight", vec![inner, hidden]),
                ("mlp.up_proj.bias", vec![inner]),
                ("mlp.down_proj.weight", vec![hidden, inner]),
                ("mlp.down_proj.bias", vec![hidden]),
            ];
            list.extend(of_block.into_iter().map(|(n, s)| (format!("visual.blocks.{block}.{n}"), s)));
        }
        let merger = [
            ("ln_q.weight", vec![hidden]),
            ("mlp.0.weight", vec![merged, merged]),
            ("mlp.0.bias", vec![merged]),
            ("mlp.2.weight", vec![self.out_hidden_size, merged]),
            ("mlp.2.bias", vec![self.out_hidden_size]),
        ];
        list.extend(merger.into_iter().map(|(n, s)| (format!("visual.merger.{n}"), s)));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLAT: &str = r#"{"model_type": "qwen2_5_vl", "hidden_act": "silu", "hidden_size": 3584,
        "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"}, "rope_theta": 1000000.0,
        "use_sliding_window": false, "tie_word_embeddings": false, "vocab_size": 152064, "vision_config": {"depth": 32,
        "hidden_size": 1280, "in_chans": 3, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}}"#;

    const NESTED: &str = r#"{"model_type": "qwen2_5_vl", "tie_word_embeddings": false, "text_config": {
        "model_type": "qwen2_5_vl_text", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "vocab_size": 152064,
        "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1000000.0, "rope_type": "default"}},
        "vision_config": {"depth": 32, "hidden_size": 1280, "in_channels": 3, "intermediate_size": 3420,
        "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}}"#;

    fn parse(text: &str) -> Result<TextEncoderConfig> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        TextEncoderConfig::from_file(&path)
    }

    #[test]
    fn both_layouts_say_the_same_and_give_the_published_size() {
        let config = parse(FLAT).unwrap();
        assert_eq!(config, parse(NESTED).unwrap());
        assert_eq!((config.head_dim, config.rope_theta), (128, 1e6));
        let tensors = config.tensors();
        let parameters: usize = tensors.iter().map(|(_, s)| s.iter().product::<usize>()).sum();
        // total_size of the published index, 16,584,333,312 bytes in bf16.
        assert_eq!((tensors.len(), parameters), (729, 8_292_166_656));
    }

    #[test]
    fn what_cannot_be_run_is_refused_by_name() {
        for (from, to, word) in [
            ("\"hidden_size\": 3584", "\"hidden_size\": \"big\"", "`hidden_size`"),
            (
                "\"num_key_value_heads\": 4",
                "\"num_key_value_heads\": 5",
                "a divisor of num_attention_heads 28, found 5",
            ),
            ("\"type\": \"mrope\"", "\"type\": \"yarn\"", "`rope_scaling.type`"),
            ("\"use_sliding_window\": false", "\"use_sliding_window\": true", "sliding windows"),
            ("\"rope_theta\": 1000000.0", "\"rope_thet\": 1000000.0", "key `rope_theta` is missing"),
            ("qwen2_5_vl", "qwen3_vl", "Qwen-Image-2.1"),
            ("\"depth\": 32", "\"dept\": 32", "key `vision_config.depth` is missing"),
        ] {
            let error = parse(&FLAT.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
