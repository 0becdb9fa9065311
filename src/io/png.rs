//! 8-bit RGB images as PNG files that carry text: `iTXt` chunks, which hold any Unicode.

use crate::error::{Error, Result};
use crate::io::write_atomic;
use image::RgbImage;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// An image as the bytes of a PNG file, with (keyword, text) pairs before the pixels. The bytes are a function of the
/// arguments.
///
/// Errors: a keyword that PNG does not allow (1 to 79 Latin-1 characters).
pub fn encode(image: &RgbImage, texts: &[(&str, &str)]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let failed = |e: png::EncodingError| Error::run("cannot encode the image as PNG").detail(e.to_string()).source(e);
    let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Balanced);
    for (keyword, text) in texts {
        encoder.add_itxt_chunk(keyword.to_string(), text.to_string()).map_err(failed)?;
    }
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(image.as_raw()).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(bytes)
}

/// Writes [`encode`]'s bytes, atomically.
pub fn write(path: &Path, image: &RgbImage, texts: &[(&str, &str)]) -> Result<()> {
    let bytes = encode(image, texts)?;
    write_atomic(path, |file| std::io::Write::write_all(file, &bytes))
}

/// The text under `keyword` in a PNG file, if it is there.
///
/// Errors (usage): not a PNG file; a chunk that cannot be read.
pub fn read_text(path: &Path, keyword: &str) -> Result<Option<String>> {
    let file = File::open(path).map_err(|e| Error::io("open the image", path, e).into_usage())?;
    let broken = |e: png::DecodingError| {
        Error::usage(format!("`{}` is not a whole PNG file", path.display())).detail(e.to_string()).source(e)
    };
    let mut reader = png::Decoder::new(BufReader::new(file)).read_info().map_err(broken)?;
    // Other programs write their texts behind the pixels.
    reader.finish().map_err(broken)?;
    let info = reader.info();
    match info.utf8_text.iter().find(|chunk| chunk.keyword == keyword) {
        Some(chunk) => Ok(Some(chunk.get_text().map_err(broken)?)),
        None => Ok(info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == keyword).map(|c| c.text.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_and_texts_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        let image = RgbImage::from_fn(5, 3, |x, y| image::Rgb([x as u8 * 50, y as u8 * 80, 7]));
        write(&path, &image, &[("recipe", "{\"提示\": \"a\\nb\"}"), ("other", "x")]).unwrap();
        assert_eq!(image::open(&path).unwrap().to_rgb8(), image);
        assert_eq!(read_text(&path, "recipe").unwrap().unwrap(), "{\"提示\": \"a\\nb\"}");
        assert_eq!(read_text(&path, "none").unwrap(), None);
        assert_eq!(encode(&image, &[]).unwrap(), encode(&image, &[]).unwrap());
    }

    #[test]
    fn what_is_no_png_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        std::fs::write(&path, "not a picture").unwrap();
        let error = read_text(&path, "recipe").unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("a.png"), "{error}");
    }
}
