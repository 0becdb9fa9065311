//! `qwen-lora merge`: adapters into a base model, or into one adapter.

use crate::adapters::convert::BaseWeight;
use crate::adapters::merge::{Base, Method, OutputForm, Weighted, merge_into_adapter};
use crate::adapters::write::{Format, write_adapter};
use crate::cli::adapters::{FloatType, ReadArgs, check_not_input, open_base, percent, weights};
use crate::cli::{Threads, print_line};
use crate::error::{Error, Result};
use crate::io::disk::human;
use crate::progress;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Merge adapters into a base model, or into one adapter.
#[derive(clap::Args, Clone, Debug)]
pub struct MergeArgs {
    /// The base (hub id, folder in the diffusers layout, single file), then the adapters; with --into-adapter the
    /// adapters alone
    #[arg(required = true, value_name = "BASE ADAPTER")]
    pub inputs: Vec<String>,
    /// A weight for each adapter; negative ones subtract [default: 1 each]
    #[arg(long, value_name = "W,...", value_delimiter = ',', allow_hyphen_values = true)]
    pub weights: Vec<f64>,
    /// The new folder or file [default: `merged`, or `merged.safetensors` where one file is written]
    #[arg(long, value_name = "PATH")]
    pub out: Option<PathBuf>,
    /// Write the transformer as one file, whatever the base is
    #[arg(long, conflicts_with = "into_adapter")]
    pub single_file: bool,
    /// Type of the floats written [default: that of the base, bf16 for a quantised base, f32 for an adapter]
    #[arg(long, value_enum)]
    pub dtype: Option<FloatType>,
    /// Merge the adapters into one adapter
    #[arg(long)]
    pub into_adapter: bool,
    /// How deltas become one, with --into-adapter
    #[arg(long, value_enum, default_value_t = MethodArg::Concat, requires = "into_adapter")]
    pub method: MethodArg,
    /// Rank of the merged adapter [default: exact for concat and linear, else the largest rank of the adapters]
    #[arg(long, value_name = "R", requires = "into_adapter")]
    pub rank: Option<usize>,
    /// Share of each delta's values that ties, dare and magnitude_prune keep
    #[arg(long, value_name = "SHARE", default_value_t = 0.5, requires = "into_adapter")]
    pub density: f64,
    /// What elects the sign in ties
    #[arg(long, value_enum, default_value_t = Majority::Sum, requires = "into_adapter")]
    pub majority: Majority,
    /// Seed of the values that dare drops
    #[arg(long, value_name = "N", default_value_t = 0, requires = "into_adapter")]
    pub seed: u64,
    /// The base model, which DoRA adapters need to become one
    #[arg(long, value_name = "BASE", requires = "into_adapter")]
    pub base: Option<String>,
    /// How the adapters are read
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

/// The values of `--method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum MethodArg {
    /// The weighted sum, exactly: ranks add up
    Concat,
    /// The weighted sum, brought to --rank
    Svd,
    /// The weighted mean
    Linear,
    /// Trim each, elect signs, mean of the elected
    Ties,
    /// Drop at random from each, scale up, weighted sum
    Dare,
    /// Trim each, weighted sum
    MagnitudePrune,
}

/// The values of `--majority`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Majority {
    /// The sum of the values
    Sum,
    /// The number of values
    Count,
}

impl MergeArgs {
    fn method(&self) -> Result<Method> {
        let density = self.density;
        if !(0.0..=1.0).contains(&density) || (self.method == MethodArg::Dare && density == 0.0) {
            return Err(Error::usage("bad `--density`").expected("a share above 0, at most 1", density));
        }
        if self.rank == Some(0) {
            return Err(Error::usage("`--rank` is 0").expected("1 or more", 0));
        }
        Ok(match self.method {
            MethodArg::Concat => Method::Concat,
            MethodArg::Svd => Method::Svd,
            MethodArg::Linear => Method::Linear,
            MethodArg::Ties => Method::Ties { density, by_count: self.majority == Majority::Count },
            MethodArg::Dare => Method::Dare { density, seed: self.seed },
            MethodArg::MagnitudePrune => Method::MagnitudePrune { density },
        })
    }

    fn open(&self, paths: &[String], base: Option<&Base>) -> Result<Vec<Weighted>> {
        if paths.is_empty() {
            return Err(Error::usage("no adapter to merge")
                .expected("`merge BASE ADAPTER...`", "a base alone")
                .hint("`--into-adapter` merges adapters alone"));
        }
        let weights = weights(&self.weights, paths.len())?;
        let open = |(path, weight): (&String, f64)| -> Result<Weighted> {
            Ok(Weighted { adapter: self.read.open(Path::new(path), base, self.quiet)?, weight })
        };
        paths.iter().zip(weights).map(open).collect()
    }
}

/// Runs the verb.
pub fn run(args: &MergeArgs) -> Result<()> {
    args.threads.start()?;
    if args.into_adapter { into_adapter(args) } else { into_base(args) }
}

fn into_base(args: &MergeArgs) -> Result<()> {
    let (base_name, paths) = args.inputs.split_first().expect("clap asks for one input at least");
    let base = open_base(base_name)?;
    let mut adapters = args.open(paths, Some(&base))?;
    let form = OutputForm { single_file: args.single_file, dtype: args.dtype.map(FloatType::dtype) };
    if !base.writes_text_encoder(&form) {
        adapters.iter_mut().for_each(|a| args.read.leave_out_text_encoder(&mut a.adapter, args.quiet));
    }
    let out = args.out.clone().unwrap_or_else(|| {
        PathBuf::from(if args.single_file || base.is_file() { "merged.safetensors" } else { "merged" })
    });
    check_not_input(&out, &paths.iter().map(Path::new).chain([Path::new(base_name)]).collect::<Vec<_>>())?;
    if base.has_unscaled_fp8() && !args.quiet {
        eprintln!(
            "warning: the base holds fp8 without scales, a plain downcast: expect artefacts; prefer its bf16 weights"
        );
    }
    let bar = progress::bytes_bar(base.output_bytes(&adapters, &form) as u64, "merging", args.quiet);
    let start = Instant::now();
    let written = base.merge(&adapters, &out, &form, &|bytes| bar.inc(bytes as u64))?;
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        return print_line(json!({
            "out": out, "weights_changed": written.changed, "bytes": written.bytes, "seconds": seconds,
        }));
    }
    if args.quiet {
        return Ok(());
    }
    print_line(format!(
        "merged {} into `{}`: {} weights changed, {} in {seconds:.1} s",
        crate::adapters::read::count(adapters.len(), "adapter"),
        out.display(),
        written.changed,
        human(written.bytes as u64),
    ))
}

fn into_adapter(args: &MergeArgs) -> Result<()> {
    let method = args.method()?;
    let base = args.base.as_deref().map(open_base).transpose()?;
    let mut adapters = args.open(&args.inputs, base.as_ref())?;
    adapters.iter_mut().for_each(|a| args.read.leave_out_text_encoder(&mut a.adapter, args.quiet));
    let out = args.out.clone().unwrap_or_else(|| "merged.safetensors".into());
    check_not_input(&out, &args.inputs.iter().map(Path::new).collect::<Vec<_>>())?;
    crate::adapters::merge::base::check_new(&out)?;
    let names: std::collections::BTreeSet<&String> =
        adapters.iter().flat_map(|a| a.adapter.transformer.keys()).collect();
    let bar = progress::bar(names.len(), "merging modules", args.quiet);
    let weight = |name: &str| base.as_ref().map_or(Ok(None), |b| b.weight(name));
    let weight = base.is_some().then_some(&weight as &BaseWeight);
    let merged = merge_into_adapter(&adapters, method, args.rank, weight, &|| bar.inc(1))?;
    bar.finish_and_clear();
    let lost: Vec<(String, usize, f64)> =
        merged.iter().map(|m| (m.module.name.clone(), m.module.rank.unwrap_or(0), m.lost)).collect();
    let modules = merged.into_iter().map(|m| m.module).collect();
    write_adapter(&out, Format::Diffusers, modules, args.dtype.map(FloatType::dtype), &Default::default())?;
    if args.json {
        let modules: Vec<_> = lost.iter().map(|(n, r, l)| json!({"module": n, "rank": r, "energy_lost": l})).collect();
        return print_line(json!({"out": out, "modules": modules}));
    }
    if args.quiet {
        return Ok(());
    }
    print_line(format!("merged {} adapters into `{}`: {} modules", adapters.len(), out.display(), lost.len()))?;
    print_losses(&lost)
}

/// The energy lost by bringing modules to a rank: nothing if nothing is lost, else each module, the worst first.
pub fn print_losses(lost: &[(String, usize, f64)]) -> Result<()> {
    let mut lost: Vec<_> = lost.iter().filter(|(_, _, share)| *share > 5e-6).collect();
    if lost.is_empty() {
        return print_line("no energy lost");
    }
    lost.sort_by(|a, b| b.2.total_cmp(&a.2));
    let mean = lost.iter().map(|(_, _, share)| share).sum::<f64>() / lost.len() as f64;
    print_line(format!("energy lost to the rank: {} on average of {} modules", percent(mean), lost.len()))?;
    lost.iter()
        .try_for_each(|(name, rank, share)| print_line(format!("  {:>8}  rank {rank:<4} {name}", percent(*share))))
}
