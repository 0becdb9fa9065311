//! What a run writes: checkpoints, the exported adapter, or the trained transformer.

use crate::adapters::file::{Provenance, write_exported};
use crate::config::{Config, TrainingMode};
use crate::error::{Error, Result};
use crate::io::safetensors::{RawTensor, write};
use crate::io::write_atomic;
use crate::model::source::PipelineFolder;
use crate::optim::{AdamW, Parameter};
use crate::train::checkpoint::{Checkpoint, FORMAT, State, Weights};
use crate::train::run_dir::RunDir;
use crate::train::structured::SavedState;
use crate::train::trainable::Trainable;
use candle_core::DType;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

/// Writes the state of one run.
pub struct Saver {
    dir: RunDir,
    mode: TrainingMode,
    every: u64,
    keep: usize,
    max_steps: u64,
    dtype: DType,
    transformer_config: PathBuf,
    config: String,
    provenance: Provenance,
}

impl Saver {
    /// For a run with this config in `dir`.
    pub fn new(config: &Config, dir: &RunDir, pipeline: &PipelineFolder, provenance: Provenance) -> Self {
        Self {
            dir: dir.clone(),
            mode: config.training.mode,
            every: config.save.every as u64,
            keep: config.save.keep,
            max_steps: config.training.max_steps as u64,
            dtype: config.save.dtype.dtype(),
            transformer_config: pipeline.transformer.config.clone(),
            config: config.to_yaml(),
            provenance,
        }
    }

    /// Whether a checkpoint is due after `step` steps: every so many, and always the last.
    pub fn is_due(&self, step: u64) -> bool {
        step == self.max_steps || (self.every > 0 && step.is_multiple_of(self.every))
    }

    /// Writes the export, then the checkpoint, then removes checkpoints beyond the newest `keep`.
    ///
    /// In this order a run that is killed in between goes on from an older checkpoint and exports again; in the other
    /// one the last checkpoint could say that the run is finished, with an export that is missing or older.
    pub fn save(
        &self,
        step: u64,
        trainable: &Trainable,
        optimizer: &AdamW,
        params: &[Parameter],
        structured: Option<SavedState>,
    ) -> Result<()> {
        let weights = match self.mode {
            TrainingMode::Lora => Weights::Adapter(trainable.adapter()),
            TrainingMode::Full => Weights::Full(params.iter().map(|p| (p.name.clone(), p.tensor.clone())).collect()),
        };
        let checkpoint = Checkpoint {
            weights,
            optimizer: optimizer.state_tensors(params)?,
            state: State {
                format: FORMAT,
                step,
                max_steps: self.max_steps,
                dataset_hash: self.provenance.dataset_hash.clone(),
                base_fingerprint: self.provenance.base_fingerprint.clone(),
                config: self.config.clone(),
                structured,
                files: BTreeMap::new(),
                checksum: String::new(),
            },
        };
        match &checkpoint.weights {
            Weights::Adapter(adapter) => write_exported(&self.dir.adapter(), adapter, self.dtype, &self.provenance)?,
            Weights::Full(tensors) => self.export_transformer(tensors)?,
        }
        checkpoint.save(&self.dir.checkpoint(step))?;
        self.dir.prune(self.keep)
    }

    /// The trained transformer in the diffusers layout: `config.json` and one safetensors file.
    fn export_transformer(&self, tensors: &[(String, candle_core::Tensor)]) -> Result<()> {
        let folder = self.dir.transformer();
        std::fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
        let source = &self.transformer_config;
        let config = std::fs::read(source).map_err(|e| Error::io("read", source, e))?;
        write_atomic(&folder.join("config.json"), |file| file.write_all(&config))?;
        let raw = |(name, t): &(String, candle_core::Tensor)| RawTensor::from_tensor(name, &t.to_dtype(self.dtype)?);
        let raw = tensors.iter().map(raw).collect::<Result<_>>()?;
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        write(&folder.join("diffusion_pytorch_model.safetensors"), raw, &metadata)
    }
}
