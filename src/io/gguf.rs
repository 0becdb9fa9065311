//! Reading GGUF files: quantised checkpoints as the ComfyUI community spreads them.
//!
//! Own parsing of the header, with every length checked against the file (a corrupt count must not become an
//! allocation); candle's block decoders.
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use crate::error::{Error, Result};
use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A memory-mapped GGUF file.
pub struct GgufFile {
    path: PathBuf,
    map: memmap2::Mmap,
    tensors: BTreeMap<String, GgufTensor>,
}

/// Where a tensor lies, and how it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    /// Dimensions, the slowest first (the file has the fastest first).
    pub shape: Vec<usize>,
    /// Block format.
    pub dtype: GgmlDType,
    start: usize,
}

impl GgufFile {
    /// Whether the file begins as a GGUF file does.
    pub fn is_gguf(path: &Path) -> bool {
        use std::io::Read;
        let mut magic = [0; 4];
        File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && &magic == b"GGUF"
    }

    /// Maps `path` and reads its header.
    ///
    /// Errors (usage): a truncated or corrupt header, a block format that is not known, data beyond the file's end.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e).into_usage())?;
        // SAFETY: as for safetensors files: read-only, and weight files are not truncated in place.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io("map", path, e).into_usage())?;
        let tensors = parse(&map).map_err(|why| {
            Error::usage(format!("`{}` is not a GGUF file that can be read", path.display()))
                .detail(why)
                .hint("download it again, or use the safetensors weights")
        })?;
        Ok(Self { path: path.into(), map, tensors })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// Gives the pages of a tensor back to the system; they are read again when touched.
    pub fn release(&self, tensor: &GgufTensor) {
        let values: usize = tensor.shape.iter().product();
        let bytes = values / tensor.dtype.block_size() * tensor.dtype.type_size();
        crate::io::safetensors::release_pages(&self.map, &self.map[tensor.start..tensor.start + bytes]);
    }

    /// Decodes the values `first..first + out.len()` of a tensor. Both ends must lie between blocks, as they do when
    /// they lie between rows.
    pub fn widen(&self, tensor: &GgufTensor, first: usize, out: &mut [f32]) -> Result<()> {
        let (block, size) = (tensor.dtype.block_size(), tensor.dtype.type_size());
        assert!(first.is_multiple_of(block) && out.len().is_multiple_of(block), "whole blocks");
        let start = tensor.start + first / block * size;
        let bytes = &self.map[start..start + out.len() / block * size];
        let failed = |e: candle_core::Error| {
            Error::run(format!("cannot decode {:?} data of `{}`", tensor.dtype, self.path.display())).source(e)
        };
        match tensor.dtype {
            GgmlDType::F32 => crate::io::floats::widen(bytes, safetensors::Dtype::F32, out),
            GgmlDType::F16 => crate::io::floats::widen(bytes, safetensors::Dtype::F16, out),
            GgmlDType::BF16 => crate::io::floats::widen(bytes, safetensors::Dtype::BF16, out),
            dtype => {
                let values = qtensor_from_ggml(dtype, bytes, vec![out.len()], &Device::Cpu)
                    .and_then(|q| q.dequantize(&Device::Cpu))
                    .and_then(|t| t.to_vec1::<f32>())
                    .map_err(failed)?;
                out.copy_from_slice(&values);
            }
        }
        Ok(())
    }
}

/// Bounds-checked reading of little-endian values.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

type Parsed<T> = std::result::Result<T, String>;

impl<'a> Cursor<'a> {
    fn take(&mut self, n: u64) -> Parsed<&'a [u8]> {
        let end = usize::try_from(n).ok().and_then(|n| self.at.checked_add(n));
        let taken = end.and_then(|end| self.bytes.get(self.at..end)).ok_or("the header runs beyond the file's end")?;
        self.at += taken.len();
        Ok(taken)
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("4 bytes")))
    }

    fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("8 bytes")))
    }

    fn string(&mut self) -> Parsed<&'a str> {
        let length = self.u64()?;
        std::str::from_utf8(self.take(length)?).map_err(|_| "a name that is not UTF-8".into())
    }

    /// Skips a metadata value; returns it if it is a 32-bit unsigned integer.
    fn value(&mut self, kind: u32, depth: usize) -> Parsed<Option<u32>> {
        match kind {
            0 | 1 | 7 => self.take(1).map(|_| None),
            2 | 3 => self.take(2).map(|_| None),
            4 => self.u32().map(Some),
            5 | 6 => self.take(4).map(|_| None),
            8 => self.string().map(|_| None),
            9 if depth < 4 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                for _ in 0..count {
                    // Every value takes at least a byte, so that a corrupt count ends at the file's end.
                    self.value(kind, depth + 1)?;
                }
                Ok(None)
            }
            10..=12 => self.take(8).map(|_| None),
            other => Err(format!("metadata of unknown type {other}")),
        }
    }
}

fn parse(bytes: &[u8]) -> Parsed<BTreeMap<String, GgufTensor>> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4)? != b"GGUF" {
        return Err("it does not begin with `GGUF`".into());
    }
    let version = cursor.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("version {version}; versions 2 and 3 are read"));
    }
    let (num_tensors, num_values) = (cursor.u64()?, cursor.u64()?);
    let mut alignment = 32;
    for _ in 0..num_values {
        let key = cursor.string()?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind, 0)?;
        if key == "general.alignment" {
            alignment = value.filter(|a| a.is_power_of_two() && *a >= 8).ok_or("a bad `general.alignment`")? as usize;
        }
    }
    let mut tensors = BTreeMap::new();
    for _ in 0..num_tensors {
        let name = cursor.string()?.to_string();
        let num_dims = cursor.u32()?;
        if num_dims > 4 {
            return Err(format!("`{name}` has {num_dims} dimensions"));
        }
        let dims = (0..num_dims).map(|_| cursor.u64()).collect::<Parsed<Vec<u64>>>()?;
        let kind = cursor.u32()?;
        let dtype = block_format(kind).ok_or_else(|| {
            format!("`{name}` is stored in ggml type {kind}, which is not read here (Q4_0 to Q8_0, Q2_K to Q6_K, F16, BF16 and F32 are)")
        })?;
        let start = cursor.u64()?;
        let shape: Option<Vec<usize>> = dims.iter().rev().map(|&d| usize::try_from(d).ok()).collect();
        let (shape, start) = shape.zip(usize::try_from(start).ok()).ok_or("sizes beyond this machine's")?;
        if !shape.last().is_none_or(|row| row.is_multiple_of(dtype.block_size())) {
            return Err(format!("`{name}`: rows of {shape:?} are no whole blocks of {dtype:?}"));
        }
        if tensors.insert(name.clone(), GgufTensor { shape, dtype, start }).is_some() {
            return Err(format!("its header names `{name}` twice"));
        }
    }
    let data = cursor.at.next_multiple_of(alignment);
    for (name, tensor) in &mut tensors {
        let elements = tensor.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let size = elements.and_then(|n| (n / tensor.dtype.block_size()).checked_mul(tensor.dtype.type_size()));
        let start = tensor.start.checked_add(data).filter(|_| tensor.start.is_multiple_of(alignment));
        let end = start.zip(size).and_then(|(start, size)| start.checked_add(size));
        match (start, end) {
            (Some(start), Some(end)) if end <= bytes.len() => tensor.start = start,
            _ => return Err(format!("the data of `{name}` lies beyond the file's end: it is truncated or corrupt")),
        }
    }
    Ok(tensors)
}

/// ggml's numbers of the formats that candle decodes.
fn block_format(kind: u32) -> Option<GgmlDType> {
    Some(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};
    use candle_core::Tensor;
    use candle_core::quantized::{QTensor, gguf_file};

    fn sample(path: &Path) -> Tensor {
        let values = Stream::new(1, 0, 0, Purpose::Bench).normals(6 * 256, 1.0);
        let x = Tensor::from_vec(values, (6, 256), &Device::Cpu).unwrap();
        let store = |dtype| QTensor::quantize(&x, dtype).unwrap();
        let stored =
            [("f32", GgmlDType::F32), ("bf16", GgmlDType::BF16), ("q8", GgmlDType::Q8_0), ("q4k", GgmlDType::Q4K)]
                .map(|(name, dtype)| (name, store(dtype)));
        let tensors: Vec<(&str, &QTensor)> = stored.iter().map(|(n, t)| (*n, t)).collect();
        let text = gguf_file::Value::String("qwen_image".into());
        let list = gguf_file::Value::Array(vec![gguf_file::Value::U32(7), gguf_file::Value::U32(8)]);
        let mut file = File::create(path).unwrap();
        gguf_file::write(&mut file, &[("general.architecture", &text), ("list", &list)], &tensors).unwrap();
        x
    }

    #[test]
    fn tensors_come_back_within_their_formats_error_whole_or_in_rows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        let want: Vec<f32> = sample(&path).flatten_all().unwrap().to_vec1().unwrap();
        assert!(GgufFile::is_gguf(&path));
        let file = GgufFile::open(&path).unwrap();
        // Half a step of each format, of the block's largest value (about 3.5 here).
        for (name, limit) in [("f32", 0.0), ("bf16", 0.008), ("q8", 0.02), ("q4k", 0.3)] {
            let tensor = &file.tensors()[name];
            assert_eq!(tensor.shape, [6, 256]);
            let mut whole = vec![0.0; want.len()];
            file.widen(tensor, 0, &mut whole).unwrap();
            let worst = whole.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= limit, "{name}: {worst}");
            let mut rows = vec![0.0; 512];
            file.widen(tensor, 3 * 256, &mut rows).unwrap();
            assert_eq!(rows, whole[768..1280]);
        }
    }

    #[test]
    fn every_cut_and_every_corrupt_length_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        sample(&path);
        let whole = std::fs::read(&path).unwrap();
        assert!(parse(&whole).is_ok());
        for cut in [0, 3, 7, 20, 60, 100, whole.len() - 40] {
            assert!(parse(&whole[..cut]).is_err(), "{cut}");
        }
        // Each 8-byte group of the header in turn becomes a huge number: an error or harmless, never an allocation.
        for at in 0..300 {
            let mut corrupt = whole.clone();
            corrupt[at..at + 8].fill(0xff);
            let _ = parse(&corrupt);
        }
        std::fs::write(&path, &whole[..100]).unwrap();
        let error = GgufFile::open(&path).err().expect("cut").to_string();
        assert!(error.contains("x.gguf") && error.contains("beyond the file's end"), "{error}");
    }
}
