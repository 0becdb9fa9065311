//! Checkpoints: everything that a resumed run needs to go on as if it had never stopped.
//!
//! A checkpoint is built in a hidden folder beside its place and renamed when it is whole.

use crate::adapters::LoraAdapter;
use crate::adapters::file::{read_raw, write_raw};
use crate::error::{Error, Result};
use crate::io::atomic::{part_path, rename_synced};
use crate::io::safetensors::{MappedFile, RawTensor, write};
use crate::io::write_atomic;
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this layout.
    pub format: u32,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run: equal to `step` when the run is finished.
    pub max_steps: u64,
    /// Hash of images and captions.
    pub dataset_hash: String,
    /// Fingerprint of the base weights.
    pub base_fingerprint: String,
    /// The resolved config, as YAML.
    pub config: String,
}

/// The version written by this program.
pub const FORMAT: u32 = 1;

const ADAPTER: &str = "adapter.safetensors";
const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// What is trained, as it is saved.
pub enum Weights {
    /// A, B and alpha of an adapter.
    Adapter(LoraAdapter),
    /// Every weight of the transformer, by name.
    Full(Vec<(String, Tensor)>),
}

/// A whole checkpoint in memory.
pub struct Checkpoint {
    /// What is trained.
    pub weights: Weights,
    /// The optimizer's tensors by name.
    pub optimizer: Vec<(String, Tensor)>,
    /// Everything else.
    pub state: State,
}

impl Checkpoint {
    /// Writes the checkpoint to `folder`, replacing one of the same step. A failed write leaves nothing.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let part = part_path(folder);
        let fresh = || -> std::io::Result<()> {
            if part.exists() {
                std::fs::remove_dir_all(&part)?;
            }
            std::fs::create_dir_all(&part)
        };
        fresh().map_err(|e| Error::io("create", &part, e))?;
        self.write_into(&part).inspect_err(|_| {
            // The failed write is what the user needs to hear about; the next save removes what this leaves.
            let _ = std::fs::remove_dir_all(&part);
        })?;
        if folder.exists() {
            std::fs::remove_dir_all(folder).map_err(|e| Error::io("replace", folder, e))?;
        }
        rename_synced(&part, folder)
    }

    fn write_into(&self, part: &Path) -> Result<()> {
        match &self.weights {
            Weights::Adapter(adapter) => write_raw(&part.join(ADAPTER), adapter)?,
            Weights::Full(tensors) => write(&part.join(WEIGHTS), raw(tensors)?, &BTreeMap::new())?,
        }
        write(&part.join(OPTIMIZER), raw(&self.optimizer)?, &BTreeMap::new())?;
        let json = serde_json::to_vec_pretty(&self.state).expect("the state is plain data");
        write_atomic(&part.join(STATE), |file| file.write_all(&json))
    }

    /// Reads a checkpoint. Errors: a missing or damaged file, a layout of another version.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let state = State::load(folder)?;
        let weights = match folder.join(WEIGHTS).exists() {
            true => Weights::Full(read(&folder.join(WEIGHTS), device)?),
            false => Weights::Adapter(read_raw(&folder.join(ADAPTER), device)?),
        };
        Ok(Self { weights, optimizer: read(&folder.join(OPTIMIZER), device)?, state })
    }
}

impl State {
    /// Reads `state.json` of a checkpoint.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(STATE);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e).into_usage())?;
        let state: Self = serde_json::from_str(&text).map_err(|e| {
            Error::usage(format!("`{}` is not the state of a checkpoint", path.display())).detail(e.to_string())
        })?;
        if state.format != FORMAT {
            return Err(Error::usage(format!("`{}` has another format", path.display()))
                .expected(FORMAT, state.format)
                .hint("resume with the version of qwen-lora that wrote it"));
        }
        Ok(state)
    }
}

/// The raw adapter of a checkpoint folder.
pub fn load_adapter(folder: &Path, device: &Device) -> Result<LoraAdapter> {
    read_raw(&folder.join(ADAPTER), device)
}

fn raw(tensors: &[(String, Tensor)]) -> Result<Vec<RawTensor>> {
    tensors.iter().map(|(name, tensor)| RawTensor::from_tensor(name, tensor)).collect()
}

fn read(path: &Path, device: &Device) -> Result<Vec<(String, Tensor)>> {
    let file = MappedFile::open(path)?;
    let names = file.names();
    let tensor = |name: String| {
        let dtype = match file.info(&name) {
            Some((safetensors::Dtype::I64, _)) => DType::I64,
            _ => DType::F32,
        };
        Ok((name.clone(), file.tensor(&name, dtype, device)?))
    };
    names.into_iter().map(tensor).collect()
}
