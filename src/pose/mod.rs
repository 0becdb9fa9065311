//! Pose networks: images in, maps of keypoints out, differentiable with respect to the image; and what the maps say of
//! persons, limbs and hands.
//!
//! Such a network serves twice. Its maps are compared by the structured loss (`train::structured`), through which
//! gradients flow into the image; and its detections say where the hands, limbs and persons of a picture are.

pub mod compare;
pub mod detection;
pub mod draw;
pub mod grouping;
pub mod hands;
pub mod heatmap;
pub mod openpose;
pub mod peaks;
pub mod posenet;
pub mod skeleton;
pub mod weights;

pub use detection::{Detection, Hand, Keypoint, Person, PixelBox};
pub use skeleton::Skeleton;

use crate::data::image::to_pixels;
use crate::data::resample::cover_crop;
use crate::error::{Error, Result, nearest};
use crate::io::hub::HubOptions;
use crate::kernels::Value;
use candle_core::{Device, Tensor};
use image::RgbImage;
use std::path::Path;

/// A network that finds keypoints.
pub trait PoseNetwork: Send + Sync {
    /// What it is, in a few words: `posenet`, `openpose`, `heatmap drawn.safetensors`.
    fn name(&self) -> &str;

    /// A hash of its weights, for cache keys.
    fn fingerprint(&self) -> &str;

    /// Its keypoints and how they hang together.
    fn skeleton(&self) -> &Skeleton;

    /// Image pixels per cell of a map; cell (i, j) stands for pixel (i, j) times this.
    fn stride(&self) -> usize;

    /// The longer side in pixels that it is best given to find persons.
    fn detection_side(&self) -> usize;

    /// Confidence maps, differentiable.
    ///
    /// Shapes: `images` (B, 3, H, W) RGB in [-1, 1] -> (B, h, w, K), 0 or more, about 1 at a keypoint; K as in
    /// [`skeleton`](Self::skeleton).
    fn maps(&self, images: &Value) -> Result<Value>;

    /// Persons, hands and limbs of one image (1, 3, H, W), in its pixels. No gradients.
    fn detect(&self, image: &Tensor) -> Result<Detection>;

    /// The same of a picture, looked for at the network's own scale.
    fn detect_picture(&self, picture: &RgbImage) -> Result<Detection> {
        let mut found = self.detect(&shrunk(picture, self.detection_side())?)?;
        found.rescale(picture.height() as usize, picture.width() as usize);
        Ok(found)
    }
}

/// The persons, hands and limbs of a picture, in its pixels, looked for at the network's own scale.
pub fn detect_image(network: &dyn PoseNetwork, picture: &RgbImage) -> Result<Detection> {
    network.detect_picture(picture)
}

/// A picture as an image (1, 3, H, W) in [-1, 1] whose longer side is at most `longest` pixels.
fn shrunk(picture: &RgbImage, longest: usize) -> Result<Tensor> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let scale = (longest as f64 / width.max(height) as f64).min(1.0);
    let side = |side: usize| ((side as f64 * scale).round() as usize).max(1);
    let (h, w) = (side(height), side(width));
    Ok(Tensor::from_vec(to_pixels(&cover_crop(picture, h, w)?), (1, 3, h, w), &Device::Cpu)?)
}

/// Which network, and where its weights are: the config's `pose:`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoseSpec {
    /// `posenet`, `openpose`, `world`, or the file of a heatmap network.
    pub network: String,
    /// OpenPose's body weights: a file or a hub id.
    pub body: String,
    /// `builtin`, or OpenPose's hand weights (a file or a hub id); `None` goes without.
    pub hand: Option<String>,
}

impl Default for PoseSpec {
    fn default() -> Self {
        Self { network: "posenet".into(), body: openpose::HUB_ID.into(), hand: None }
    }
}

impl PoseSpec {
    /// Loads the network. For OpenPose, `notice` is told of its licence.
    ///
    /// Errors (usage): neither a known name nor a file; weights of another network; hands for a network that has its
    /// own, or OpenPose's for another one; no way to the hub.
    pub fn load(&self, hub: HubOptions, notice: &mut dyn FnMut(&str)) -> Result<Box<dyn PoseNetwork>> {
        let own = self.hand.as_deref().filter(|hand| *hand != hands::BUILTIN);
        if let Some(hand) = own
            && self.network != "openpose"
        {
            return Err(Error::usage(format!("the hand network `{hand}` goes with OpenPose alone"))
                .expected("`builtin`, or none", format!("`{hand}` with the network `{}`", self.network)));
        }
        let body = self.load_body(own, hub, notice)?;
        match self.hand.as_deref() {
            Some(hands::BUILTIN) => Ok(Box::new(hands::WithHands::new(body, hands::HandFinder::embedded()?)?)),
            _ => Ok(body),
        }
    }

    fn load_body(
        &self,
        hand: Option<&str>,
        hub: HubOptions,
        notice: &mut dyn FnMut(&str),
    ) -> Result<Box<dyn PoseNetwork>> {
        match self.network.as_str() {
            "posenet" => Ok(Box::new(posenet::PoseNet::embedded()?)),
            "openpose" => {
                notice(openpose::LICENCE_NOTICE);
                Ok(Box::new(openpose::OpenPose::load(&self.body, hand, &hub)?))
            }
            "world" => Ok(Box::new(heatmap::HeatmapNetwork::world()?)),
            file if Path::new(file).is_file() => Ok(Box::new(heatmap::HeatmapNetwork::load(Path::new(file))?)),
            other => {
                let error = Error::usage(format!("no pose network `{other}`"))
                    .expected("posenet, openpose, world, or the file of a heatmap network", other);
                Err(match nearest(other, ["posenet", "openpose", "world"]) {
                    Some(near) => error.hint(format!("did you mean `{near}`?")),
                    None => error,
                })
            }
        }
    }
}
