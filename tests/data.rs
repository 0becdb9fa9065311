//! Images, datasets, buckets, plans and caches through the public API.

use candle_core::{DType, Device};
use image::RgbImage;
use qwen_lora::data::{Dataset, image as images, resample::cover_crop};
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

/// Expected values: the recorded reference cases; the second has a crop offset of 2.5, rounded to the even 2.
#[test]
fn the_reference_cases_are_resized_to_the_bit() {
    for case in ["case_a", "case_b"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference").join(case);
        let golden = MappedFile::open(&folder.join("golden.safetensors")).unwrap();
        let input = images::load(&folder.join("image.png")).unwrap();
        let names: Vec<String> = golden.names().into_iter().filter(|n| n.starts_with("img.cover_")).collect();
        assert_eq!(names.len(), 2);
        for name in names {
            let (h, w) = target_size(&name);
            let found = cover_crop(&input, h, w).unwrap().into_raw();
            let expected = golden.tensor(&name, DType::I64, &Device::Cpu).unwrap().flatten_all().unwrap();
            let found: Vec<i64> = found.into_iter().map(i64::from).collect();
            assert_eq!(found, expected.to_vec1::<i64>().unwrap(), "{case} {name}");
        }
        let pixels = golden.tensor("vae.pixels", DType::F32, &Device::Cpu).unwrap();
        let pixels: Vec<f32> = pixels.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(images::to_pixels(&input), pixels, "{case}");
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

/// A folder of small images, all different, with captions.
fn folder(files: &[(&str, u32, u32, Option<&[u8]>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (i, &(name, height, width, caption)) in files.iter().enumerate() {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        RgbImage::from_pixel(width, height, image::Rgb([i as u8; 3])).save(&path).unwrap();
        if let Some(caption) = caption {
            std::fs::write(path.with_extension("txt"), caption).unwrap();
        }
    }
    dir
}

fn open_error(dir: &tempfile::TempDir, default: Option<&str>) -> String {
    let error = Dataset::open(dir.path(), default, true).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[test]
fn a_folder_is_indexed_with_its_captions() {
    let dir = folder(&[
        ("b.PNG", 16, 24, Some(b"\xEF\xBB\xBF  a red square \r\n")),
        ("a/一.png", 8, 8, Some("夕阳下的少女，水彩风格\n".as_bytes())),
        ("c.png", 4, 4, None),
    ]);
    std::fs::write(dir.path().join(".hidden.png"), b"").unwrap();
    std::fs::write(dir.path().join("d.gif"), b"GIF89a").unwrap();
    std::fs::copy(fixture("exif_6.jpg"), dir.path().join("e.jpeg")).unwrap();
    let dataset = Dataset::open(dir.path(), Some("a picture"), true).unwrap();
    let found: Vec<_> =
        dataset.items().iter().map(|i| (i.path.as_str(), i.size.height, i.size.width, i.caption.as_str())).collect();
    let expected = [
        ("a/一.png", 8, 8, "夕阳下的少女，水彩风格"),
        ("b.PNG", 16, 24, "a red square"),
        ("c.png", 4, 4, "a picture"),
        ("e.jpeg", 32, 16, "a picture"),
    ];
    assert_eq!(found, expected);
    assert_eq!(dataset.load(1).unwrap().dimensions(), (24, 16));
    assert!(dataset.notices()[0].contains("d.gif"), "{:?}", dataset.notices());
    let error = open_error(&dir, None);
    assert!(error.starts_with("2 images without a caption") && error.contains("c.png, e.jpeg"), "{error}");
}

/// A set in which many pictures stand twice must not fill the screen.
#[test]
fn identical_images_are_one_notice() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..7 {
        for copy in ["a", "b"] {
            image::RgbImage::from_pixel(8, 8, image::Rgb([i; 3]))
                .save(dir.path().join(format!("{i}{copy}.png")))
                .unwrap();
        }
    }
    let dataset = Dataset::open(dir.path(), Some("grey"), true).unwrap();
    let five = (0..5).map(|i| format!("{i}a.png = {i}b.png")).collect::<Vec<_>>().join(", ");
    assert_eq!(dataset.notices(), [format!("images with the same content: {five} and 2 more")]);
}

#[test]
fn the_dataset_hash_is_of_content_not_of_names() {
    let hash = |dir: &tempfile::TempDir| Dataset::open(dir.path(), None, true).unwrap().hash();
    let one = folder(&[("a.png", 8, 8, Some(b"one")), ("b.png", 8, 8, Some(b"two"))]);
    let before = hash(&one);
    let rename = |from: &str, to: &str| {
        for extension in ["png", "txt"] {
            std::fs::rename(
                one.path().join(format!("{from}.{extension}")),
                one.path().join(format!("{to}.{extension}")),
            )
            .unwrap();
        }
    };
    rename("a", "z");
    assert_eq!(hash(&one), before);
    std::fs::write(one.path().join("z.txt"), "two").unwrap();
    std::fs::write(one.path().join("b.txt"), "one").unwrap();
    assert_ne!(hash(&one), before, "swapped captions are another dataset");
}

#[test]
fn bad_datasets_get_one_error_that_names_the_file() {
    let empty = tempfile::tempdir().unwrap();
    assert!(open_error(&empty, None).starts_with("no images in"));
    std::fs::write(empty.path().join("a.heic"), b"x").unwrap();
    assert!(open_error(&empty, None).contains("heic is not read"));

    let captions = folder(&[("a.png", 8, 8, Some(b"fine\nthen \xC4\xE3")), ("b.png", 8, 8, Some(b"fine"))]);
    let error = open_error(&captions, None);
    assert!(error.contains("a.txt` is not UTF-8\n  at byte offset 10 (line 2) stands 0xC4"), "{error}");

    let broken = folder(&[("a.png", 8, 8, Some(b"x")), ("b.png", 8, 8, Some(b"x")), ("c.png", 8, 8, Some(b"x"))]);
    std::fs::write(broken.path().join("b.png"), b"").unwrap();
    std::fs::write(broken.path().join("c.png"), b"\x89PNG\r\n\x1a\nrest").unwrap();
    let error = open_error(&broken, None);
    assert!(error.starts_with("cannot read the image"), "{error}");
    assert!(error.contains("b.png`\n  the file is empty\n  also: cannot read the image") && error.contains("c.png"));

    // The header of a cut image is whole: the fault shows when the pixels are read.
    let cut = folder(&[("a.png", 8, 8, Some(b"x"))]);
    let whole = std::fs::read(fixture("alpha.png")).unwrap();
    std::fs::write(cut.path().join("a.png"), &whole[..whole.len() / 2]).unwrap();
    let dataset = Dataset::open(cut.path(), None, true).unwrap();
    assert!(dataset.load(0).unwrap_err().to_string().contains("a.png"));
    std::fs::write(cut.path().join("a.png"), &whole).unwrap();
    assert!(dataset.load(0).unwrap_err().to_string().contains("was changed"));
}
