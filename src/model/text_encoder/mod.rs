//! The text encoder: the language model of Qwen2.5-VL, up to and with its final norm. Inference only.
//!
//! Prompts are never padded: those of a group lie one after the other and share the matrix products, and since
//! attention is causal a prompt's result is the same alone and in any company.

mod config;
mod layer;
mod prompts;

pub use config::{TextEncoderConfig, VisionConfig};
pub use prompts::{PromptEncoder, pad_embeds};

use crate::error::{Error, Result};
use crate::io::Weights;
use crate::kernels::Value;
use crate::kernels::causal_attention::HalfRope;
use crate::kernels::norm::rms_norm;
use candle_core::{DType, Device, Tensor};
use layer::DecoderLayer;
use std::path::Path;

/// Where the layers are between two calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// On disk: each layer is read, run over all prompts, and dropped. The published model then needs 1.0 GB for one
    /// prompt and 1.6 GB for 2,500 tokens, instead of the 15 GB of its weights in bf16.
    Streamed,
    /// In memory, in this dtype (f32, or bf16 for half the memory). Computation is in f32 either way.
    Resident(DType),
}

/// Tokens that a layer works on at once; more prompts than that go through it in groups.
const GROUP_TOKENS: usize = 2048;

/// The text encoder.
pub struct TextEncoder {
    config: TextEncoderConfig,
    weights: Weights,
    /// `model.`, or `model.language_model.` in files of newer transformers.
    prefix: &'static str,
    /// Empty when streamed.
    resident: Vec<DecoderLayer>,
    norm: Value,
}

/// Tensors that belong to the checkpoint but not to what a text prompt runs through.
fn is_unused(name: &str) -> bool {
    ["visual.", "model.visual.", "lm_head."].iter().any(|prefix| name.starts_with(prefix))
}

impl TextEncoder {
    /// Loads the folder `text_encoder/`: `config.json` and the weights beside it.
    ///
    /// Errors: those of [`TextEncoderConfig::from_file`]; a missing, misshapen or unknown tensor.
    pub fn load(folder: &Path, residency: Residency) -> Result<Self> {
        let config = TextEncoderConfig::from_file(&folder.join("config.json"))?;
        Self::from_weights(config, Weights::open_folder(folder)?, residency)
    }

    /// Builds the network from weights that fit `config`; the vision tower and `lm_head` may be absent.
    pub fn from_weights(config: TextEncoderConfig, weights: Weights, residency: Residency) -> Result<Self> {
        let nested = "model.language_model.";
        let prefix = if weights.names().any(|n| n.starts_with(nested)) { nested } else { "model." };
        let expected: Vec<_> = config.language_model_tensors();
        let expected: Vec<_> = expected.into_iter().map(|(n, s)| (n.replacen("model.", prefix, 1), s)).collect();
        weights.check(&expected, is_unused)?;
        let norm = weights.get(&format!("{prefix}norm.weight"), &[config.hidden_size], DType::F32, &Device::Cpu)?;
        let mut encoder = Self { config, weights, prefix, resident: Vec::new(), norm: Value::constant(norm) };
        if let Residency::Resident(dtype) = residency {
            let layers = 0..encoder.config.num_hidden_layers;
            encoder.resident = layers.map(|i| encoder.load_layer(i, dtype)).collect::<Result<_>>()?;
        }
        Ok(encoder)
    }

    /// The model's dimensions.
    pub fn config(&self) -> &TextEncoderConfig {
        &self.config
    }

    fn load_layer(&self, index: usize, dtype: DType) -> Result<DecoderLayer> {
        DecoderLayer::load(&self.config, |name, shape| {
            self.weights.get(&format!("{}layers.{index}.{name}", self.prefix), shape, dtype, &Device::Cpu)
        })
    }

    /// Token embeddings (T, hidden_size), read from the file row by row.
    ///
    /// Errors: an id that the embedding table does not have.
    pub fn embed_tokens(&self, ids: &[u32]) -> Result<Tensor> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let rows: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
        self.weights.rows(&format!("{}embed_tokens.weight", self.prefix), &shape, &rows, DType::F32).map_err(|e| {
            let worst = ids.iter().max().copied().unwrap_or(0) as usize;
            if worst < self.config.vocab_size { e } else { e.hint("tokenizer and text encoder do not belong together") }
        })
    }

    /// The last hidden state of every token, after the final norm: for each prompt (tokens, hidden_size), in f32.
    ///
    /// Between layers the hidden states of all prompts are held (4 bytes times `hidden_size` a token).
    /// `layer_done` is called with 1, 2, ... as the layers finish.
    pub fn encode(&self, prompts: &[Vec<u32>], mut layer_done: impl FnMut(usize)) -> Result<Vec<Tensor>> {
        if let Some(empty) = prompts.iter().position(Vec::is_empty) {
            return Err(Error::run(format!("prompt {empty} has no tokens")));
        }
        let groups = groups(prompts);
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let rope = HalfRope::new(longest, self.config.head_dim, self.config.rope_theta);
        let embed = |group: &&[Vec<u32>]| self.embed_tokens(&group.concat());
        let mut states: Vec<Tensor> = groups.iter().map(embed).collect::<Result<_>>()?;
        let lengths: Vec<Vec<usize>> = groups.iter().map(|g| g.iter().map(Vec::len).collect()).collect();
        for index in 0..self.config.num_hidden_layers {
            let streamed;
            let layer = match self.resident.get(index) {
                Some(layer) => layer,
                None => {
                    streamed = self.load_layer(index, DType::F32)?;
                    &streamed
                }
            };
            for (state, lengths) in states.iter_mut().zip(&lengths) {
                *state = layer.forward(state, lengths, &rope)?;
            }
            layer_done(index + 1);
        }
        let mut out = Vec::with_capacity(prompts.len());
        for (state, lengths) in states.into_iter().zip(&lengths) {
            let state = rms_norm(&Value::constant(state), &self.norm, self.config.rms_norm_eps as f32)?.into_tensor();
            let mut start = 0;
            for &length in lengths {
                out.push(state.narrow(0, start, length)?);
                start += length;
            }
        }
        Ok(out)
    }
}

/// Consecutive prompts of together at most `GROUP_TOKENS`, or single longer ones.
fn groups(prompts: &[Vec<u32>]) -> Vec<&[Vec<u32>]> {
    let mut tokens = 0;
    let mut starts: Vec<usize> = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        tokens += prompt.len();
        if starts.is_empty() || tokens > GROUP_TOKENS {
            starts.push(i);
            tokens = prompt.len();
        }
    }
    let ends = starts.iter().skip(1).copied().chain([prompts.len()]);
    starts.iter().zip(ends).map(|(&start, end)| &prompts[start..end]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_hold_every_prompt_once_and_stay_small() {
        let prompts: Vec<Vec<u32>> = [1000, 1000, 48, 1, 3000, 5].map(|n| vec![0; n]).into();
        let sizes: Vec<Vec<usize>> = groups(&prompts).iter().map(|g| g.iter().map(Vec::len).collect()).collect();
        assert_eq!(sizes, [vec![1000, 1000, 48], vec![1], vec![3000], vec![5]]);
        assert!(groups(&[]).is_empty());
    }
}
