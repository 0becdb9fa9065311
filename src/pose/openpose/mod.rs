//! OpenPose's body and hand networks, read from the public PyTorch files or from safetensors.
//!
//! B batch, H and W height and width, C channels; channels last. Layer lists from the public PyTorch port; its weights
//! are for non-commercial use only.
//! Source: <https://github.com/Hzzone/pytorch-openpose/blob/master/src/model.py>

mod body;
mod hand;
mod limbs;

pub use body::Body;
pub use hand::HandNetwork;

use super::PoseNetwork;
use super::detection::{Detection, Keypoint, PixelBox};
use super::skeleton::Skeleton;
use super::weights::{self, NetworkWeights};
use crate::error::Result;
use crate::io::hub::HubOptions;
use crate::kernels::conv::{Conv2d, Padding};
use crate::kernels::pixels::channels_last;
use crate::kernels::pool::max_pool2x2;
use crate::kernels::relu::relu;
use crate::kernels::{Value, no_grad};
use candle_core::{DType, Device, Tensor};

/// The repository with both files.
pub const HUB_ID: &str = "lllyasviel/Annotators";
const BODY_FILE: &str = "body_pose_model.pth";
const HAND_FILE: &str = "hand_pose_model.pth";

/// What a user of these weights must know.
pub const LICENCE_NOTICE: &str = "OpenPose's weights are licensed by Carnegie Mellon University for academic or non-profit, non-commercial \
     research only; `posenet`, the default, is under Apache-2.0";

/// Image pixels per cell.
pub const STRIDE: usize = 8;

/// Body network, and hand network if its weights were given.
pub struct OpenPose {
    body: Body,
    hand: Option<HandNetwork>,
    skeleton: Skeleton,
    fingerprint: String,
}

impl OpenPose {
    /// Loads body and hand weights: each a file, a folder or a hub id.
    ///
    /// Errors (usage): those of [`weights::locate`]; weights of another network.
    pub fn load(body: &str, hand: Option<&str>, hub: &HubOptions) -> Result<Self> {
        let body = NetworkWeights::open("OpenPose's body network", &weights::locate(body, BODY_FILE, hub)?)?;
        let open_hand = |source| {
            let path = weights::locate(source, HAND_FILE, hub)?;
            HandNetwork::from_weights(&NetworkWeights::open("OpenPose's hand network", &path)?)
        };
        Self::new(&body, hand.map(open_hand).transpose()?)
    }

    /// The networks of open files. Errors (usage): weights of another network.
    pub fn new(body: &NetworkWeights, hand: Option<HandNetwork>) -> Result<Self> {
        Ok(Self {
            fingerprint: body.fingerprint()?,
            body: Body::from_weights(body)?,
            hand,
            skeleton: Skeleton::of(&body::KEYPOINTS),
        })
    }
}

impl PoseNetwork for OpenPose {
    fn name(&self) -> &str {
        "openpose"
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn skeleton(&self) -> &Skeleton {
        &self.skeleton
    }

    fn stride(&self) -> usize {
        STRIDE
    }

    fn detection_side(&self) -> usize {
        368
    }

    /// The heat maps of the body's keypoints. The affinity fields and the hand network have no part in them.
    fn maps(&self, images: &Value) -> Result<Value> {
        let (_, heatmaps) = self.body.forward(images)?;
        body::without_background(&heatmaps)
    }

    fn detect(&self, image: &Tensor) -> Result<Detection> {
        let (_, _, height, width) = image.dims4()?;
        let (fields, heatmaps) = no_grad(|| self.body.forward(&Value::constant(image.clone())))?;
        let mut found = limbs::decode(fields.tensor(), heatmaps.tensor(), height, width)?;
        found.add_hands_at_wrists(&self.skeleton, 20.0);
        if let Some(network) = &self.hand {
            for hand in &mut found.hands {
                hand.points = network.points(image, hand.area)?;
            }
        }
        Ok(found)
    }
}

/// One of the layers of a network: its name, output channels and kernel size.
type Layer<'a> = (&'a str, usize, usize);

/// The trunk that both networks begin with: VGG-19 up to conv4_2, a pooling before each of the last three groups.
const VGG: [(&str, usize, bool); 10] = [
    ("conv1_1", 64, false),
    ("conv1_2", 64, false),
    ("conv2_1", 128, true),
    ("conv2_2", 128, false),
    ("conv3_1", 256, true),
    ("conv3_2", 256, false),
    ("conv3_3", 256, false),
    ("conv3_4", 256, false),
    ("conv4_1", 512, true),
    ("conv4_2", 512, false),
];

/// [`VGG`] with the normalisation before it.
struct Trunk {
    to_bgr: Conv2d,
    first: [Tensor; 2],
    rest: Vec<(Conv2d, bool)>,
}

impl Trunk {
    fn load(weights: &NetworkWeights) -> Result<Self> {
        // BGR in 0..255, divided by 256, less one half; from RGB in [-1, 1].
        let scale = 127.5f32 / 256.0;
        let mut swap = [0f32; 9];
        (swap[2], swap[4], swap[6]) = (scale, scale, scale);
        let swap = Tensor::from_slice(&swap, (3, 3, 1, 1), &Device::Cpu)?;
        let shift = Tensor::full(scale - 0.5, 3, &Device::Cpu)?.to_dtype(DType::F32)?;
        let mut rest = Vec::new();
        let mut input = 64;
        for (name, output, pooled) in &VGG[1..] {
            rest.push((weights.conv(name, [*output, input, 3], 1, Padding::all(1))?, *pooled));
            input = *output;
        }
        Ok(Self {
            to_bgr: Conv2d::new(&swap, Some(&shift), 1, Padding::default())?,
            first: [
                weights.get("conv1_1.weight", &[64, 3, 3, 3])?.clone(),
                weights.get("conv1_1.bias", &[64])?.clone(),
            ],
            rest,
        })
    }

    /// (B, 3, H, W) -> (B, ceil(H/8), ceil(W/8), 512). To the right and at the bottom the original pads with 128 up to a
    /// multiple of 8: the zeros of the first convolution.
    fn forward(&self, images: &Value) -> Result<Value> {
        let (_, _, h, w) = images.tensor().dims4()?;
        let missing = |side: usize| side.next_multiple_of(STRIDE) - side;
        let padding = Padding { top: 1, left: 1, bottom: 1 + missing(h), right: 1 + missing(w) };
        let first = Conv2d::new(&self.first[0], Some(&self.first[1]), 1, padding)?;
        let mut x = relu(&first.forward(&self.to_bgr.forward(&channels_last(images)?)?)?)?;
        for (conv, pooled) in &self.rest {
            if *pooled {
                x = max_pool2x2(&x)?;
            }
            x = relu(&conv.forward(&x)?)?;
        }
        Ok(x)
    }
}

/// Convolutions one after the other, each with a ReLU, except perhaps the last.
struct Chain {
    convs: Vec<Conv2d>,
    last_is_rectified: bool,
}

impl Chain {
    fn load(weights: &NetworkWeights, mut input: usize, layers: &[Layer], last_is_rectified: bool) -> Result<Self> {
        let mut convs = Vec::new();
        for &(name, output, kernel) in layers {
            convs.push(weights.conv(name, [output, input, kernel], 1, Padding::all(kernel / 2))?);
            input = output;
        }
        Ok(Self { convs, last_is_rectified })
    }

    /// Stage `stage` of 2 to 6: five 7x7 convolutions and two 1x1 ones. `ending` is `_L1`, `_L2` or nothing.
    fn stage(
        weights: &NetworkWeights,
        stage: usize,
        ending: &str,
        [input, output]: [usize; 2],
        last_is_rectified: bool,
    ) -> Result<Self> {
        let names: Vec<String> = (1..=7).map(|i| format!("Mconv{i}_stage{stage}{ending}")).collect();
        let layer = |(i, name): (usize, &'_ String)| {
            (name.clone(), if i == 6 { output } else { 128 }, if i < 5 { 7 } else { 1 })
        };
        let owned: Vec<_> = names.iter().enumerate().map(layer).collect();
        let layers: Vec<Layer> = owned.iter().map(|(name, output, kernel)| (name.as_str(), *output, *kernel)).collect();
        Self::load(weights, input, &layers, last_is_rectified)
    }

    fn forward(&self, x: &Value) -> Result<Value> {
        let mut x = x.clone();
        for (i, conv) in self.convs.iter().enumerate() {
            x = conv.forward(&x)?;
            if i + 1 < self.convs.len() || self.last_is_rectified {
                x = relu(&x)?;
            }
        }
        Ok(x)
    }
}

/// A square part of an image (1, 3, H, W), resampled bilinearly to `side` pixels; grey outside the image.
fn crop(image: &Tensor, area: PixelBox, side: usize) -> Result<Tensor> {
    let (_, channels, h, w) = image.dims4()?;
    let pixels = crate::kernels::cpu::view(image)?;
    let step = (area.width() / side as f32, area.height() / side as f32);
    let mut out = vec![0f32; channels * side * side];
    for (c, plane) in out.chunks_exact_mut(side * side).enumerate() {
        let at = |y: isize, x: isize| {
            let inside = y >= 0 && x >= 0 && (y as usize) < h && (x as usize) < w;
            if inside { pixels[(c * h + y as usize) * w + x as usize] } else { 0.0 }
        };
        for (i, out) in plane.iter_mut().enumerate() {
            let y = area.y0 + ((i / side) as f32 + 0.5) * step.1 - 0.5;
            let x = area.x0 + ((i % side) as f32 + 0.5) * step.0 - 0.5;
            let (y0, x0) = (y.floor(), x.floor());
            let (fy, fx) = (y - y0, x - x0);
            let (y0, x0) = (y0 as isize, x0 as isize);
            let row = |y| at(y, x0) * (1.0 - fx) + at(y, x0 + 1) * fx;
            *out = row(y0) * (1.0 - fy) + row(y0 + 1) * fy;
        }
    }
    Ok(Tensor::from_vec(out, (1, channels, side, side), &Device::Cpu)?)
}

/// A point of a crop in the pixels of the whole image.
fn uncrop(x: f32, y: f32, score: f32, area: PixelBox, side: usize) -> Keypoint {
    let side = side as f32;
    Keypoint { x: area.x0 + x * area.width() / side, y: area.y0 + y * area.height() / side, score }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::relative_error;
    use crate::pose::weights::{Recorded, formula};
    use std::collections::BTreeMap;
    use std::path::Path;

    /// Names and shapes of the public files: 92 layers of the body, 36 of the hand.
    fn layers(hand: bool) -> Vec<(String, [usize; 3])> {
        let mut all: Vec<(String, [usize; 3])> = Vec::new();
        let mut input = 3;
        for (name, output, _) in VGG {
            all.push((name.into(), [output, input, 3]));
            input = output;
        }
        let mut chain = |mut input: usize, layers: &[(String, usize, usize)]| {
            for (name, output, kernel) in layers {
                all.push((name.clone(), [*output, input, *kernel]));
                input = *output;
            }
        };
        let named =
            |list: &[(&str, usize, usize)]| -> Vec<_> { list.iter().map(|l| (l.0.to_string(), l.1, l.2)).collect() };
        let stage = |i: usize, ending: &str, output: usize| -> Vec<_> {
            let size = |j: usize| (if j == 7 { output } else { 128 }, if j < 6 { 7 } else { 1 });
            (1..=7).map(|j| (format!("Mconv{j}_stage{i}{ending}"), size(j).0, size(j).1)).collect()
        };
        if hand {
            let features = [("conv4_3", 512, 3), ("conv4_4", 512, 3), ("conv5_1", 512, 3), ("conv5_2", 512, 3)];
            chain(512, &named(&features));
            chain(512, &named(&[("conv5_3_CPM", 128, 3), ("conv6_1_CPM", 512, 1), ("conv6_2_CPM", 22, 1)]));
            (2..=6).for_each(|i| chain(150, &stage(i, "", 22)));
        } else {
            chain(512, &named(&[("conv4_3_CPM", 256, 3), ("conv4_4_CPM", 128, 3)]));
            for (ending, output) in [("L1", 38), ("L2", 19)] {
                let sizes = [(128, 3), (128, 3), (128, 3), (512, 1), (output, 1)];
                let layer = |(i, (c, k)): (usize, (usize, usize))| (format!("conv5_{}_CPM_{ending}", i + 1), c, k);
                chain(128, &sizes.into_iter().enumerate().map(layer).collect::<Vec<_>>());
                (2..=6).for_each(|i| chain(185, &stage(i, &format!("_{ending}"), output)));
            }
        }
        all
    }

    fn weights(hand: bool) -> NetworkWeights {
        let mut tensors = BTreeMap::new();
        for (name, [output, input, kernel]) in layers(hand) {
            let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
            tensors.insert(weight.clone(), formula(&weight, &[output, input, kernel, kernel]));
            tensors.insert(bias.clone(), formula(&bias, &[output]));
        }
        NetworkWeights::from_tensors("openpose", Path::new("formula"), tensors)
    }

    fn channels_last(t: &Tensor) -> Tensor {
        t.permute((0, 2, 3, 1)).unwrap()
    }

    #[test]
    fn the_body_network_equals_its_twin_in_pytorch() {
        let sizes = layers(false);
        let parameters: usize = sizes.iter().map(|(_, [o, i, k])| o * (i * k * k + 1)).sum();
        // As published: 92 convolutions, 209 MB in f32.
        assert_eq!((sizes.len(), parameters), (92, 52_311_446));
        let recorded = Recorded::open("openpose.safetensors");
        let weights = weights(false);
        let network = OpenPose::new(&weights, None).unwrap();
        let (fields, heatmaps) = no_grad(|| network.body.forward(&Value::constant(recorded.image()))).unwrap();
        assert_eq!(fields.dims(), [1, 6, 8, 38]);
        assert!(relative_error(fields.tensor(), &channels_last(&recorded.get("fields"))) < 1e-5);
        assert!(relative_error(heatmaps.tensor(), &channels_last(&recorded.get("heatmaps"))) < 1e-5);
        assert_eq!(network.detect(&recorded.image()).unwrap().persons.len(), 0, "random weights see nobody");

        let error = HandNetwork::from_weights(&weights).err().expect("the body's weights").to_string();
        assert!(error.contains("`conv4_3.weight`") && error.contains("another network"), "{error}");
    }

    #[test]
    fn the_hand_network_equals_its_twin_in_pytorch() {
        let recorded = Recorded::open("openpose.safetensors");
        let network = HandNetwork::from_weights(&weights(true)).unwrap();
        let maps = no_grad(|| network.forward(&Value::constant(recorded.image()))).unwrap();
        assert!(relative_error(maps.tensor(), &channels_last(&recorded.get("hand"))) < 1e-5);
    }

    #[test]
    fn a_crop_keeps_its_place() {
        // Rows hold their number, columns do not matter: a crop of rows 2 to 6 in half as many pixels.
        let rows: Vec<f32> = (0..3 * 8 * 8).map(|i| (i / 8 % 8) as f32).collect();
        let image = Tensor::from_vec(rows, (1, 3, 8, 8), &Device::Cpu).unwrap();
        let area = PixelBox { x0: 2.0, y0: 2.0, x1: 6.0, y1: 6.0 };
        let half = crop(&image, area, 2).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(half[..4], [2.5, 2.5, 4.5, 4.5]);
        let back = uncrop(1.0, 2.0, 0.5, area, 2);
        assert_eq!((back.x, back.y, back.score), (4.0, 6.0, 0.5));
    }
}
