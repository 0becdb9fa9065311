//! The identity of a set of weight files, without reading all of them.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Files up to this size are hashed whole: configs, tokenizers, small models.
const WHOLE_BYTES: u64 = 16 << 20;
/// Of a larger file this many evenly spaced samples are hashed, the first at its beginning, the last at its end.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 64 << 10;
/// Safetensors headers longer than this are not believed.
const MAX_HEADER_BYTES: u64 = 100 << 20;

/// A hex hash that identifies `files` (the weights of one network, its config.json, a tokenizer) for cache keys.
///
/// It covers each file's name without folder and its size; files up to 16 MiB whole; of larger ones the safetensors
/// header and 64 samples of 64 KiB. What it does not see: a change to a large file that keeps its size and header and
/// lies between the samples. Fine-tuned or requantised weights differ almost everywhere and are told apart; a few
/// patched numbers may not be: clear the cache after such surgery. Files renamed or sharded in another way count as
/// other files; that costs a recomputation, no more.
/// Errors: a file that cannot be read.
pub fn fingerprint(files: &[PathBuf]) -> Result<String> {
    let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut named: Vec<(String, &PathBuf)> = files.iter().map(|p| (name(p), p)).collect();
    named.sort();
    let mut hasher = blake3::Hasher::new();
    for (name, path) in named {
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
        hash_file(&mut hasher, path).map_err(|e| Error::io("read", path, e).into_usage())?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn hash_file(hasher: &mut blake3::Hasher, path: &Path) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    hasher.update(&len.to_le_bytes());
    let mut part = |start: u64, len: u64| -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut bytes)?;
        hasher.update(&bytes);
        Ok(bytes)
    };
    if len <= WHOLE_BYTES {
        part(0, len)?;
        return Ok(());
    }
    let header_len = part(0, 8)?;
    let header_len = u64::from_le_bytes(header_len.try_into().expect("8 bytes were read"));
    if header_len <= MAX_HEADER_BYTES.min(len - 8) {
        part(8, header_len)?;
    }
    let last = len - SAMPLE_BYTES;
    for i in 0..SAMPLES {
        // len is far below 2^58: no overflow.
        part(last * i / (SAMPLES - 1), SAMPLE_BYTES)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_sees_names_sizes_headers_both_ends_and_not_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let print = |folder: &str, name: &str, bytes: &[u8]| {
            let path = dir.path().join(folder).join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, bytes).unwrap();
            fingerprint(&[path]).unwrap()
        };
        let mut large = vec![0u8; (WHOLE_BYTES + 12345) as usize];
        large[..8].copy_from_slice(&100_000u64.to_le_bytes());
        let base = print("a", "m.safetensors", &large);
        assert_eq!(base, print("b", "m.safetensors", &large));
        assert_ne!(base, print("a", "n.safetensors", &large));
        let mut changed = |at: usize| {
            large[at] ^= 1;
            let other = print("a", "m.safetensors", &large);
            large[at] ^= 1;
            other
        };
        let end = (WHOLE_BYTES + 12344) as usize;
        for at in [8, 90_000, end, end - 60_000] {
            assert_ne!(base, changed(at), "byte {at}");
        }
        assert_ne!(print("a", "config.json", b"{}"), print("a", "config.json", b"{ }"));
        let missing = fingerprint(&[dir.path().join("no.safetensors")]).unwrap_err();
        assert!(missing.to_string().contains("no.safetensors"));
    }
}
