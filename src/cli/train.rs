//! `qwen-lora train`.

use crate::cli::{Threads, print_line};
use crate::config::{Config, MemorySize, Preview};
use crate::error::Result;
use crate::prompt::structured::expand_all;
use crate::train::interrupt;
use crate::train::run::{Options, train};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Train an adapter as a config file says.
#[derive(Args)]
pub struct TrainArgs {
    /// The YAML file that describes the run; `docs/config.md` lists its keys.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Override a key of the config: `--set training.max_steps=100`. May be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Continue the run in the output folder from its last whole checkpoint; start it if there is none.
    #[arg(long, value_name = "HOW")]
    resume: Option<Resume>,
    /// Check config, images and model, say what would be trained, and stop.
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: which types, `training.checkpointing`, `model.modulation` and `model.blocks_to_swap` fit into a GPU with so
    /// much memory, such as 24GB or 16GiB, whether there is one here or not; with `device: cpu` into a machine with so much. A tenth
    /// is left for what is not counted.
    #[arg(long, value_name = "SIZE", requires = "dry_run")]
    memory: Option<MemorySize>,
    #[command(flatten)]
    threads: Threads,
    /// Show no progress and no notes.
    #[arg(long)]
    quiet: bool,
    /// Print the outcome as one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Resume {
    /// From the last whole checkpoint.
    Auto,
}

/// Runs the verb.
pub fn run(args: &TrainArgs) -> Result<()> {
    args.threads.start()?;
    let mut config = Config::load(&args.config, &args.sets)?;
    let preview = &mut config.preview;
    let own = Some(preview.negative_prompt.clone()).filter(|own| *own != Preview::default().negative_prompt);
    expand_all(&mut preview.prompts, &mut preview.negative_prompt, own.as_deref())?;
    interrupt::install()?;
    let options =
        Options { resume: args.resume.is_some(), dry_run: args.dry_run, memory: args.memory, quiet: args.quiet };
    let outcome = train(&config, options)?;
    if args.json {
        print_line(outcome.to_json())?;
    } else if !args.quiet {
        print_line(&outcome)?;
    }
    Ok(())
}
