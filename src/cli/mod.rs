//! The command line. Each verb has a file here with its arguments (a clap `Args` struct whose doc comment is the
//! help text) and a function `run`.
//!
//! A new verb takes two lines: its `pub mod`, and its entry in `verbs!`.

mod adapters;
pub mod bench;
pub mod config;
pub mod convert;
pub mod eval;
pub mod extract;
pub mod generate;
pub mod inspect;
pub mod kernels;
pub mod merge;
pub mod pose;
pub mod prompt;
pub mod route;
mod sampling;
pub mod synth;
pub mod train;
pub mod verify;
pub mod world;

use crate::error::{Error, Result};
use clap::{Args, Parser, Subcommand};
use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

/// Train LoRA adapters for Qwen-Image.
#[derive(Parser)]
#[command(name = "qwen-lora", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

macro_rules! verbs {
    ($($module:ident: $name:ident($args:ident);)*) => {
        #[derive(Subcommand)]
        enum Verb {
            $($name($module::$args),)*
        }

        fn run(verb: &Verb) -> Result<()> {
            match verb {
                $(Verb::$name(args) => $module::run(args),)*
            }
        }
    };
}

verbs! {
    train: Train(TrainArgs);
    generate: Generate(GenerateArgs);
    route: Route(RouteArgs);
    prompt: Prompt(PromptArgs);
    eval: Eval(EvalArgs);
    pose: Pose(PoseArgs);
    verify: Verify(VerifyArgs);
    bench: Bench(BenchArgs);
    kernels: Kernels(KernelsArgs);
    merge: Merge(MergeArgs);
    convert: Convert(ConvertArgs);
    inspect: Inspect(InspectArgs);
    extract: Extract(ExtractArgs);
    synth: Synth(SynthArgs);
    world: World(WorldArgs);
    config: Config(ConfigArgs);
}

/// Parses the command line of the process, runs the verb and reports its error.
///
/// Exit codes: 0 done, 1 the run failed, 2 wrong usage or config, 130 interrupted after saving.
pub fn main() -> ExitCode {
    match run(&Cli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With stderr gone there is nobody to tell; the exit code still tells.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// The flag of every verb that computes.
#[derive(Args, Clone, Copy, Debug)]
pub struct Threads {
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl Threads {
    /// Lets everything compute with so many threads. Errors: 0 threads.
    pub fn start(self) -> Result<()> {
        let Some(threads) = self.threads else { return Ok(()) };
        if threads == 0 {
            return Err(Error::usage("`--threads` is 0").expected("1 or more", 0));
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        pool.map_err(|e| Error::run("cannot start the threads").detail(e.to_string()).source(e))
    }
}

/// Prints a line to stdout. A reader that has gone (`qwen-lora ... | head`) is no error and, unlike with `println!`, no
/// panic: a run that has work to finish goes on.
///
/// Errors: any other failed write, such as to a file on a full disk.
pub fn print_line(line: impl Display) -> Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(Error::run("cannot write the output").detail(e.to_string())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed_and_every_verb_has_help() {
        let command = Cli::command();
        command.clone().debug_assert();
        for verb in command.get_subcommands() {
            assert!(verb.get_about().is_some(), "`{}` has no help text", verb.get_name());
        }
    }
}
