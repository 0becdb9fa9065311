//! `QwenImageDecoder3d`, for a single frame. Channels last.

use super::VaeConfig;
use super::blocks::{MidBlock, ResBlock, Scope, Upsample};
use crate::error::Result;
use crate::kernels::Value;
use crate::kernels::channel_norm::channel_norm;
use crate::kernels::conv::Conv2d;
use crate::kernels::math::Activation;
use candle_core::Tensor;

/// Latent, after `post_quant_conv`, to image, before the clamp.
pub(super) struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    norm_out: Tensor,
    conv_out: Conv2d,
}

struct UpBlock {
    resnets: Vec<ResBlock>,
    /// A list of one in the checkpoint; none in the last block.
    upsamplers: Option<Upsample>,
}

impl UpBlock {
    fn load(scope: &Scope, input: usize, dim: usize, config: &VaeConfig, upsample: bool) -> Result<Self> {
        let resnet = |i| ResBlock::load(&scope.at(&format!("resnets.{i}")), if i == 0 { input } else { dim }, dim);
        let upsampler = upsample.then(|| Upsample::load(&scope.at("upsamplers.0"), dim));
        Ok(Self {
            resnets: (0..=config.num_res_blocks).map(resnet).collect::<Result<_>>()?,
            upsamplers: upsampler.transpose()?,
        })
    }

    fn forward(&self, x: &Value) -> Result<Value> {
        let mut x = x.clone();
        for resnet in &self.resnets {
            x = resnet.forward(&x)?;
        }
        match &self.upsamplers {
            Some(upsampler) => upsampler.forward(&x),
            None => Ok(x),
        }
    }
}

impl Decoder {
    pub fn load(scope: &Scope, config: &VaeConfig) -> Result<Self> {
        let levels = config.decoder_dims();
        let widest = levels[0].0;
        let up_block = |(i, &(input, dim)): (usize, &(usize, usize))| {
            UpBlock::load(&scope.at(&format!("up_blocks.{i}")), input, dim, config, i + 1 < levels.len())
        };
        Ok(Self {
            conv_in: scope.at("conv_in").causal_conv(widest, config.z_dim, 3)?,
            mid_block: MidBlock::load(&scope.at("mid_block"), widest)?,
            up_blocks: levels.iter().enumerate().map(up_block).collect::<Result<_>>()?,
            norm_out: scope.at("norm_out").gamma(levels[levels.len() - 1].1)?,
            conv_out: scope.at("conv_out").causal_conv(config.input_channels, levels[levels.len() - 1].1, 3)?,
        })
    }

    /// (B, h, w, z_dim) -> (B, 8h, 8w, image channels)
    pub fn forward(&self, z: &Value) -> Result<Value> {
        let mut x = self.mid_block.forward(&self.conv_in.forward(z)?)?;
        for block in &self.up_blocks {
            x = block.forward(&x)?;
        }
        self.conv_out.forward(&channel_norm(&x, &self.norm_out, Some(Activation::Silu))?)
    }
}
