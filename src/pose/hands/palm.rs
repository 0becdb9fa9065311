//! The palm detector: for each cell of three grids, boxes with seven points around palms, and how sure it is of each.
//!
//! B batch, H and W height and width, C channels; channels last. Residual blocks of a depthwise and a pointwise
//! convolution down to stride 32, then up again to 16 and 8 over transposed convolutions. Layer list from the graph of
//! the model `handdetect`; all boxes are of one size, so that a cell's centre is their anchor.
//! Source: Bazarevsky and Zhang, <https://research.google/blog/on-device-real-time-hand-tracking-with-mediapipe/>

use super::map::{HandGrid, hand_map};
use crate::error::Result;
use crate::kernels::basic::add;
use crate::kernels::conv::{Conv2d, Padding};
use crate::kernels::cpu::view;
use crate::kernels::depthwise::DepthwiseConv2d;
use crate::kernels::math;
use crate::kernels::pixels::channels_last;
use crate::kernels::pool::{join_channels, max_pool2x2};
use crate::kernels::relu::{relu, sigmoid};
use crate::kernels::upsample::depth_to_space2x;
use crate::kernels::{Value, no_grad};
use crate::pose::detection::PixelBox;
use crate::pose::weights::NetworkWeights;
use candle_core::{DType, Device, Tensor};

/// Images are padded with grey at the right and at the bottom to multiples of this.
const MULTIPLE: usize = 32;
/// Channels at the block that reads them, where they change; the fifth change is that at the end.
const WIDTHS: [(usize, usize); 4] = [(0, 32), (8, 64), (16, 128), (24, 256)];
/// Blocks that halve the image.
const HALVING: [usize; 4] = [7, 15, 23, 31];
/// Blocks on the way down; two more follow on the way up.
const DOWN: usize = 39;
/// Stride and boxes per cell of the grids.
const GRIDS: [(usize, usize); 3] = [(8, 2), (16, 2), (32, 6)];
/// Numbers of a box: centre, size, seven points.
const NUMBERS: usize = 18;
/// Confidence at which a box counts.
const SURE: f32 = 0.5;
/// Boxes that overlap a surer one by this share of their union are the same palm.
const SAME: f32 = 0.3;

/// The network. 1.76 million parameters.
pub struct PalmDetector {
    /// The first convolution's weight and bias; its padding depends on the image.
    first: [Tensor; 2],
    blocks: Vec<Block>,
    up: [Conv2d; 2],
    heads: Vec<Head>,
}

struct Block {
    depthwise: DepthwiseConv2d,
    pointwise: Conv2d,
    halves: bool,
}

struct Head {
    stride: usize,
    scores: Conv2d,
    boxes: Conv2d,
}

/// A palm in an image.
#[derive(Clone, Debug, PartialEq)]
pub struct Palm {
    /// Confidence.
    pub score: f32,
    /// The square around it.
    pub area: PixelBox,
    /// Columns and rows of wrist, the four fingers' first joints and two of the thumb.
    pub points: [[f32; 2]; 7],
}

impl PalmDetector {
    /// Errors (usage): weights of another network.
    pub fn from_weights(weights: &NetworkWeights) -> Result<Self> {
        let width = |i: usize| WIDTHS.iter().rev().find(|(from, _)| *from <= i).expect("the first is 0").1;
        let mut blocks = Vec::new();
        for i in 0..DOWN + 2 {
            // The second block on the way up has the width of its skip.
            let (input, output) = if i == DOWN + 1 { (128, 128) } else { (width(i), width((i + 1).min(DOWN))) };
            let halves = HALVING.contains(&i);
            let padding = if halves { Padding { bottom: 1, right: 1, ..Padding::default() } } else { Padding::all(1) };
            let kernel = weights.get(&format!("palm.blocks.{i}.depthwise.weight"), &[input, 1, 3, 3])?;
            let depthwise = DepthwiseConv2d::new(kernel, None, if halves { 2 } else { 1 }, padding)?;
            let name = format!("palm.blocks.{i}.pointwise");
            let pointwise = weights.conv(&name, [output, input, 1], 1, Padding::default())?;
            blocks.push(Block { depthwise, pointwise, halves });
        }
        let head = |&(stride, boxes): &(usize, usize)| -> Result<Head> {
            let input = if stride == 8 { 128 } else { 256 };
            let conv = |kind: &str, numbers: usize| {
                let name = format!("palm.{kind}.{stride}");
                weights.conv(&name, [boxes * numbers, input, 1], 1, Padding::default())
            };
            Ok(Head { stride, scores: conv("score", 1)?, boxes: conv("box", NUMBERS)? })
        };
        Ok(Self {
            first: [
                weights.get("palm.first.weight", &[32, 3, 3, 3])?.clone(),
                weights.get("palm.first.bias", &[32])?.clone(),
            ],
            up: [transposed(weights, 0, [256, 256])?, transposed(weights, 1, [128, 256])?],
            heads: GRIDS.iter().map(head).collect::<Result<_>>()?,
            blocks,
        })
    }

    /// What the heads read: (B, 3, H, W) in [-1, 1] -> (B, h, w, C) for strides 8, 16 and 32.
    fn features(&self, images: &Value) -> Result<[Value; 3]> {
        let (_, _, h, w) = images.tensor().dims4()?;
        let missing = |side: usize| side.next_multiple_of(MULTIPLE) - side;
        let padding = Padding { top: 0, left: 0, bottom: 1 + missing(h), right: 1 + missing(w) };
        let first = Conv2d::new(&self.first[0], Some(&self.first[1]), 2, padding)?;
        let mut x = relu(&first.forward(&channels_last(images)?)?)?;
        let mut skips = Vec::new();
        for block in &self.blocks[..DOWN] {
            if block.halves {
                skips.push(x.clone());
            }
            x = block.forward(&x)?;
        }
        let raised = |i: usize, x: &Value, skip: &Value| -> Result<Value> {
            let doubled = relu(&depth_to_space2x(&self.up[i].forward(x)?)?)?;
            self.blocks[DOWN + i].forward(&add(skip, &doubled)?)
        };
        let sixteen = raised(0, &x, &skips[3])?;
        let eight = raised(1, &sixteen, &skips[2])?;
        Ok([eight, sixteen, x])
    }

    /// Logits (B, h, w, boxes) and numbers of the boxes (B, h, w, 18 boxes) at strides 8, 16 and 32. No gradients.
    pub fn heads(&self, images: &Tensor) -> Result<Vec<(Tensor, Tensor)>> {
        no_grad(|| {
            let features = self.features(&Value::constant(images.clone()))?;
            let read = |(head, x): (&Head, &Value)| -> Result<(Tensor, Tensor)> {
                Ok((head.scores.forward(x)?.into_tensor(), head.boxes.forward(x)?.into_tensor()))
            };
            self.heads.iter().zip(&features).map(read).collect()
        })
    }

    /// Where hands are, differentiable: images (B, 3, H, W) -> (B, h, w, 1), whose sum is about the number of hands.
    pub fn map(&self, images: &Value, grid: HandGrid) -> Result<Value> {
        let (_, _, h, w) = images.tensor().dims4()?;
        let features = self.features(images)?;
        let score = |(head, x): (&Head, &Value)| sigmoid(&head.scores.forward(x)?);
        let scores = self.heads.iter().zip(&features).map(score).collect::<Result<Vec<_>>>()?;
        let strides: Vec<usize> = self.heads.iter().map(|head| head.stride).collect();
        hand_map(&scores, &strides, [h, w], grid)
    }

    /// The palms of an image (1, 3, H, W), surest first, in its pixels.
    pub fn detect(&self, image: &Tensor) -> Result<Vec<Palm>> {
        let mut found: Vec<Palm> = Vec::new();
        for (head, (scores, boxes)) in self.heads.iter().zip(self.heads(image)?) {
            let (_, _, width, each) = scores.dims4()?;
            let (scores, boxes) = (view(&scores)?, view(&boxes)?);
            for (i, (&logit, numbers)) in scores.iter().zip(boxes.chunks_exact(NUMBERS)).enumerate() {
                let score = math::sigmoid(logit);
                if score >= SURE {
                    let cell = i / each;
                    let centre = |cell: usize| (cell as f32 + 0.5) * head.stride as f32;
                    found.push(Palm::of(score, [centre(cell % width), centre(cell / width)], numbers));
                }
            }
        }
        found.sort_by(|a, b| b.score.total_cmp(&a.score));
        let mut kept: Vec<Palm> = Vec::new();
        for palm in found {
            if kept.iter().all(|other| other.area.overlap(&palm.area) < SAME) {
                kept.push(palm);
            }
        }
        Ok(kept)
    }
}

impl Palm {
    /// From the numbers of a box around a cell's centre.
    fn of(score: f32, [x, y]: [f32; 2], numbers: &[f32]) -> Self {
        let (cx, cy, w, h) = (x + numbers[0], y + numbers[1], numbers[2], numbers[3]);
        let area = PixelBox { x0: cx - w / 2.0, y0: cy - h / 2.0, x1: cx + w / 2.0, y1: cy + h / 2.0 };
        let points = std::array::from_fn(|i| [x + numbers[4 + 2 * i], y + numbers[5 + 2 * i]]);
        Self { score, area, points }
    }
}

impl Block {
    /// `relu(x + pointwise(depthwise(x)))`, x halved by its largest pixels and widened by zeros where needed.
    fn forward(&self, x: &Value) -> Result<Value> {
        let y = self.pointwise.forward(&self.depthwise.forward(x)?)?;
        let mut x = if self.halves { max_pool2x2(x)? } else { x.clone() };
        let (b, h, w, c) = x.tensor().dims4()?;
        let more = self.pointwise.out_channels() - c;
        if more > 0 {
            x = join_channels(&[&x, &Value::constant(Tensor::zeros((b, h, w, more), x.dtype(), &Device::Cpu)?)])?;
        }
        relu(&add(&x, &y)?)
    }
}

/// A 2x2 transposed convolution of stride 2, scaled and shifted: one of 1x1 to four groups of channels.
fn transposed(weights: &NetworkWeights, i: usize, [output, input]: [usize; 2]) -> Result<Conv2d> {
    let part = |kind: &str| weights.get(&format!("palm.up.{i}.{kind}"), &[output]);
    let kernel = weights.get(&format!("palm.up.{i}.weight"), &[output, input, 2, 2])?.to_dtype(DType::F32)?;
    let kernel = kernel.broadcast_mul(&part("scale")?.reshape((output, 1, 1, 1))?)?;
    let kernel = kernel.permute((2, 3, 0, 1))?.contiguous()?.reshape((4 * output, input, 1, 1))?;
    let bias = Tensor::cat(&[part("bias")?; 4], 0)?;
    Conv2d::new(&kernel, Some(&bias), 1, Padding::default())
}
