//! `qwen-lora kernels`: the self-test of the ops on a device.

use crate::cli::{Threads, print_line};
use crate::config::DeviceChoice;
use crate::device;
use crate::error::{Error, Result};
use crate::progress::tell;
use crate::verify::kernels::{Sizes, run as check};
use clap::{Args, ValueEnum};

/// Test the ops on this machine's device: each compiled GPU kernel against the same op in plain f32
#[derive(Args)]
pub struct KernelsArgs {
    /// Where: auto, cpu or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Small ragged tensors, those of the published model (which are timed too), or both [default: on a GPU both]
    #[arg(long, value_enum)]
    sizes: Option<Which>,
    #[command(flatten)]
    threads: Threads,
    /// Print the table as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Which {
    Small,
    Published,
    Both,
}

/// Runs the verb. Errors: a value outside its limit.
pub fn run(args: &KernelsArgs) -> Result<()> {
    args.threads.start()?;
    let compute = device::open(args.device)?;
    compute.notes.iter().for_each(|note| tell(format_args!("note: {note}")));
    let on_cpu = compute.device.is_cpu();
    if on_cpu {
        let why = if cfg!(feature = "cuda") { "there is no GPU" } else { "this build has no GPU kernels" };
        tell(format_args!("note: {why}: the composed ops are compared with the CPU's kernels"));
    }
    let which = args.sizes.unwrap_or(if on_cpu { Which::Small } else { Which::Both });
    let sizes: &[Sizes] = match which {
        Which::Small => &[Sizes::Small],
        Which::Published => &[Sizes::Published],
        Which::Both => &[Sizes::Small, Sizes::Published],
    };
    let mut ok = true;
    for &sizes in sizes {
        let table = check(&compute.device, sizes, |_| {})?;
        ok &= table.ok();
        match args.json {
            true => print_line(serde_json::to_string(&table).expect("a table is plain data"))?,
            false => print_line(format_args!("{table}\n"))?,
        }
    }
    if ok { Ok(()) } else { Err(Error::run("an op does not compute what it should on this device")) }
}
