//! Writes a merged safetensors file: from the mapped base to the disk, in f32 arithmetic, window by window of the output,
//! in memory that does not grow with the model.

use super::change::{Change, Weighted};
use super::output::{WINDOW_BYTES, Windows, write_windows};
use crate::adapters::read::Component;
use crate::error::{Error, Result};
use crate::io::checkpoint::{CheckpointFile, Stored};
use crate::io::floats::narrow;
use crate::io::safetensors::header_bytes;
use rayon::prelude::*;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::ops::Range;
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

    /// Number of values in a row; vectors have rows of one.
    fn width(&self) -> usize {
        self.tensor.shape.iter().skip(1).product::<usize>().max(1)
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

/// Windows between two meetings of the threads; bounds the memory for changes that are prepared.
const WINDOWS_AT_ONCE: usize = 64;
/// Values that are computed at a time: they fit a cache.
const BLOCK_VALUES: usize = 256 << 10;

/// A tensor and the bytes of the output that are its.
struct Placed<'a> {
    tensor: &'a OutTensor<'a>,
    bytes: Range<usize>,
}

/// Writes `path`, which must not exist yet, and syncs it. The data lies in the order of `tensors`.
pub fn write_merged(path: &Path, tensors: &[OutTensor], metadata: &BTreeMap<String, String>, job: &Job) -> Result<()> {
    let header = header_bytes(tensors.iter().map(|t| (t.name.as_str(), t.dtype, t.tensor.shape.as_slice())), metadata);
    let mut end = header.len();
    let place = |tensor| {
        let begin = end;
        end += OutTensor::size(tensor);
        Placed { tensor, bytes: begin..end }
    };
    let placed: Vec<Placed> = tensors.iter().map(place).collect();
    write_windows(path, end, job.progress, |windows| {
        for begin in (0..end).step_by(WINDOWS_AT_ONCE * WINDOW_BYTES) {
            let part = begin..end.min(begin + WINDOWS_AT_ONCE * WINDOW_BYTES);
            fill_windows(part, &header, &placed, windows, job)?;
        }
        Ok(())
    })
}

/// Fills the windows of a `part` of the output, which begins with one.
fn fill_windows(part: Range<usize>, header: &[u8], placed: &[Placed], windows: &Windows, job: &Job) -> Result<()> {
    let placed = overlapping(placed, &part);
    let changes: Vec<Option<Change>> = placed.par_iter().map(|p| change_of(p.tensor, job)).collect::<Result<_>>()?;
    let offsets: Vec<usize> = part.clone().step_by(WINDOW_BYTES).collect();
    offsets.par_iter().with_max_len(1).try_for_each_init(Scratch::default, |scratch, &begin| {
        let range = begin..part.end.min(begin + WINDOW_BYTES);
        // Writing has failed: `write_windows` tells why.
        let Some(mut window) = windows.take() else { return Ok(()) };
        let out = window.bytes_mut(range.len());
        let from_header = header.len().clamp(range.start, range.end) - range.start;
        out[..from_header].copy_from_slice(&header[range.start.min(header.len())..][..from_header]);
        for (placed, change) in placed.iter().zip(&changes) {
            let bytes = placed.bytes.start.max(range.start)..placed.bytes.end.min(range.end);
            if !bytes.is_empty() {
                let inside = bytes.start - placed.bytes.start..bytes.end - placed.bytes.start;
                let out = &mut out[bytes.start - range.start..bytes.end - range.start];
                fill(placed.tensor, change.as_ref(), inside, out, scratch)?;
            }
        }
        windows.put(window, range.start, range.len());
        Ok::<(), Error>(())
    })?;
    let done = placed.iter().filter(|p| p.bytes.end <= part.end);
    done.for_each(|p| p.tensor.file.release(p.tensor.tensor));
    Ok(())
}

/// The tensors with bytes in `part`.
fn overlapping<'a, 'b>(placed: &'a [Placed<'b>], part: &Range<usize>) -> &'a [Placed<'b>] {
    let first = placed.partition_point(|p| p.bytes.end <= part.start);
    let count = placed[first..].partition_point(|p| p.bytes.start < part.end);
    &placed[first..first + count]
}

fn change_of(tensor: &OutTensor, job: &Job) -> Result<Option<Change>> {
    let Some(module) = &tensor.module else { return Ok(None) };
    let width = tensor.width();
    let base = |row: usize, out: &mut [f32]| tensor.file.widen(tensor.tensor, row * width, out);
    Change::of(job.adapters, job.component, module, &base)
}

/// Memory that a thread uses again and again.
#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
    /// A row of which a window wants a part.
    row: Vec<u8>,
}

/// The bytes `range` of a tensor of the output.
fn fill(
    tensor: &OutTensor,
    change: Option<&Change>,
    range: Range<usize>,
    out: &mut [u8],
    scratch: &mut Scratch,
) -> Result<()> {
    let size = tensor.dtype.bitsize() / 8;
    if let Some(bytes) = tensor.unchanged_bytes() {
        let first = range.start / size;
        tensor.file.populate(tensor.tensor, first, range.end.div_ceil(size) - first);
        out.copy_from_slice(&bytes[range]);
        return Ok(());
    }
    let row_bytes = tensor.width() * size;
    let rows_at_once = (BLOCK_VALUES / tensor.width()).max(1);
    let mut at = range.start;
    while at < range.end {
        let (row, skipped, left) = (at / row_bytes, at % row_bytes, range.end - at);
        let out = &mut out[at - range.start..];
        if skipped > 0 || left < row_bytes {
            // The window begins or ends within a row.
            scratch.row.resize(row_bytes, 0);
            compute(tensor, change, row..row + 1, &mut scratch.values, &mut scratch.row)?;
            let len = left.min(row_bytes - skipped);
            out[..len].copy_from_slice(&scratch.row[skipped..skipped + len]);
            at += len;
        } else {
            let rows = rows_at_once.min(left / row_bytes);
            compute(tensor, change, row..row + rows, &mut scratch.values, &mut out[..rows * row_bytes])?;
            at += rows * row_bytes;
        }
    }
    Ok(())
}

/// Whole rows of a tensor of the output.
fn compute(
    tensor: &OutTensor,
    change: Option<&Change>,
    rows: Range<usize>,
    values: &mut Vec<f32>,
    out: &mut [u8],
) -> Result<()> {
    let (first, len) = (rows.start * tensor.width(), rows.len() * tensor.width());
    values.resize(len, 0.0);
    tensor.file.populate(tensor.tensor, first, len);
    tensor.file.widen(tensor.tensor, first, values)?;
    if let Some(change) = change {
        change.apply(rows.start, values);
    }
    narrow(values, tensor.dtype, out);
    Ok(())
}
