//! `qwen-lora world`: a drawn world to train on, and checks of what a model makes of it.

mod distance;
mod score;

use crate::cli::{Threads, print_line};
use crate::data::image as photo;
use crate::error::{Error, Result};
use crate::world::check::check;
use crate::world::check::report::Report;
use crate::world::folder::{Series, read_index, with_trigger};
use crate::world::split::Pool;
use crate::world::{Kind, SIDE, Split, Style};
use clap::{Args, Subcommand};
use serde_json::json;
use std::path::PathBuf;

/// A small drawn world: pictures to train on, held-out prompts, and checks without a network.
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
    Check(CheckArgs),
    Score(score::ScoreArgs),
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
    #[command(flatten)]
    threads: Threads,
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

/// Check pictures against what their index says that they show: without any network, by colours and outlines.
///
/// Objects: number, colour, shape, position. Figures: number, colour, pose, position, and whether each has two hands on
/// two arms and two feet on two legs of plausible length, with nothing loose and nothing too many.
#[derive(Args, Clone, Debug)]
struct CheckArgs {
    /// A folder with `index.jsonl`, from `world draw` or `world score --out`
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Also name each picture that is not as it should be, and what was found in it; with --json, say of each picture
    /// what is right
    #[arg(long)]
    list: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: &WorldArgs) -> Result<()> {
    match &args.verb {
        WorldVerb::Draw(args) => draw(args),
        WorldVerb::Prompts(args) => prompts(args),
        WorldVerb::Check(args) => check_folder(args),
        WorldVerb::Score(args) => score::run(args),
    }
}

fn draw(args: &DrawArgs) -> Result<()> {
    args.threads.start()?;
    let pool = Pool::new(args.which.split, args.which.kind);
    let series =
        Series { count: args.count, seed: args.seed, styles: args.style.clone(), trigger: args.trigger.clone() };
    series.write(&pool, &args.out)?;
    print_line(format_args!("drew {} pictures in {}", args.count, args.out.display()))
}

fn prompts(args: &PromptsArgs) -> Result<()> {
    for (scene, caption) in Pool::new(args.which.split, args.which.kind).prompts(args.seed, args.count)? {
        let prompt = with_trigger(args.trigger.as_deref(), &caption.text(scene));
        print_line(json!({"prompt": prompt, "language": caption.language, "scene": scene}))?;
    }
    Ok(())
}

fn check_folder(args: &CheckArgs) -> Result<()> {
    let mut report = Report::default();
    let mut list = Vec::new();
    for entry in read_index(&args.folder)? {
        let path = args.folder.join(&entry.file);
        let image = photo::load(&path)?;
        if image.dimensions() != (SIDE as u32, SIDE as u32) {
            return Err(Error::usage(format!("`{}` is no picture of the world", path.display()))
                .expected(format!("{SIDE}x{SIDE} pixels"), format!("{}x{}", image.width(), image.height())));
        }
        let verdict = check(&image, entry.scene);
        let whole = verdict.found.anatomy.as_ref().is_none_or(|a| a.flaws.is_empty());
        if args.list && !args.json && !(verdict.all() && whole) {
            print_line(format_args!("{}: {}: {}", entry.file, entry.caption, json!(verdict.found)))?;
        }
        report.add(&image, entry.scene, &verdict);
        if args.list && args.json {
            let anatomy = verdict.found.anatomy.as_ref();
            list.push(json!({
                "file": entry.file,
                "attributes": verdict.all(),
                "hand_error": anatomy.map(|a| a.hand_error()),
                "limb_error": anatomy.map(|a| a.limb_error()),
            }));
        }
    }
    if args.json {
        let mut json = report.to_json();
        if args.list {
            json["list"] = list.into();
        }
        return print_line(json);
    }
    report.lines().iter().try_for_each(print_line)
}
