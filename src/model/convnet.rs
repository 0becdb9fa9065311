//! What the image networks of the evaluation are made of: convolutions with a ReLU, and pools, on channels-last
//! images (B, H, W, C) in f32. Inference only.

use crate::error::Result;
use crate::io::Weights;
use crate::kernels::conv::{Conv2d, Padding};
use crate::kernels::cpu::{from_f32, par_rows, uninit, view};
use crate::kernels::{Value, no_grad};
use candle_core::{DType, Device, Tensor};

/// Where a convolution stands and what shape it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Name of its module.
    pub name: String,
    /// Input channels.
    pub input: usize,
    /// Output channels.
    pub output: usize,
    /// Height and width of the kernel.
    pub kernel: (usize, usize),
    /// Distance of the output's pixels in the input.
    pub stride: usize,
    /// Zeros above and below, and to the left and right.
    pub padding: (usize, usize),
}

impl Shape {
    fn weight(&self) -> Vec<usize> {
        vec![self.output, self.input, self.kernel.0, self.kernel.1]
    }

    fn padded(&self) -> Padding {
        let (y, x) = self.padding;
        Padding { top: y, bottom: y, left: x, right: x }
    }

    /// Names and shapes of the tensors of a convolution with bias.
    pub fn plain_tensors(&self) -> Vec<(String, Vec<usize>)> {
        vec![(format!("{}.weight", self.name), self.weight()), (format!("{}.bias", self.name), vec![self.output])]
    }

    /// Names and shapes of the tensors of a convolution without bias, followed by a batch normalisation.
    pub fn normalised_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let norm = ["weight", "bias", "running_mean", "running_var"].map(|n| format!("{}.bn.{n}", self.name));
        let mut tensors = vec![(format!("{}.conv.weight", self.name), self.weight())];
        tensors.extend(norm.map(|name| (name, vec![self.output])));
        tensors
    }

    /// The convolution with bias, then ReLU.
    pub fn load_plain(&self, weights: &Weights) -> Result<ConvRelu> {
        let [weight, bias] = &self.load(weights, self.plain_tensors())?[..] else { unreachable!("two tensors") };
        Ok(ConvRelu(Conv2d::new(weight, Some(bias), self.stride, self.padded())?))
    }

    /// The convolution with its batch normalisation folded in, then ReLU.
    pub fn load_normalised(&self, weights: &Weights, eps: f64) -> Result<ConvRelu> {
        let [weight, gamma, beta, mean, variance] = &self.load(weights, self.normalised_tensors())?[..] else {
            unreachable!("five tensors")
        };
        let factor = (gamma / (variance + eps)?.sqrt()?)?; // (out,)
        let weight = weight.broadcast_mul(&factor.reshape((self.output, 1, 1, 1))?)?;
        let bias = (beta - (mean * &factor)?)?;
        Ok(ConvRelu(Conv2d::new(&weight, Some(&bias), self.stride, self.padded())?))
    }

    fn load(&self, weights: &Weights, tensors: Vec<(String, Vec<usize>)>) -> Result<Vec<Tensor>> {
        tensors.iter().map(|(name, shape)| weights.get(name, shape, DType::F32, &Device::Cpu)).collect()
    }
}

/// A convolution and a ReLU.
pub struct ConvRelu(Conv2d);

impl ConvRelu {
    /// (B, H, W, in) -> (B, H', W', out).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(no_grad(|| self.0.forward(&Value::constant(x.clone())))?.into_tensor().relu()?)
    }
}

/// What a pool makes of the pixels under its window. Pixels outside the image do not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// The largest value.
    Max,
    /// The mean.
    Mean,
}

impl Pool {
    /// Over 3x3 windows. Shapes: (B, H, W, C) -> (B, H', W', C), H' = (H + 2 padding - 3) / stride + 1.
    pub fn over_3x3(self, x: &Tensor, stride: usize, padding: usize) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let (out_h, out_w) = ((h + 2 * padding - 3) / stride + 1, (w + 2 * padding - 3) / stride + 1);
        let image = view(x)?;
        let mut out = uninit(b * out_h * out_w * c);
        par_rows(&mut out, c, |i, out| {
            let (b, y, x) = (i / (out_h * out_w), i / out_w % out_h, i % out_w);
            let window =
                |at: usize, n: usize| (at * stride).saturating_sub(padding)..(at * stride + 3 - padding).min(n);
            let mut count = 0f32;
            out.fill(if self == Self::Max { f32::NEG_INFINITY } else { 0.0 });
            for row in window(y, h) {
                for column in window(x, w) {
                    let pixel = &image[((b * h + row) * w + column) * c..][..c];
                    count += 1.0;
                    match self {
                        Self::Max => out.iter_mut().zip(pixel).for_each(|(o, &p)| *o = o.max(p)),
                        Self::Mean => out.iter_mut().zip(pixel).for_each(|(o, &p)| *o += p),
                    }
                }
            }
            if self == Self::Mean {
                out.iter_mut().for_each(|o| *o /= count);
            }
        });
        from_f32(out, (b, out_h, out_w, c), DType::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_leave_what_lies_outside_out() {
        let x = Tensor::arange(0f32, 16.0, &Device::Cpu).unwrap().reshape((1, 4, 4, 1)).unwrap();
        let values = |pool: Pool, stride, padding| {
            let y = pool.over_3x3(&x, stride, padding).unwrap();
            (y.dims()[1], y.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        };
        let (side, mean) = values(Pool::Mean, 1, 1);
        // The corner's window holds 0, 1, 4 and 5.
        assert_eq!((side, mean[0], mean[5]), (4, 2.5, 5.0));
        assert_eq!(values(Pool::Max, 2, 0), (1, vec![10.0]));
        assert_eq!(values(Pool::Max, 1, 1).1[0], 5.0);
        let negative = (&x - 100.0).unwrap();
        let y = Pool::Max.over_3x3(&negative, 1, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(y[0], -95.0, "zeros around the image would win");
    }
}
