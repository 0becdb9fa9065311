//! Reading and writing safetensors files.
//!
//! The header is written here rather than by the safetensors crate because that one serialises metadata in the
//! random order of a `HashMap`; ours sorts every key, so that a file's bytes are a function of its content.
//! Format: <https://github.com/huggingface/safetensors/blob/v0.5.3/README.md#format>

use crate::error::{Error, Result};
use crate::io::{floats, write_atomic};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, SafeTensors};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A memory-mapped safetensors file whose header has been checked against its length.
pub struct MappedFile {
    path: PathBuf,
    map: Bytes,
    data_start: usize,
    header: Metadata,
}

impl MappedFile {
    /// Maps `path` and reads its header. Errors name the file and say what is wrong with it.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e).into_usage())?;
        // SAFETY: the map is read-only; a file truncated by another process while it is mapped would fault, as with
        // every memory-mapped weight loader. Our own files are never truncated in place: they are renamed over.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io("map", path, e).into_usage())?;
        Self::new(path, Bytes::Mapped(map))
    }

    /// The same from bytes in memory; `path` is what errors call them.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        Self::new(path, Bytes::Owned(bytes))
    }

    fn new(path: &Path, map: Bytes) -> Result<Self> {
        let (header_len, header) = SafeTensors::read_metadata(&map).map_err(|e| bad_header(path, &map, e))?;
        // read_metadata has checked that the offsets are those of the shapes, leave no gap, do not overlap and end
        // where the file ends; a key that stands twice it would silently take once.
        if let Some(name) = duplicate_key(&map[8..8 + header_len]) {
            return Err(Error::usage(format!("`{}` is not a whole safetensors file", path.display()))
                .detail(format!("its header names `{name}` twice"))
                .hint("the file is corrupt, or was written by a broken tool: write it again"));
        }
        Ok(Self { path: path.into(), map, data_start: header_len + 8, header })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length in bytes.
    pub fn num_bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Tensor names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.header.tensors().into_keys().collect();
        names.sort();
        names
    }

    /// Tensor names in the order of their data.
    pub fn names_by_offset(&self) -> Vec<String> {
        let mut names: Vec<(usize, String)> =
            self.header.tensors().into_iter().map(|(name, info)| (info.data_offsets.0, name)).collect();
        names.sort();
        names.into_iter().map(|(_, name)| name).collect()
    }

    /// The `__metadata__` entries, sorted.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header
            .metadata()
            .as_ref()
            .map(|m| m.iter().map(|(k, v)| (k.clone(), v.clone())).collect())
            .unwrap_or_default()
    }

    /// Storage type and shape of one tensor, if the file has it.
    pub fn info(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.header.info(name).map(|t| (t.dtype, t.shape.as_slice()))
    }

    /// The raw little-endian bytes of one tensor.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let info = self
            .header
            .info(name)
            .ok_or_else(|| Error::usage(format!("`{}` has no tensor `{name}`", self.path.display())))?;
        Ok(&self.map[self.data_start + info.data_offsets.0..self.data_start + info.data_offsets.1])
    }

    /// One tensor on `device`, converted to `dtype` (floats: f32, bf16, f16, f64; integers: i64, u32, u8).
    ///
    /// The pages read are given back to the system, so that loading does not hold file and copy both.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let bytes = self.bytes(name)?;
        let (stored, shape) = self.info(name).expect("bytes() found it");
        let tensor = decode(bytes, stored, shape, dtype).ok_or_else(|| self.bad_dtype(name, stored, dtype.as_str()))?;
        self.release(bytes);
        Ok(tensor.to_device(device)?)
    }

    /// The error for a tensor whose storage type does not convert to the type wanted.
    pub(crate) fn bad_dtype(&self, name: &str, stored: Dtype, wanted: &str) -> Error {
        let error = Error::usage(format!("cannot load `{name}` from `{}`", self.path.display()))
            .expected(format!("a dtype that converts to {wanted}"), format!("{stored:?}"));
        match stored {
            Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64 | Dtype::I64 => error,
            _ => error.hint("use the bf16 files of the model"),
        }
    }

    /// Some rows of a matrix, in the given order, as a CPU tensor of `dtype`; the rest is not read.
    ///
    /// Errors: not a matrix, a row that it does not have, a dtype that does not convert.
    pub fn rows(&self, name: &str, rows: &[usize], dtype: DType) -> Result<Tensor> {
        let bytes = self.bytes(name)?;
        let (stored, shape) = self.info(name).expect("bytes() found it");
        let bad = |expected: String, found: String| {
            Error::usage(format!("cannot load rows of `{name}` from `{}`", self.path.display()))
                .expected(expected, found)
        };
        let &[height, width] = shape else { return Err(bad("a matrix".into(), format!("shape {shape:?}"))) };
        if let Some(row) = rows.iter().find(|&&r| r >= height) {
            return Err(bad(format!("rows below {height}"), format!("row {row}")));
        }
        let row_bytes = bytes.len() / height.max(1);
        let gathered: Vec<u8> = rows.iter().flat_map(|r| &bytes[r * row_bytes..(r + 1) * row_bytes]).copied().collect();
        decode(&gathered, stored, &[rows.len(), width], dtype)
            .ok_or_else(|| self.bad_dtype(name, stored, dtype.as_str()))
    }

    /// The values of one float tensor (f32, bf16, f16, f64, fp8) as f32, row-major.
    ///
    /// Errors: no such tensor, a type that is not a float.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let bytes = self.bytes(name)?;
        let (stored, _) = self.info(name).expect("bytes() found it");
        if !floats::is_float(stored) {
            return Err(Error::usage(format!("cannot load `{name}` from `{}`", self.path.display()))
                .expected("a float type", format!("{stored:?}")));
        }
        let values = floats::widened(bytes, stored);
        self.release(bytes);
        Ok(values)
    }

    /// Gives the pages of `bytes`, a part of this file, back to the system; they are read again when touched.
    pub fn release(&self, bytes: &[u8]) {
        if let Bytes::Mapped(map) = &self.map {
            release_pages(map, bytes);
        }
    }

    /// Maps the pages of `bytes` at once, which costs far less than a fault for every few of them. A kernel that does
    /// not know how (Linux before 5.14) changes nothing.
    pub fn populate(&self, bytes: &[u8]) {
        self.advise(bytes, |map, start, len| {
            #[cfg(target_os = "linux")]
            let _ = map.advise_range(memmap2::Advice::PopulateRead, start, len);
        });
    }

    /// Calls `advise` with the whole pages inside `bytes`, which must lie in this file.
    fn advise(&self, bytes: &[u8], advise: impl Fn(&memmap2::Mmap, usize, usize)) {
        if let Bytes::Mapped(map) = &self.map {
            advise_pages(map, bytes, advise);
        }
    }
}

/// Gives the pages of `bytes`, a part of a mapped file, back to the system; they are read again when touched.
pub(super) fn release_pages(map: &memmap2::Mmap, bytes: &[u8]) {
    advise_pages(map, bytes, |map, start, len| {
        #[cfg(unix)]
        // SAFETY: the map is read-only and backed by a file; dropped pages are read again when touched.
        let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) };
    });
}

/// Calls `advise` with the whole pages inside `bytes`, which must lie in `map`.
#[cfg_attr(not(unix), allow(unused_variables))]
fn advise_pages(map: &memmap2::Mmap, bytes: &[u8], advise: impl Fn(&memmap2::Mmap, usize, usize)) {
    #[cfg(unix)]
    {
        // SAFETY: sysconf only reads. It is negative for unknown names alone.
        let Ok(page) = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }) else { return };
        let start = (bytes.as_ptr() as usize - map.as_ptr() as usize).next_multiple_of(page);
        let end = (bytes.as_ptr() as usize - map.as_ptr() as usize + bytes.len()) / page * page;
        if end > start {
            advise(map, start, end - start);
        }
    }
}

enum Bytes {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// The first key that stands twice in the header or in its metadata. The header is known to be valid JSON.
fn duplicate_key(header: &[u8]) -> Option<String> {
    use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

    /// Walks one object, and the one under `__metadata__`; the value is the first key seen twice.
    struct Keys;
    impl<'de> Visitor<'de> for Keys {
        type Value = Option<String>;

        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_unit<E>(self) -> std::result::Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Self::Value, M::Error> {
            let (mut seen, mut twice) = (std::collections::HashSet::new(), None);
            while let Some(key) = map.next_key::<String>()? {
                if key == "__metadata__" {
                    twice = twice.or(map.next_value_seed(Keys)?);
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
                if !seen.insert(key.clone()) {
                    twice = twice.or(Some(key));
                }
            }
            Ok(twice)
        }
    }
    impl<'de> serde::de::DeserializeSeed<'de> for Keys {
        type Value = Option<String>;

        fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<Self::Value, D::Error> {
            d.deserialize_any(self)
        }
    }
    serde_json::Deserializer::from_slice(header).deserialize_any(Keys).ok().flatten()
}

fn bad_header(path: &Path, map: &[u8], e: safetensors::SafeTensorError) -> Error {
    use safetensors::SafeTensorError as Bad;
    let error = Error::usage(format!("`{}` is not a whole safetensors file", path.display()));
    let error = match (&e, map.first_chunk::<8>().map(|n| u64::from_le_bytes(*n))) {
        (Bad::HeaderTooLarge | Bad::InvalidHeaderLength, Some(said)) => error.expected(
            format!("a header of {said} bytes, as its first eight bytes say"),
            format!("a file of {} bytes", map.len()),
        ),
        (Bad::MetadataIncompleteBuffer, _) => match declared_length(map) {
            Some(length) => {
                error.expected(format!("{length} bytes, as its header says"), format!("{} bytes", map.len()))
            }
            None => error.detail(e.to_string()),
        },
        (Bad::InvalidOffset(name), _) => {
            error.detail(format!("the data of `{name}` overlaps another tensor's or leaves a gap before it"))
        }
        _ => error.detail(e.to_string()),
    };
    let hint = if map.is_empty() {
        "the file is empty: download or copy it again"
    } else if map.starts_with(b"version https://git-lfs") {
        "this is a git-lfs pointer, not the weights: run `git lfs pull` or download the file itself"
    } else if map.starts_with(b"PK") || map.starts_with(&[0x80]) {
        "this looks like a PyTorch pickle file: convert it to safetensors"
    } else if map.starts_with(b"GGUF") {
        "this is a GGUF file, which is not read here: use safetensors"
    } else {
        "the file is truncated or corrupt: download or copy it again"
    };
    error.hint(hint)
}

/// The file length that a readable header asks for.
fn declared_length(map: &[u8]) -> Option<u64> {
    let header_length = u64::from_le_bytes(map.get(..8)?.try_into().expect("8 bytes"));
    let end = usize::try_from(header_length).ok()?.checked_add(8)?;
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(map.get(8..end)?).ok()?;
    let ends = header.values().filter_map(|t| t.get("data_offsets")?.get(1)?.as_u64());
    header_length.checked_add(8)?.checked_add(ends.max().unwrap_or(0))
}

fn read<const N: usize, T: Send>(bytes: &[u8], f: impl Fn([u8; N]) -> T + Sync) -> Vec<T> {
    bytes.par_chunks_exact(N).with_min_len(1 << 16).map(|b| f(b.try_into().expect("chunks of N bytes"))).collect()
}

/// Bytes of `stored` type as a CPU tensor of `dtype`; `None` if the one does not convert to the other.
fn decode(bytes: &[u8], stored: Dtype, shape: &[usize], dtype: DType) -> Option<Tensor> {
    use half::{bf16, f16};
    let cpu = &Device::Cpu;
    let tensor = match (stored, dtype) {
        (Dtype::F32, DType::F32) => Tensor::from_vec(read(bytes, f32::from_le_bytes), shape, cpu),
        (Dtype::BF16, DType::F32) => Tensor::from_vec(read(bytes, |b| bf16::from_le_bytes(b).to_f32()), shape, cpu),
        (Dtype::F16, DType::F32) => Tensor::from_vec(read(bytes, |b| f16::from_le_bytes(b).to_f32()), shape, cpu),
        (Dtype::F64, DType::F32) => Tensor::from_vec(read(bytes, |b| f64::from_le_bytes(b) as f32), shape, cpu),
        (Dtype::BF16, DType::BF16) => Tensor::from_vec(read(bytes, bf16::from_le_bytes), shape, cpu),
        (Dtype::F32, DType::BF16) => {
            Tensor::from_vec(read(bytes, |b| bf16::from_f32(f32::from_le_bytes(b))), shape, cpu)
        }
        (Dtype::F16, DType::BF16) => {
            Tensor::from_vec(read(bytes, |b| bf16::from_f32(f16::from_le_bytes(b).to_f32())), shape, cpu)
        }
        (Dtype::F64, DType::BF16) => {
            Tensor::from_vec(read(bytes, |b| bf16::from_f64(f64::from_le_bytes(b))), shape, cpu)
        }
        (Dtype::I64, DType::I64) => Tensor::from_vec(read(bytes, i64::from_le_bytes), shape, cpu),
        (Dtype::I32, DType::I64) => Tensor::from_vec(read(bytes, |b| i64::from(i32::from_le_bytes(b))), shape, cpu),
        (Dtype::U32, DType::U32) => Tensor::from_vec(read(bytes, u32::from_le_bytes), shape, cpu),
        (Dtype::U8 | Dtype::BOOL, DType::U8) => Tensor::from_vec(bytes.to_vec(), shape, cpu),
        _ => return None,
    };
    Some(tensor.expect("the header's check made length and shape agree"))
}

/// One tensor to be written: name, storage type, shape, little-endian bytes.
pub struct RawTensor {
    /// The key in the file.
    pub name: String,
    /// Storage type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Little-endian data, row-major.
    pub bytes: Vec<u8>,
}

impl RawTensor {
    /// From a tensor on any device, in its own dtype (f32, bf16, f16, i64, u32, u8).
    pub fn from_tensor(name: impl Into<String>, tensor: &Tensor) -> Result<Self> {
        let (dtype, bytes) = match tensor.dtype() {
            DType::F32 => (Dtype::F32, flat::<f32>(tensor)?.iter().flat_map(|v| v.to_le_bytes()).collect()),
            DType::BF16 => (Dtype::BF16, flat::<half::bf16>(tensor)?.iter().flat_map(|v| v.to_le_bytes()).collect()),
            DType::F16 => (Dtype::F16, flat::<half::f16>(tensor)?.iter().flat_map(|v| v.to_le_bytes()).collect()),
            DType::I64 => (Dtype::I64, flat::<i64>(tensor)?.iter().flat_map(|v| v.to_le_bytes()).collect()),
            DType::U32 => (Dtype::U32, flat::<u32>(tensor)?.iter().flat_map(|v| v.to_le_bytes()).collect()),
            DType::U8 => (Dtype::U8, flat::<u8>(tensor)?),
            other => return Err(Error::run(format!("tensors of type {} are not written", other.as_str()))),
        };
        Ok(Self { name: name.into(), dtype, shape: tensor.dims().to_vec(), bytes })
    }
}

fn flat<T: candle_core::WithDType>(tensor: &Tensor) -> Result<Vec<T>> {
    Ok(tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?)
}

/// Writes a safetensors file atomically. Tensors are laid out in name order and all header keys are sorted.
pub fn write(path: &Path, mut tensors: Vec<RawTensor>, metadata: &BTreeMap<String, String>) -> Result<()> {
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let header = header_bytes(tensors.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice())), metadata);
    write_atomic(path, |file| {
        file.write_all(&header)?;
        tensors.iter().try_for_each(|t| file.write_all(&t.bytes))
    })
}

/// The length prefix and JSON header for tensors laid out back to back in the given order, padded to 8 bytes.
pub fn header_bytes<'a>(
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>,
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    // Ordered maps and a struct rather than serde_json's own map, whose order is a matter of its build features.
    #[derive(serde::Serialize)]
    #[serde(untagged)]
    enum Entry<'a> {
        Metadata(&'a BTreeMap<String, String>),
        Tensor { data_offsets: [usize; 2], dtype: Dtype, shape: &'a [usize] },
    }
    let mut header = BTreeMap::new();
    if !metadata.is_empty() {
        header.insert("__metadata__", Entry::Metadata(metadata));
    }
    let mut offset = 0usize;
    for (name, dtype, shape) in tensors {
        let end = offset + shape.iter().product::<usize>() * dtype.bitsize() / 8;
        header.insert(name, Entry::Tensor { data_offsets: [offset, end], dtype, shape });
        offset = end;
    }
    let mut json = serde_json::to_vec(&header).expect("strings and numbers have a JSON form");
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.append(&mut json);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_the_bytes_are_reproducible() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let x = Tensor::new(&[[1f32, -2.5], [3.25, 1e-8]], &Device::Cpu).unwrap();
        let ids = Tensor::new(&[7i64, 8], &Device::Cpu).unwrap();
        let metadata: BTreeMap<_, _> = ["z", "a", "m", "b"].map(|k| (k.to_string(), "v".to_string())).into();
        let save = || {
            let raw = vec![RawTensor::from_tensor("x", &x).unwrap(), RawTensor::from_tensor("ids", &ids).unwrap()];
            write(&path, raw, &metadata).unwrap();
            std::fs::read(&path).unwrap()
        };
        assert_eq!(save(), save());
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.names(), ["ids", "x"]);
        assert_eq!(file.metadata(), metadata);
        let back = file.tensor("x", DType::F32, &Device::Cpu).unwrap();
        assert_eq!(back.to_vec2::<f32>().unwrap(), x.to_vec2::<f32>().unwrap());
        assert_eq!(file.tensor("ids", DType::I64, &Device::Cpu).unwrap().to_vec1::<i64>().unwrap(), [7, 8]);
        let rows = file.rows("x", &[1, 0, 1], DType::F32).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(rows, [[3.25, 1e-8], [1.0, -2.5], [3.25, 1e-8]]);
        assert!(file.rows("x", &[2], DType::F32).unwrap_err().to_string().contains("found row 2"));
        assert!(file.rows("ids", &[0], DType::I64).is_err());
    }

    #[test]
    fn corrupt_headers_are_explained() {
        let open = |header: &str, data: usize| {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend(vec![0; data]);
            MappedFile::from_bytes(Path::new("x.safetensors"), bytes)
        };
        let fail = |header: &str, data: usize| open(header, data).err().expect("a corrupt header").to_string();
        let one = r#""dtype":"U8","shape":[4],"data_offsets""#;
        assert!(open(&format!(r#"{{"a":{{{one}:[0,4]}},"b":{{{one}:[4,8]}}}}"#), 8).is_ok());
        let error = fail(&format!(r#"{{"a":{{{one}:[0,4]}},"a":{{{one}:[0,4]}}}}"#), 4);
        assert!(error.contains("names `a` twice"), "{error}");
        let error = fail(&format!(r#"{{"__metadata__":{{"k":"1","k":"2"}},"a":{{{one}:[0,4]}}}}"#), 4);
        assert!(error.contains("names `k` twice"), "{error}");
        let error = fail(&format!(r#"{{"a":{{{one}:[0,4]}},"b":{{{one}:[2,6]}}}}"#), 6);
        assert!(error.contains("`b` overlaps"), "{error}");
        let error = fail(&format!(r#"{{"a":{{{one}:[0,4]}}}}"#), 9);
        assert!(error.contains("bytes, as its header says"), "{error}");
        let mut huge = (10u64 << 30).to_le_bytes().to_vec();
        huge.resize(1024, b' ');
        let error = MappedFile::from_bytes(Path::new("x.safetensors"), huge).err().expect("10 GB in 1 KB").to_string();
        assert!(error.contains("a header of 10737418240 bytes") && error.contains("a file of 1024 bytes"), "{error}");
    }

    #[test]
    fn truncated_and_empty_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let x = Tensor::zeros((64, 64), DType::F32, &Device::Cpu).unwrap();
        write(&path, vec![RawTensor::from_tensor("x", &x).unwrap()], &BTreeMap::new()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for len in [0, 4, 40, whole.len() - 1] {
            std::fs::write(&path, &whole[..len]).unwrap();
            let error = MappedFile::open(&path).err().expect("a cut file must not open").to_string();
            assert!(error.contains("t.safetensors") && error.contains("\nhint: "), "{error}");
            if len > 40 {
                let lengths = format!("expected {} bytes, as its header says, found {len} bytes", whole.len());
                assert!(error.contains(&lengths), "{error}");
            }
        }
    }
}
