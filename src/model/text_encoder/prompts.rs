//! From captions to prompt embeddings: template, tokens, hidden states, prefix dropped.

use super::TextEncoder;
use crate::error::{Error, Result};
use crate::model::tokenizer::{MAX_PROMPT_TOKENS, PromptTokenizer};
use crate::prompt::Template;
use candle_core::Tensor;

/// Tokenizer, template and text encoder together.
pub struct PromptEncoder<'a> {
    /// Text to ids.
    pub tokenizer: &'a PromptTokenizer,
    /// Ids to hidden states.
    pub text_encoder: &'a TextEncoder,
    /// What a caption is put into.
    pub template: Template,
    /// Embeddings kept of a prompt at most: 1024, or less.
    pub max_sequence_length: usize,
}

impl<'a> PromptEncoder<'a> {
    /// With the longest prompts that the original allows.
    pub fn new(tokenizer: &'a PromptTokenizer, text_encoder: &'a TextEncoder, template: Template) -> Self {
        Self { tokenizer, text_encoder, template, max_sequence_length: MAX_PROMPT_TOKENS }
    }

    /// The embeddings of each caption: (tokens, hidden_size) without the template's prefix, in f32.
    ///
    /// `layer_done` is called with 1, 2, ... as the layers of the text encoder finish.
    pub fn encode(&self, captions: &[&str], layer_done: impl FnMut(usize)) -> Result<Vec<Tensor>> {
        let prompts: Vec<Vec<u32>> =
            captions.iter().map(|c| self.tokenizer.encode_prompt(&self.template, c)).collect::<Result<_>>()?;
        let drop = self.tokenizer.num_prefix_tokens(&self.template)?;
        let embeds = |(state, caption): (Tensor, &&str)| -> Result<Tensor> {
            let kept = state.dims()[0].saturating_sub(drop).min(self.max_sequence_length);
            if kept == 0 {
                return Err(Error::run(format!(
                    "the prompt of {caption:?} has no tokens behind the template's prefix"
                ))
                .hint("tokenizer and template do not belong together"));
            }
            Ok(state.narrow(0, drop, kept)?)
        };
        self.text_encoder.encode(&prompts, layer_done)?.into_iter().zip(captions).map(embeds).collect()
    }
}

/// Stacks embeddings of different lengths, with zeros behind the shorter ones: (B, longest, D), and the lengths.
pub fn pad_embeds(embeds: &[Tensor]) -> Result<(Tensor, Vec<usize>)> {
    let lengths: Vec<usize> = embeds.iter().map(|e| e.dims()[0]).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let padded = |e: &Tensor| e.pad_with_zeros(0, 0, longest - e.dims()[0]);
    let rows: Vec<Tensor> = embeds.iter().map(padded).collect::<candle_core::Result<_>>()?;
    Ok((Tensor::stack(&rows, 0)?, lengths))
}
