//! Hands in photographs, with networks that are built in: a palm detector looks over the whole picture, and a second
//! network looks at each palm it found, says whether there is a hand, and gives its 21 points.
//!
//! Weights: MediaPipe's, Apache-2.0, made by `scripts/pose/convert_hands.py`.

mod map;
mod palm;
mod points;
mod with_hands;

pub use map::HandGrid;
pub use palm::{Palm, PalmDetector};
pub use points::{HandPoints, PointNetwork};
pub use with_hands::WithHands;

use super::detection::{Hand, Keypoint, PixelBox};
use super::weights::NetworkWeights;
use crate::error::Result;
use crate::io::safetensors::MappedFile;
use crate::kernels::Value;
use candle_core::{Device, Tensor};
use image::RgbImage;
use std::f32::consts::FRAC_PI_2;
use std::path::Path;

const WEIGHTS: &[u8] = include_bytes!("../../../assets/hands.safetensors");

/// The name by which a config asks for these networks.
pub const BUILTIN: &str = "builtin";

/// The longer sides in pixels of the pictures in which palms are looked for. At 256, that of the detector's training, it
/// misses hands of a person who fills the picture, at 512 hands that do so themselves.
const DETECTION_SIDES: [usize; 2] = [512, 256];
/// How sure both networks together must be of a hand: the product of their confidences.
const SURE: f32 = 0.4;
/// The crop around a palm: its side in sides of the palm, and how far its centre lies from the palm's towards the
/// fingers. Source: `hand_landmark_tracking` and `palm_detection_to_roi` of MediaPipe.
const CROP: f32 = 2.6;
const TOWARDS_FINGERS: f32 = 0.5;
/// A hand's box is that of its points and this share of its longer side all around: points end within the fingertips.
const MARGIN: f32 = 0.1;
/// Two palms whose hands overlap by this share of their union show one hand.
const SAME: f32 = 0.5;

/// Both networks.
pub struct HandFinder {
    palms: PalmDetector,
    points: PointNetwork,
    fingerprint: String,
}

/// A square part of a picture, turned so that the fingers point up.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Crop {
    x: f32,
    y: f32,
    side: f32,
    /// Sine and cosine of the angle by which it is turned clockwise.
    turn: (f32, f32),
}

impl HandFinder {
    /// The networks that are built in.
    pub fn embedded() -> Result<Self> {
        let file = MappedFile::from_bytes(Path::new("hands (built in)"), WEIGHTS.to_vec())?;
        Self::from_weights(&NetworkWeights::from_safetensors("the hand networks", &file)?)
    }

    /// The networks with these weights. Errors (usage): those of another network.
    pub fn from_weights(weights: &NetworkWeights) -> Result<Self> {
        Ok(Self {
            palms: PalmDetector::from_weights(weights)?,
            points: PointNetwork::from_weights(weights)?,
            fingerprint: weights.fingerprint()?,
        })
    }

    /// A hash of the weights.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Where hands are in images (B, 3, H, W) in [-1, 1], differentiable: (B, h, w, 1), whose sum is about their number.
    pub fn map(&self, images: &Value, grid: HandGrid) -> Result<Value> {
        self.palms.map(images, grid)
    }

    /// The hands of a picture, surest first, in its pixels.
    pub fn find(&self, picture: &RgbImage) -> Result<Vec<Hand>> {
        let mut hands: Vec<Hand> = Vec::new();
        for side in DETECTION_SIDES {
            let small = super::shrunk(picture, side)?;
            let (_, _, h, w) = small.dims4()?;
            let (sx, sy) = (picture.width() as f32 / w as f32, picture.height() as f32 / h as f32);
            for palm in self.palms.detect(&small)? {
                let crop = Crop::around(&palm, sx, sy);
                let seen = self.points.look(&crop.cut(picture)?)?;
                let score = palm.score * seen.presence;
                if score >= SURE {
                    hands.push(crop.hand(&seen, score));
                }
            }
        }
        hands.sort_by(|a, b| b.score.total_cmp(&a.score));
        let mut kept: Vec<Hand> = Vec::new();
        for hand in hands {
            if kept.iter().all(|other| other.area.overlap(&hand.area) < SAME) {
                kept.push(hand);
            }
        }
        Ok(kept)
    }
}

impl Crop {
    /// Around a palm found in a picture that is larger by `sx` and `sy`.
    fn around(palm: &Palm, sx: f32, sy: f32) -> Self {
        let scaled = |[x, y]: [f32; 2]| [x * sx, y * sy];
        let (wrist, middle) = (scaled(palm.points[0]), scaled(palm.points[2]));
        let turn = FRAC_PI_2 - (wrist[1] - middle[1]).atan2(middle[0] - wrist[0]);
        let (sin, cos) = turn.sin_cos();
        let area = palm.area;
        let (w, h) = (area.width() * sx, area.height() * sy);
        let [x, y] = scaled([(area.x0 + area.x1) / 2.0, (area.y0 + area.y1) / 2.0]);
        let ahead = TOWARDS_FINGERS * h;
        Self { x: x + sin * ahead, y: y - cos * ahead, side: CROP * w.max(h), turn: (sin, cos) }
    }

    /// The point of the picture at a column and row of the crop, both from 0 to 1.
    fn point(&self, u: f32, v: f32) -> (f32, f32) {
        let ((sin, cos), u, v) = (self.turn, (u - 0.5) * self.side, (v - 0.5) * self.side);
        (self.x + cos * u - sin * v, self.y + sin * u + cos * v)
    }

    /// Its pixels (1, 3, 224, 224) in [0, 1], bilinear; black outside the picture.
    fn cut(&self, picture: &RgbImage) -> Result<Tensor> {
        let side = points::SIDE;
        let (width, height) = (picture.width() as i64, picture.height() as i64);
        let at = |x: i64, y: i64, c: usize| match x >= 0 && y >= 0 && x < width && y < height {
            true => f32::from(picture.get_pixel(x as u32, y as u32).0[c]),
            false => 0.0,
        };
        let mut out = vec![0f32; 3 * side * side];
        for i in 0..side * side {
            let (u, v) = ((i % side) as f32 + 0.5, (i / side) as f32 + 0.5);
            let (x, y) = self.point(u / side as f32, v / side as f32);
            let (x, y) = (x - 0.5, y - 0.5);
            let (fx, fy) = (x - x.floor(), y - y.floor());
            let (x, y) = (x.floor() as i64, y.floor() as i64);
            for c in 0..3 {
                let row = |y| at(x, y, c) * (1.0 - fx) + at(x + 1, y, c) * fx;
                out[c * side * side + i] = (row(y) * (1.0 - fy) + row(y + 1) * fy) / 255.0;
            }
        }
        Ok(Tensor::from_vec(out, (1, 3, side, side), &Device::Cpu)?)
    }

    /// The hand that was seen in it, in the picture's pixels.
    fn hand(&self, seen: &HandPoints, score: f32) -> Hand {
        let side = points::SIDE as f32;
        let keypoint = |&[u, v]: &[f32; 2]| {
            let (x, y) = self.point(u / side, v / side);
            Keypoint { x, y, score }
        };
        let keypoints: Vec<Keypoint> = seen.points.iter().map(keypoint).collect();
        let tight = PixelBox::around(&keypoints, 0.0).unwrap_or(PixelBox::square(self.x, self.y, self.side));
        let margin = MARGIN * tight.width().max(tight.height());
        let area = PixelBox::around(&keypoints, margin).unwrap_or(tight);
        let which = if seen.right >= 0.5 { "right" } else { "left" };
        Hand { side: which, score, area, points: keypoints.into_iter().map(Some).collect() }
    }
}

#[cfg(test)]
mod tests;
