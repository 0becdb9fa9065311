//! `qwen-lora verify`: replays a recorded case of the reference implementation.

use crate::cli::adapters::path_and_weight;
use crate::cli::print_line;
use crate::config::{BaseDtype, DeviceChoice};
use crate::device;
use crate::error::{Error, Result};
use crate::io::safetensors::{RawTensor, write};
use crate::model::transformer::Precision;
use crate::progress::tell;
use crate::verify::{Case, run as replay};
use candle_core::DType;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Replay recorded values of the reference implementation through our networks, and compare.
#[derive(clap::Args, Clone, Debug)]
pub struct VerifyArgs {
    /// Model folder in the diffusers layout that the values were recorded with.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Folder of the recorded case: golden.safetensors and golden.json.
    #[arg(long, value_name = "DIR")]
    pub reference: PathBuf,
    /// Also compute `adapter.output`: the transformer's output for the `tf.b2_mask` inputs with this adapter active, a
    /// file or a checkpoint folder (repeatable: they add up) [default weight: 1].
    #[arg(long = "adapter", value_name = "PATH[:WEIGHT]")]
    pub adapters: Vec<String>,
    /// Write everything that was computed to this safetensors file, under the recorded names.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Where the transformer runs: auto, cpu or cuda:N; the other networks run on the CPU.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: DeviceChoice,
    /// Type in which the transformer is held and run: f32, bf16 or int8 with wider limits.
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: VerifyDtype,
    /// Print the report as JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Types in which the transformer can be verified.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum VerifyDtype {
    /// 32-bit floats, as the values were recorded.
    F32,
    /// 16-bit floats with the range of f32.
    Bf16,
    /// Weights in int8 in blocks of 32; activations in f32, on a GPU in bf16.
    Int8,
}

/// Replays the case and prints the report. Errors: a case that cannot be opened; any value outside its limits.
pub fn run(args: &VerifyArgs) -> Result<()> {
    let compute = device::open(args.device)?;
    compute.notes.iter().for_each(|note| tell(format_args!("note: {note}")));
    let adapter = |text: &String| path_and_weight(text).map(|(path, weight)| (path.into(), weight));
    let adapters: Vec<_> = args.adapters.iter().map(adapter).collect::<Result<_>>()?;
    let mut case = Case::open(&args.model, &args.reference, adapters)?;
    let own = if compute.device.is_cpu() { DType::F32 } else { DType::BF16 };
    case.device = compute.device;
    case.precision = match args.dtype {
        VerifyDtype::F32 => Precision::uniform(DType::F32),
        VerifyDtype::Bf16 => Precision::uniform(DType::BF16),
        VerifyDtype::Int8 => Precision::of(BaseDtype::Int8, own),
    };
    if !case.model.is_dir() {
        return Err(Error::usage(format!("there is no model folder `{}`", case.model.display())));
    }
    let (report, computed) = replay(&case, |stage| {
        if !args.json {
            tell(format_args!("replaying {stage}"));
        }
    })?;
    if let Some(path) = &args.output {
        let raw = computed.iter().map(|c| RawTensor::from_tensor(&c.name, &c.tensor)).collect::<Result<_>>()?;
        write(path, raw, &BTreeMap::new())?;
    }
    if args.json {
        print_line(format_args!("{:#}", report.to_json()))?;
    } else {
        print_line(&report)?;
    }
    if report.ok() {
        return Ok(());
    }
    let first = report.rows.iter().find(|r| !r.ok).map(|r| format!("first: `{}`", r.name));
    Err(first
        .into_iter()
        .fold(Error::run(format!("the reference is not reproduced: {}", report.summary())), Error::detail))
}
