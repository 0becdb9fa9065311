//! `qwen-lora convert`: an adapter in the spelling that another tool reads.

use crate::adapters::convert::{BaseWeight, Convert, Converted, convert_module};
use crate::adapters::write::{Format, write_adapter};
use crate::cli::adapters::{FloatType, ReadArgs, check_not_input, open_base};
use crate::cli::merge::print_losses;
use crate::cli::{Threads, print_line};
use crate::error::{Error, Result};
use crate::progress;
use rayon::prelude::*;
use serde_json::json;
use std::path::PathBuf;

/// Convert an adapter to the spelling and form that another tool reads.
#[derive(clap::Args, Clone, Debug)]
pub struct ConvertArgs {
    /// The adapter: a file, or a folder that holds one
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// The new file; a folder for peft
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// Who shall read it
    #[arg(long, value_enum, value_name = "TOOL")]
    pub to: Target,
    /// Type of the floats written [default: that of the adapter]
    #[arg(long, value_enum)]
    pub dtype: Option<FloatType>,
    /// Rank of LoRAs made from LoKr, LoHa and DoRA
    #[arg(long, value_name = "R", default_value_t = 64)]
    pub rank: usize,
    /// Make LoRAs of LoKr, LoHa and DoRA even where the reader knows them
    #[arg(long)]
    pub to_lora: bool,
    /// The base model: checks shapes; needed to make a LoRA of a DoRA
    #[arg(long, value_name = "BASE")]
    pub base: Option<String>,
    /// How the adapter is read
    #[command(flatten)]
    pub read: ReadArgs,
    #[command(flatten)]
    pub threads: Threads,
    /// Show no progress, warnings or summary
    #[arg(long)]
    pub quiet: bool,
    /// Print the outcome as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// The values of `--to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Target {
    /// diffusers; ComfyUI reads it too
    Diffusers,
    /// ComfyUI, with LoKr, LoHa and DoRA as they are
    Comfyui,
    /// kohya's scripts and musubi-tuner
    Kohya,
    /// PEFT: a folder
    Peft,
    /// DiffSynth-Studio
    Diffsynth,
}

impl Target {
    fn format(self) -> Format {
        match self {
            Self::Diffusers => Format::Diffusers,
            Self::Comfyui => Format::ComfyUi,
            Self::Kohya => Format::Kohya,
            Self::Peft => Format::Peft,
            Self::Diffsynth => Format::DiffSynth,
        }
    }
}

/// Runs the verb.
pub fn run(args: &ConvertArgs) -> Result<()> {
    args.threads.start()?;
    if args.rank == 0 {
        return Err(Error::usage("`--rank` is 0").expected("1 or more", 0));
    }
    check_not_input(&args.out, &[&args.input])?;
    crate::adapters::merge::base::check_new(&args.out)?;
    let base = args.base.as_deref().map(open_base).transpose()?;
    let mut adapter = args.read.open(&args.input, base.as_ref(), args.quiet)?;
    args.read.leave_out_text_encoder(&mut adapter, args.quiet);
    if let Some(name) = adapter.text_encoder.keys().next() {
        return Err(Error::usage(format!("`{}` also adapts the text encoder (`{name}`)", args.input.display()))
            .detail("no tool reads that part for Qwen-Image")
            .hint("`--allow-unmatched` leaves it out; `merge` puts it into a pipeline folder"));
    }
    let weight = |name: &str| base.as_ref().map_or(Ok(None), |b| b.weight(name));
    let how = Convert {
        format: args.to.format(),
        rank: args.rank,
        to_lora: args.to_lora,
        base: base.is_some().then_some(&weight as &BaseWeight),
    };
    let bar = progress::bar(adapter.transformer.len(), "converting", args.quiet);
    let modules: Vec<_> = adapter.transformer.iter().collect();
    let mut converted: Vec<Converted> = Vec::with_capacity(modules.len());
    // A few at a time: changes of other kinds are multiplied out on the way.
    for group in modules.chunks(8) {
        let done = group.par_iter().map(|(name, entry)| convert_module(&adapter, name, entry, &how));
        converted.extend(done.collect::<Result<Vec<_>>>()?);
        bar.inc(group.len() as u64);
    }
    bar.finish_and_clear();
    let lost: Vec<(String, usize, f64)> =
        converted.iter().filter_map(|c| Some((c.module.name.clone(), c.module.rank.unwrap_or(0), c.lost?))).collect();
    let modules: Vec<_> = converted.into_iter().map(|c| c.module).collect();
    let count = modules.len();
    write_adapter(&args.out, how.format, modules, args.dtype.map(FloatType::dtype), &adapter.file().metadata())?;
    if args.json {
        let made: Vec<_> = lost.iter().map(|(n, r, l)| json!({"module": n, "rank": r, "energy_lost": l})).collect();
        return print_line(json!({"out": args.out, "modules": count, "made_into_lora": made}));
    }
    if args.quiet {
        return Ok(());
    }
    print_line(format!("wrote `{}`: {count} modules", args.out.display()))?;
    if lost.is_empty() { Ok(()) } else { print_losses(&lost) }
}
