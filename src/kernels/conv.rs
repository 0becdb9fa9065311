//! 2-D convolution with frozen weights on channels-last images, as matrix products over gathered patches.
//!
//! The patches of a few hundred output pixels at a time are copied side by side (im2col) and multiplied by the
//! kernel; the whole matrix of patches, nine times the image for a 3x3 kernel, is never held. The gradient of the
//! input is the same loop over the output's gradient, with the kernel turned round.

use crate::error::{Error, Result};
use crate::kernels::cpu::{self, uninit, view};
use crate::kernels::matmul::{Into, Mat, MatMut, gemm, gemm_one_thread};
use crate::kernels::tape::{Value, record1};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// Rows and columns of zeros around the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Padding {
    /// Rows above.
    pub top: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns to the left.
    pub left: usize,
    /// Columns to the right.
    pub right: usize,
}

impl Padding {
    /// `size` on every side.
    pub fn all(size: usize) -> Self {
        Self { top: size, bottom: size, left: size, right: size }
    }
}

/// A frozen convolution.
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// (out, kernel height, kernel width, in), f32.
    weight: Tensor,
    /// (out,), f32.
    bias: Option<Tensor>,
    stride: usize,
    padding: Padding,
}

/// Floats of gathered patches that one task holds: 1 MiB, about what the second-level cache does.
const PATCH_FLOATS: usize = 1 << 18;
/// Output pixels that one task computes at least, so that packing the kernel is paid for.
const MIN_PIXELS: usize = 256;

impl Conv2d {
    /// A convolution with `weight` (out, in, kernel height, kernel width) and `bias` (out,).
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: Padding) -> Result<Self> {
        let weight = weight.to_dtype(DType::F32)?.permute((0, 2, 3, 1))?.contiguous()?;
        let bias = bias.map(|b| b.to_dtype(DType::F32)?.contiguous()).transpose()?;
        Ok(Self { weight, bias, stride, padding })
    }

    /// Output channels.
    pub fn out_channels(&self) -> usize {
        self.weight.dims()[0]
    }

    /// The convolution of `x`.
    ///
    /// Shapes: `x` (B, H, W, in) -> (B, H', W', out), H' = (H + top + bottom - kernel height) / stride + 1.
    pub fn forward(&self, x: &Value) -> Result<Value> {
        let (b, h, w, c) = x.tensor().dims4()?;
        let (out_c, kh, kw, in_c) = self.weight.dims4()?;
        let Padding { top, bottom, left, right } = self.padding;
        let (padded_h, padded_w) = (h + top + bottom, w + left + right);
        if c != in_c || padded_h < kh || padded_w < kw {
            return Err(Error::run("an image does not fit its convolution").expected(
                format!("(batch, {kh} or more, {kw} or more, {in_c}) with padding"),
                format!("{:?}", x.dims()),
            ));
        }
        let (out_h, out_w) = ((padded_h - kh) / self.stride + 1, (padded_w - kw) / self.stride + 1);
        let (image, weight) = (view(x.tensor())?, view(&self.weight)?);
        let bias = self.bias.as_ref().map(view).transpose()?;
        let out = if self.is_pointwise() {
            let mut out = uninit(b * h * w * out_c);
            let mode = start_with(&mut out, bias.as_deref());
            gemm(
                MatMut::new(&mut out, b * h * w, out_c),
                mode,
                Mat::new(&image, b * h * w, c),
                Mat::new(&weight, out_c, c).t(),
                1.0,
            );
            out
        } else {
            let patches = Patches {
                image: &image,
                dims: [h, w, c],
                rows: taps(out_h, kh, |o, t| (o * self.stride + t).checked_sub(top).filter(|&i| i < h)),
                cols: taps(out_w, kw, |o, t| (o * self.stride + t).checked_sub(left).filter(|&i| i < w)),
                kernel: [kh, kw],
            };
            patches.product(&weight, bias.as_deref(), [b, out_h, out_w, out_c])
        };
        drop((image, bias));
        let y = cpu::from_f32(out, (b, out_h, out_w, out_c), x.dtype())?;
        let conv = self.clone();
        Ok(record1(&[x], y, move |grad| Ok(vec![Some(conv.backward(&grad, [b, h, w, c])?)])))
    }

    /// The gradient of the input, whose shape is `dims`, from that of the output.
    fn backward(&self, grad: &Tensor, dims: [usize; 4]) -> Result<Tensor> {
        let [b, h, w, c] = dims;
        let (_, out_h, out_w, out_c) = grad.dims4()?;
        let (dy, weight) = (view(grad)?, view(&self.weight)?);
        let dx = if self.is_pointwise() {
            let mut dx = uninit(b * h * w * c);
            let product = (Mat::new(&dy, b * h * w, out_c), Mat::new(&weight, out_c, c));
            gemm(MatMut::new(&mut dx, b * h * w, c), Into::Overwrite, product.0, product.1, 1.0);
            dx
        } else {
            let (_, kh, kw, _) = self.weight.dims4()?;
            // Input pixel i was tap t of output pixel o where o * stride + t = i + padding. Taps are visited from the
            // last to the first, so that the pixels they name run forward in memory.
            let output_of = |i: usize, tap: usize, before: usize, output: usize| {
                let distance = (i + before).checked_sub(tap)?;
                let o = distance / self.stride;
                (distance % self.stride == 0 && o < output).then_some(o)
            };
            let patches = Patches {
                image: &dy,
                dims: [out_h, out_w, out_c],
                rows: taps(h, kh, |i, t| output_of(i, kh - 1 - t, self.padding.top, out_h)),
                cols: taps(w, kw, |i, t| output_of(i, kw - 1 - t, self.padding.left, out_w)),
                kernel: [kh, kw],
            };
            patches.product(&turned(&weight, out_c, kh * kw, c), None, [b, h, w, c])
        };
        cpu::from_f32(dx, dims.to_vec(), grad.dtype())
    }

    fn is_pointwise(&self) -> bool {
        self.weight.dims()[1..3] == [1, 1] && self.stride == 1 && self.padding == Padding::default()
    }
}

/// (out, taps, in) to (in, taps reversed, out).
fn turned(weight: &[f32], out: usize, taps: usize, input: usize) -> Vec<f32> {
    let mut turned = uninit(weight.len());
    turned.par_chunks_exact_mut(taps * out).enumerate().for_each(|(i, rows)| {
        for (t, row) in rows.chunks_exact_mut(out).enumerate() {
            for (o, w) in row.iter_mut().enumerate() {
                *w = weight[(o * taps + taps - 1 - t) * input + i];
            }
        }
    });
    turned
}

/// For each of `n` coordinates and each tap of the kernel, the coordinate that is read; `None` reads zeros.
fn taps(n: usize, kernel: usize, read: impl Fn(usize, usize) -> Option<usize>) -> Vec<Option<usize>> {
    (0..n * kernel).map(|i| read(i / kernel, i % kernel)).collect()
}

/// Puts the bias into every pixel of `out`, or leaves it to be overwritten.
fn start_with(out: &mut [f32], bias: Option<&[f32]>) -> Into {
    match bias {
        Some(bias) => {
            cpu::par_rows(out, bias.len(), |_, pixel| pixel.copy_from_slice(bias));
            Into::Add
        }
        None => Into::Overwrite,
    }
}

/// What each output pixel reads of an image.
struct Patches<'a> {
    /// (B, H, W, C) of `dims` = [H, W, C].
    image: &'a [f32],
    dims: [usize; 3],
    /// Image row of (output row, tap).
    rows: Vec<Option<usize>>,
    /// Image column of (output column, tap).
    cols: Vec<Option<usize>>,
    kernel: [usize; 2],
}

impl Patches<'_> {
    /// Patches times `weight` (out, taps * C), plus `bias`; `out` = [B, H, W, C] of the result.
    fn product(&self, weight: &[f32], bias: Option<&[f32]>, out: [usize; 4]) -> Vec<f32> {
        let [b, h, w, c] = out;
        let k = self.kernel[0] * self.kernel[1] * self.dims[2];
        let pixels = (PATCH_FLOATS / k).max(MIN_PIXELS);
        let mut result = uninit(b * h * w * c);
        result.par_chunks_mut(pixels * c).enumerate().for_each_init(Vec::new, |patches, (i, out)| {
            let n = out.len() / c;
            if patches.len() < n * k {
                *patches = uninit(n * k);
            }
            for (p, patch) in patches.chunks_exact_mut(k).take(n).enumerate() {
                let pixel = i * pixels + p;
                self.gather(pixel / (h * w), pixel / w % h, pixel % w, patch);
            }
            let mode = start_with(out, bias);
            gemm_one_thread(MatMut::new(out, n, c), mode, Mat::new(patches, n, k), Mat::new(weight, c, k).t(), 1.0);
        });
        result
    }

    /// Copies what output pixel (y, x) of image `b` reads.
    fn gather(&self, b: usize, y: usize, x: usize, patch: &mut [f32]) {
        let ([h, w, c], [kh, kw]) = (self.dims, self.kernel);
        let cols = &self.cols[x * kw..(x + 1) * kw];
        let whole = cols[0].filter(|&first| cols[kw - 1] == Some(first + kw - 1));
        for (row, patch) in self.rows[y * kh..(y + 1) * kh].iter().zip(patch.chunks_exact_mut(kw * c)) {
            let Some(row) = row else {
                patch.fill(0.0);
                continue;
            };
            let row = &self.image[(b * h + row) * w * c..][..w * c];
            if let Some(first) = whole {
                patch.copy_from_slice(&row[first * c..][..kw * c]);
                continue;
            }
            for (col, patch) in cols.iter().zip(patch.chunks_exact_mut(c)) {
                match col {
                    Some(col) => patch.copy_from_slice(&row[col * c..][..c]),
                    None => patch.fill(0.0),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check, randn, relative_error};

    /// candle's convolution of a channels-last image, in f64.
    fn twin(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize, p: Padding) -> candle_core::Result<Tensor> {
        let x = x.permute((0, 3, 1, 2))?.pad_with_zeros(2, p.top, p.bottom)?.pad_with_zeros(3, p.left, p.right)?;
        let y = x.conv2d(&weight.to_dtype(DType::F64)?, 0, stride, 1, 1)?;
        y.permute((0, 2, 3, 1))?.broadcast_add(&bias.to_dtype(DType::F64)?)
    }

    #[test]
    fn convolution_equals_its_twin() {
        let down = Padding { bottom: 1, right: 1, ..Padding::default() };
        let cases = [
            (3, 3, 1, Padding::all(1), [2, 7, 6, 5]),
            // The downsampling convolution, on even and odd sizes.
            (3, 3, 2, down, [1, 8, 6, 3]),
            (3, 3, 2, down, [1, 7, 9, 3]),
            (1, 1, 1, Padding::default(), [2, 3, 4, 7]),
            (2, 3, 1, Padding { left: 2, top: 1, ..Padding::default() }, [1, 5, 4, 2]),
            // Narrower than its kernel.
            (3, 3, 1, Padding::all(1), [1, 1, 2, 4]),
            // The wide kernel of pose networks, on an image smaller and one larger than it.
            (7, 7, 1, Padding::all(3), [1, 4, 9, 3]),
        ];
        for (i, (kh, kw, stride, padding, dims)) in cases.into_iter().enumerate() {
            let weight = randn(10 + i as u64, &[6, dims[3], kh, kw], 0.4);
            let bias = randn(20 + i as u64, &[6], 1.0);
            let conv = Conv2d::new(&weight, Some(&bias), stride, padding).unwrap();
            check(
                &[randn(i as u64, &dims, 1.0)],
                5e-6,
                |v| Ok(vec![conv.forward(&v[0])?]),
                |t| Ok(vec![twin(&t[0], &weight, &bias, stride, padding)?]),
            );
        }
    }

    #[test]
    fn an_image_of_many_tiles_equals_its_twin() {
        // 2 * 40 * 45 pixels with patches of 9 * 96 floats are a dozen tasks, the last of them ragged.
        let (x, weight) = (randn(0, &[2, 40, 45, 96], 1.0), randn(1, &[8, 96, 3, 3], 0.1));
        let conv = Conv2d::new(&weight, None, 1, Padding::all(1)).unwrap();
        let y = conv.forward(&Value::constant(x.clone())).unwrap();
        let zeros = Tensor::zeros(8, DType::F32, x.device()).unwrap();
        let expected = twin(&x.to_dtype(DType::F64).unwrap(), &weight, &zeros, 1, Padding::all(1)).unwrap();
        assert!(relative_error(y.tensor(), &expected) < 5e-6);
    }

    #[test]
    fn a_wrong_number_of_channels_is_an_error() {
        let conv = Conv2d::new(&randn(0, &[4, 3, 3, 3], 1.0), None, 1, Padding::all(1)).unwrap();
        let error = conv.forward(&Value::constant(randn(1, &[1, 4, 4, 2], 1.0))).err().expect("refused");
        assert!(error.to_string().contains("found [1, 4, 4, 2]"), "{error}");
    }
}
