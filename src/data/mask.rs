//! Masks: which parts of an image count in the loss. White counts, black hardly does.

use crate::data::bucket::Bucket;
use crate::data::dataset::{Item, Mask};
use crate::data::image;
use crate::data::resample::cover_crop;
use crate::error::{Error, Result};
use std::path::PathBuf;

/// Pixels of an image per latent, in each direction.
pub const LATENT_PIXELS: usize = 8;

/// The mask at `path` for `item`. Errors (usage): unreadable, or of another shape than the image.
pub(super) fn open(path: PathBuf, item: &Item) -> Result<Mask> {
    let bytes = std::fs::read(&path).map_err(|e| Error::io("read the mask", &path, e).into_usage())?;
    let size = image::size(&bytes, &path)?;
    // Half a pixel of the mask: one that was drawn on a smaller copy of the image is fine.
    let (ours, theirs) = (size.width as f64 * item.size.height as f64, size.height as f64 * item.size.width as f64);
    let tolerance = 0.5 * (item.size.width + item.size.height) as f64;
    if (ours - theirs).abs() > tolerance {
        return Err(Error::usage(format!("the mask `{}` has another shape than its image", path.display()))
            .expected(
                format!("{}x{}, or smaller in the same proportion", item.size.width, item.size.height),
                format!("{}x{}", size.width, size.height),
            )
            .hint("a mask covers the whole image, pixel by pixel"));
    }
    Ok(Mask { hash: blake3::hash(&bytes), path })
}

/// The mask in a bucket at the resolution of latents, row by row: the mean brightness, in [0, 1], of what lies under each
/// latent after the mask was resized and cropped as its image is.
///
/// Errors: a mask that cannot be decoded, or was changed since the data set was indexed.
pub fn latent_mask(mask: &Mask, bucket: Bucket) -> Result<Vec<f32>> {
    let bytes = std::fs::read(&mask.path).map_err(|e| Error::io("read the mask", &mask.path, e))?;
    if blake3::hash(&bytes) != mask.hash {
        return Err(Error::run(format!("the mask `{}` was changed while it was in use", mask.path.display()))
            .hint("start again: the dataset is indexed anew"));
    }
    let pixels = cover_crop(&image::decode(&bytes, &mask.path)?, bucket.height(), bucket.width())?;
    let (h, w) = (bucket.height() / LATENT_PIXELS, bucket.width() / LATENT_PIXELS);
    let mut sums = vec![0u32; h * w];
    for (x, y, rgb) in pixels.enumerate_pixels() {
        let cell = y as usize / LATENT_PIXELS * w + x as usize / LATENT_PIXELS;
        sums[cell] += rgb.0.iter().map(|&c| u32::from(c)).sum::<u32>();
    }
    let whole = (3 * 255 * LATENT_PIXELS * LATENT_PIXELS) as f32;
    Ok(sums.into_iter().map(|sum| sum as f32 / whole).collect())
}
