//! `qwen-lora config`: check a config file, or print the reference of all keys.

use crate::cli::print_line;
use crate::config::{Config, reference};
use crate::error::Result;
use std::path::PathBuf;

/// Check a config file and print it with every default filled in
#[derive(clap::Args)]
pub struct ConfigArgs {
    /// The config file
    #[arg(value_name = "FILE", required_unless_present_any = ["reference", "schema"])]
    pub file: Option<PathBuf>,
    /// Override a key, for example training.max_steps=10 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "file")]
    pub sets: Vec<String>,
    /// Print the reference page of all keys (docs/config.md) instead
    #[arg(long, conflicts_with_all = ["file", "schema"])]
    pub reference: bool,
    /// Print a JSON schema for editors instead
    #[arg(long, conflicts_with = "file")]
    pub schema: bool,
}

/// Runs the verb.
///
/// Errors: those of [`Config::load`], and a config that this version cannot train.
pub fn run(args: &ConfigArgs) -> Result<()> {
    match &args.file {
        Some(file) => {
            let config = Config::load(file, &args.sets)?;
            print_line(config.to_yaml().trim_end())?;
            config.check_supported()
        }
        None if args.schema => print_line(reference::schema().trim_end()),
        None => print_line(reference::markdown().trim_end()),
    }
}
