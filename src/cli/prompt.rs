//! `qwen-lora prompt`: structured prompts from their parts.

use crate::cli::print_line;
use crate::error::{Error, Result};
use crate::io::write_atomic;
use crate::model::source::{ModelSource, ModelSpec};
use crate::model::tokenizer::PromptTokenizer;
use crate::prompt::structured::{Parts, Prompt};
use crate::prompt::table;
use crate::sample::stages::MAX_SEQUENCE_LENGTH;
use clap::Args;
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Build structured prompts: quality, subject, style, details, anatomy; unwanted things in the negative prompt.
///
/// `{a|b|c}` in any part stands for one of the alternatives. `generate --prompt` and the previews of a run take the same
/// parts inline: `--prompt '{subject: 女孩, style: 赛博朋克, detail: [蓝色长发]}'`.
#[derive(Args, Clone, Debug)]
pub struct PromptArgs {
    /// Who or what is shown
    #[arg(long, value_name = "TEXT", required_unless_present = "table")]
    subject: Option<String>,
    /// The style, such as 赛博朋克
    #[arg(long, value_name = "TEXT")]
    style: Option<String>,
    /// A detail of the subject (repeatable)
    #[arg(long = "detail", value_name = "TEXT")]
    details: Vec<String>,
    /// A technical term in English, such as "sharp focus" (repeatable)
    #[arg(long = "english", value_name = "TEXT")]
    english: Vec<String>,
    /// Words for quality; an empty text for none [default: those of the model card]
    #[arg(long, value_name = "TEXT")]
    quality: Option<String>,
    /// Emphasis on anatomy; an empty text for none [default: whole hands, five fingers, proportions]
    #[arg(long, value_name = "TEXT")]
    anatomy: Option<String>,
    /// The negative prompt [default: that of the model card, and extra limbs]
    #[arg(long, value_name = "TEXT")]
    negative: Option<String>,
    /// Write what is not wanted into the prompt as negations, as the original recipe did. It works less well: a text
    /// encoder hardly reads a "no"
    #[arg(long)]
    recipe_style: bool,
    /// A table of prompts instead: CSV with columns named like these arguments, or a YAML list of maps
    #[arg(long, value_name = "FILE", conflicts_with_all = ["subject", "style", "details", "english", "quality", "anatomy", "negative", "recipe_style"])]
    table: Option<PathBuf>,
    /// Prompts to make of each row, with different alternatives
    #[arg(long, value_name = "N", default_value_t = 1)]
    variations: u64,
    /// Seed of the alternatives
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Count tokens with this model's tokenizer: hub id, folder, `synthetic:world` or `synthetic:tiny`
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Take a hub model from the local cache only
    #[arg(long)]
    offline: bool,
    /// Also write the prompts to a file for `generate --prompt-file`, one a line
    #[arg(long, value_name = "FILE.txt")]
    output: Option<PathBuf>,
    /// Print the prompts as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the verb. Errors (usage): an empty subject, a bad table, a model without tokenizer, an output that is there.
pub fn run(args: &PromptArgs) -> Result<()> {
    if args.variations == 0 {
        return Err(Error::usage("`--variations` is 0").expected("1 or more", 0));
    }
    let rows = match &args.table {
        Some(path) => table::read(path)?,
        None => vec![parts(args)?],
    };
    let tokenizer = args.model.as_deref().map(|model| load_tokenizer(model, args.offline)).transpose()?;
    let index = |row: usize, variation: u64| row as u64 * args.variations + variation;
    let prompts: Vec<Prompt> = rows
        .iter()
        .enumerate()
        .flat_map(|(i, row)| (0..args.variations).map(move |v| row.build(args.seed, index(i, v))))
        .collect();
    let counts =
        |text: &str| -> Result<Option<usize>> { tokenizer.as_ref().map(|t| Ok(t.encode(text)?.len())).transpose() };
    let tokens: Vec<(Option<usize>, Option<usize>)> =
        prompts.iter().map(|p| Ok((counts(&p.prompt)?, counts(&p.negative_prompt)?))).collect::<Result<_>>()?;
    if let Some(path) = &args.output {
        write_lines(path, &prompts)?;
    }
    if args.json {
        let prompt = |(p, (positive, negative)): (&Prompt, &(Option<usize>, Option<usize>))| json!({"prompt": p.prompt, "negative_prompt": p.negative_prompt, "tokens": positive, "negative_tokens": negative});
        return print_line(json!({"prompts": prompts.iter().zip(&tokens).map(prompt).collect::<Vec<_>>()}));
    }
    for (i, (prompt, (positive, negative))) in prompts.iter().zip(&tokens).enumerate() {
        if i > 0 {
            print_line("")?;
        }
        print_line(format!("prompt: {}", prompt.prompt))?;
        print_line(format!("negative prompt: {}", prompt.negative_prompt))?;
        if let (Some(positive), Some(negative)) = (positive, negative) {
            print_line(format!("tokens: {positive}, negative {negative} ({})", limit((*positive).max(*negative))))?;
        }
    }
    Ok(())
}

fn parts(args: &PromptArgs) -> Result<Parts> {
    let parts = Parts {
        subject: args.subject.clone().unwrap_or_default(),
        style: args.style.clone(),
        detail: args.details.clone(),
        english: args.english.clone(),
        quality: args.quality.clone(),
        anatomy: args.anatomy.clone(),
        negative: args.negative.clone(),
        recipe_style: args.recipe_style,
    };
    parts.check().map(|()| parts)
}

fn load_tokenizer(model: &str, offline: bool) -> Result<PromptTokenizer> {
    let pipeline = ModelSource::resolve(&ModelSpec { offline, ..ModelSpec::new(model) })?;
    PromptTokenizer::load(&pipeline.tokenizer)
}

/// The text encoder keeps so many tokens of a prompt, those of the template's end included.
fn limit(tokens: usize) -> String {
    if tokens > MAX_SEQUENCE_LENGTH {
        format!("over the limit of {MAX_SEQUENCE_LENGTH}: the end is cut off")
    } else {
        format!("the limit is {MAX_SEQUENCE_LENGTH}")
    }
}

fn write_lines(path: &Path, prompts: &[Prompt]) -> Result<()> {
    if path.exists() {
        return Err(Error::usage(format!("`{}` is there already", path.display())).hint("give another `--output`"));
    }
    write_atomic(path, |file| prompts.iter().try_for_each(|p| writeln!(file, "{}", p.prompt.replace('\n', " "))))
}
