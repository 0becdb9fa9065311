//! Replaying a recorded case of the reference implementation through our networks.
//!
//! A case is a folder with `golden.safetensors` (tensors under dotted names) and `golden.json` (scalars and prompts).
//! Each stage computes again what was recorded under its names, from the inputs recorded beside them.

mod compare;
mod image;
pub mod kernels;
mod lora;
mod pipeline;
mod report;
mod scheduler;
mod text;
mod tokenizer;
mod transformer;
mod vae;

pub use compare::{Row, compare};
pub use report::Report;

use crate::error::Result;
use crate::io::JsonObject;
use crate::io::safetensors::MappedFile;
use crate::model::transformer::Precision;
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use std::path::{Path, PathBuf};

/// A recorded case and the model that it was recorded with.
pub struct Case {
    /// The model folder, in the diffusers layout.
    pub model: PathBuf,
    /// The case's folder.
    pub folder: PathBuf,
    /// The recorded tensors.
    pub golden: MappedFile,
    /// The recorded scalars and texts.
    pub json: JsonObject,
    /// Adapter files or checkpoint folders with their weights, for the output with adapters active.
    pub adapters: Vec<(PathBuf, f64)>,
    /// Where the transformer runs; the other networks run on the CPU.
    pub device: Device,
    /// The types in which the transformer is held and run where f32 was recorded: f32, or others with wider limits.
    pub precision: Precision,
}

/// A tensor that a stage computed, under the name that it was recorded with.
pub struct Computed {
    /// Name in `golden.safetensors`.
    pub name: String,
    /// f32 or i64, of the recorded shape.
    pub tensor: Tensor,
}

/// One part of the pipeline: which recorded names it answers for, and how they are computed.
struct Stage {
    name: &'static str,
    covers: fn(&str) -> bool,
    run: fn(&Case) -> Result<Vec<Computed>>,
}

/// Every stage, in the order of the report.
const STAGES: &[Stage] = &[
    Stage { name: "scheduler", covers: |n| n.starts_with("sched."), run: scheduler::run },
    Stage { name: "image", covers: |n| n.starts_with("img."), run: image::run },
    Stage { name: "tokenizer", covers: tokenizer::covers, run: tokenizer::run },
    Stage { name: "text", covers: |n| n.starts_with("te.") && !tokenizer::covers(n), run: text::run },
    Stage { name: "vae", covers: |n| n.starts_with("vae."), run: vae::run },
    Stage { name: "transformer", covers: |n| n.starts_with("tf."), run: transformer::run },
    Stage { name: "pipeline", covers: |n| n.starts_with("pipe."), run: pipeline::run },
    Stage { name: "lora", covers: |n| n.starts_with("lora."), run: lora::run },
];

impl Case {
    /// Opens the case in `folder`, to be replayed with the model in `model`, and once more with `adapters` active; on the
    /// CPU in f32.
    pub fn open(model: &Path, folder: &Path, adapters: impl IntoIterator<Item = (PathBuf, f64)>) -> Result<Self> {
        Ok(Self {
            model: model.into(),
            folder: folder.into(),
            golden: MappedFile::open(&folder.join("golden.safetensors"))?,
            json: JsonObject::open(&folder.join("golden.json"))?,
            adapters: adapters.into_iter().collect(),
            device: Device::Cpu,
            precision: Precision::uniform(DType::F32),
        })
    }

    /// Whether a tensor of this name was recorded.
    pub fn has(&self, name: &str) -> bool {
        self.golden.info(name).is_some()
    }

    /// A recorded tensor on the CPU: floats in f32, integers in i64.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let is_integer = matches!(self.golden.info(name), Some((Dtype::I64 | Dtype::I32, _)));
        self.golden.tensor(name, if is_integer { DType::I64 } else { DType::F32 }, &Device::Cpu)
    }
}

impl Computed {
    /// A computed tensor under `name`.
    pub fn new(name: impl Into<String>, tensor: Tensor) -> Self {
        Self { name: name.into(), tensor }
    }

    /// Integers under `name`, as one row.
    fn integers(name: impl Into<String>, values: impl IntoIterator<Item = i64>) -> Result<Self> {
        Ok(Self::new(name, Tensor::from_iter(values, &Device::Cpu)?))
    }

    /// Floats under `name`, as one row.
    fn floats(name: impl Into<String>, values: impl IntoIterator<Item = f32>) -> Result<Self> {
        Ok(Self::new(name, Tensor::from_iter(values, &Device::Cpu)?))
    }
}

/// Replays every stage that the case recorded, and compares. Also gives all that was computed.
///
/// A stage that cannot run is in the report as failed, with its error. `started` is called with each stage's name.
pub fn run(case: &Case, mut started: impl FnMut(&str)) -> Result<(Report, Vec<Computed>)> {
    let names = case.golden.names();
    let mut report = Report::default();
    let mut all = Vec::new();
    for stage in STAGES {
        let recorded: Vec<&str> = names.iter().map(String::as_str).filter(|n| (stage.covers)(n)).collect();
        if recorded.is_empty() {
            report.skipped.push(stage.name);
            continue;
        }
        started(stage.name);
        match (stage.run)(case) {
            Ok(computed) => {
                report.rows.extend(compare(stage.name, case, &recorded, &computed)?);
                all.extend(computed);
            }
            Err(error) => report.failed.push((stage.name, error)),
        }
    }
    if !case.adapters.is_empty() {
        all.push(lora::adapter_output(case)?);
    }
    Ok((report, all))
}
