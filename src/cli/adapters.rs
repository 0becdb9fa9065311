//! What the verbs on adapters share: finding the base, the modules that keys are matched against, common arguments.

use crate::adapters::merge::Base;
use crate::adapters::read::{AdapterFile, Component, ModuleTable, ReadOptions, count};
use crate::adapters::target::ModuleInfo;
use crate::error::{Error, Result};
use crate::model::source::{ModelSource, ModelSpec};
use crate::model::transformer::TransformerConfig;
use safetensors::Dtype;
use std::path::{Path, PathBuf};

/// Float types that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum FloatType {
    /// 32 bits
    F32,
    /// bfloat16
    Bf16,
    /// IEEE half
    F16,
}

impl FloatType {
    /// As weight files name it.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }
}

/// How adapter files are read.
#[derive(clap::Args, Clone, Debug)]
pub struct ReadArgs {
    /// Alpha of adapters that store none; without it they are taken at scale 1, as their readers do
    #[arg(long, value_name = "ALPHA")]
    pub alpha: Option<f64>,
    /// Leave out keys that cannot be used instead of failing
    #[arg(long)]
    pub allow_unmatched: bool,
}

impl ReadArgs {
    /// Opens an adapter for the modules of `base`, or of the published architecture; tells of its warnings.
    pub fn open(&self, path: &Path, base: Option<&Base>, quiet: bool) -> Result<AdapterFile> {
        if self.alpha.is_some_and(|a| !(a.is_finite() && a > 0.0)) {
            return Err(Error::usage("bad `--alpha`").expected("a positive number", self.alpha.unwrap_or_default()));
        }
        let published = published_table();
        let options = ReadOptions {
            table: base.map_or(&published, Base::transformer_table),
            text_encoder: base.and_then(|b| b.table(Component::TextEncoder)),
            alpha: self.alpha,
            allow_unmatched: self.allow_unmatched,
        };
        let adapter = AdapterFile::open(path, &options)?;
        if !quiet {
            for warning in &adapter.warnings {
                eprintln!("warning: `{}`: {warning}", path.display());
            }
            for problem in &adapter.problems {
                eprintln!("warning: left out: {}", problem.text(options.table));
            }
        }
        Ok(adapter)
    }
}

impl ReadArgs {
    /// With `--allow-unmatched`, leaves an adapter's part for the text encoder out where the output cannot hold it,
    /// unless there is no other part. What stays is refused by name later.
    pub fn leave_out_text_encoder(&self, adapter: &mut AdapterFile, quiet: bool) {
        if !self.allow_unmatched || adapter.transformer.is_empty() || adapter.text_encoder.is_empty() {
            return;
        }
        if !quiet {
            let what = count(adapter.text_encoder.len(), "module");
            eprintln!("warning: left out: {what} of the text encoder in `{}`", adapter.path().display());
        }
        adapter.text_encoder.clear();
    }
}

/// The modules of the published Qwen-Image transformer: 60 blocks.
pub fn published_modules() -> Vec<ModuleInfo> {
    TransformerConfig {
        patch_size: 2,
        in_channels: 64,
        out_channels: 16,
        num_layers: 60,
        attention_head_dim: 128,
        num_attention_heads: 24,
        joint_attention_dim: 3584,
        axes_dims_rope: [16, 56, 56],
        zero_cond_t: false,
        use_additional_t_cond: false,
        use_layer3d_rope: false,
    }
    .modules()
}

/// The published modules by name; widths are not checked, so that adapters of smaller models of the family are read.
pub fn published_table() -> ModuleTable {
    ModuleTable::names_only(&published_modules())
}

/// Opens a base model: a file, a folder, or a hub id, which is fetched if need be.
pub fn open_base(text: &str) -> Result<Base> {
    let path = PathBuf::from(text);
    if path.exists() {
        return Base::open(&path);
    }
    match ModelSource::parse(text)? {
        ModelSource::Folder(folder) => Base::open(&folder),
        ModelSource::Hub(_) | ModelSource::Synthetic(_) => {
            let pipeline = ModelSource::resolve(&ModelSpec::new(text))?;
            let root = pipeline.transformer.config.parent().and_then(Path::parent);
            Base::open(root.expect("config.json lies in the transformer's folder of a pipeline"))
        }
    }
}

/// `PATH` or `PATH:WEIGHT`; the weight is 1 if none is given. A path that exists is taken whole.
///
/// Errors: a weight that is no finite number.
pub fn path_and_weight(text: &str) -> Result<(&str, f64)> {
    match text.rsplit_once(':').map(|(path, weight)| (path, weight.parse::<f64>())) {
        Some((path, Ok(weight))) if !Path::new(text).exists() => {
            if !weight.is_finite() {
                return Err(Error::usage(format!("bad strength of `{path}`")).expected("a finite number", weight));
            }
            Ok((path, weight))
        }
        _ => Ok((text, 1.0)),
    }
}

/// `--weights`: one for each adapter, 1 where none are given.
///
/// Errors: another number of weights than adapters, a weight that is no finite number.
pub fn weights(given: &[f64], adapters: usize) -> Result<Vec<f64>> {
    if given.is_empty() {
        return Ok(vec![1.0; adapters]);
    }
    if given.len() != adapters {
        return Err(Error::usage("`--weights` does not fit the adapters")
            .expected(format!("{adapters} weights, one for each adapter"), given.len())
            .hint("a decimal point within a weight, a comma between two: `--weights 0.8,-0.3`"));
    }
    match given.iter().find(|w| !w.is_finite()) {
        Some(weight) => Err(Error::usage("bad `--weights`").expected("finite numbers", weight)),
        None => Ok(given.to_vec()),
    }
}

/// Fails if an output is one of the inputs.
pub fn check_not_input(out: &Path, inputs: &[&Path]) -> Result<()> {
    let real = |p: &Path| p.canonicalize().ok();
    match inputs.iter().find(|input| real(out).is_some_and(|o| real(input) == Some(o))) {
        Some(input) => Err(Error::usage(format!("the output `{}` is the input `{}`", out.display(), input.display()))
            .hint("name another output: nothing is overwritten")),
        None => Ok(()),
    }
}

/// A share as people write it: `0.12 %`.
pub fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}
