//! Image files to 8-bit RGB: jpg, png and webp, upright, without transparency.
//!
//! The format is recognised by the file's content, not by its name: a png called `a.jpg` is common in datasets.

use crate::error::{Error, Result};
use image::{DynamicImage, ImageDecoder, ImageError, ImageReader, RgbImage, metadata::Orientation};
use rayon::prelude::*;
use std::io::Cursor;
use std::path::Path;

/// Raised when the pixels that come out of [`decode`] or of [`cover_crop`](super::resample::cover_crop) change for
/// some file, so that cached latents are computed anew.
pub const PIXELS_VERSION: u32 = 1;

/// Height and width of an image in pixels, as it is seen: after the EXIF orientation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Size {
    /// Width over height.
    pub fn aspect(self) -> f64 {
        self.width as f64 / self.height as f64
    }
}

/// Reads and decodes the image at `path`: see [`decode`].
pub fn load(path: &Path) -> Result<RgbImage> {
    decode(&std::fs::read(path).map_err(|e| Error::io("read the image", path, e).into_usage())?, path)
}

/// Decodes a jpg, png or webp file. The EXIF orientation is applied; transparency is composited on white (what lies
/// under transparent pixels is arbitrary, often black); grey, palette, 16-bit and CMYK images become 8-bit RGB.
///
/// `path` is only for messages. Errors: not such a file, truncated, corrupt, or larger than 512 MiB decoded.
pub fn decode(bytes: &[u8], path: &Path) -> Result<RgbImage> {
    let mut decoder = decoder(bytes, path)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    if image::guess_format(bytes).is_ok_and(|f| f == image::ImageFormat::Jpeg) && !has_end_of_jpeg(bytes) {
        // The decoder is lenient and would fill the rest with grey.
        return Err(unreadable(path).detail("the file ends in the middle of the picture").hint(COPY_AGAIN));
    }
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| explain(e, path))?;
    image.apply_orientation(orientation);
    Ok(flatten(image))
}

/// The size of an image from its header alone, after the EXIF orientation. `path` is only for messages.
///
/// Errors: not a jpg, png or webp file, an unreadable header, or no pixels.
pub fn size(bytes: &[u8], path: &Path) -> Result<Size> {
    let mut decoder = decoder(bytes, path)?;
    let (width, height) = decoder.dimensions();
    let (width, height) = (width as usize, height as usize);
    Ok(match decoder.orientation().unwrap_or(Orientation::NoTransforms) {
        Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH => {
            Size { height: width, width: height }
        }
        _ => Size { height, width },
    })
}

/// Pixels as (3, H, W) floats in [-1, 1]: `x / 127.5 - 1`.
pub fn to_pixels(image: &RgbImage) -> Vec<f32> {
    let plane = image.width() as usize * image.height() as usize;
    let bytes = image.as_raw();
    let mut pixels = vec![0f32; 3 * plane];
    if plane > 0 {
        pixels.par_chunks_mut(plane).enumerate().for_each(|(c, out)| {
            for (o, rgb) in out.iter_mut().zip(bytes.chunks_exact(3)) {
                *o = f32::from(rgb[c]) / 127.5 - 1.0;
            }
        });
    }
    pixels
}

const COPY_AGAIN: &str = "copy or download the file again, or remove it from the dataset";

fn decoder<'a>(bytes: &'a [u8], path: &Path) -> Result<impl ImageDecoder + 'a> {
    if bytes.is_empty() {
        return Err(unreadable(path).detail("the file is empty").hint(COPY_AGAIN));
    }
    let reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| Error::io("read the image", path, e).into_usage())?;
    let decoder = reader.into_decoder().map_err(|e| explain(e, path))?;
    match decoder.dimensions() {
        (0, _) | (_, 0) => Err(unreadable(path).detail("it has no pixels")),
        _ => Ok(decoder),
    }
}

fn unreadable(path: &Path) -> Error {
    Error::usage(format!("cannot read the image `{}`", path.display()))
}

fn explain(e: ImageError, path: &Path) -> Error {
    let error = unreadable(path);
    match &e {
        ImageError::Unsupported(_) => error.expected("a jpg, png or webp file", e.to_string()).hint("convert the file"),
        ImageError::Limits(_) => error.detail("it takes more than 512 MiB decoded").hint("scale it down first"),
        _ => error.detail(e.to_string()).hint(COPY_AGAIN),
    }
    .source(e)
}

/// Whether a JPEG holds an end-of-image marker after its first scan begins. Segments before that are stepped over by
/// their lengths, because the thumbnail in an EXIF segment has a marker of its own.
fn has_end_of_jpeg(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xDA;
    let mut at = 2;
    while let Some(&[0xFF, kind, high, low]) = bytes.get(at..at + 4) {
        match kind {
            START_OF_SCAN => return bytes[at..].windows(2).any(|w| w == [0xFF, 0xD9]),
            0xFF => at += 1, // a fill byte
            _ => at += 2 + usize::from(u16::from_be_bytes([high, low])),
        }
    }
    false
}

fn flatten(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let image = image.into_rgba8();
    let (width, height) = image.dimensions();
    let over_white = |c: u8, a: u8| {
        let (c, a) = (u32::from(c), u32::from(a));
        ((c * a + 255 * (255 - a) + 127) / 255) as u8
    };
    let rgb = image.as_raw().chunks_exact(4).flat_map(|p| [0, 1, 2].map(|c| over_white(p[c], p[3]))).collect();
    RgbImage::from_raw(width, height, rgb).expect("three bytes for each pixel")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_of_pixels_is_minus_one_to_one_in_planes() {
        let image = RgbImage::from_raw(2, 1, vec![0, 255, 51, 255, 0, 204]).unwrap();
        assert_eq!(to_pixels(&image), [-1.0, 1.0, 1.0, -1.0, -0.6, 0.6]);
    }

    #[test]
    fn an_empty_file_and_a_text_file_are_named() {
        for bytes in [&b""[..], b"not an image"] {
            let error = decode(bytes, Path::new("pictures/a.png")).unwrap_err();
            assert!(error.to_string().contains("pictures/a.png"), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
