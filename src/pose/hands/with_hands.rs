//! A network of bodies together with the hand networks that are built in.

use super::{HandFinder, HandGrid};
use crate::error::{Error, Result};
use crate::kernels::cpu::view;
use crate::kernels::pool::join_channels;
use crate::kernels::{Value, no_grad};
use crate::pose::skeleton::HAND;
use crate::pose::{Detection, Keypoint, PoseNetwork, Skeleton};
use candle_core::Tensor;
use image::{Rgb, RgbImage};

/// A network of bodies whose hands are those that [`HandFinder`] sees: its maps have a channel `hand` more, by which
/// hands are counted, and its detections have found hands instead of places beyond the wrists.
pub struct WithHands {
    body: Box<dyn PoseNetwork>,
    hands: HandFinder,
    name: String,
    fingerprint: String,
    skeleton: Skeleton,
}

impl WithHands {
    /// Errors (usage): a network that has hands of its own.
    pub fn new(body: Box<dyn PoseNetwork>, hands: HandFinder) -> Result<Self> {
        let skeleton = body.skeleton();
        if !skeleton.hands().is_empty() {
            return Err(
                Error::usage(format!("the pose network `{}` finds hands itself", body.name())).hint("leave `hand` out")
            );
        }
        let both = format!("{}\n{}", body.fingerprint(), hands.fingerprint());
        Ok(Self {
            name: format!("{} with hands", body.name()),
            fingerprint: blake3::hash(both.as_bytes()).to_hex().to_string(),
            skeleton: skeleton.with_keypoint(HAND),
            body,
            hands,
        })
    }

    /// Puts the hands of `picture` into what the body's network found there.
    fn add_hands(&self, picture: &RgbImage, mut found: Detection) -> Result<Detection> {
        found.hands = self.hands.find(picture)?;
        let centre = |hand: &crate::pose::Hand| {
            let a = hand.area;
            Keypoint { x: (a.x0 + a.x1) / 2.0, y: (a.y0 + a.y1) / 2.0, score: hand.score }
        };
        found.peaks.push(found.hands.iter().map(centre).collect());
        // A person has two hands, and this keypoint is one: whose a hand is stays open.
        found.persons.iter_mut().for_each(|person| person.keypoints.push(None));
        Ok(found)
    }

    /// The hands' map of images on the grid of the body's maps (B, h, w, K).
    fn hand_channel(&self, images: &Value, (height, width): (usize, usize)) -> Result<Value> {
        self.hands.map(images, HandGrid { stride: self.body.stride(), height, width })
    }

    /// The soft count of hands in an image (1, 3, H, W).
    fn soft_count(&self, image: &Tensor) -> Result<f64> {
        let (_, _, h, w) = image.dims4()?;
        let (height, width) = (h.div_ceil(self.stride()), w.div_ceil(self.stride()));
        let map = no_grad(|| self.hand_channel(&Value::constant(image.clone()), (height, width)))?;
        Ok(view(map.tensor())?.iter().map(|&v| f64::from(v)).sum())
    }
}

impl PoseNetwork for WithHands {
    fn name(&self) -> &str {
        &self.name
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn skeleton(&self) -> &Skeleton {
        &self.skeleton
    }

    fn stride(&self) -> usize {
        self.body.stride()
    }

    fn detection_side(&self) -> usize {
        self.body.detection_side()
    }

    fn maps(&self, images: &Value) -> Result<Value> {
        let maps = self.body.maps(images)?;
        let (_, h, w, _) = maps.tensor().dims4()?;
        join_channels(&[&maps, &self.hand_channel(images, (h, w))?])
    }

    fn detect(&self, image: &Tensor) -> Result<Detection> {
        let mut found = self.body.detect(image)?;
        found.soft_counts.push(self.soft_count(image)?);
        self.add_hands(&to_picture(image)?, found)
    }

    /// The body at its network's scale, hands in the picture as it is.
    fn detect_picture(&self, picture: &RgbImage) -> Result<Detection> {
        let mut found = self.body.detect_picture(picture)?;
        found.soft_counts.push(self.soft_count(&crate::pose::shrunk(picture, self.detection_side())?)?);
        self.add_hands(picture, found)
    }
}

/// An image (1, 3, H, W) in [-1, 1] in bytes.
fn to_picture(image: &Tensor) -> Result<RgbImage> {
    let (_, _, height, width) = image.dims4()?;
    let values = view(image)?;
    let byte = |i: usize| ((values[i] + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
    let plane = height * width;
    Ok(RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let i = y as usize * width + x as usize;
        Rgb([byte(i), byte(plane + i), byte(2 * plane + i)])
    }))
}
