//! The tensors of a checkpoint in any of the forms that base models come in: safetensors in f32, bf16 or f16, fp8
//! with or without scales, GGUF. Values come out widened to f32, some rows at a time.
//!
//! Scaled fp8 (ComfyUI): the value of `X.weight` is fp8 times `X.weight_scale`, or `X.scale_weight` in older files, a
//! single number or one for each row; `X.input_scale`, `X.comfy_quant` and `scaled_fp8` are not values of the model.

use crate::error::{Error, Result};
use crate::io::floats::{is_float, widen};
use crate::io::gguf::{GgufFile, GgufTensor};
use crate::io::safetensors::MappedFile;
use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The files of one checkpoint.
pub struct Checkpoint {
    files: Vec<CheckpointFile>,
}

/// One file and its tensors, in the order of their data.
pub struct CheckpointFile {
    source: Source,
    tensors: Vec<Stored>,
}

enum Source {
    Safetensors(MappedFile),
    Gguf(GgufFile),
}

/// One tensor as it is stored.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The key in the file.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// How its values are stored.
    pub storage: Storage,
}

/// How the values of a tensor are stored.
#[derive(Clone, Debug)]
pub enum Storage {
    /// As they are.
    Plain(Dtype),
    /// In fp8, to be multiplied by the scales: one, or one for each row.
    Scaled(Dtype, Vec<f32>),
    /// In blocks of a GGUF format.
    Blocks(GgufTensor),
}

/// What ComfyUI puts before the transformer's names, in files with other networks beside it.
pub const PREFIXES: [&str; 2] = ["model.diffusion_model.", "diffusion_model."];

/// A name of the transformer without [`PREFIXES`].
pub fn bare(name: &str) -> &str {
    PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name)
}

impl Stored {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it holds no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The plain type in which this tensor is written by default: its own, or bf16 if it is quantised.
    pub fn plain_dtype(&self) -> Dtype {
        match &self.storage {
            Storage::Plain(Dtype::F8_E4M3 | Dtype::F8_E5M2) | Storage::Scaled(..) | Storage::Blocks(_) => Dtype::BF16,
            Storage::Plain(Dtype::F64) => Dtype::F32,
            Storage::Plain(dtype) => *dtype,
        }
    }

    /// Whether it is fp8 without scales: a bare cast, which has lost more than fp8 need lose.
    pub fn is_unscaled_fp8(&self) -> bool {
        matches!(self.storage, Storage::Plain(Dtype::F8_E4M3 | Dtype::F8_E5M2))
    }

    /// Whether its values are floats that can be widened.
    pub fn is_float(&self) -> bool {
        !matches!(&self.storage, Storage::Plain(dtype) if !is_float(*dtype))
    }
}

impl Checkpoint {
    /// Opens the files of one network.
    ///
    /// Errors (usage): a corrupt file, a tensor in two files, a quantisation that is not read here.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let files = paths.iter().map(|p| CheckpointFile::open(p)).collect::<Result<Vec<_>>>()?;
        let mut seen: BTreeMap<&str, &Path> = BTreeMap::new();
        for file in &files {
            for tensor in &file.tensors {
                if let Some(first) = seen.insert(&tensor.name, file.path()) {
                    return Err(Error::usage(format!("tensor `{}` stands in two files", tensor.name)).detail(format!(
                        "`{}` and `{}`",
                        first.display(),
                        file.path().display()
                    )));
                }
            }
        }
        Ok(Self { files })
    }

    /// The files, in the order given.
    pub fn files(&self) -> &[CheckpointFile] {
        &self.files
    }

    /// All tensors.
    pub fn tensors(&self) -> impl Iterator<Item = &Stored> {
        self.files.iter().flat_map(|f| &f.tensors)
    }
}

impl CheckpointFile {
    /// Opens one file.
    ///
    /// Errors (usage): a corrupt file, a quantisation that is not read here.
    pub fn open(path: &Path) -> Result<Self> {
        if GgufFile::is_gguf(path) {
            let file = GgufFile::open(path)?;
            let stored = |(name, tensor): (&String, &GgufTensor)| Stored {
                name: name.clone(),
                shape: tensor.shape.clone(),
                storage: Storage::Blocks(tensor.clone()),
            };
            let tensors = file.tensors().iter().map(stored).collect();
            return Ok(Self { source: Source::Gguf(file), tensors });
        }
        let file = MappedFile::open(path)?;
        let tensors = safetensors_tensors(&file)?;
        Ok(Self { source: Source::Safetensors(file), tensors })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        match &self.source {
            Source::Safetensors(file) => file.path(),
            Source::Gguf(file) => file.path(),
        }
    }

    /// Its tensors, in the order of their data.
    pub fn tensors(&self) -> &[Stored] {
        &self.tensors
    }

    /// The metadata of a safetensors file.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        match &self.source {
            Source::Safetensors(file) => file.metadata(),
            Source::Gguf(_) => BTreeMap::new(),
        }
    }

    /// The bytes of a tensor that is stored plainly.
    pub fn raw(&self, tensor: &Stored) -> Option<&[u8]> {
        match (&self.source, &tensor.storage) {
            (Source::Safetensors(file), Storage::Plain(_)) => file.bytes(&tensor.name).ok(),
            _ => None,
        }
    }

    /// Maps the pages of the values `first..first + len` at once, before they are read.
    pub fn populate(&self, tensor: &Stored, first: usize, len: usize) {
        if let (Source::Safetensors(file), Storage::Plain(dtype) | Storage::Scaled(dtype, _)) =
            (&self.source, &tensor.storage)
            && let Ok(bytes) = file.bytes(&tensor.name)
        {
            let size = dtype.bitsize() / 8;
            file.populate(&bytes[first * size..(first + len) * size]);
        }
    }

    /// Gives the pages of a tensor back to the system.
    pub fn release(&self, tensor: &Stored) {
        match (&self.source, &tensor.storage) {
            (Source::Gguf(file), Storage::Blocks(blocks)) => file.release(blocks),
            (Source::Safetensors(file), _) => {
                if let Ok(bytes) = file.bytes(&tensor.name) {
                    file.release(bytes);
                }
            }
            (Source::Gguf(_), _) => {}
        }
    }

    /// The file as safetensors, if it is that.
    pub fn safetensors(&self) -> Option<&MappedFile> {
        match &self.source {
            Source::Safetensors(file) => Some(file),
            Source::Gguf(_) => None,
        }
    }

    /// Checks that a tensor's values can be taken for weights of a base model.
    ///
    /// Errors (usage): integers; fp8 without scales.
    pub fn check_weights(&self, tensor: &Stored) -> Result<()> {
        let cannot = |found: String| {
            Error::usage(format!("cannot load `{}` from `{}`", tensor.name, self.path().display()))
                .expected("f32, bf16, f16, fp8 with scales, or blocks of a GGUF file", found)
        };
        match &tensor.storage {
            Storage::Plain(Dtype::F8_E4M3 | Dtype::F8_E5M2) => Err(cannot(format!(
                "fp8 without `{}_scale`",
                tensor.name
            ))
            .detail("a bare cast to fp8 is off by 3 % and more where weights are small: pictures show a grid, and an")
            .detail("adapter trained on it learns to mend that")
            .hint(
                "use the bf16 file, or fp8 with scales; `dtype: int8` holds a bf16 file in as little memory, with a \
                         sixth of the error",
            )),
            Storage::Plain(dtype) if !is_float(*dtype) => {
                Err(cannot(format!("{dtype:?}")).hint("use the bf16 files of the model"))
            }
            _ => Ok(()),
        }
    }

    /// A tensor of weights on `device`, converted to `dtype` (f32 or bf16 where it is quantised), its pages given back.
    ///
    /// Errors: those of [`Self::check_weights`], a type that does not convert.
    pub fn tensor(&self, tensor: &Stored, dtype: DType, device: &Device) -> Result<Tensor> {
        if let (Source::Safetensors(file), Storage::Plain(_), false) =
            (&self.source, &tensor.storage, tensor.is_unscaled_fp8())
        {
            return file.tensor(&tensor.name, dtype, device);
        }
        self.check_weights(tensor)?;
        let converted = self.convert(tensor, 0, tensor.len(), dtype)?.reshape(tensor.shape.as_slice())?;
        self.release(tensor);
        Ok(converted.to_device(device)?)
    }

    /// Some rows of a matrix of weights, in the given order, as a CPU tensor of `dtype`; the rest is not read.
    ///
    /// Errors: those of [`Self::tensor`], not a matrix, a row that it does not have.
    pub fn rows(&self, tensor: &Stored, rows: &[usize], dtype: DType) -> Result<Tensor> {
        if let (Source::Safetensors(file), Storage::Plain(_), false) =
            (&self.source, &tensor.storage, tensor.is_unscaled_fp8())
        {
            return file.rows(&tensor.name, rows, dtype);
        }
        self.check_weights(tensor)?;
        let bad = |expected: String, found: String| {
            Error::usage(format!("cannot load rows of `{}` from `{}`", tensor.name, self.path().display()))
                .expected(expected, found)
        };
        let &[height, width] = tensor.shape.as_slice() else {
            return Err(bad("a matrix".into(), format!("shape {:?}", tensor.shape)));
        };
        if let Some(row) = rows.iter().find(|&&r| r >= height) {
            return Err(bad(format!("rows below {height}"), format!("row {row}")));
        }
        let row = |&row: &usize| self.convert(tensor, row * width, width, dtype);
        Ok(Tensor::stack(&rows.iter().map(row).collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// The values `first..first + len` of a float tensor, between rows, as one row of f32 or bf16. Of bf16 only a strip for
    /// each thread is ever there in f32.
    fn convert(&self, tensor: &Stored, first: usize, len: usize, dtype: DType) -> Result<Tensor> {
        let width = tensor.shape.last().copied().unwrap_or(1).max(1);
        let strip = ((1 << 18) / width).max(1) * width;
        match dtype {
            DType::F32 => {
                let mut out = vec![0f32; len];
                let strips = out.par_chunks_mut(strip).enumerate();
                strips.try_for_each(|(i, out)| self.widen(tensor, first + i * strip, out))?;
                Ok(Tensor::from_vec(out, len, &Device::Cpu)?)
            }
            DType::BF16 => {
                let mut out = vec![bf16::ZERO; len];
                let strips = out.par_chunks_mut(strip).enumerate();
                strips.try_for_each_init(Vec::new, |wide, (i, out)| -> Result<()> {
                    wide.resize(out.len(), 0.0);
                    self.widen(tensor, first + i * strip, wide)?;
                    out.iter_mut().zip(wide).for_each(|(o, v)| *o = bf16::from_f32(*v));
                    Ok(())
                })?;
                Ok(Tensor::from_vec(out, len, &Device::Cpu)?)
            }
            other => Err(Error::usage(format!("cannot load `{}` from `{}`", tensor.name, self.path().display()))
                .expected("f32 or bf16 to convert it to", other.as_str())),
        }
    }

    /// The values `first..first + out.len()` of a float tensor, row-major, in f32. Both ends must lie between rows.
    pub fn widen(&self, tensor: &Stored, first: usize, out: &mut [f32]) -> Result<()> {
        let plain = |dtype: Dtype, out: &mut [f32]| -> Result<()> {
            let Source::Safetensors(file) = &self.source else { unreachable!("GGUF tensors are blocks") };
            let size = dtype.bitsize() / 8;
            widen(&file.bytes(&tensor.name)?[first * size..(first + out.len()) * size], dtype, out);
            Ok(())
        };
        match (&self.source, &tensor.storage) {
            (Source::Gguf(file), Storage::Blocks(blocks)) => file.widen(blocks, first, out),
            (_, Storage::Plain(dtype)) => plain(*dtype, out),
            (_, Storage::Scaled(dtype, scales)) => {
                plain(*dtype, out)?;
                let width = tensor.shape[1..].iter().product::<usize>().max(1);
                for (i, row) in out.chunks_mut(width).enumerate() {
                    let scale = scales[if scales.len() == 1 { 0 } else { first / width + i }];
                    row.iter_mut().for_each(|v| *v *= scale);
                }
                Ok(())
            }
            (Source::Safetensors(_), Storage::Blocks(_)) => unreachable!("blocks come from GGUF files"),
        }
    }
}

/// Keys of scaled files that are no values of the model.
pub(super) fn is_auxiliary(name: &str) -> bool {
    [".weight_scale", ".scale_weight", ".input_scale", ".scale_input", ".comfy_quant"].iter().any(|e| name.ends_with(e))
        || name == "scaled_fp8"
        || name.ends_with(".scaled_fp8")
}

fn safetensors_tensors(file: &MappedFile) -> Result<Vec<Stored>> {
    let fail = |name: &str, expected: &str, found: String| {
        Err(Error::usage(format!("cannot read `{name}` of `{}`", file.path().display()))
            .expected(expected, found)
            .hint("use the bf16 weights of this model, or its GGUF"))
    };
    let names = file.names_by_offset();
    let quantised = names.iter().any(|n| is_auxiliary(n));
    let mut tensors = Vec::new();
    for name in names {
        let (dtype, shape) = file.info(&name).expect("a name of this file");
        if quantised && is_auxiliary(&name) {
            if name.ends_with(".comfy_quant") {
                let text = String::from_utf8_lossy(file.bytes(&name)?).into_owned();
                if !text.contains("float8_e4m3fn") && !text.contains("float8_e5m2") {
                    return fail(&name, "a float8 format", text);
                }
            }
            continue;
        }
        if matches!(dtype, Dtype::F8_E8M0 | Dtype::F4 | Dtype::F6_E2M3 | Dtype::F6_E3M2) {
            return fail(&name, "f32, bf16, f16 or fp8 values", format!("{dtype:?}"));
        }
        let scale = name.strip_suffix(".weight").and_then(|module| {
            [format!("{module}.weight_scale"), format!("{module}.scale_weight")]
                .into_iter()
                .find(|s| file.info(s).is_some())
        });
        let storage = match scale {
            Some(scale) if matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2) => {
                let scales = file.floats(&scale)?;
                if scales.len() != 1 && scales.len() != shape[0] {
                    let found = format!("{} scales", scales.len());
                    return fail(&scale, &format!("one scale, or one for each of {} rows", shape[0]), found);
                }
                Storage::Scaled(dtype, scales)
            }
            _ => Storage::Plain(dtype),
        };
        let shape = shape.to_vec();
        tensors.push(Stored { name, shape, storage });
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::safetensors::{RawTensor, write};

    fn raw(name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> RawTensor {
        RawTensor { name: name.into(), dtype, shape: shape.into(), bytes }
    }

    fn floats(name: &str, shape: &[usize], values: &[f32]) -> RawTensor {
        raw(name, Dtype::F32, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    fn values(file: &CheckpointFile, name: &str, first: usize, n: usize) -> Vec<f32> {
        let tensor = file.tensors().iter().find(|t| t.name == name).unwrap();
        let mut out = vec![0.0; n];
        file.widen(tensor, first, &mut out).unwrap();
        out
    }

    #[test]
    fn scaled_fp8_is_multiplied_out_and_its_helpers_are_no_tensors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        // 1, 2, -1, 0.5 in e4m3.
        let fp8 = |name: &str| raw(name, Dtype::F8_E4M3, &[2, 2], vec![0x38, 0x40, 0xb8, 0x30]);
        let quant = br#"{"format": "float8_e4m3fn"}"#.to_vec();
        let tensors = vec![
            fp8("a.weight"),
            floats("a.weight_scale", &[], &[3.0]),
            floats("a.input_scale", &[], &[9.0]),
            raw("a.comfy_quant", Dtype::U8, &[quant.len()], quant),
            fp8("b.weight"),
            floats("b.scale_weight", &[2, 1], &[2.0, 10.0]),
            fp8("c.weight"),
            floats("c.bias", &[2], &[0.5, 0.25]),
            raw("scaled_fp8", Dtype::F8_E4M3, &[0], vec![]),
        ];
        write(&path, tensors, &BTreeMap::new()).unwrap();
        let checkpoint = Checkpoint::open(&[path]).unwrap();
        let file = &checkpoint.files()[0];
        let names: Vec<&str> = file.tensors().iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["a.weight", "b.weight", "c.bias", "c.weight"]);
        assert_eq!(values(file, "a.weight", 0, 4), [3.0, 6.0, -3.0, 1.5]);
        assert_eq!(values(file, "b.weight", 0, 4), [2.0, 4.0, -10.0, 5.0]);
        assert_eq!(values(file, "b.weight", 2, 2), [-10.0, 5.0]);
        assert_eq!(values(file, "c.weight", 0, 4), [1.0, 2.0, -1.0, 0.5]);
        let dtypes: Vec<Dtype> = file.tensors().iter().map(Stored::plain_dtype).collect();
        assert_eq!(dtypes, [Dtype::BF16, Dtype::BF16, Dtype::F32, Dtype::BF16]);
    }

    #[test]
    fn other_quantisations_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let quant = br#"{"format": "nvfp4"}"#.to_vec();
        let tensors =
            vec![raw("a.weight", Dtype::U8, &[2], vec![0, 1]), raw("a.comfy_quant", Dtype::U8, &[quant.len()], quant)];
        write(&path, tensors, &BTreeMap::new()).unwrap();
        let error = Checkpoint::open(std::slice::from_ref(&path)).err().expect("nvfp4").to_string();
        assert!(error.contains("a.comfy_quant") && error.contains("nvfp4"), "{error}");
        let tensors =
            vec![raw("a.weight", Dtype::F8_E4M3, &[2, 2], vec![0; 4]), floats("a.weight_scale", &[3], &[1.0; 3])];
        write(&path, tensors, &BTreeMap::new()).unwrap();
        let error = Checkpoint::open(&[path.clone(), path]).err().expect("three scales").to_string();
        assert!(error.contains("found 3 scales"), "{error}");
    }

    #[test]
    fn a_tensor_in_two_files_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["x", "y"].map(|n| dir.path().join(format!("{n}.safetensors")));
        for path in &paths {
            write(path, vec![floats("a", &[1], &[1.0])], &BTreeMap::new()).unwrap();
        }
        let error = Checkpoint::open(&paths).err().expect("twice").to_string();
        assert!(error.contains("tensor `a` stands in two files"), "{error}");
    }
}
