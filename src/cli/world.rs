//! `qwen-lora world`: the drawn world that `synthetic:world` is trained on.

use crate::cli::{print_line, use_threads};
use crate::error::{Error, Result};
use crate::world::folder::{Series, with_trigger};
use crate::world::split::Pool;
use crate::world::{Kind, Split, Style};
use clap::{Args, Subcommand};
use serde_json::json;
use std::path::PathBuf;

/// Draw the small world that `synthetic:world` knows.
///
/// Coloured objects and stick figures on a light ground, 128x128 pixels, with captions in English and Chinese. Every
/// picture is a function of the seed and its number.
#[derive(Args, Clone, Debug)]
pub struct WorldArgs {
    #[command(subcommand)]
    verb: WorldVerb,
}

#[derive(Subcommand, Clone, Debug)]
enum WorldVerb {
    Draw(DrawArgs),
    Prompts(PromptsArgs),
}

/// Draw pictures with captions, and an index of what is exactly where.
#[derive(Args, Clone, Debug)]
struct DrawArgs {
    /// The new folder: `000000.png`, `000000.txt`, ..., `index.jsonl`
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number of pictures
    #[arg(long, value_name = "N", default_value_t = 1000)]
    count: usize,
    /// Seed of everything that is drawn by chance
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    which: Which,
    /// How things are painted; several styles take turns
    #[arg(long, value_enum, value_name = "STYLE", value_delimiter = ',', default_value = "plain")]
    style: Vec<Style>,
    /// A word put before each caption
    #[arg(long, value_name = "WORD")]
    trigger: Option<String>,
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// Which scenes.
#[derive(Args, Clone, Debug)]
struct Which {
    /// The scenes to train on, or the combinations of attributes that are kept from training
    #[arg(long, value_enum, default_value_t = Split::Train)]
    split: Split,
    /// What is shown
    #[arg(long, value_enum, default_value_t = Kind::All)]
    kind: Kind,
}

/// Print prompts as JSON lines, each with the attributes that it asks for.
#[derive(Args, Clone, Debug)]
struct PromptsArgs {
    /// Number of prompts, all different
    #[arg(long, value_name = "N", default_value_t = 500)]
    count: usize,
    /// Seed of their order
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    which: Which,
    /// A word put before each prompt
    #[arg(long, value_name = "WORD")]
    trigger: Option<String>,
}

/// Runs the verb.
pub fn run(args: &WorldArgs) -> Result<()> {
    match &args.verb {
        WorldVerb::Draw(args) => draw(args),
        WorldVerb::Prompts(args) => prompts(args),
    }
}

fn draw(args: &DrawArgs) -> Result<()> {
    use_threads(args.threads)?;
    let pool = Pool::new(args.which.split, args.which.kind);
    let series =
        Series { count: args.count, seed: args.seed, styles: args.style.clone(), trigger: args.trigger.clone() };
    series.write(&pool, &args.out)?;
    print_line(format_args!("drew {} pictures in {}", args.count, args.out.display()))
}

fn prompts(args: &PromptsArgs) -> Result<()> {
    let prompts = Pool::new(args.which.split, args.which.kind).prompts(args.seed, args.count);
    if prompts.len() < args.count {
        return Err(Error::usage(format!("there are no {} different prompts", args.count))
            .expected(format!("at most {}", prompts.len()), args.count));
    }
    for (scene, caption) in prompts {
        let prompt = with_trigger(args.trigger.as_deref(), &caption.text(scene));
        print_line(json!({"prompt": prompt, "language": caption.language, "scene": scene}))?;
    }
    Ok(())
}
