//! `synthetic:world`: a small trained model of the drawn world ([`crate::world`]), built into the binary and unpacked
//! into the user's cache folder. Made by `scripts/world/build.sh`; see `docs/world.md`.

use super::cached::{cache_folder, made_once};
use crate::error::{Error, Result};
use crate::io::atomic::rename_synced;
use std::fs;
use std::path::{Path, PathBuf};

/// A file and what it holds.
type Packed = (&'static str, &'static [u8]);

macro_rules! packed {
    ($($path:literal),+ $(,)?) => { &[$(($path, include_bytes!(concat!("../../../assets/world/", $path)))),+] };
}

/// The pipeline in the published layout.
const FILES: &[Packed] = packed![
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/added_tokens.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

/// The folder of the world's pipeline, which is unpacked there unless it is whole: `synthetic-world-<hash>` beside the
/// tiny one.
pub fn world_in_cache() -> Result<PathBuf> {
    world_in(&cache_folder()).map_err(|e| e.hint("XDG_CACHE_HOME can name another folder for it"))
}

/// The same under another folder.
pub fn world_in(folder: &Path) -> Result<PathBuf> {
    made_once(folder, &format!("synthetic-world-{}", hash()), is_whole, unpack)
}

/// Writes the files beside `place` and renames.
fn unpack(place: &Path) -> Result<()> {
    let part = place.with_extension(format!("part-{}", std::process::id()));
    let write = || {
        for (name, bytes) in FILES {
            let path = part.join(name);
            let parent = path.parent().expect("a joined path has a parent");
            fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
            fs::write(&path, bytes).map_err(|e| Error::io("write", &path, e))?;
        }
        rename_synced(&part, place)
    };
    write().inspect_err(|_| {
        // What is left is of no use; the first error is the one to tell.
        let _ = fs::remove_dir_all(&part);
    })
}

/// Whether every file is there and as long as it should be.
fn is_whole(place: &Path) -> bool {
    FILES.iter().all(|(name, bytes)| fs::metadata(place.join(name)).is_ok_and(|m| m.len() == bytes.len() as u64))
}

/// Names the content.
fn hash() -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, bytes) in FILES {
        hasher.update(name.as_bytes());
        hasher.update(bytes);
    }
    hasher.finalize().to_hex()[..12].to_string()
}
