//! The body network: a trunk, then two branches (affinity fields and heat maps) refined in six stages.

use super::{Chain, Trunk};
use crate::error::Result;
use crate::kernels::Value;
use crate::kernels::conv::{Conv2d, Padding};
use crate::kernels::pool::join_channels;
use crate::kernels::relu::relu;
use crate::pose::weights::NetworkWeights;
use candle_core::{DType, Device, Tensor};

/// The keypoints, in the order of the heat maps; a nineteenth map is the background.
pub const KEYPOINTS: [&str; 18] = [
    "nose",
    "neck",
    "right_shoulder",
    "right_elbow",
    "right_wrist",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "right_hip",
    "right_knee",
    "right_ankle",
    "left_hip",
    "left_knee",
    "left_ankle",
    "right_eye",
    "left_eye",
    "right_ear",
    "left_ear",
];

/// Channels of the affinity fields and of the heat maps with their background.
const FIELDS: usize = 38;
const HEATMAPS: usize = 19;
const FEATURES: usize = 128;

/// The network. 92 convolutions, 52.3 million parameters.
pub struct Body {
    trunk: Trunk,
    features: Chain,
    /// For each stage the branch of the fields and that of the heat maps.
    stages: Vec<[Chain; 2]>,
}

impl Body {
    /// Errors (usage): weights of another network.
    pub fn from_weights(weights: &NetworkWeights) -> Result<Self> {
        let trunk = Trunk::load(weights)?;
        let features = Chain::load(weights, 512, &[("conv4_3_CPM", 256, 3), ("conv4_4_CPM", FEATURES, 3)], true)?;
        let first = |ending: &str, output: usize| {
            let names: Vec<String> = (1..=5).map(|i| format!("conv5_{i}_CPM_{ending}")).collect();
            let sizes = [(128, 3), (128, 3), (128, 3), (512, 1), (output, 1)];
            let layers: Vec<_> = names.iter().zip(sizes).map(|(n, (c, k))| (n.as_str(), c, k)).collect();
            Chain::load(weights, FEATURES, &layers, false)
        };
        let mut stages = vec![[first("L1", FIELDS)?, first("L2", HEATMAPS)?]];
        let joined = FIELDS + HEATMAPS + FEATURES;
        for stage in 2..=6 {
            let fields = Chain::stage(weights, stage, "_L1", [joined, FIELDS], false)?;
            // The port leaves `Mconv7_stage6_L2` out of its list of layers without ReLU, and so do we: its weights are
            // used like this everywhere.
            let heatmaps = Chain::stage(weights, stage, "_L2", [joined, HEATMAPS], stage == 6)?;
            stages.push([fields, heatmaps]);
        }
        Ok(Self { trunk, features, stages })
    }

    /// Images (B, 3, H, W) in [-1, 1] to affinity fields (B, h, w, 38) and heat maps (B, h, w, 19), h = ceil(H/8).
    pub fn forward(&self, images: &Value) -> Result<(Value, Value)> {
        let features = self.features.forward(&self.trunk.forward(images)?)?;
        let [fields, heatmaps] = &self.stages[0];
        let (mut fields, mut heatmaps) = (fields.forward(&features)?, heatmaps.forward(&features)?);
        for [to_fields, to_heatmaps] in &self.stages[1..] {
            let joined = join_channels(&[&fields, &heatmaps, &features])?;
            (fields, heatmaps) = (to_fields.forward(&joined)?, to_heatmaps.forward(&joined)?);
        }
        Ok((fields, heatmaps))
    }
}

/// (B, h, w, 19) to (B, h, w, 18), below 0 cut off.
pub fn without_background(heatmaps: &Value) -> Result<Value> {
    let eye = Tensor::eye(HEATMAPS, DType::F32, &Device::Cpu)?.narrow(0, 0, KEYPOINTS.len())?.contiguous()?;
    let select = Conv2d::new(&eye.reshape((KEYPOINTS.len(), HEATMAPS, 1, 1))?, None, 1, Padding::default())?;
    relu(&select.forward(heatmaps)?)
}
