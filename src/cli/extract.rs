//! `qwen-lora extract`: an adapter from the difference of two checkpoints.

use crate::adapters::extract::{Extracted, extract_module};
use crate::adapters::merge::base::check_new;
use crate::adapters::write::{Format, write_adapter};
use crate::cli::adapters::{FloatType, open_base, percent};
use crate::cli::{Threads, print_line};
use crate::error::{Error, Result};
use crate::progress;
use serde_json::json;
use std::path::PathBuf;

/// Make an adapter from the difference of two checkpoints.
#[derive(clap::Args, Clone, Debug)]
pub struct ExtractArgs {
    /// The model before: hub id, folder or single file
    #[arg(value_name = "BASE")]
    pub base: String,
    /// The model after
    #[arg(value_name = "TUNED")]
    pub tuned: String,
    /// Rank of the adapter
    #[arg(long, value_name = "R")]
    pub rank: usize,
    /// The new file
    #[arg(long, value_name = "FILE", default_value = "extracted.safetensors")]
    pub out: PathBuf,
    /// Type of the floats written
    #[arg(long, value_enum, default_value_t = FloatType::F32)]
    pub dtype: FloatType,
    #[command(flatten)]
    pub threads: Threads,
    /// Show no progress or summary
    #[arg(long)]
    pub quiet: bool,
    /// Print the outcome as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the verb.
pub fn run(args: &ExtractArgs) -> Result<()> {
    args.threads.start()?;
    if args.rank == 0 {
        return Err(Error::usage("`--rank` is 0").expected("1 or more", 0));
    }
    check_new(&args.out)?;
    let (base, tuned) = (open_base(&args.base)?, open_base(&args.tuned)?);
    let names: Vec<String> = base.transformer_table().names().map(String::from).collect();
    let bar = progress::bar(names.len(), "extracting", args.quiet);
    let mut extracted: Vec<Extracted> = Vec::new();
    for name in &names {
        extracted.extend(extract_module(&base, &tuned, name, args.rank)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let left = base.other_differences(&tuned)?;
    if extracted.is_empty() {
        return Err(Error::usage("the checkpoints do not differ in any linear layer")
            .detail(format!("`{}` and `{}`", args.base, args.tuned)));
    }
    let report: Vec<(String, f64, f64)> =
        extracted.iter().map(|e| (e.module.name.clone(), e.lost, e.relative)).collect();
    let modules = extracted.into_iter().map(|e| e.module).collect();
    write_adapter(&args.out, Format::Diffusers, modules, Some(args.dtype.dtype()), &Default::default())?;
    if args.json {
        let modules: Vec<_> =
            report.iter().map(|(n, l, r)| json!({"module": n, "energy_lost": l, "relative_change": r})).collect();
        return print_line(json!({"out": args.out, "rank": args.rank, "modules": modules, "not_extracted": left}));
    }
    if args.quiet {
        return Ok(());
    }
    print_line(format!("wrote `{}`: {} modules of rank {}", args.out.display(), report.len(), args.rank))?;
    print_line("  energy lost  change/base  module")?;
    for (name, lost, relative) in &report {
        print_line(format!("  {:>11}  {:>11}  {name}", percent(*lost), percent(*relative)))?;
    }
    if let Some(first) = left.first() {
        print_line(format!(
            "{} that no adapter can hold also differ (biases, norms), such as `{first}`",
            crate::adapters::read::count(left.len(), "tensor")
        ))?;
    }
    Ok(())
}
