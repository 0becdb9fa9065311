//! `qwen-lora inspect`: what an adapter file is, who loads it and at what strength, where it acts, what is wrong.

use crate::adapters::convert::BaseWeight;
use crate::adapters::inspect::{Level, Model, block_of, inspect, page};
use crate::adapters::merge::Base;
use crate::adapters::read::{AdapterFile, Component, ReadOptions};
use crate::cli::adapters::{open_base, published_modules, published_table};
use crate::cli::print_line;
use crate::error::{Error, Result};
use crate::io::write_atomic;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

/// Look into an adapter file: what it is, who loads it and at what strength, where it acts, what is wrong.
#[derive(clap::Args, Clone, Debug)]
pub struct InspectArgs {
    /// The adapter: a file, or a folder that holds one
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The base model: strengths relative to its weights, shapes checked
    #[arg(long, value_name = "BASE")]
    pub base: Option<String>,
    /// Alpha it was trained with, for a file that stores none
    #[arg(long, value_name = "ALPHA")]
    pub alpha: Option<f64>,
    /// Also write a page with a heat map of blocks and modules
    #[arg(long, value_name = "PAGE")]
    pub html: Option<PathBuf>,
    /// Print everything as one JSON object
    #[arg(long)]
    pub json: bool,
    /// Exit with code 1 if a finding is an error
    #[arg(long)]
    pub strict: bool,
}

/// Parts of the last block that get no gradient, or a zero one: only image tokens leave the network, so nothing that
/// acts on the last block's text output matters.
const LAST_TEXT_SIDE: [&str; 4] = ["attn.to_add_out", "attn.add_q_proj", "txt_mlp.net.0.proj", "txt_mlp.net.2"];

/// Runs the verb.
pub fn run(args: &InspectArgs) -> Result<()> {
    let base = args.base.as_deref().map(open_base).transpose()?;
    let published = published_table();
    let table = base.as_ref().map_or(&published, Base::transformer_table);
    let options = ReadOptions {
        table,
        text_encoder: base.as_ref().and_then(|b| b.table(Component::TextEncoder)),
        alpha: args.alpha,
        allow_unmatched: true,
    };
    let adapter = AdapterFile::survey(&args.file, &options)?;
    let modules = published_modules();
    let widths: BTreeMap<&str, (usize, usize)> =
        modules.iter().map(|m| (m.name.as_str(), (m.out_features, m.in_features))).collect();
    let blocks = |names: &mut dyn Iterator<Item = &str>| names.filter_map(|n| block_of(n).0).max().map(|last| last + 1);
    // Without a base, an adapter of the published widths is for the published 60 blocks.
    let is_published = adapter.transformer.iter().any(|(name, e)| widths.get(name.as_str()) == Some(&e.shape));
    let num_blocks = match &base {
        Some(base) => blocks(&mut base.transformer_table().names()),
        None if is_published => blocks(&mut published.names()),
        None => None,
    };
    let last = num_blocks.or_else(|| blocks(&mut adapter.transformer.keys().map(String::as_str)));
    let no_gradient = |module: &str| {
        let (block, part) = block_of(module);
        block.map(|b| b + 1) == last && LAST_TEXT_SIDE.contains(&part)
    };
    let groups: BTreeMap<&str, &str> =
        modules.iter().filter_map(|m| Some((block_of(&m.name).1, *m.groups.first()?))).collect();
    let group_of = |module: &str| groups.get(block_of(module).1).map(|g| g.to_string());
    let weight = |name: &str| base.as_ref().map_or(Ok(None), |b| b.weight(name));
    let weight = base.is_some().then_some(&weight as &BaseWeight);
    let inspection = inspect(&adapter, table, &group_of, weight, &Model { num_blocks, no_gradient: &no_gradient })?;
    if let Some(html) = &args.html {
        write_atomic(html, |file| file.write_all(page(&inspection).as_bytes()))?;
    }
    if args.json {
        let json = serde_json::to_string_pretty(&inspection).map_err(|e| Error::run("cannot write JSON").source(e))?;
        print_line(json)?;
    } else {
        print_line(&inspection)?;
        if let Some(html) = &args.html {
            print_line(format!("wrote `{}`", html.display()))?;
        }
    }
    let errors = inspection.lints.iter().filter(|l| l.level == Level::Error).count();
    if args.strict && errors > 0 {
        return Err(Error::run(format!(
            "{} in `{}`",
            crate::adapters::read::count(errors, "error"),
            args.file.display()
        )));
    }
    Ok(())
}
