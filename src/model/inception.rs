//! InceptionV3 as the Fréchet inception distance knows it: the network of `pt_inception-2015-12-05`, up to its last
//! pool. It differs from torchvision's in its averages, which leave the border out, and in a maximum in the last block.
//!
//! Source: <https://github.com/mseitzer/pytorch-fid/blob/0.3.0/src/pytorch_fid/inception.py>. B samples.

use crate::error::Result;
use crate::io::Weights;
use crate::model::convnet::{ConvRelu, Pool, Shape};
use candle_core::{D, Device, Tensor};
use image::RgbImage;
use std::collections::BTreeMap;

/// Length of a feature vector.
pub const FEATURES: usize = 2048;

/// Side of the images that the network sees.
const SIDE: usize = 299;

/// `eps` of the batch normalisations.
const EPS: f64 = 1e-3;

/// The network, its batch normalisations folded into its convolutions.
pub struct Inception {
    /// By name of the module.
    units: BTreeMap<String, ConvRelu>,
}

impl Inception {
    /// Loads the network. The classifier behind the features must be in the file, as it tells these weights from
    /// others, but it is not used.
    ///
    /// Errors (usage): names or shapes that are not those of `pt_inception-2015-12-05`.
    pub fn load(weights: &Weights) -> Result<Self> {
        let refuse = |e: crate::error::Error| {
            e.detail("FID and KID are only comparable with the weights of pt_inception-2015-12-05").hint(
                "take pytorch-fid's pt_inception-2015-12-05-6726825d.pth, converted to safetensors: see docs/evaluation.md",
            )
        };
        weights.check(&tensors(), |name| name.ends_with("num_batches_tracked")).map_err(refuse)?;
        let unit = |shape: Shape| Ok((shape.name.clone(), shape.load_normalised(weights, EPS)?));
        Ok(Self { units: layout().into_iter().map(unit).collect::<Result<_>>()? })
    }

    /// The features of one image, after pytorch-fid's preprocessing.
    pub fn features(&self, image: &RgbImage) -> Result<Vec<f32>> {
        let pixels = Tensor::from_vec(resized(image), (1, SIDE, SIDE, 3), &Device::Cpu)?;
        Ok(self.forward(&pixels)?.flatten_all()?.to_vec1()?)
    }

    /// (B, 299, 299, 3) in [-1, 1] -> (B, 2048).
    fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let x = self.chain(pixels, &["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"])?; // (B, 147, 147, 64)
        let x = Pool::Max.over_3x3(&x, 2, 0)?;
        let x = self.chain(&x, &["Conv2d_3b_1x1", "Conv2d_4a_3x3"])?; // (B, 71, 71, 192)
        let mut x = Pool::Max.over_3x3(&x, 2, 0)?;
        for name in ["Mixed_5b", "Mixed_5c", "Mixed_5d"] {
            x = self.block_a(&x, name)?; // (B, 35, 35, 288)
        }
        x = self.block_b(&x, "Mixed_6a")?;
        for name in ["Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"] {
            x = self.block_c(&x, name)?; // (B, 17, 17, 768)
        }
        x = self.block_d(&x, "Mixed_7a")?;
        x = self.block_e(&x, "Mixed_7b", Pool::Mean)?;
        x = self.block_e(&x, "Mixed_7c", Pool::Max)?; // (B, 8, 8, 2048)
        Ok(x.flatten(1, 2)?.mean(1)?)
    }

    fn block_a(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let at = |path: &[&str]| self.branch(x, name, path);
        let pooled = Pool::Mean.over_3x3(x, 1, 1)?;
        join(&[
            at(&["branch1x1"])?,
            at(&["branch5x5_1", "branch5x5_2"])?,
            at(&["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"])?,
            self.branch(&pooled, name, &["branch_pool"])?,
        ])
    }

    fn block_b(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        join(&[
            self.branch(x, name, &["branch3x3"])?,
            self.branch(x, name, &["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"])?,
            Pool::Max.over_3x3(x, 2, 0)?,
        ])
    }

    fn block_c(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let at = |path: &[&str]| self.branch(x, name, path);
        let pooled = Pool::Mean.over_3x3(x, 1, 1)?;
        let double = ["branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"];
        join(&[
            at(&["branch1x1"])?,
            at(&["branch7x7_1", "branch7x7_2", "branch7x7_3"])?,
            at(&double)?,
            self.branch(&pooled, name, &["branch_pool"])?,
        ])
    }

    fn block_d(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        join(&[
            self.branch(x, name, &["branch3x3_1", "branch3x3_2"])?,
            self.branch(x, name, &["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"])?,
            Pool::Max.over_3x3(x, 2, 0)?,
        ])
    }

    fn block_e(&self, x: &Tensor, name: &str, pool: Pool) -> Result<Tensor> {
        let single = self.branch(x, name, &["branch3x3_1"])?;
        let double = self.branch(x, name, &["branch3x3dbl_1", "branch3x3dbl_2"])?;
        let pooled = pool.over_3x3(x, 1, 1)?;
        join(&[
            self.branch(x, name, &["branch1x1"])?,
            self.branch(&single, name, &["branch3x3_2a"])?,
            self.branch(&single, name, &["branch3x3_2b"])?,
            self.branch(&double, name, &["branch3x3dbl_3a"])?,
            self.branch(&double, name, &["branch3x3dbl_3b"])?,
            self.branch(&pooled, name, &["branch_pool"])?,
        ])
    }

    fn branch(&self, x: &Tensor, block: &str, path: &[&str]) -> Result<Tensor> {
        path.iter().try_fold(x.clone(), |x, unit| self.units[&format!("{block}.{unit}")].forward(&x))
    }

    fn chain(&self, x: &Tensor, path: &[&str]) -> Result<Tensor> {
        path.iter().try_fold(x.clone(), |x, unit| self.units[*unit].forward(&x))
    }
}

/// Along the channels.
fn join(parts: &[Tensor]) -> Result<Tensor> {
    Ok(Tensor::cat(parts, D::Minus1)?)
}

/// Names and shapes of everything in the file.
pub fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors: Vec<_> = layout().iter().flat_map(Shape::normalised_tensors).collect();
    tensors.push(("fc.weight".into(), vec![1008, FEATURES]));
    tensors.push(("fc.bias".into(), vec![1008]));
    tensors
}

/// All convolutions. Those of stride 2 and the first two and the last of the stem have no padding, all others keep
/// the size.
fn layout() -> Vec<Shape> {
    let mut all = Vec::new();
    let mut put = |name: String, input: usize, output: usize, kernel: (usize, usize), stride: usize| {
        let inside = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_4a_3x3"].contains(&name.as_str());
        let padding = if stride == 2 || inside { (0, 0) } else { (kernel.0 / 2, kernel.1 / 2) };
        all.push(Shape { name, input, output, kernel, stride, padding });
    };
    for (name, input, output, side, stride) in [
        ("Conv2d_1a_3x3", 3, 32, 3, 2),
        ("Conv2d_2a_3x3", 32, 32, 3, 1),
        ("Conv2d_2b_3x3", 32, 64, 3, 1),
        ("Conv2d_3b_1x1", 64, 80, 1, 1),
        ("Conv2d_4a_3x3", 80, 192, 3, 1),
    ] {
        put(name.into(), input, output, (side, side), stride);
    }
    for (block, input, pooled) in [("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)] {
        for (name, input, output, side) in [
            ("branch1x1", input, 64, 1),
            ("branch5x5_1", input, 48, 1),
            ("branch5x5_2", 48, 64, 5),
            ("branch3x3dbl_1", input, 64, 1),
            ("branch3x3dbl_2", 64, 96, 3),
            ("branch3x3dbl_3", 96, 96, 3),
            ("branch_pool", input, pooled, 1),
        ] {
            put(format!("{block}.{name}"), input, output, (side, side), 1);
        }
    }
    for (name, input, output, side, stride) in [
        ("branch3x3", 288, 384, 3, 2),
        ("branch3x3dbl_1", 288, 64, 1, 1),
        ("branch3x3dbl_2", 64, 96, 3, 1),
        ("branch3x3dbl_3", 96, 96, 3, 2),
    ] {
        put(format!("Mixed_6a.{name}"), input, output, (side, side), stride);
    }
    for (block, inner) in [("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)] {
        for (name, input, output, kernel) in [
            ("branch1x1", 768, 192, (1, 1)),
            ("branch7x7_1", 768, inner, (1, 1)),
            ("branch7x7_2", inner, inner, (1, 7)),
            ("branch7x7_3", inner, 192, (7, 1)),
            ("branch7x7dbl_1", 768, inner, (1, 1)),
            ("branch7x7dbl_2", inner, inner, (7, 1)),
            ("branch7x7dbl_3", inner, inner, (1, 7)),
            ("branch7x7dbl_4", inner, inner, (7, 1)),
            ("branch7x7dbl_5", inner, 192, (1, 7)),
            ("branch_pool", 768, 192, (1, 1)),
        ] {
            put(format!("{block}.{name}"), input, output, kernel, 1);
        }
    }
    for (name, input, output, kernel, stride) in [
        ("branch3x3_1", 768, 192, (1, 1), 1),
        ("branch3x3_2", 192, 320, (3, 3), 2),
        ("branch7x7x3_1", 768, 192, (1, 1), 1),
        ("branch7x7x3_2", 192, 192, (1, 7), 1),
        ("branch7x7x3_3", 192, 192, (7, 1), 1),
        ("branch7x7x3_4", 192, 192, (3, 3), 2),
    ] {
        put(format!("Mixed_7a.{name}"), input, output, kernel, stride);
    }
    for (block, input) in [("Mixed_7b", 1280), ("Mixed_7c", 2048)] {
        for (name, input, output, kernel) in [
            ("branch1x1", input, 320, (1, 1)),
            ("branch3x3_1", input, 384, (1, 1)),
            ("branch3x3_2a", 384, 384, (1, 3)),
            ("branch3x3_2b", 384, 384, (3, 1)),
            ("branch3x3dbl_1", input, 448, (1, 1)),
            ("branch3x3dbl_2", 448, 384, (3, 3)),
            ("branch3x3dbl_3a", 384, 384, (1, 3)),
            ("branch3x3dbl_3b", 384, 384, (3, 1)),
            ("branch_pool", input, 192, (1, 1)),
        ] {
            put(format!("{block}.{name}"), input, output, kernel, 1);
        }
    }
    all
}

/// The image at 299x299 in [-1, 1], channels last: bilinear without anti-aliasing, the corners of pixels aligned, as
/// `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` does.
fn resized(image: &RgbImage) -> Vec<f32> {
    let (w, h) = (image.width() as usize, image.height() as usize);
    let taps = |n: usize| -> Vec<(usize, usize, f32)> {
        let scale = n as f32 / SIDE as f32;
        let tap = |i: usize| {
            let at = (scale * (i as f32 + 0.5) - 0.5).max(0.0);
            let first = (at as usize).min(n - 1);
            (first, (first + 1).min(n - 1), at - first as f32)
        };
        (0..SIDE).map(tap).collect()
    };
    let (rows, columns) = (taps(h), taps(w));
    let bytes = image.as_raw();
    let mut out = Vec::with_capacity(SIDE * SIDE * 3);
    for &(top, bottom, down) in &rows {
        for &(left, right, along) in &columns {
            for c in 0..3 {
                let at = |y: usize, x: usize| f32::from(bytes[(y * w + x) * 3 + c]) / 255.0;
                let mix = |a: f32, b: f32, t: f32| (1.0 - t) * a + t * b;
                let value = mix(
                    mix(at(top, left), at(top, right), along),
                    mix(at(bottom, left), at(bottom, right), along),
                    down,
                );
                out.push(2.0 * value - 1.0);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_that_of_the_published_file() {
        assert_eq!(layout().len(), 94);
        // Counted by torch on the network of pytorch-fid 0.3.0, running statistics included.
        let values: usize = tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!((tensors().len(), values), (472, 23_885_392));
    }

    #[test]
    fn a_plain_image_stays_plain_and_edges_are_in_place() {
        let grey = resized(&RgbImage::from_pixel(7, 500, image::Rgb([51; 3])));
        assert!(grey.iter().all(|v| (v + 0.6).abs() < 1e-6));
        let same = RgbImage::from_fn(299, 299, |x, y| image::Rgb([(x % 256) as u8, (y % 256) as u8, 0]));
        let pixels = resized(&same);
        assert!((pixels[(3 * 299 + 200) * 3] - (200.0 / 127.5 - 1.0)).abs() < 1e-6);
    }
}
