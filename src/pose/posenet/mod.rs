//! PoseNet: a MobileNetV1 of width 0.75 with four heads, 17 keypoints at stride 16. Its weights are built in.
//!
//! B batch, H and W height and width, C channels; channels last. Ported from the layer list of the TensorFlow.js model,
//! whose `SAME` padding equals one row of zeros on every side for images of 16 k + 1 pixels: other images get zeros
//! (grey) at the right and at the bottom up to that size.
//! Source: <https://github.com/tensorflow/tfjs-models/tree/master/posenet>

mod decode;

use super::PoseNetwork;
use super::detection::Detection;
use super::skeleton::Skeleton;
use super::weights::NetworkWeights;
use crate::error::Result;
use crate::io::safetensors::MappedFile;
use crate::kernels::conv::{Conv2d, Padding};
use crate::kernels::depthwise::DepthwiseConv2d;
use crate::kernels::pixels::channels_last;
use crate::kernels::relu::{relu6, sigmoid};
use crate::kernels::{Value, no_grad};
use candle_core::Tensor;
use std::path::Path;

const WEIGHTS: &[u8] = include_bytes!("../../../assets/posenet_mv1_075.safetensors");

/// Image pixels per cell.
pub const STRIDE: usize = 16;

/// The keypoints, in the order of the channels.
pub const KEYPOINTS: [&str; 17] = [
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
];

/// Output channels of the thirteen separable blocks, and the ones that halve the image.
const WIDTHS: [usize; 13] = [48, 96, 96, 192, 192, 384, 384, 384, 384, 384, 384, 384, 384];
const HALVING: [usize; 3] = [2, 4, 6];

/// The network.
pub struct PoseNet {
    skeleton: Skeleton,
    fingerprint: String,
    /// The first convolution's weight and bias; its padding depends on the image.
    first: [Tensor; 2],
    blocks: Vec<(DepthwiseConv2d, Conv2d)>,
    heatmap: Conv2d,
    offset: Conv2d,
    displacement_fwd: Conv2d,
    displacement_bwd: Conv2d,
}

/// What the four heads give, all at stride 16; vectors in pixels, rows first, then columns.
pub struct Heads {
    /// Logits of the keypoints (B, h, w, 17).
    pub heatmap: Tensor,
    /// From the cell to the keypoint (B, h, w, 34).
    pub offset: Tensor,
    /// From a parent keypoint to its child, for each of 16 edges (B, h, w, 32).
    pub displacement_fwd: Tensor,
    /// From a child to its parent (B, h, w, 32).
    pub displacement_bwd: Tensor,
}

impl PoseNet {
    /// The network with the weights that are built in.
    pub fn embedded() -> Result<Self> {
        let file = MappedFile::from_bytes(Path::new("posenet (built in)"), WEIGHTS.to_vec())?;
        Self::from_weights(&NetworkWeights::from_safetensors("posenet", &file)?)
    }

    /// The network with these weights. Errors (usage): those of another network.
    pub fn from_weights(weights: &NetworkWeights) -> Result<Self> {
        let mut blocks = Vec::new();
        let mut input = 24;
        for (i, output) in (1..).zip(WIDTHS) {
            let stride = if HALVING.contains(&i) { 2 } else { 1 };
            let depthwise = weights.depthwise(&format!("Conv2d_{i}_depthwise"), input, 3, stride)?;
            let pointwise = format!("Conv2d_{i}_pointwise");
            blocks.push((depthwise, weights.conv(&pointwise, [output, input, 1], 1, Padding::default())?));
            input = output;
        }
        let head = |name, channels| weights.conv(name, [channels, input, 1], 1, Padding::default());
        Ok(Self {
            skeleton: Skeleton::of(&KEYPOINTS),
            fingerprint: weights.fingerprint()?,
            first: [
                weights.get("Conv2d_0.weight", &[24, 3, 3, 3])?.clone(),
                weights.get("Conv2d_0.bias", &[24])?.clone(),
            ],
            heatmap: head("heatmap_2", 17)?,
            offset: head("offset_2", 34)?,
            displacement_fwd: head("displacement_fwd_2", 32)?,
            displacement_bwd: head("displacement_bwd_2", 32)?,
            blocks,
        })
    }

    /// (B, 3, H, W) -> (B, ceil((H - 1) / 16) + 1, .., 384)
    fn features(&self, images: &Value) -> Result<Value> {
        let (_, _, h, w) = images.tensor().dims4()?;
        let missing = |side: usize| (side.max(2) - 1).next_multiple_of(STRIDE) + 1 - side;
        let padding = Padding { top: 1, left: 1, bottom: 1 + missing(h), right: 1 + missing(w) };
        let first = Conv2d::new(&self.first[0], Some(&self.first[1]), 2, padding)?;
        let mut x = relu6(&first.forward(&channels_last(images)?)?)?;
        for (depthwise, pointwise) in &self.blocks {
            x = relu6(&depthwise.forward(&x)?)?;
            x = relu6(&pointwise.forward(&x)?)?;
        }
        Ok(x)
    }

    /// What all four heads say of images (B, 3, H, W). No gradients.
    pub fn heads(&self, images: &Tensor) -> Result<Heads> {
        no_grad(|| {
            let features = self.features(&Value::constant(images.clone()))?;
            let head = |conv: &Conv2d| -> Result<Tensor> { Ok(conv.forward(&features)?.into_tensor()) };
            Ok(Heads {
                heatmap: head(&self.heatmap)?,
                offset: head(&self.offset)?,
                displacement_fwd: head(&self.displacement_fwd)?,
                displacement_bwd: head(&self.displacement_bwd)?,
            })
        })
    }
}

impl PoseNetwork for PoseNet {
    fn name(&self) -> &str {
        "posenet"
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

    /// On the two photos of `examples/photos` nose and shoulders are the surer the smaller the picture: .97 or more at 257
    /// pixels, .58 at 385. Small people in large scenes want the opposite: a middle.
    fn detection_side(&self) -> usize {
        305
    }

    fn maps(&self, images: &Value) -> Result<Value> {
        sigmoid(&self.heatmap.forward(&self.features(images)?)?)
    }

    fn detect(&self, image: &Tensor) -> Result<Detection> {
        let (_, _, height, width) = image.dims4()?;
        let mut found = decode::decode(&self.heads(image)?, height, width)?;
        found.add_hands_at_wrists(&self.skeleton, 12.0);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::backward;
    use crate::kernels::cpu::view;
    use crate::kernels::testing::randn;
    use crate::pose::detect_image;
    use crate::pose::weights::Recorded;
    use candle_core::DType;

    #[test]
    fn the_heads_equal_pytorchs_to_1e_4() {
        let recorded = Recorded::open("posenet.safetensors");
        let heads = PoseNet::embedded().unwrap().heads(&recorded.image()).unwrap();
        for (name, got) in [
            ("heatmap_2", &heads.heatmap),
            ("offset_2", &heads.offset),
            ("displacement_fwd_2", &heads.displacement_fwd),
            ("displacement_bwd_2", &heads.displacement_bwd),
        ] {
            let expected = recorded.get(name).permute((0, 2, 3, 1)).unwrap();
            assert_eq!(got.dims(), expected.dims());
            let worst = (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            // Displacements are hundreds of pixels.
            let limit = if name == "heatmap_2" { 1e-4 } else { 2e-3 };
            assert!(worst < limit, "{name}: {worst:e}");
        }
    }

    #[test]
    fn each_photo_shows_one_person_with_a_sure_nose_and_shoulders() {
        let network = PoseNet::embedded().unwrap();
        for (photo, nose) in [("astronaut.jpg", (220.0, 110.0)), ("grace_hopper.jpg", (256.0, 250.0))] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/photos").join(photo);
            let found = detect_image(&network, &crate::data::image::load(&path).unwrap()).unwrap();
            assert_eq!(found.persons.len(), 1, "{photo}: {:?}", found.persons);
            let person = &found.persons[0];
            for name in ["nose", "left_shoulder", "right_shoulder"] {
                let keypoint = person.keypoints[network.skeleton.index(name).unwrap()].expect("found");
                assert!(keypoint.score > 0.8, "{photo}: {name} {keypoint:?}");
            }
            let at = person.keypoints[0].unwrap();
            assert!((at.x - nose.0).hypot(at.y - nose.1) < 40.0, "{photo}: the nose is at {at:?}");
            // The person's left shoulder is on the right of the picture.
            assert!(person.keypoints[5].unwrap().x > person.keypoints[6].unwrap().x, "{photo}");
        }
    }

    #[test]
    fn copies_of_a_person_side_by_side_are_counted_and_noise_is_nobody() {
        let network = PoseNet::embedded().unwrap();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/photos/astronaut.jpg");
        let photo = crate::data::image::load(&path).unwrap();
        let mut three = image::RgbImage::new(3 * photo.width(), photo.height());
        (0..3).for_each(|i| image::imageops::replace(&mut three, &photo, i64::from(i * photo.width()), 0));
        let found = detect_image(&network, &three).unwrap();
        assert_eq!(found.persons.len(), 3, "{:?}", found.persons.iter().map(|p| p.score).collect::<Vec<_>>());
        let noise = randn(0, &[1, 3, 113, 129], 0.6);
        assert!(network.detect(&noise).unwrap().persons.is_empty());
    }

    #[test]
    fn gradients_reach_the_image_and_equal_finite_differences() {
        let network = PoseNet::embedded().unwrap();
        let recorded = Recorded::open("posenet.safetensors");
        let image = recorded.image();
        let image = image.narrow(2, 8, 65).unwrap().narrow(3, 16, 49).unwrap().contiguous().unwrap();
        let leaf = Value::leaf(image.clone());
        let maps = network.maps(&leaf).unwrap();
        assert_eq!(maps.dims(), [1, 5, 4, 17]);
        let seed = randn(1, maps.dims(), 1.0);
        let grad = backward(vec![(maps, seed.clone())]).unwrap().take(&leaf).unwrap();
        // Along a random direction. Rounding through 27 layers in f32 and the kinks of ReLU6 leave two digits.
        let direction = randn(2, image.dims(), 1.0);
        let loss = |by: f64| {
            let moved = (&image + (&direction * by).unwrap()).unwrap();
            let maps = network.maps(&Value::constant(moved)).unwrap();
            (maps.tensor() * &seed)
                .unwrap()
                .to_dtype(DType::F64)
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
        };
        let numeric = (loss(5e-4) - loss(-5e-4)) / 1e-3;
        let along: f64 = view(&grad)
            .unwrap()
            .iter()
            .zip(&*view(&direction).unwrap())
            .map(|(g, d)| f64::from(*g) * f64::from(*d))
            .sum();
        assert!((numeric - along).abs() < 0.05 * along.abs(), "{numeric} {along}");
    }
}
