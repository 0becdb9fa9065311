//! LPIPS (Zhang et al. 2018), version 0.1 with AlexNet: how different two images look to a network.
//!
//! Source: <https://github.com/richzhang/PerceptualSimilarity/blob/v0.1/lpips/lpips.py>.

use crate::error::{Error, Result};
use crate::io::Weights;
use crate::model::convnet::{ConvRelu, Pool, Shape};
use candle_core::{DType, Device, Tensor};
use image::RgbImage;

/// Number of the layer in torchvision's `features`, number of its slice in lpips' own files, input and output
/// channels, side of the kernel, stride, padding.
const LAYERS: [(usize, usize, usize, usize, usize, usize, usize); 5] = [
    (0, 1, 3, 64, 11, 4, 2),
    (3, 2, 64, 192, 5, 1, 2),
    (6, 3, 192, 384, 3, 1, 1),
    (8, 4, 384, 256, 3, 1, 1),
    (10, 5, 256, 256, 3, 1, 1),
];

/// Sides shorter than this vanish in the network.
pub const MIN_SIDE: u32 = 31;

/// Mean and scale of the pixels in [-1, 1], by channel.
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];

/// The features of AlexNet and the weights of their differences.
pub struct Perceptual {
    layers: Vec<ConvRelu>,
    /// Of each layer the weight of each channel, not negative.
    heads: Vec<Vec<f32>>,
}

/// What the network makes of an image: of each layer (pixels, channels), each pixel of length 1.
pub struct Look {
    layers: Vec<Tensor>,
}

impl Perceptual {
    /// Loads AlexNet under torchvision's names (`features.0.weight`) or lpips' (`net.slice1.0.weight`), and the heads
    /// (`lin0.model.1.weight`), from one file or several. Other tensors, such as the classifier, are passed over.
    ///
    /// Errors (usage): a tensor that is in none of the files or has another shape.
    pub fn load(files: &[Weights]) -> Result<Self> {
        let find =
            |names: &[String]| files.iter().find_map(|f| names.iter().find(|n| f.contains(n)).map(|n| (f, n.clone())));
        let missing = |names: &[String]| {
            let searched: Vec<String> = files.iter().map(|f| format!("`{}`", f.folder().display())).collect();
            Error::usage("these are not all the weights of LPIPS with AlexNet")
                .expected(format!("a tensor `{}`", names.join("` or `")), format!("none in {}", searched.join(", ")))
                .hint(
                    "it takes torchvision's alexnet and the heads of lpips 0.1, as safetensors: see docs/evaluation.md",
                )
        };
        let (mut layers, mut heads) = (Vec::new(), Vec::new());
        for (i, &(number, slice, input, output, side, stride, padding)) in LAYERS.iter().enumerate() {
            let names = [format!("features.{number}"), format!("net.slice{slice}.{number}")];
            let weight_names = names.clone().map(|n| format!("{n}.weight"));
            let (file, found) = find(&weight_names).ok_or_else(|| missing(&weight_names))?;
            let name = found.trim_end_matches(".weight").to_string();
            let (kernel, padding) = ((side, side), (padding, padding));
            layers.push(Shape { name, input, output, kernel, stride, padding }.load_plain(file)?);

            let head = [format!("lin{i}.model.1.weight"), format!("lins.{i}.model.1.weight")];
            let (file, found) = find(&head).ok_or_else(|| missing(&head))?;
            let head = file.get(&found, &[1, output, 1, 1], DType::F32, &Device::Cpu)?;
            heads.push(head.flatten_all()?.to_vec1()?);
        }
        Ok(Self { layers, heads })
    }

    /// Runs the network on an image with sides of at least [`MIN_SIDE`].
    pub fn look(&self, image: &RgbImage) -> Result<Look> {
        let pixel = |i: usize, v: u8| (f32::from(v) / 127.5 - 1.0 - SHIFT[i % 3]) / SCALE[i % 3];
        let pixels: Vec<f32> = image.as_raw().iter().enumerate().map(|(i, &v)| pixel(i, v)).collect();
        let mut x = Tensor::from_vec(pixels, (1, image.height() as usize, image.width() as usize, 3), &Device::Cpu)?;
        let mut layers = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            if i == 1 || i == 2 {
                x = Pool::Max.over_3x3(&x, 2, 0)?;
            }
            x = layer.forward(&x)?; // (1, H, W, C)
            let pixels = x.flatten(0, 2)?;
            let length = (pixels.sqr()?.sum_keepdim(1)?.sqrt()? + 1e-10)?;
            layers.push(pixels.broadcast_div(&length)?);
        }
        Ok(Look { layers })
    }

    /// The distance of two images of one size: 0 for equal ones.
    pub fn distance(&self, a: &Look, b: &Look) -> Result<f64> {
        let mut distance = 0.0;
        for ((a, b), head) in a.layers.iter().zip(&b.layers).zip(&self.heads) {
            let squares = (a - b)?.sqr()?.mean(0)?.to_vec1::<f32>()?; // (C,)
            distance += squares.iter().zip(head).map(|(s, w)| f64::from(*s) * f64::from(*w)).sum::<f64>();
        }
        Ok(distance)
    }
}
