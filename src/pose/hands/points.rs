//! The network of points: in a square crop around a hand its 21 points, whether there is a hand at all, and which.
//!
//! H and W height and width, C channels; channels last. Inverted residual blocks (MobileNetV2's), a mean over all pixels,
//! and a matrix for each answer. Layer list from the graph of the model `handlandmark-lite`. No gradients.

use crate::error::Result;
use crate::kernels::basic::add;
use crate::kernels::conv::{Conv2d, Padding};
use crate::kernels::cpu::{self, view};
use crate::kernels::depthwise::DepthwiseConv2d;
use crate::kernels::math::sigmoid;
use crate::kernels::pixels::channels_last;
use crate::kernels::pool::max_pool2x2;
use crate::kernels::relu::relu6;
use crate::kernels::{Value, no_grad};
use crate::pose::weights::NetworkWeights;
use candle_core::{DType, Tensor};

/// Side of the crops that the network was trained on.
pub const SIDE: usize = 224;
/// Points of a hand: the wrist, then four of each finger from thumb to little finger, from the palm outwards.
pub const POINTS: usize = 21;
/// Of each block: channels inside, kernel and stride of the depthwise convolution, channels after it.
const BLOCKS: [(usize, usize, usize, usize); 14] = [
    (64, 3, 2, 16),
    (96, 3, 1, 16),
    (96, 5, 2, 24),
    (144, 5, 1, 24),
    (144, 3, 2, 48),
    (288, 3, 1, 48),
    (288, 3, 1, 48),
    (288, 5, 1, 64),
    (384, 5, 1, 64),
    (384, 5, 1, 64),
    (384, 5, 2, 112),
    (672, 5, 1, 112),
    (672, 5, 1, 112),
    (672, 5, 1, 112),
];
/// Channels of the last layers.
const WIDE: usize = 672;

/// The network. 0.97 million parameters.
pub struct PointNetwork {
    first: Conv2d,
    first_depthwise: DepthwiseConv2d,
    first_pointwise: Conv2d,
    blocks: Vec<Block>,
    last: Conv2d,
    last_depthwise: DepthwiseConv2d,
    points: Conv2d,
    presence: Conv2d,
    right: Conv2d,
}

struct Block {
    expand: Conv2d,
    depthwise: DepthwiseConv2d,
    project: Conv2d,
}

/// What the network says of a crop.
#[derive(Clone, Debug, PartialEq)]
pub struct HandPoints {
    /// Columns and rows of the points in pixels of the crop, which has 224 x 224.
    pub points: Vec<[f32; 2]>,
    /// How sure it is of a hand.
    pub presence: f32,
    /// How sure it is that the hand is a right one.
    pub right: f32,
}

/// TensorFlow's `SAME` on sides that the stride divides.
fn same(kernel: usize, stride: usize) -> Padding {
    let (before, after) = ((kernel - stride) / 2, (kernel - stride).div_ceil(2));
    Padding { top: before, left: before, bottom: after, right: after }
}

impl PointNetwork {
    /// Errors (usage): weights of another network.
    pub fn from_weights(weights: &NetworkWeights) -> Result<Self> {
        let conv = |name: &str, output: usize, input: usize| {
            weights.conv(&format!("landmark.{name}"), [output, input, 1], 1, Padding::default())
        };
        let depthwise = |name: &str, channels: usize, kernel: usize, stride: usize| {
            let weight = weights.get(&format!("landmark.{name}.weight"), &[channels, 1, kernel, kernel])?;
            let bias = weights.get(&format!("landmark.{name}.bias"), &[channels])?;
            DepthwiseConv2d::new(weight, Some(bias), stride, same(kernel, stride))
        };
        let mut blocks = Vec::new();
        let mut input = 16;
        for (i, (inside, kernel, stride, output)) in BLOCKS.into_iter().enumerate() {
            blocks.push(Block {
                expand: conv(&format!("blocks.{i}.expand"), inside, input)?,
                depthwise: depthwise(&format!("blocks.{i}.depthwise"), inside, kernel, stride)?,
                project: conv(&format!("blocks.{i}.project"), output, inside)?,
            });
            input = output;
        }
        Ok(Self {
            first: weights.conv("landmark.first", [24, 3, 3], 2, same(3, 2))?,
            first_depthwise: depthwise("first_depthwise", 24, 3, 1)?,
            first_pointwise: conv("first_pointwise", 16, 24)?,
            last: conv("last", WIDE, input)?,
            last_depthwise: depthwise("last_depthwise", WIDE, 3, 1)?,
            points: conv("points", 3 * POINTS, WIDE)?,
            presence: conv("presence", 1, WIDE)?,
            right: conv("right", 1, WIDE)?,
            blocks,
        })
    }

    /// Points (3 for each of 21: column, row, depth), and logits of presence and right hand, of a crop (1, 3, H, W) in
    /// [0, 1] with sides that are multiples of 32.
    pub fn answers(&self, crop: &Tensor) -> Result<[Vec<f32>; 3]> {
        no_grad(|| {
            let x = channels_last(&Value::constant(crop.clone()))?;
            let x = relu6(&self.first.forward(&x)?)?;
            let x = relu6(&self.first_depthwise.forward(&x)?)?;
            let mut x = self.first_pointwise.forward(&x)?;
            for (i, block) in self.blocks.iter().enumerate() {
                let y = block.forward(&x)?;
                x = match i {
                    0 => add(&max_pool2x2(&x)?, &y)?,
                    _ if x.dims() == y.dims() => add(&x, &y)?,
                    _ => y,
                };
            }
            let x = relu6(&self.last.forward(&x)?)?;
            let x = relu6(&self.last_depthwise.forward(&x)?)?;
            let mean = mean(x.tensor())?;
            let answer = |conv: &Conv2d| -> Result<Vec<f32>> { Ok(view(conv.forward(&mean)?.tensor())?.to_vec()) };
            Ok([answer(&self.points)?, answer(&self.presence)?, answer(&self.right)?])
        })
    }

    /// What it says of a crop (1, 3, 224, 224) in [0, 1].
    pub fn look(&self, crop: &Tensor) -> Result<HandPoints> {
        let [points, presence, right] = self.answers(crop)?;
        let points = points.chunks_exact(3).map(|p| [p[0], p[1]]).collect();
        Ok(HandPoints { points, presence: sigmoid(presence[0]), right: sigmoid(right[0]) })
    }
}

impl Block {
    fn forward(&self, x: &Value) -> Result<Value> {
        let x = relu6(&self.expand.forward(x)?)?;
        self.project.forward(&relu6(&self.depthwise.forward(&x)?)?)
    }
}

/// (1, H, W, C) -> (1, 1, 1, C)
fn mean(x: &Tensor) -> Result<Value> {
    let (_, h, w, c) = x.dims4()?;
    let mut mean = cpu::column_sums(&view(x)?, c);
    mean.iter_mut().for_each(|sum| *sum /= (h * w) as f32);
    Ok(Value::constant(cpu::from_f32(mean, (1, 1, 1, c), DType::F32)?))
}
