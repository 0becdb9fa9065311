//! The hand network: 21 points of a hand in a square crop.

use super::{Chain, STRIDE, Trunk, crop, uncrop};
use crate::error::Result;
use crate::kernels::cpu::view;
use crate::kernels::pool::join_channels;
use crate::kernels::{Value, no_grad};
use crate::pose::detection::{Keypoint, PixelBox};
use crate::pose::peaks::Map;
use crate::pose::weights::NetworkWeights;
use candle_core::Tensor;

/// Points of a hand; a further map is the background.
pub const POINTS: usize = 21;
const MAPS: usize = POINTS + 1;
const FEATURES: usize = 128;
/// Side of the crop that the network is given.
const SIDE: usize = 368;
/// Points below this confidence are not found.
const SURE: f32 = 0.05;

/// The network. 36.8 million parameters.
pub struct HandNetwork {
    trunk: Trunk,
    features: Chain,
    stages: Vec<Chain>,
}

impl HandNetwork {
    /// Errors (usage): weights of another network.
    pub fn from_weights(weights: &NetworkWeights) -> Result<Self> {
        let trunk = Trunk::load(weights)?;
        let layers = [
            ("conv4_3", 512, 3),
            ("conv4_4", 512, 3),
            ("conv5_1", 512, 3),
            ("conv5_2", 512, 3),
            ("conv5_3_CPM", FEATURES, 3),
        ];
        let features = Chain::load(weights, 512, &layers, true)?;
        let first = Chain::load(weights, FEATURES, &[("conv6_1_CPM", 512, 1), ("conv6_2_CPM", MAPS, 1)], false)?;
        let mut stages = vec![first];
        for stage in 2..=6 {
            stages.push(Chain::stage(weights, stage, "", [MAPS + FEATURES, MAPS], false)?);
        }
        Ok(Self { trunk, features, stages })
    }

    /// Images (B, 3, H, W) in [-1, 1] to maps (B, h, w, 22), h = ceil(H/8).
    pub fn forward(&self, images: &Value) -> Result<Value> {
        let features = self.features.forward(&self.trunk.forward(images)?)?;
        let mut maps = self.stages[0].forward(&features)?;
        for stage in &self.stages[1..] {
            maps = stage.forward(&join_channels(&[&maps, &features])?)?;
        }
        Ok(maps)
    }

    /// The points of the hand in this part of an image (1, 3, H, W), in the image's pixels.
    pub fn points(&self, image: &Tensor, area: PixelBox) -> Result<Vec<Option<Keypoint>>> {
        let maps = no_grad(|| self.forward(&Value::constant(crop(image, area, SIDE)?)))?;
        let (_, height, width, channels) = maps.tensor().dims4()?;
        let values = view(maps.tensor())?;
        let best = |channel| {
            let map = Map { values: &values, height, width, channels, channel };
            let peak = *map.peaks(SURE, 1).first()?;
            Some(uncrop(peak.x * STRIDE as f32, peak.y * STRIDE as f32, peak.score, area, SIDE))
        };
        Ok((0..POINTS).map(best).collect())
    }
}
