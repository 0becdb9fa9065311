//! Finding the images of a folder and the caption file beside each.

use crate::error::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use unicode_normalization::UnicodeNormalization;

const READ: [&str; 4] = ["jpg", "jpeg", "png", "webp"];
/// What a mask's name has between its image's stem and `.png`.
const MASK: &str = ".mask";
/// Extensions that a person would take for an image of the dataset, but that are not read.
const NOT_READ: [&str; 12] = ["avif", "bmp", "gif", "heic", "heif", "ico", "jfif", "jxl", "psd", "svg", "tif", "tiff"];

/// What lies in a dataset folder. All paths are relative to it, with `/` between folders.
#[derive(Debug, Default)]
pub struct Listing {
    /// The images, in an order that is the same on every machine.
    pub images: Vec<FoundImage>,
    /// Images of a kind that is not read, sorted, each with the reason.
    pub skipped: Vec<(String, String)>,
    /// Caption files without an image beside them, sorted.
    pub lone_captions: Vec<String>,
}

/// An image and, if there is one, the caption file of the same stem beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundImage {
    /// The image.
    pub path: String,
    /// `name.txt` beside `name.jpg`.
    pub caption: Option<String>,
    /// `name.mask.png` beside `name.jpg`.
    pub mask: Option<String>,
}

/// Lists `root` and the folders in it. Extensions are compared without case; hidden files and folders (`.name`) are
/// passed over, other files ignored; symbolic links are followed.
///
/// Images are sorted by relative path in Unicode's composed form, because some file systems decompose names.
/// `a.jpg` and `a.png` share the caption `a.txt` and the mask `a.mask.png`, which is no image of its own.
/// Errors: a folder that cannot be read, a link in a circle or to nowhere, an image whose name is not Unicode.
pub fn list(root: &Path) -> Result<Listing> {
    if !root.is_dir() {
        let found = if root.exists() { "a file" } else { "nothing there" };
        return Err(Error::usage(format!("cannot read the dataset `{}`", root.display()))
            .expected("a folder of images with captions", found)
            .hint("check `data.path`"));
    }
    let mut paths = Vec::new();
    walk(root, "", &mut Vec::new(), &mut paths)?;
    paths.sort_by_cached_key(|p| (p.nfc().collect::<String>(), p.clone()));

    let captions: BTreeMap<String, &String> =
        paths.iter().filter(|p| extension(p) == "txt").map(|p| (stem(p).to_string(), p)).collect();
    let is_image = |path: &str| READ.contains(&extension(path).as_str());
    let stems: BTreeSet<&str> = paths.iter().filter(|p| is_image(p)).map(|p| stem(p)).collect();
    let masks: BTreeMap<&str, &String> =
        paths.iter().filter(|p| extension(p) == "png").filter_map(|p| Some((stem(p).strip_suffix(MASK)?, p))).collect();
    let is_mask = |path: &str| {
        let image = stem(path).strip_suffix(MASK);
        image.is_some_and(|image| stems.contains(image) && masks.get(image).is_some_and(|mask| *mask == path))
    };
    let mut listing = Listing::default();
    let mut claimed = BTreeSet::new();
    for path in &paths {
        let extension = extension(path);
        if is_mask(path) {
            continue;
        }
        if READ.contains(&extension.as_str()) {
            claimed.insert(stem(path));
            let caption = captions.get(stem(path)).map(|&c| c.clone());
            let mask = masks.get(stem(path)).map(|&m| m.clone());
            listing.images.push(FoundImage { path: path.clone(), caption, mask });
        } else if NOT_READ.contains(&extension.as_str()) {
            claimed.insert(stem(path));
            listing.skipped.push((path.clone(), format!("{extension} is not read; convert it to jpg, png or webp")));
        }
    }
    listing.lone_captions =
        captions.iter().filter(|(s, _)| !claimed.contains(s.as_str())).map(|(_, p)| p.to_string()).collect();
    Ok(listing)
}

/// Lists into `paths`; `prefix` is the relative path of `folder` with a closing `/`, `above` the folders it lies in.
fn walk(folder: &Path, prefix: &str, above: &mut Vec<PathBuf>, paths: &mut Vec<String>) -> Result<()> {
    let read = |e| Error::io("read the folder", folder, e).into_usage();
    let identity = folder.canonicalize().map_err(read)?;
    if above.contains(&identity) {
        return Err(Error::usage(format!("the folder `{}` is a link to a folder it lies in", folder.display()))
            .hint("remove the link from the dataset"));
    }
    above.push(identity);
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let entry = entry.map_err(read)?;
        let (name, path) = (entry.file_name(), entry.path());
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let lossy = name.to_string_lossy();
        // Through links: the type of what is there, not of the link.
        let kind = std::fs::metadata(&path).map_err(|e| Error::io("read", &path, e).into_usage());
        match (kind, name.to_str()) {
            (Ok(kind), Some(name)) if kind.is_dir() => walk(&path, &format!("{prefix}{name}/"), above, paths)?,
            (Ok(kind), Some(name)) if kind.is_file() => paths.push(format!("{prefix}{name}")),
            (Ok(kind), None) if kind.is_dir() || READ.contains(&extension(&lossy).as_str()) => {
                return Err(Error::usage(format!("the name of `{}` is not Unicode", path.display()))
                    .hint("rename it: paths are recorded, and must read the same on every machine"));
            }
            (Err(e), _) if READ.contains(&extension(&lossy).as_str()) => return Err(e),
            _ => {}
        }
    }
    above.pop();
    Ok(())
}

/// The extension in lower case, empty if there is none.
fn extension(path: &str) -> String {
    Path::new(path).extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

/// The path without its extension.
fn stem(path: &str) -> &str {
    path.rsplit_once('.').map_or(path, |(stem, _)| stem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_by_composed_name_and_captions_find_their_images() {
        let dir = tempfile::tempdir().unwrap();
        let decomposed = "e\u{301}.png"; // sorts before `z` as written, after it when composed
        for name in [
            decomposed,
            "z.JPG",
            "z.TXT",
            "b/猫.webp",
            "b/猫.txt",
            "a.png",
            "a.jpg",
            "a.txt",
            ".c.png",
            "lone.txt",
            "notes.md",
            "d.heic",
            "d.txt",
            "b/猫.mask.png",
            "alone.mask.png",
        ] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let listing = list(dir.path()).unwrap();
        let found: Vec<(&str, Option<&str>)> =
            listing.images.iter().map(|i| (i.path.as_str(), i.caption.as_deref())).collect();
        let expected = [
            ("a.jpg", Some("a.txt")),
            ("a.png", Some("a.txt")),
            ("alone.mask.png", None),
            ("b/猫.webp", Some("b/猫.txt")),
            ("z.JPG", Some("z.TXT")),
            (decomposed, None),
        ];
        assert_eq!(found, expected);
        let masks: Vec<&str> = listing.images.iter().filter_map(|i| i.mask.as_deref()).collect();
        assert_eq!(masks, ["b/猫.mask.png"], "a mask of no image is an image");
        assert_eq!(listing.skipped.len(), 1);
        assert!(listing.skipped[0].1.contains("heic"));
        assert_eq!(listing.lone_captions, ["lone.txt"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_circle_of_links_is_an_error_and_a_link_to_a_folder_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        std::fs::write(elsewhere.path().join("a.png"), "").unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), dir.path().join("linked")).unwrap();
        assert_eq!(list(dir.path()).unwrap().images[0].path, "linked/a.png");
        std::os::unix::fs::symlink(dir.path(), dir.path().join("circle")).unwrap();
        assert!(list(dir.path()).unwrap_err().to_string().contains("circle"));
    }
}
