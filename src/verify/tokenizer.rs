//! `te.N.input_ids`: the token ids of each prompt inside the template.

use super::{Case, Computed};
use crate::error::Result;
use crate::model::tokenizer::PromptTokenizer;
use crate::prompt::Template;

pub(super) fn covers(name: &str) -> bool {
    name.starts_with("te.") && name.ends_with(".input_ids")
}

pub(super) fn run(case: &Case) -> Result<Vec<Computed>> {
    let tokenizer = PromptTokenizer::load(&case.model.join("tokenizer"))?;
    let template = Template::parse(&case.json.get::<String>("te.template")?)?;
    let mut computed = Vec::new();
    for (i, prompt) in case.json.get::<Vec<String>>("te.prompts")?.iter().enumerate() {
        let ids = tokenizer.encode_prompt(&template, prompt)?;
        computed.push(Computed::integers(format!("te.{i}.input_ids"), ids.into_iter().map(i64::from))?);
    }
    Ok(computed)
}
