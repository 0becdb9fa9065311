//! `QwenImageEncoder3d`, for a single frame. Channels last.

use super::VaeConfig;
use super::blocks::{Downsample, MidBlock, ResBlock, Scope};
use crate::error::Result;
use crate::kernels::Value;
use crate::kernels::channel_norm::channel_norm;
use crate::kernels::conv::Conv2d;
use crate::kernels::math::Activation;
use candle_core::Tensor;

/// Image to the moments of the latent, before `quant_conv`.
pub(super) struct Encoder {
    conv_in: Conv2d,
    /// One flat list over all levels, as in the checkpoint.
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    norm_out: Tensor,
    conv_out: Conv2d,
}

enum DownBlock {
    Res(ResBlock),
    Down(Downsample),
}

impl Encoder {
    pub fn load(scope: &Scope, config: &VaeConfig) -> Result<Self> {
        let dims = config.encoder_dims();
        let widest = dims[dims.len() - 1];
        let mut down_blocks = Vec::new();
        let mut channels = config.base_dim;
        for (level, &dim) in dims.iter().enumerate() {
            for _ in 0..config.num_res_blocks {
                let scope = scope.at(&format!("down_blocks.{}", down_blocks.len()));
                down_blocks.push(DownBlock::Res(ResBlock::load(&scope, channels, dim)?));
                channels = dim;
            }
            if level + 1 < dims.len() {
                let scope = scope.at(&format!("down_blocks.{}", down_blocks.len()));
                down_blocks.push(DownBlock::Down(Downsample::load(&scope, dim)?));
            }
        }
        Ok(Self {
            conv_in: scope.at("conv_in").causal_conv(config.base_dim, config.input_channels, 3)?,
            down_blocks,
            mid_block: MidBlock::load(&scope.at("mid_block"), widest)?,
            norm_out: scope.at("norm_out").gamma(widest)?,
            conv_out: scope.at("conv_out").causal_conv(2 * config.z_dim, widest, 3)?,
        })
    }

    /// (B, H, W, image channels) -> (B, H/8, W/8, 2 z_dim)
    pub fn forward(&self, x: &Value) -> Result<Value> {
        let mut x = self.conv_in.forward(x)?;
        for block in &self.down_blocks {
            x = match block {
                DownBlock::Res(block) => block.forward(&x)?,
                DownBlock::Down(block) => block.forward(&x)?,
            };
        }
        let x = self.mid_block.forward(&x)?;
        self.conv_out.forward(&channel_norm(&x, &self.norm_out, Some(Activation::Silu))?)
    }
}
