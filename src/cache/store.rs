//! A folder of cache entries: one safetensors file per key, written beside and renamed, verified when read.
//!
//! Several processes may use one store at once: each writes under a name of its own, and whoever renames last wins
//! with the same content. A kill leaves at most a hidden file, which a later [`Store::open`] removes.

use crate::cache::key::Key;
use crate::error::{Error, Result};
use crate::io::atomic::rename_synced;
use crate::io::safetensors::{self, MappedFile, RawTensor};
use ::safetensors::Dtype;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The tensors of one entry by name, on the CPU, in the type they were stored in.
pub type Entry = BTreeMap<String, Tensor>;

/// How the names of entries end that are still being written.
const UNFINISHED: &str = ".tmp";

/// A folder of cache entries.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// What [`Store::missing`] found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Indices of the keys without a whole entry, ascending; of equal keys only the first.
    pub indices: Vec<usize>,
    /// One line for each of them whose file is there but damaged.
    pub damaged: Vec<String>,
}

/// Why an entry cannot be used.
enum Fault {
    Absent,
    Damaged(String),
}

impl Store {
    /// Opens the store in `dir`, making the folder if needed and removing unfinished files older than an hour.
    pub fn open(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(|e| Error::io("make the cache folder", dir, e))?;
        let listing = std::fs::read_dir(dir).map_err(|e| Error::io("read the cache folder", dir, e))?;
        for entry in listing.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // `io::write_atomic` adds `.part` while it writes.
            let unfinished = name.starts_with('.') && name.trim_end_matches(".part").ends_with(UNFINISHED);
            let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
            if unfinished && age.is_some_and(|age| age > Duration::from_secs(3600)) {
                // Another process may have removed it first; leaving it costs only space.
                let _ = std::fs::remove_file(entry.path());
            }
        }
        Ok(Self { dir: dir.into() })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file of an entry, whether it exists or not.
    pub fn path(&self, key: &Key) -> PathBuf {
        self.dir.join(format!("{}.safetensors", key.hex()))
    }

    /// The keys whose entries must be computed: absent ones, and ones whose file is cut, altered or not theirs.
    ///
    /// Every entry is read and its checksum compared, in parallel; `tick` is called once per distinct key.
    pub fn missing(&self, keys: &[Key], tick: impl Fn() + Sync) -> Missing {
        let mut seen = std::collections::HashSet::new();
        let distinct: Vec<usize> = (0..keys.len()).filter(|&i| seen.insert(keys[i])).collect();
        let check = |&i: &usize| {
            let fault = self.verified(&keys[i]).err();
            tick();
            fault.map(|fault| (i, fault))
        };
        let mut missing = Missing::default();
        for (i, fault) in distinct.par_iter().filter_map(check).collect::<Vec<_>>() {
            missing.indices.push(i);
            if let Fault::Damaged(why) = fault {
                missing.damaged.push(format!("`{}` {why}", self.path(&keys[i]).display()));
            }
        }
        missing
    }

    /// Writes an entry, whole or not at all, over an earlier one if there is one.
    ///
    /// Types: f32, bf16, i64, u32, u8. Errors: another type; a write that fails (on a full disk, what was written
    /// before stays usable).
    pub fn put(&self, key: &Key, entry: &Entry) -> Result<()> {
        let raw: Vec<RawTensor> = entry.iter().map(|(n, t)| RawTensor::from_tensor(n, t)).collect::<Result<_>>()?;
        if let Some(bad) = raw.iter().find(|t| readable(t.dtype).is_none()) {
            return Err(Error::run(format!("the cache does not hold tensors of type {:?}", bad.dtype)));
        }
        let checksum = checksum(raw.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice(), t.bytes.as_slice())));
        let metadata = [("checksum", checksum), ("key", key.hex()), ("kind", key.kind().to_string())];
        let metadata = metadata.map(|(k, v)| (k.to_string(), v)).into();

        static WRITES: AtomicU64 = AtomicU64::new(0);
        let (process, write) = (std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed));
        let path = self.path(key);
        let own = self.dir.join(format!(".{}.{process}-{write}{UNFINISHED}", key.hex()));
        safetensors::write(&own, raw, &metadata)?;
        rename_synced(&own, &path).inspect_err(|_| {
            // The failed rename is what the user needs to hear about.
            let _ = std::fs::remove_file(&own);
        })
    }

    /// Reads an entry; `None` if it is absent or damaged.
    pub fn get(&self, key: &Key) -> Result<Option<Entry>> {
        self.verified(key).ok().map(|file| entry(&file)).transpose()
    }

    /// Reads an entry that must be there. Errors: absent or damaged, with a hint to run again.
    pub fn require(&self, key: &Key) -> Result<Entry> {
        let why = match self.verified(key) {
            Ok(file) => return entry(&file),
            Err(Fault::Absent) => "is gone".to_string(),
            Err(Fault::Damaged(why)) => why,
        };
        Err(Error::run(format!("the cache entry `{}` {why}", self.path(key).display()))
            .hint("run again with `--resume auto`: it is computed anew"))
    }

    /// The entry's file, after comparing its key and checksum.
    fn verified(&self, key: &Key) -> Result<MappedFile, Fault> {
        let path = self.path(key);
        if let Err(e) = std::fs::symlink_metadata(&path)
            && e.kind() == std::io::ErrorKind::NotFound
        {
            return Err(Fault::Absent);
        }
        let damaged = |why: &str| Fault::Damaged(why.to_string());
        let file = MappedFile::open(&path).map_err(|_| damaged("is cut or corrupt"))?;
        let metadata = file.metadata();
        if metadata.get("key") != Some(&key.hex()) {
            return Err(damaged("holds another entry than its name says"));
        }
        let names = file.names();
        let mut parts = Vec::new();
        for name in &names {
            let (dtype, shape) = file.info(name).ok_or_else(|| damaged("is corrupt"))?;
            let bytes = file.bytes(name).map_err(|_| damaged("is corrupt"))?;
            parts.push((name.as_str(), dtype, shape, bytes));
        }
        if metadata.get("checksum") != Some(&checksum(parts.into_iter())) {
            return Err(damaged("has a wrong checksum"));
        }
        Ok(file)
    }
}

fn entry(file: &MappedFile) -> Result<Entry> {
    let read = |name: String| {
        let (stored, _) = file.info(&name).expect("names() lists it");
        let dtype = readable(stored).ok_or_else(|| Error::run(format!("the cache does not hold {stored:?}")))?;
        Ok((name.clone(), file.tensor(&name, dtype, &Device::Cpu)?))
    };
    file.names().into_iter().map(read).collect()
}

/// The tensor type that a storage type is read as; `None` for types the cache does not hold.
fn readable(stored: Dtype) -> Option<DType> {
    match stored {
        Dtype::F32 => Some(DType::F32),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::I64 => Some(DType::I64),
        Dtype::U32 => Some(DType::U32),
        Dtype::U8 => Some(DType::U8),
        _ => None,
    }
}

/// A hash over names, types, shapes and data of tensors in name order.
fn checksum<'a>(tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, dtype, shape, bytes) in tensors {
        hasher.update(format!("{name:?} {dtype:?} {shape:?} {}\n", bytes.len()).as_bytes());
        hasher.update(bytes);
    }
    hasher.finalize().to_hex().to_string()
}
