//! The parts that encoder and decoder are made of. B batch, H and W height and width, C channels; channels last.
//!
//! The published weights are those of a causal video network: 5-D kernels (out, in, time, h, w). A single frame is
//! preceded by zeros in time, so that only the last temporal tap counts, and `time_conv` is never reached (setting
//! all the rest to zero changed no bit of the original's output).

use crate::error::Result;
use crate::io::Weights;
use crate::kernels::Value;
use crate::kernels::basic::add;
use crate::kernels::channel_norm::channel_norm;
use crate::kernels::checkpoint::{Keep, segment};
use crate::kernels::conv::{Conv2d, Padding};
use crate::kernels::math::Activation;
use crate::kernels::spatial_attention::spatial_attention;
use crate::kernels::upsample::upsample_nearest2x;
use candle_core::{DType, Device, Tensor};

/// Where a block's tensors are: the weights and the name before the block's own names.
#[derive(Clone)]
pub(super) struct Scope<'a> {
    pub weights: &'a Weights,
    pub prefix: String,
}

impl Scope<'_> {
    /// The scope of a part.
    pub fn at(&self, name: &str) -> Self {
        let prefix = if self.prefix.is_empty() { name.into() } else { format!("{}.{name}", self.prefix) };
        Self { weights: self.weights, prefix }
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.get(&format!("{}.{name}", self.prefix), shape, DType::F32, &Device::Cpu)
    }

    /// A causal convolution with a kernel of `size` in time, height and width, as the 2-D one of a single frame.
    pub fn causal_conv(&self, output: usize, input: usize, size: usize) -> Result<Conv2d> {
        let weight = self.tensor("weight", &[output, input, size, size, size])?.narrow(2, size - 1, 1)?.squeeze(2)?;
        Conv2d::new(&weight, Some(&self.tensor("bias", &[output])?), 1, Padding::all(size / 2))
    }

    fn conv(&self, output: usize, input: usize, size: usize, stride: usize, padding: Padding) -> Result<Conv2d> {
        let weight = self.tensor("weight", &[output, input, size, size])?;
        Conv2d::new(&weight, Some(&self.tensor("bias", &[output])?), stride, padding)
    }

    /// The scale of a norm over `dim` channels.
    pub fn gamma(&self, dim: usize) -> Result<Tensor> {
        Ok(self.tensor("gamma", &[dim, 1, 1, 1])?.flatten_all()?)
    }
}

/// `QwenImageResidualBlock`: norm, SiLU, convolution, twice, around a shortcut.
#[derive(Clone)]
pub(super) struct ResBlock {
    norm1: Tensor,
    conv1: Conv2d,
    norm2: Tensor,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl ResBlock {
    pub fn load(scope: &Scope, input: usize, output: usize) -> Result<Self> {
        let shortcut = (input != output).then(|| scope.at("conv_shortcut").causal_conv(output, input, 1));
        Ok(Self {
            norm1: scope.at("norm1").gamma(input)?,
            conv1: scope.at("conv1").causal_conv(output, input, 3)?,
            norm2: scope.at("norm2").gamma(output)?,
            conv2: scope.at("conv2").causal_conv(output, output, 3)?,
            conv_shortcut: shortcut.transpose()?,
        })
    }

    /// Keeps of the graph its input alone: what lies inside is computed again for the backward pass.
    pub fn forward(&self, x: &Value) -> Result<Value> {
        let block = self.clone();
        one(segment(Keep::Inputs, &[x], false, move |v| Ok(vec![block.inside(&v[0])?]))?)
    }

    fn inside(&self, x: &Value) -> Result<Value> {
        let h = self.conv1.forward(&channel_norm(x, &self.norm1, Some(Activation::Silu))?)?; // (B, H, W, out)
        let normed = channel_norm(&h, &self.norm2, Some(Activation::Silu))?;
        // At full resolution each of these is hundreds of megabytes: at most three live at once.
        drop(h);
        let h = self.conv2.forward(&normed)?; // (B, H, W, out)
        drop(normed);
        match &self.conv_shortcut {
            Some(conv) => add(&conv.forward(x)?, &h),
            None => add(x, &h),
        }
    }
}

/// `QwenImageAttentionBlock`: every pixel attends to every pixel, with one head.
#[derive(Clone)]
pub(super) struct AttentionBlock {
    norm: Tensor,
    to_qkv: Conv2d,
    proj: Conv2d,
}

impl AttentionBlock {
    fn load(scope: &Scope, dim: usize) -> Result<Self> {
        let none = Padding::default();
        Ok(Self {
            norm: scope.at("norm").tensor("gamma", &[dim, 1, 1])?.flatten_all()?,
            to_qkv: scope.at("to_qkv").conv(3 * dim, dim, 1, 1, none)?,
            proj: scope.at("proj").conv(dim, dim, 1, 1, none)?,
        })
    }

    /// Keeps its input alone, as [`ResBlock::forward`].
    fn forward(&self, x: &Value) -> Result<Value> {
        let block = self.clone();
        one(segment(Keep::Inputs, &[x], false, move |v| Ok(vec![block.inside(&v[0])?]))?)
    }

    fn inside(&self, x: &Value) -> Result<Value> {
        let (b, h, w, c) = x.tensor().dims4()?;
        let qkv = self.to_qkv.forward(&channel_norm(x, &self.norm, None)?)?; // (B, H, W, 3C)
        let attended = spatial_attention(&qkv.reshape((b, h * w, 3 * c))?)?; // (B, HW, C)
        add(x, &self.proj.forward(&attended.reshape((b, h, w, c))?)?)
    }
}

/// The one output of a segment.
fn one(outputs: Vec<Value>) -> Result<Value> {
    Ok(outputs.into_iter().next().expect("the segment gives one value"))
}

/// `QwenImageMidBlock`: residual block, attention, residual block.
pub(super) struct MidBlock {
    resnets: [ResBlock; 2],
    attentions: [AttentionBlock; 1],
}

impl MidBlock {
    pub fn load(scope: &Scope, dim: usize) -> Result<Self> {
        let resnet = |name| ResBlock::load(&scope.at(name), dim, dim);
        Ok(Self {
            resnets: [resnet("resnets.0")?, resnet("resnets.1")?],
            attentions: [AttentionBlock::load(&scope.at("attentions.0"), dim)?],
        })
    }

    pub fn forward(&self, x: &Value) -> Result<Value> {
        let x = self.resnets[0].forward(x)?;
        let x = self.attentions[0].forward(&x)?;
        self.resnets[1].forward(&x)
    }
}

/// `QwenImageResample`, halving: a row and a column of zeros at the end, then a convolution of stride 2.
pub(super) struct Downsample(Conv2d);

impl Downsample {
    pub fn load(scope: &Scope, dim: usize) -> Result<Self> {
        let padding = Padding { bottom: 1, right: 1, ..Padding::default() };
        Ok(Self(scope.at("resample.1").conv(dim, dim, 3, 2, padding)?))
    }

    pub fn forward(&self, x: &Value) -> Result<Value> {
        self.0.forward(x) // (B, H/2, W/2, C)
    }
}

/// `QwenImageResample`, doubling: each pixel four times, then a convolution that halves the channels.
pub(super) struct Upsample(Conv2d);

impl Upsample {
    pub fn load(scope: &Scope, dim: usize) -> Result<Self> {
        Ok(Self(scope.at("resample.1").conv(dim / 2, dim, 3, 1, Padding::all(1))?))
    }

    pub fn forward(&self, x: &Value) -> Result<Value> {
        self.0.forward(&upsample_nearest2x(x)?) // (B, 2H, 2W, C/2)
    }
}
