//! `te.*`: prompt embeddings of single prompts and of all together, and what lies before them.

use super::{Case, Computed};
use crate::error::Result;
use crate::model::text_encoder::{PromptEncoder, Residency, TextEncoder, pad_embeds};
use crate::model::tokenizer::PromptTokenizer;
use crate::prompt::Template;

pub(super) fn run(case: &Case) -> Result<Vec<Computed>> {
    let tokenizer = PromptTokenizer::load(&case.model.join("tokenizer"))?;
    let text_encoder = TextEncoder::load(&case.model.join("text_encoder"), Residency::Streamed)?;
    let template = Template::parse(&case.json.get::<String>("te.template")?)?;
    let prompts: Vec<String> = case.json.get("te.prompts")?;
    let encoder = PromptEncoder::new(&tokenizer, &text_encoder, template.clone());
    let mut computed = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        if case.has(&format!("te.{i}.prompt_embeds")) {
            let embeds = encoder.encode(&[prompt], |_| {})?.remove(0);
            computed.push(Computed::new(format!("te.{i}.prompt_embeds"), embeds.unsqueeze(0)?));
        }
        let ids = tokenizer.encode_prompt(&template, prompt)?;
        if case.has(&format!("te.{i}.embeddings")) {
            let embeddings = text_encoder.embed_tokens(&ids)?;
            computed.push(Computed::new(format!("te.{i}.embeddings"), embeddings.unsqueeze(0)?));
        }
        if case.has(&format!("te.{i}.all_hidden_last")) {
            let hidden = text_encoder.encode(&[ids], |_| {})?.remove(0);
            computed.push(Computed::new(format!("te.{i}.all_hidden_last"), hidden.unsqueeze(0)?));
        }
    }
    if case.has("te.batch.prompt_embeds") {
        let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
        let (embeds, lengths) = pad_embeds(&encoder.encode(&prompts, |_| {})?)?;
        let longest = embeds.dims()[1];
        let mask = lengths.iter().flat_map(|&n| (0..longest).map(move |j| i64::from(j < n)));
        let mask = Computed::integers("te.batch.prompt_embeds_mask", mask)?;
        computed.push(Computed::new(mask.name, mask.tensor.reshape((lengths.len(), longest))?));
        computed.push(Computed::new("te.batch.prompt_embeds", embeds));
    }
    Ok(computed)
}
