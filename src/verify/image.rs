//! `img.cover_HxW.u8`: the case's image resized to cover a size, and cropped.

use super::{Case, Computed};
use crate::data::{image, resample};
use crate::error::{Error, Result};

pub(super) fn run(case: &Case) -> Result<Vec<Computed>> {
    let original = image::load(&case.folder.join("image.png"))?;
    let mut computed = Vec::new();
    for name in case.golden.names().into_iter().filter(|n| n.starts_with("img.cover_")) {
        let size = name["img.cover_".len()..].split('.').next().and_then(|size| size.split_once('x'));
        let size = size.and_then(|(h, w)| Some((h.parse().ok()?, w.parse().ok()?)));
        let (height, width) = size.ok_or_else(|| {
            Error::usage(format!("cannot replay `{name}`")).expected("img.cover_HEIGHTxWIDTH.u8", &name)
        })?;
        let cropped = resample::cover_crop(&original, height, width)?;
        let pixels = Computed::integers(&name, cropped.as_raw().iter().map(|&v| i64::from(v)))?;
        computed.push(Computed::new(name, pixels.tensor.reshape((height, width, 3))?));
    }
    Ok(computed)
}
