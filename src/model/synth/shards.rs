//! Weight files as published: one file, or shards of at most 5 GB with an index.

use super::dense::{self, Law};
use super::{Precision, Written};
use crate::error::{Error, Result};
use crate::io::safetensors::header_bytes;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// The largest shard, as in the published repositories.
const MAX_SHARD_BYTES: usize = 5_000_000_000;
/// Random tensors are drawn in parallel for so many bytes at a time.
const BATCH_BYTES: usize = 64 << 20;

type Tensors = Vec<(String, Vec<usize>)>;

/// What the tensors hold.
pub enum Content {
    /// Zeros that take no space: only the header is written.
    Zeros,
    /// Drawn by `law`.
    Random {
        /// Seed of every stream.
        seed: u64,
        /// The network, which is part of each stream's name.
        part: &'static str,
        /// Sizes of the values.
        law: Law,
    },
}

/// Writes `tensors` into `folder` as `<stem>.safetensors`, or as shards and an index if they are more than 5 GB.
pub fn save(
    folder: &Path,
    stem: &str,
    mut tensors: Tensors,
    precision: Precision,
    content: &Content,
) -> Result<Written> {
    if matches!(content, Content::Zeros) {
        check_sparse(folder)?;
    }
    tensors.sort();
    let num_tensors = tensors.len();
    let total: usize = tensors.iter().map(|t| size(t, precision)).sum();
    let shards = split(tensors, precision);
    let mut written = Written { num_tensors, num_files: shards.len(), num_bytes: 0 };
    let mut weight_map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => format!("{stem}.safetensors"),
            n => format!("{stem}-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let path = folder.join(&name);
        written.num_bytes += save_shard(&path, shard, precision, content).map_err(|e| Error::io("write", &path, e))?;
        weight_map.extend(shard.iter().map(|(tensor, _)| (tensor, name.clone())));
    }
    if shards.len() > 1 {
        let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        super::configs::save(&folder.join(format!("{stem}.safetensors.index.json")), &index)?;
    }
    Ok(written)
}

fn size((_, shape): &(String, Vec<usize>), precision: Precision) -> usize {
    shape.iter().product::<usize>() * precision.bytes()
}

/// Fills one shard after the other, in name order.
fn split(tensors: Tensors, precision: Precision) -> Vec<Tensors> {
    let mut shards: Vec<Tensors> = Vec::new();
    let mut room = 0;
    for tensor in tensors {
        let size = size(&tensor, precision);
        if shards.is_empty() || size > room {
            shards.push(Vec::new());
            room = MAX_SHARD_BYTES;
        }
        room = room.saturating_sub(size);
        shards.last_mut().expect("pushed above").push(tensor);
    }
    shards
}

/// Returns the file's length.
fn save_shard(path: &Path, tensors: &Tensors, precision: Precision, content: &Content) -> std::io::Result<u64> {
    // transformers refuses files that do not say which framework wrote them.
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let header = header_bytes(tensors.iter().map(|(n, s)| (n.as_str(), precision.dtype(), s.as_slice())), &metadata);
    let data: usize = tensors.iter().map(|t| size(t, precision)).sum();
    let length = (header.len() + data) as u64;
    let mut file = File::create(path)?;
    file.write_all(&header)?;
    match content {
        Content::Zeros => file.set_len(length)?,
        Content::Random { seed, part, law } => {
            let mut rest = tensors.as_slice();
            while !rest.is_empty() {
                let mut bytes = 0;
                let fits = rest.iter().take_while(|t| {
                    bytes += size(t, precision);
                    bytes <= BATCH_BYTES
                });
                let (batch, after) = rest.split_at(fits.count().max(1));
                rest = after;
                let drawn: Vec<Vec<u8>> = batch
                    .par_iter()
                    .map(|(name, shape)| dense::bytes(*seed, part, name, shape, law, precision))
                    .collect();
                drawn.iter().try_for_each(|b| file.write_all(b))?;
            }
        }
    }
    file.sync_all()?;
    Ok(length)
}

/// Refuses file systems on which a file of zeros takes up its length.
fn check_sparse(folder: &Path) -> Result<()> {
    if has_sparse_files(folder).map_err(|e| Error::io("write into", folder, e))? {
        return Ok(());
    }
    Err(Error::run(format!("the file system of `{}` has no sparse files", folder.display()))
        .hint("choose a folder on another file system: the files would take up their whole length"))
}

/// Whether a file that is lengthened without being written takes up no space in `folder`.
fn has_sparse_files(folder: &Path) -> std::io::Result<bool> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        const LENGTH: u64 = 1 << 24;
        let path = folder.join(".sparse-probe");
        let probe = || -> std::io::Result<u64> {
            let file = File::create(&path)?;
            file.set_len(LENGTH)?;
            file.sync_all()?;
            Ok(file.metadata()?.blocks() * 512)
        };
        let occupied = probe();
        std::fs::remove_file(&path)?;
        Ok(occupied? < LENGTH / 2)
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_hold_every_tensor_once_and_none_is_too_large() {
        let tensors: Tensors = (0..11).map(|i| (format!("t{i:02}"), vec![1000, 1_000_000])).collect();
        let shards = split(tensors.clone(), Precision::Bf16);
        assert_eq!(shards.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 2, 2, 2, 1]);
        assert_eq!(shards.concat(), tensors);
        let one = split(vec![("huge".into(), vec![6_000_000_000])], Precision::F32);
        assert_eq!(one.len(), 1);
    }
}
