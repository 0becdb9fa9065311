//! Depthwise 2-D convolution with frozen weights on channels-last images: every channel has a kernel of its own.
//!
//! There is too little arithmetic per element for matrix products over gathered patches to pay: each tap is a
//! multiply-add over the channels of a pixel, which lie side by side.

use crate::error::{Error, Result};
use crate::kernels::conv::Padding;
use crate::kernels::cpu::{self, uninit, view};
use crate::kernels::math::vectorized;
use crate::kernels::tape::{Value, record1};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// A frozen depthwise convolution.
#[derive(Clone, Debug)]
pub struct DepthwiseConv2d {
    /// (kernel height, kernel width, C), f32.
    weight: Tensor,
    /// (C,), f32.
    bias: Option<Tensor>,
    stride: usize,
    padding: Padding,
}

impl DepthwiseConv2d {
    /// A convolution with `weight` (C, 1, kernel height, kernel width) and `bias` (C,).
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: Padding) -> Result<Self> {
        let weight = weight.to_dtype(DType::F32)?.squeeze(1)?.permute((1, 2, 0))?.contiguous()?;
        let bias = bias.map(|b| b.to_dtype(DType::F32)?.contiguous()).transpose()?;
        Ok(Self { weight, bias, stride, padding })
    }

    /// The convolution of `x`.
    ///
    /// Shapes: `x` (B, H, W, C) -> (B, H', W', C), H' = (H + top + bottom - kernel height) / stride + 1.
    pub fn forward(&self, x: &Value) -> Result<Value> {
        let (b, h, w, c) = x.tensor().dims4()?;
        let (kh, kw, channels) = self.weight.dims3()?;
        let Padding { top, bottom, left, right } = self.padding;
        let (padded_h, padded_w) = (h + top + bottom, w + left + right);
        if c != channels || padded_h < kh || padded_w < kw {
            return Err(Error::run("an image does not fit its depthwise convolution").expected(
                format!("(batch, {kh} or more, {kw} or more, {channels}) with padding"),
                format!("{:?}", x.dims()),
            ));
        }
        let (out_h, out_w) = ((padded_h - kh) / self.stride + 1, (padded_w - kw) / self.stride + 1);
        let (image, weight) = (view(x.tensor())?, view(&self.weight)?);
        let bias = self.bias.as_ref().map(view).transpose()?;
        let mut out = uninit(b * out_h * out_w * c);
        // One task computes a row of pixels.
        out.par_chunks_exact_mut(out_w * c).enumerate().for_each(|(row, out)| {
            let (n, oy) = (row / out_h, row % out_h);
            match bias.as_deref() {
                Some(bias) => out.chunks_exact_mut(c).for_each(|pixel| pixel.copy_from_slice(bias)),
                None => out.fill(0.0),
            }
            for ky in 0..kh {
                let Some(y) = (oy * self.stride + ky).checked_sub(top).filter(|&y| y < h) else { continue };
                let input = &image[(n * h + y) * w * c..][..w * c];
                for kx in 0..kw {
                    let tap = &weight[(ky * kw + kx) * c..][..c];
                    vectorized!({
                        for (ox, pixel) in out.chunks_exact_mut(c).enumerate() {
                            let x = (ox * self.stride + kx).wrapping_sub(left);
                            if x < w {
                                let input = &input[x * c..][..c];
                                (0..c).for_each(|j| pixel[j] += input[j] * tap[j]);
                            }
                        }
                    });
                }
            }
        });
        drop((image, weight, bias));
        let y = cpu::from_f32(out, (b, out_h, out_w, c), x.dtype())?;
        let conv = self.clone();
        Ok(record1(&[x], y, move |grad| Ok(vec![Some(conv.backward(&grad, [b, h, w, c])?)])))
    }

    /// The gradient of the input, whose shape is `dims`: input row y was tap `ky` of output row oy where
    /// `oy * stride + ky = y + top`.
    fn backward(&self, grad: &Tensor, dims: [usize; 4]) -> Result<Tensor> {
        let [b, h, w, c] = dims;
        let (_, out_h, out_w, _) = grad.dims4()?;
        let (kh, kw, _) = self.weight.dims3()?;
        let (dy, weight) = (view(grad)?, view(&self.weight)?);
        let mut dx = vec![0f32; b * h * w * c];
        dx.par_chunks_exact_mut(w * c).enumerate().for_each(|(row, dx)| {
            let (n, y) = (row / h, row % h);
            for ky in 0..kh {
                let Some(distance) = (y + self.padding.top).checked_sub(ky) else { continue };
                let oy = distance / self.stride;
                if distance % self.stride != 0 || oy >= out_h {
                    continue;
                }
                let dy = &dy[(n * out_h + oy) * out_w * c..][..out_w * c];
                for kx in 0..kw {
                    let tap = &weight[(ky * kw + kx) * c..][..c];
                    vectorized!({
                        for (ox, dy) in dy.chunks_exact(c).enumerate() {
                            let x = (ox * self.stride + kx).wrapping_sub(self.padding.left);
                            if x < w {
                                let dx = &mut dx[x * c..][..c];
                                (0..c).for_each(|j| dx[j] += dy[j] * tap[j]);
                            }
                        }
                    });
                }
            }
        });
        cpu::from_f32(dx, dims.to_vec(), grad.dtype())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check, randn};

    #[test]
    fn depthwise_convolution_equals_its_twin() {
        let cases = [
            (3, 3, 1, Padding::all(1), [2, 7, 6, 20]),
            (3, 3, 2, Padding::all(1), [1, 9, 7, 3]),
            // A last row and column that no tap reaches.
            (3, 3, 2, Padding { top: 1, left: 1, bottom: 3, right: 3 }, [1, 6, 8, 17]),
            (3, 2, 1, Padding { left: 1, ..Padding::default() }, [2, 4, 5, 2]),
        ];
        for (i, (kh, kw, stride, p, dims)) in cases.into_iter().enumerate() {
            let c = dims[3];
            let weight = randn(10 + i as u64, &[c, 1, kh, kw], 0.6);
            let bias = randn(20 + i as u64, &[c], 1.0);
            let conv = DepthwiseConv2d::new(&weight, Some(&bias), stride, p).unwrap();
            check(
                &[randn(i as u64, &dims, 1.0)],
                5e-6,
                |v| Ok(vec![conv.forward(&v[0])?]),
                |t| {
                    let x = t[0].permute((0, 3, 1, 2))?.pad_with_zeros(2, p.top, p.bottom)?;
                    let x = x.pad_with_zeros(3, p.left, p.right)?;
                    // Channel by channel: candle's grouped convolution has no tested gradient.
                    let weight = weight.to_dtype(DType::F64)?;
                    let channels = (0..c).map(|j| x.narrow(1, j, 1)?.conv2d(&weight.narrow(0, j, 1)?, 0, stride, 1, 1));
                    let y = Tensor::cat(&channels.collect::<candle_core::Result<Vec<_>>>()?, 1)?;
                    Ok(vec![y.permute((0, 2, 3, 1))?.broadcast_add(&bias.to_dtype(DType::F64)?)?])
                },
            );
        }
    }

    #[test]
    fn a_wrong_number_of_channels_is_an_error() {
        let conv = DepthwiseConv2d::new(&randn(0, &[4, 1, 3, 3], 1.0), None, 1, Padding::all(1)).unwrap();
        let error = conv.forward(&Value::constant(randn(1, &[1, 4, 4, 2], 1.0))).err().expect("refused");
        assert!(error.to_string().contains("found [1, 4, 4, 2]"), "{error}");
    }
}
