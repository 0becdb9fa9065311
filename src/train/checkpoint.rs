//! Checkpoints: everything that a resumed run needs to go on as if it had never stopped.
//!
//! A checkpoint is built in a hidden folder beside its place and renamed when it is whole.

use crate::adapters::LoraAdapter;
use crate::adapters::file::{read_raw, write_raw};
use crate::error::{Error, Result};
use crate::io::atomic::{part_path, rename_synced};
use crate::io::safetensors::{MappedFile, RawTensor, write};
use crate::io::write_atomic;
use crate::train::structured::SavedState;
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
    /// What the structured loss remembers, where it is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub structured: Option<SavedState>,
    /// The checksum of each other file of the checkpoint, by name, in hex (BLAKE3). Checkpoints of early versions have none.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// The checksum of all of the above; empty in checkpoints of early versions.
    #[serde(default)]
    pub checksum: String,
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
        let mut state = self.state.clone();
        for name in [ADAPTER, WEIGHTS, OPTIMIZER] {
            // Read back, so that what the disk holds is what is vouched for.
            if part.join(name).exists() {
                state.files.insert(name.into(), checksum(&part.join(name))?);
            }
        }
        state.checksum = state.own_checksum();
        let json = serde_json::to_vec_pretty(&state).expect("the state is plain data");
        write_atomic(&part.join(STATE), |file| file.write_all(&json))
    }

    /// Reads a checkpoint. Errors: a missing or damaged file, a layout of another version.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let state = State::load(folder)?;
        state.check_files(folder)?;
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
        if !state.checksum.is_empty() && state.checksum != state.own_checksum() {
            return Err(damaged(&path));
        }
        Ok(state)
    }

    /// The checksum of everything but itself.
    fn own_checksum(&self) -> String {
        let bare = Self { checksum: String::new(), ..self.clone() };
        let json = serde_json::to_vec(&bare).expect("the state is plain data");
        blake3::hash(&json).to_hex().to_string()
    }

    /// Compares the checkpoint's files with their checksums. Errors: a file that is gone or was changed.
    pub fn check_files(&self, folder: &Path) -> Result<()> {
        self.files.keys().try_for_each(|name| self.check_file(folder, name))
    }

    fn check_file(&self, folder: &Path, name: &str) -> Result<()> {
        let path = folder.join(name);
        match self.files.get(name) {
            Some(expected) if checksum(&path).map_err(Error::into_usage)? != *expected => Err(damaged(&path)),
            _ => Ok(()),
        }
    }
}

/// A file that is not as it was written.
fn damaged(path: &Path) -> Error {
    Error::usage(format!("`{}` is damaged: its checksum is not the one it was saved with", path.display()))
        .hint("use an older checkpoint of the run: `--resume auto` falls back to the newest whole one")
}

/// The BLAKE3 hash of a file, in hex.
fn checksum(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let file = std::fs::File::open(path).map_err(|e| Error::io("read", path, e))?;
    hasher.update_reader(file).map_err(|e| Error::io("read", path, e))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// The raw adapter of a checkpoint folder. Errors: a missing or damaged file.
pub fn load_adapter(folder: &Path, device: &Device) -> Result<LoraAdapter> {
    if folder.join(STATE).exists() {
        State::load(folder)?.check_file(folder, ADAPTER)?;
    }
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
