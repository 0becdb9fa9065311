//! The tensors of a pose network, from a safetensors file or from a PyTorch file, with errors that name the network.

use crate::error::{Error, Result, nearest};
use crate::io::hub::{self, HubOptions, RepoId, Wanted};
use crate::io::safetensors::MappedFile;
use crate::kernels::conv::{Conv2d, Padding};
use crate::kernels::depthwise::DepthwiseConv2d;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Named f32 tensors on the CPU.
pub struct NetworkWeights {
    /// What errors call the network.
    network: &'static str,
    /// What errors call the file.
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
}

impl NetworkWeights {
    /// Reads a file: `.pth`, `.pt` and `.bin` as PyTorch pickles of tensors alone, everything else as safetensors.
    ///
    /// Errors (usage): no such file; not such a file.
    pub fn open(network: &'static str, path: &Path) -> Result<Self> {
        let pickled = matches!(path.extension().and_then(|e| e.to_str()), Some("pth" | "pt" | "bin"));
        if !pickled {
            return Self::from_safetensors(network, &MappedFile::open(path)?);
        }
        std::fs::metadata(path).map_err(|e| Error::io("open", path, e).into_usage())?;
        let read = candle_core::pickle::read_all(path).map_err(|e| {
            Error::usage(format!("`{}` is not a PyTorch file of tensors", path.display()))
                .detail(e.to_string().lines().next().unwrap_or_default())
                .hint("a file of PyTorch before 1.6 must be saved again, or converted to safetensors")
        })?;
        let f32s = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_dtype(DType::F32)?));
        let tensors = read.into_iter().map(f32s).collect::<Result<_>>()?;
        Ok(Self { network, path: path.into(), tensors, metadata: BTreeMap::new() })
    }

    /// The tensors of an open file.
    pub fn from_safetensors(network: &'static str, file: &MappedFile) -> Result<Self> {
        let read = |name: String| Ok((name.clone(), file.tensor(&name, DType::F32, &Device::Cpu)?));
        let tensors = file.names().into_iter().map(read).collect::<Result<_>>()?;
        Ok(Self { network, path: file.path().into(), tensors, metadata: file.metadata() })
    }

    /// Tensors that are there already.
    pub fn from_tensors(network: &'static str, path: &Path, tensors: BTreeMap<String, Tensor>) -> Self {
        Self { network, path: path.into(), tensors, metadata: BTreeMap::new() }
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A hash over names, shapes and values.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for (name, tensor) in &self.tensors {
            hasher.update(format!("{name:?} {:?}\n", tensor.dims()).as_bytes());
            let values = crate::kernels::cpu::view(tensor)?;
            for chunk in values.chunks(1 << 16) {
                let bytes: Vec<u8> = chunk.iter().flat_map(|v| v.to_le_bytes()).collect();
                hasher.update(&bytes);
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Whether there is such a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The length of a vector. Errors (usage): it is missing, or no vector.
    pub fn dim(&self, name: &str) -> Result<usize> {
        match self.tensors.get(name).map(|t| t.dims().to_vec()).as_deref() {
            Some(&[n]) => Ok(n),
            // Says which of both it is.
            _ => Ok(self.get(name, &[0])?.elem_count()),
        }
    }

    /// A tensor of this shape. Errors (usage): it is missing, or has another shape.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<&Tensor> {
        let wrong = || Error::usage(format!("cannot load `{name}` of {} from `{}`", self.network, self.path.display()));
        let Some(tensor) = self.tensors.get(name) else {
            let mut error = wrong().expected(format!("a tensor {shape:?}"), "none of this name");
            if let Some(near) = nearest(name, self.tensors.keys().map(String::as_str)) {
                error = error.detail(format!("the nearest name there is `{near}`"));
            }
            return Err(error.hint("these are the weights of another network"));
        };
        if tensor.dims() != shape {
            return Err(wrong()
                .expected(format!("shape {shape:?}"), format!("{:?}", tensor.dims()))
                .hint("these are the weights of another network"));
        }
        Ok(tensor)
    }

    /// `NAME.weight` and `NAME.bias` of a convolution from `input` to `output` channels with a square kernel.
    pub fn conv(
        &self,
        name: &str,
        [output, input, kernel]: [usize; 3],
        stride: usize,
        padding: Padding,
    ) -> Result<Conv2d> {
        let weight = self.get(&format!("{name}.weight"), &[output, input, kernel, kernel])?;
        Conv2d::new(weight, Some(self.get(&format!("{name}.bias"), &[output])?), stride, padding)
    }

    /// The same for a depthwise one.
    pub fn depthwise(&self, name: &str, channels: usize, kernel: usize, stride: usize) -> Result<DepthwiseConv2d> {
        let weight = self.get(&format!("{name}.weight"), &[channels, 1, kernel, kernel])?;
        let bias = self.get(&format!("{name}.bias"), &[channels])?;
        DepthwiseConv2d::new(weight, Some(bias), stride, Padding::all(kernel / 2))
    }
}

/// The file that `source` means: a file on this machine, or `file` of a repository on the hub.
///
/// Errors (usage): neither; what [`hub::fetch`] gives.
pub fn locate(source: &str, file: &str, hub: &HubOptions) -> Result<PathBuf> {
    let path = Path::new(source);
    if path.is_file() {
        return Ok(path.into());
    }
    if path.is_dir() && path.join(file).is_file() {
        return Ok(path.join(file));
    }
    let Some(repo) = RepoId::parse(source) else {
        return Err(Error::usage(format!("no pose weights at `{source}`"))
            .expected(format!("a file, a folder with `{file}`, or a hub id (owner/name)"), "nothing of that name"));
    };
    let wanted = Wanted { files: vec![file.into()], parts: Vec::new() };
    let options = HubOptions { observer: Some(hub::progress_bar(source)), ..hub.clone() };
    Ok(hub::fetch(&repo, &wanted, &|_| Ok(()), &options)?.join(file))
}

/// The values that `scripts/pose/make_reference.py` gives a tensor of this name and shape, by the same formula.
#[cfg(test)]
pub(crate) fn formula(name: &str, shape: &[usize]) -> Tensor {
    let seed = name.bytes().fold(0x811C_9DC5u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let fan_in: usize = shape[1..].iter().product();
    let bound = if shape.len() > 1 { (6.0 / fan_in as f64).sqrt() } else { 0.1 };
    let value = |i: usize| {
        let mut h = (i as u32).wrapping_add(seed).wrapping_mul(0x9E37_79B1);
        h = (h ^ (h >> 15)).wrapping_mul(0x85EB_CA77);
        h ^= h >> 13;
        ((f64::from(h) / 4_294_967_296.0 * 2.0 - 1.0) * bound) as f32
    };
    Tensor::from_vec((0..shape.iter().product()).map(value).collect(), shape, &Device::Cpu).unwrap()
}

/// A recorded case of `scripts/pose/make_reference.py`.
#[cfg(test)]
pub(crate) struct Recorded(MappedFile);

#[cfg(test)]
impl Recorded {
    pub(crate) fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pose");
        Self(MappedFile::open(&folder.join(name)).unwrap())
    }

    pub(crate) fn get(&self, name: &str) -> Tensor {
        self.0.tensor(name, DType::F32, &Device::Cpu).unwrap()
    }

    /// `pixels` (H, W, 3) in bytes as an image (1, 3, H, W) in [-1, 1].
    pub(crate) fn image(&self) -> Tensor {
        let (_, shape) = self.0.info("pixels").unwrap();
        let (h, w) = (shape[0] as u32, shape[1] as u32);
        let image = image::RgbImage::from_raw(w, h, self.0.bytes("pixels").unwrap().to_vec()).unwrap();
        let pixels = crate::data::image::to_pixels(&image);
        Tensor::from_vec(pixels, (1, 3, h as usize, w as usize), &Device::Cpu).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pytorch_file_is_read_and_another_networks_weights_are_named() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pose/tiny.pth");
        let weights = NetworkWeights::open("a network", &path).unwrap();
        let read = weights.get("conv1_2.weight", &[4, 3, 3, 3]).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(read), values(&formula("conv1_2.weight", &[4, 3, 3, 3])));

        let error = weights.get("conv1_1.weight", &[64, 3, 3, 3]).unwrap_err().to_string();
        assert!(error.contains("expected shape [64, 3, 3, 3], found [4, 3, 3, 3]"), "{error}");
        assert!(error.contains("weights of another network"), "{error}");
        let error = weights.get("conv1_3.weight", &[4, 3, 3, 3]).unwrap_err().to_string();
        assert!(error.contains("the nearest name there is `conv1_"), "{error}");

        let folder = tempfile::tempdir().unwrap();
        let broken = folder.path().join("x.pth");
        std::fs::write(&broken, b"not a pickle").unwrap();
        let error = NetworkWeights::open("a network", &broken).err().expect("refused").to_string();
        assert!(error.contains("is not a PyTorch file of tensors"), "{error}");
        let error = NetworkWeights::open("a network", &folder.path().join("y.pth")).err().expect("absent");
        assert_eq!(error.exit_code(), 2);
        assert!(locate("no such thing", "f.pth", &HubOptions::default()).unwrap_err().to_string().contains("hub id"));
    }
}
