//! A tiny decoder in place of the autoencoder's own: TAEHV in its form for the Wan-2.1 latent space (`taew2_1`), which
//! is that of Qwen-Image. Rougher pictures for a small part of the cost.
//!
//! B batch, h and w height and width of the latents; channels last. The original decodes video; here one frame, with
//! nothing before it. A latent frame becomes four frames of which the last is the picture: the frame between, on which
//! the blocks at a quarter of the resolution still look back, is computed too.
//! Source: <https://github.com/madebyollin/taehv/blob/115aaa7ef7a36a51d90cfeddc71b34874b618cba/taehv.py>

use crate::error::{Error, Result};
use crate::kernels::Value;
use crate::kernels::basic::add;
use crate::kernels::checkpoint::{Keep, segment};
use crate::kernels::conv::{Conv2d, Padding};
use crate::kernels::pixels::{channels_first, channels_last, clamp};
use crate::kernels::pool::join_channels;
use crate::kernels::relu::{relu, soft_clamp};
use crate::kernels::upsample::upsample_nearest2x;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

/// Latent channels.
const LATENT: usize = 16;

/// The decoder.
pub struct TinyDecoder {
    first: Conv2d,
    levels: [Level; 3],
    last: Conv2d,
}

/// Three blocks, a doubling in space (and perhaps in time, of which the later frame is kept), a convolution.
#[derive(Clone)]
struct Level {
    blocks: [MemBlock; 3],
    grow_earlier: Option<Conv2d>,
    grow_later: Conv2d,
    conv: Conv2d,
}

/// A residual block that looks at the frame before.
#[derive(Clone)]
struct MemBlock {
    /// On [frame, frame before].
    conv0: Conv2d,
    /// The same on a frame with nothing before it.
    conv0_alone: Conv2d,
    conv2: Conv2d,
    conv4: Conv2d,
}

impl TinyDecoder {
    /// The decoder among the tensors of a checkpoint: `decoder.1.weight` and so on; its encoder is left alone.
    ///
    /// Errors (usage): a tensor is missing or has another shape; `file` is what errors call the file.
    pub fn new(tensors: &BTreeMap<String, Tensor>, file: &str) -> Result<Self> {
        let load = Loader { tensors, file };
        let level = |index: usize, input: usize, output: usize, grows: bool| -> Result<Level> {
            let block = |i: usize| MemBlock::load(&load, &format!("decoder.{}", index + i), input);
            let name = format!("decoder.{}.conv.weight", index + 4);
            let stored = load.tensors.get(&name).map_or(0, |t| t.dims().first().copied().unwrap_or(0));
            // Files whose first level doubles time too hold more rows than are used: the last ones are the frame's.
            let rows = if stored == 2 * input { 2 * input } else { (1 + usize::from(grows)) * input };
            let grow = load.get(&name, &[rows, input, 1, 1])?;
            let part = |start| Conv2d::new(&grow.narrow(0, start, input)?.contiguous()?, None, 1, Padding::default());
            Ok(Level {
                blocks: [block(0)?, block(1)?, block(2)?],
                grow_earlier: if grows { Some(part(0)?) } else { None },
                grow_later: part(rows - input)?,
                conv: load.conv(&format!("decoder.{}", index + 5), output, input, false)?,
            })
        };
        Ok(Self {
            first: load.conv("decoder.1", 256, LATENT, true)?,
            levels: [level(3, 256, 128, false)?, level(9, 128, 64, true)?, level(15, 64, 64, true)?],
            last: load.conv("decoder.22", 3, 64, true)?,
        })
    }

    /// Normalised latents (B, 16, h, w) to pixels (B, 3, 8h, 8w) in [-1, 1], differentiable; of the graph only the
    /// inputs of its parts are kept.
    pub fn decode_value(&self, latents: &Value) -> Result<Value> {
        let image = self.raw(latents)?;
        // From [0, 1] to [-1, 1].
        let double = Tensor::eye(3, DType::F32, &Device::Cpu)?.affine(2.0, 0.0)?.reshape((3, 3, 1, 1))?;
        let shift = Tensor::full(-1f32, 3, &Device::Cpu)?;
        let scale = Conv2d::new(&double, Some(&shift), 1, Padding::default())?;
        channels_first(&clamp(&scale.forward(&image)?, -1.0, 1.0)?)
    }

    /// (B, 16, h, w) -> (B, 8h, 8w, 3), about [0, 1].
    fn raw(&self, latents: &Value) -> Result<Value> {
        let x = relu(&self.first.forward(&soft_clamp(&channels_last(latents)?, 3.0)?)?)?;
        let [first, second, third] = &self.levels;
        let (x, _) = first.forward(&x, None)?;
        let (later, earlier) = second.forward(&x, None)?;
        let (x, _) = third.forward(&later, earlier.as_ref())?;
        self.last.forward(&relu(&x)?)
    }
}

impl Level {
    /// A frame and the one before it (if there is one) to the frame and, where time doubles, the one before it.
    fn forward(&self, frame: &Value, before: Option<&Value>) -> Result<(Value, Option<Value>)> {
        let level = self.clone();
        let inputs: Vec<&Value> = std::iter::once(frame).chain(before).collect();
        let keeps_earlier = self.grow_earlier.is_some() && before.is_none();
        let mut out = segment(Keep::Inputs, &inputs, false, move |v| {
            let (mut frame, mut before) = (v[0].clone(), v.get(1).cloned());
            for (i, block) in level.blocks.iter().enumerate() {
                let next = block.forward(&frame, before.as_ref())?;
                // The last block's output of the earlier frame is read by nobody.
                before = match before {
                    Some(before) if i < 2 => Some(block.forward(&before, None)?),
                    _ => None,
                };
                frame = next;
            }
            let large = upsample_nearest2x(&frame)?;
            let grown = |conv: &Conv2d| level.conv.forward(&conv.forward(&large)?);
            let mut out = vec![grown(&level.grow_later)?];
            if let (true, Some(conv)) = (keeps_earlier, &level.grow_earlier) {
                out.push(grown(conv)?);
            }
            Ok(out)
        })?;
        let earlier = keeps_earlier.then(|| out.pop()).flatten();
        Ok((out.remove(0), earlier))
    }
}

impl MemBlock {
    fn load(load: &Loader, name: &str, channels: usize) -> Result<Self> {
        let both = load.get(&format!("{name}.conv.0.weight"), &[channels, 2 * channels, 3, 3])?;
        let bias = load.get(&format!("{name}.conv.0.bias"), &[channels])?;
        let alone = both.narrow(1, 0, channels)?.contiguous()?;
        Ok(Self {
            conv0: Conv2d::new(both, Some(bias), 1, Padding::all(1))?,
            conv0_alone: Conv2d::new(&alone, Some(bias), 1, Padding::all(1))?,
            conv2: load.conv(&format!("{name}.conv.2"), channels, channels, true)?,
            conv4: load.conv(&format!("{name}.conv.4"), channels, channels, true)?,
        })
    }

    fn forward(&self, frame: &Value, before: Option<&Value>) -> Result<Value> {
        let x = match before {
            Some(before) => self.conv0.forward(&join_channels(&[frame, before])?)?,
            None => self.conv0_alone.forward(frame)?,
        };
        let x = relu(&self.conv2.forward(&relu(&x)?)?)?;
        relu(&add(&self.conv4.forward(&x)?, frame)?)
    }
}

struct Loader<'a> {
    tensors: &'a BTreeMap<String, Tensor>,
    file: &'a str,
}

impl Loader<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<&Tensor> {
        match self.tensors.get(name) {
            Some(tensor) if tensor.dims() == shape => Ok(tensor),
            found => Err(Error::usage(format!("cannot load `{name}` of the tiny decoder from `{}`", self.file))
                .expected(
                    format!("shape {shape:?}"),
                    found.map_or("no such tensor".into(), |t| format!("{:?}", t.dims())),
                )
                .hint("`loss.decoder` wants TAEHV's `taew2_1`, as .pth or .safetensors")),
        }
    }

    fn conv(&self, name: &str, output: usize, input: usize, bias: bool) -> Result<Conv2d> {
        let weight = self.get(&format!("{name}.weight"), &[output, input, 3, 3])?;
        let bias = bias.then(|| self.get(&format!("{name}.bias"), &[output])).transpose()?;
        Conv2d::new(weight, bias, 1, Padding::all(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::safetensors::MappedFile;
    use crate::kernels::{backward, testing::relative_error};
    use crate::pose::weights::formula;
    use std::path::Path;

    fn decoder() -> TinyDecoder {
        let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
        let mut conv = |name: String, output: usize, input: usize, kernel: usize, bias: bool| {
            shapes.push((format!("{name}.weight"), vec![output, input, kernel, kernel]));
            if bias {
                shapes.push((format!("{name}.bias"), vec![output]));
            }
        };
        conv("decoder.1".into(), 256, 16, 3, true);
        for (start, c, output, grow) in [(3, 256, 128, 1), (9, 128, 64, 2), (15, 64, 64, 2)] {
            for i in 0..3 {
                conv(format!("decoder.{}.conv.0", start + i), c, 2 * c, 3, true);
                conv(format!("decoder.{}.conv.2", start + i), c, c, 3, true);
                conv(format!("decoder.{}.conv.4", start + i), c, c, 3, true);
            }
            conv(format!("decoder.{}.conv", start + 4), grow * c, c, 1, false);
            conv(format!("decoder.{}", start + 5), output, c, 3, false);
        }
        conv("decoder.22".into(), 3, 64, 3, true);
        let tensors = shapes.iter().map(|(name, shape)| (name.clone(), formula(name, shape))).collect();
        TinyDecoder::new(&tensors, "formula").unwrap()
    }

    #[test]
    fn one_frame_equals_pytorchs_decoding_of_a_video_of_one_frame() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pose/tiny_decoder.safetensors");
        let file = MappedFile::open(&path).unwrap();
        let get = |name: &str| file.tensor(name, DType::F32, &Device::Cpu).unwrap();
        let decoder = decoder();
        let latents = Value::leaf(get("latents"));
        let image = channels_first(&decoder.raw(&latents).unwrap()).unwrap();
        assert!(relative_error(image.tensor(), &get("image")) < 1e-5);

        // Gradients reach the latents, and equal finite differences.
        let seed = crate::kernels::testing::randn(1, image.dims(), 1.0);
        let grad = backward(vec![(image, seed.clone())]).unwrap().take(&latents).unwrap();
        let grad = grad.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let values = latents.tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let at = (0..grad.len()).max_by(|&a, &b| grad[a].abs().total_cmp(&grad[b].abs())).unwrap();
        let loss = |by: f32| {
            let mut moved = values.clone();
            moved[at] += by;
            let z = Value::constant(Tensor::from_vec(moved, latents.dims().to_vec(), &Device::Cpu).unwrap());
            let y = channels_first(&decoder.raw(&z).unwrap()).unwrap();
            let product = (y.tensor() * &seed).unwrap().to_dtype(DType::F64).unwrap();
            product.sum_all().unwrap().to_scalar::<f64>().unwrap()
        };
        let numeric = (loss(2e-3) - loss(-2e-3)) / 4e-3;
        // In f32, across the kinks of a ReLU network.
        assert!((numeric - f64::from(grad[at])).abs() < 0.02 * numeric.abs(), "{numeric} {}", grad[at]);
    }

    #[test]
    fn weights_of_another_network_are_refused_by_name() {
        let error = TinyDecoder::new(&BTreeMap::new(), "x.pth").err().expect("refused").to_string();
        assert!(error.contains("`decoder.1.weight`") && error.contains("taew2_1"), "{error}");
    }
}
