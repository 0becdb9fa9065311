//! Images, datasets, buckets, plans and caches through the public API.

use candle_core::{DType, Device};
use image::RgbImage;
use qwen_lora::data::{image as images, resample::cover_crop};
use qwen_lora::io::safetensors::MappedFile;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images").join(name)
}

fn stored_image(file: &MappedFile, name: &str) -> RgbImage {
    let pixels = file.tensor(name, DType::U8, &Device::Cpu).unwrap();
    let (h, w, _) = pixels.dims3().unwrap();
    RgbImage::from_raw(w as u32, h as u32, pixels.flatten_all().unwrap().to_vec1().unwrap()).unwrap()
}

fn largest_difference(a: &RgbImage, b: &RgbImage) -> u8 {
    assert_eq!(a.dimensions(), b.dimensions());
    a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

/// `HxW` in `0.cover_HxW` or `img.cover_HxW.u8`.
fn target_size(name: &str) -> (usize, usize) {
    let size = name.split("cover_").nth(1).unwrap().split('.').next().unwrap();
    let (h, w) = size.split_once('x').unwrap();
    (h.parse().unwrap(), w.parse().unwrap())
}

/// Expected values: scripts/fixtures/images.py.
#[test]
fn resizing_is_pillows_to_the_bit() {
    let file = MappedFile::open(&fixture("resize.safetensors")).unwrap();
    let mut compared = 0;
    for name in file.names().iter().filter(|n| n.contains("cover_")) {
        let input = stored_image(&file, &format!("{}.input", name.split('.').next().unwrap()));
        let (h, w) = target_size(name);
        let found = cover_crop(&input, h, w).unwrap();
        assert_eq!(largest_difference(&found, &stored_image(&file, name)), 0, "{name}");
        compared += 1;
    }
    assert_eq!(compared, 14);
}

#[test]
fn the_reference_case_is_resized_to_the_bit() {
    let file = MappedFile::open(&fixture("case_a.safetensors")).unwrap();
    let input = images::load(&fixture("case_a.png")).unwrap();
    for name in file.names() {
        let (h, w) = target_size(&name);
        let found = cover_crop(&input, h, w).unwrap();
        assert_eq!(largest_difference(&found, &stored_image(&file, &name)), 0, "{name}");
    }
}

/// Expected values: scripts/fixtures/images.py. JPEG decoders may differ by a few levels, all others may not.
#[test]
fn every_encoding_decodes_to_the_picture_as_it_is_seen() {
    let file = MappedFile::open(&fixture("decoded.safetensors")).unwrap();
    let names = file.names();
    assert_eq!(names.len(), 18);
    for name in names {
        let bytes = std::fs::read(fixture(&name)).unwrap();
        let found = images::decode(&bytes, Path::new(&name)).unwrap();
        let expected = stored_image(&file, &name);
        let difference = largest_difference(&found, &expected);
        let limit = if name.ends_with(".jpg") && name != "png_named.jpg" { 4 } else { 0 };
        assert!(difference <= limit, "{name}: {difference} grey levels");
        let size = images::size(&bytes, Path::new(&name)).unwrap();
        assert_eq!((size.width as u32, size.height as u32), expected.dimensions(), "{name}");
    }
}

#[test]
fn a_cut_image_of_any_format_is_refused() {
    for name in ["exif_1.jpg", "progressive.jpg", "alpha.png", "opaque.webp"] {
        let bytes = std::fs::read(fixture(name)).unwrap();
        for keep in [bytes.len() - 30, bytes.len() / 2] {
            let error = images::decode(&bytes[..keep], Path::new(name)).expect_err(name).to_string();
            assert!(error.contains(name) && error.contains("hint"), "{error}");
        }
    }
}
