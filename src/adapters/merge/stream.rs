//! Writes a merged safetensors file: tensor by tensor from the mapped base to the disk, in f32 arithmetic, in blocks
//! of rows that the threads share, in memory that does not grow with the model.

use super::change::{Change, Weighted};
use crate::adapters::read::Component;
use crate::error::{Error, Result};
use crate::io::checkpoint::{CheckpointFile, Stored};
use crate::io::floats::narrow;
use crate::io::safetensors::header_bytes;
use rayon::prelude::*;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A tensor of the output.
pub struct OutTensor<'a> {
    /// The key in the output.
    pub name: String,
    /// The type in the output; another than the stored one only for floats.
    pub dtype: Dtype,
    /// The file that holds the base tensor.
    pub file: &'a CheckpointFile,
    /// The base tensor.
    pub tensor: &'a Stored,
    /// The module whose adapters change it.
    pub module: Option<String>,
}

impl OutTensor<'_> {
    fn size(&self) -> usize {
        self.tensor.len() * self.dtype.bitsize() / 8
    }

    /// Its bytes in the base, if they are also its bytes in the output.
    fn unchanged_bytes(&self) -> Option<&[u8]> {
        self.file.raw(self.tensor).filter(|raw| {
            self.module.is_none() && raw.len() == self.size() && {
                matches!(&self.tensor.storage, crate::io::checkpoint::Storage::Plain(dtype) if *dtype == self.dtype)
            }
        })
    }
}

/// The adapters to merge, of one network, and who wants to hear of the bytes written.
pub struct Job<'a> {
    /// The adapters.
    pub adapters: &'a [Weighted],
    /// The network that the files belong to.
    pub component: Component,
    /// Called with the number of bytes just written, from any thread.
    pub progress: &'a (dyn Fn(usize) + Sync),
}

/// Bytes of output that are prepared and written between two meetings of the threads; bounds the memory.
const BATCH_BYTES: usize = 128 << 20;
/// Values that one thread computes at a time.
const BLOCK_VALUES: usize = 256 << 10;
/// Bytes copied at a time.
const COPY_BYTES: usize = 8 << 20;

/// Writes `path`, which must not exist yet, and syncs it. The data lies in the order of `tensors`.
pub fn write_merged(path: &Path, tensors: &[OutTensor], metadata: &BTreeMap<String, String>, job: &Job) -> Result<()> {
    let header = header_bytes(tensors.iter().map(|t| (t.name.as_str(), t.dtype, t.tensor.shape.as_slice())), metadata);
    let out = Out { file: File::create_new(path).map_err(|e| Error::io("create", path, e))?, path };
    out.write(&header, 0)?;
    let mut offset = header.len();
    let mut batch: Vec<(&OutTensor, usize)> = Vec::new();
    let mut batch_bytes = 0;
    for tensor in tensors {
        batch.push((tensor, offset));
        batch_bytes += tensor.size();
        offset += tensor.size();
        if batch_bytes >= BATCH_BYTES {
            write_batch(&std::mem::take(&mut batch), &out, job)?;
            batch_bytes = 0;
        }
    }
    write_batch(&batch, &out, job)?;
    out.file.sync_all().map_err(|e| Error::io("write", path, e))
}

/// A piece of work for one thread.
enum Piece<'a> {
    /// Bytes as they are.
    Copy(&'a [u8]),
    /// Values `first..first + len` of a tensor, with its change if it has one.
    Compute { tensor: &'a OutTensor<'a>, change: Option<&'a Change>, first: usize, len: usize },
}

fn write_batch(batch: &[(&OutTensor, usize)], out: &Out, job: &Job) -> Result<()> {
    let changes: Vec<Option<Change>> =
        batch.par_iter().map(|(tensor, _)| change_of(tensor, job)).collect::<Result<_>>()?;
    let mut pieces: Vec<(Piece, usize)> = Vec::new();
    for ((tensor, offset), change) in batch.iter().zip(&changes) {
        if let Some(bytes) = tensor.unchanged_bytes() {
            let copies = bytes.chunks(COPY_BYTES).enumerate();
            pieces.extend(copies.map(|(i, chunk)| (Piece::Copy(chunk), offset + i * COPY_BYTES)));
            continue;
        }
        let width = tensor.tensor.shape.iter().skip(1).product::<usize>().max(1);
        let block = (BLOCK_VALUES / width).max(1) * width;
        for first in (0..tensor.tensor.len()).step_by(block) {
            let len = block.min(tensor.tensor.len() - first);
            let piece = Piece::Compute { tensor, change: change.as_ref(), first, len };
            pieces.push((piece, offset + first * tensor.dtype.bitsize() / 8));
        }
    }
    pieces.par_iter().with_max_len(1).try_for_each_init(
        || (Vec::new(), Vec::new()),
        |(values, bytes), (piece, offset)| {
            let written = match piece {
                Piece::Copy(bytes) => {
                    out.write(bytes, *offset)?;
                    bytes.len()
                }
                Piece::Compute { tensor, change, first, len } => {
                    compute(tensor, *change, *first, *len, values, bytes)?;
                    out.write(bytes, *offset)?;
                    bytes.len()
                }
            };
            (job.progress)(written);
            Ok::<(), Error>(())
        },
    )?;
    batch.iter().for_each(|(tensor, _)| tensor.file.release(tensor.tensor));
    Ok(())
}

fn change_of(tensor: &OutTensor, job: &Job) -> Result<Option<Change>> {
    let Some(module) = &tensor.module else { return Ok(None) };
    let width = tensor.tensor.shape.iter().skip(1).product::<usize>();
    let base = |row: usize, out: &mut [f32]| tensor.file.widen(tensor.tensor, row * width, out);
    Change::of(job.adapters, job.component, module, &base)
}

fn compute(
    tensor: &OutTensor,
    change: Option<&Change>,
    first: usize,
    len: usize,
    values: &mut Vec<f32>,
    bytes: &mut Vec<u8>,
) -> Result<()> {
    values.resize(len, 0.0);
    tensor.file.widen(tensor.tensor, first, values)?;
    if let Some(change) = change {
        let width = tensor.tensor.shape.iter().skip(1).product::<usize>().max(1);
        change.apply(first / width, values);
    }
    bytes.resize(len * tensor.dtype.bitsize() / 8, 0);
    narrow(values, tensor.dtype, bytes);
    Ok(())
}

/// The output, written at offsets by many threads.
struct Out<'a> {
    file: File,
    path: &'a Path,
}

impl Out<'_> {
    fn write(&self, bytes: &[u8], offset: usize) -> Result<()> {
        self.file.write_all_at(bytes, offset as u64).map_err(|e| Error::io("write", self.path, e))?;
        self.start_writeback(offset, bytes.len());
        Ok(())
    }

    /// Lets the disk begin while the next block is computed, so that the final sync finds little left to do.
    fn start_writeback(&self, offset: usize, len: usize) {
        #[cfg(target_os = "linux")]
        {
            use std::os::fd::AsRawFd;
            // SAFETY: a plain system call on an open descriptor. Its failure loses nothing: sync_all follows.
            unsafe {
                libc::sync_file_range(self.file.as_raw_fd(), offset as i64, len as i64, libc::SYNC_FILE_RANGE_WRITE)
            };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (offset, len);
    }
}
