//! A folder of captioned images: `name.txt` beside `name.jpg`, `.png` or `.webp`.

use crate::config::{Masks, NO_PROMPT};
use crate::data::files::{self, FoundImage};
use crate::data::filter::LeftOut;
use crate::data::image::{self, Size};
use crate::data::mask;
use crate::error::{Error, Result};
use crate::progress;
use ::image::RgbImage;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// An index of the images in a folder, made by [`Dataset::open`].
#[derive(Debug)]
pub struct Dataset {
    root: PathBuf,
    items: Vec<Item>,
    notices: Vec<String>,
}

/// One captioned image. Items are known by their index in [`Dataset::items`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Path relative to the dataset, with `/` between folders.
    pub path: String,
    /// Height and width as seen, from the header.
    pub size: Size,
    /// Hash of the file's bytes.
    pub image_hash: blake3::Hash,
    /// The caption, without surrounding white space. May be empty.
    pub caption: String,
    /// The mask file beside it, whether masks are used or not; as `path`.
    pub mask_beside: Option<String>,
    /// Its mask, if masks are used.
    pub mask: Option<Mask>,
}

/// The file of an image's mask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Where it is.
    pub path: PathBuf,
    /// Hash of the file's bytes.
    pub hash: blake3::Hash,
}

impl Dataset {
    /// Indexes `root` and its subfolders: reads every file once, hashes it, and reads the image's header; pixels are
    /// not decoded. A bar shows the progress unless `quiet`.
    ///
    /// An image without caption file gets `default_caption`. Two images of one stem share a caption, with a notice.
    /// Errors (all of kind usage): no images; images without caption and no default; an empty, unreadable or
    /// unknown image; a caption that is not UTF-8. Each names its file and says how many more have the same trouble.
    pub fn open(root: &Path, default_caption: Option<&str>, quiet: bool) -> Result<Self> {
        let listing = files::list(root)?;
        if listing.images.is_empty() {
            let mut error = Error::usage(format!("no images in `{}`", root.display()))
                .expected("jpg, png or webp files, each with a caption of the same name ending in .txt", "none");
            if let Some((first, reason)) = listing.skipped.first() {
                error = error.detail(format!("{} skipped, the first: `{first}`: {reason}", listing.skipped.len()));
            }
            return Err(error.hint("check `data.path`"));
        }
        let without: Vec<&str> =
            listing.images.iter().filter(|i| i.caption.is_none()).map(|i| i.path.as_str()).collect();
        if !without.is_empty() && default_caption.is_none() {
            return Err(Error::usage(format!(
                "{} without a caption in `{}`",
                count(without.len(), "image"),
                root.display()
            ))
            .detail(name_some(&without))
            .hint("write the caption of `name.jpg` to `name.txt` beside it, or set `data.default_caption`"));
        }

        let bar = progress::bar(listing.images.len(), "reading images", quiet);
        let read = |found: &FoundImage| {
            let item = read_item(root, found, default_caption.unwrap_or_default());
            bar.inc(1);
            item
        };
        let results: Vec<Result<Item>> = listing.images.par_iter().map(read).collect();
        bar.finish_and_clear();
        let items = all_or_first_error(results)?;

        let mut notices = Vec::new();
        let mut notice = |what: &str, names: &[&str]| {
            if !names.is_empty() {
                notices.push(format!("{what}: {}", name_some(names)));
            }
        };
        let mut skipped: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (path, reason) in &listing.skipped {
            skipped.entry(reason).or_default().push(path);
        }
        for (reason, paths) in skipped {
            notice(&format!("skipped {} ({reason})", count(paths.len(), "image")), &paths);
        }
        notice("captions without an image", &strs(&listing.lone_captions));
        let empty: Vec<&str> = items.iter().filter(|i| i.caption.is_empty()).map(|i| i.path.as_str()).collect();
        notice("images with an empty caption", &empty);
        let sharing = groups(listing.images.iter().filter_map(|i| Some((i.caption.as_ref()?, i.path.as_str()))));
        notice("images that share one caption file", &strs(&sharing));
        let same = groups(items.iter().map(|i| (i.image_hash.to_hex(), i.path.as_str())));
        notice("images with the same content", &strs(&same));
        Ok(Self { root: root.into(), items, notices })
    }

    /// Gives the items their masks, as `data.masks` says where they are.
    ///
    /// Errors (usage): no image has one; a mask that cannot be read, or whose shape is not its image's.
    pub fn use_masks(&mut self, masks: &Masks) -> Result<()> {
        let of = |item: &Item| -> Option<PathBuf> {
            match masks {
                Masks::None => None,
                Masks::Beside => item.mask_beside.as_ref().map(|mask| self.root.join(mask)),
                Masks::Folder(folder) => Some(folder.join(Path::new(&item.path).with_extension("png"))),
            }
        };
        let paths: Vec<Option<PathBuf>> = self.items.iter().map(of).map(|path| path.filter(|p| p.is_file())).collect();
        for (item, path) in self.items.iter_mut().zip(paths) {
            item.mask = path.map(|path| mask::open(path, item)).transpose()?;
        }
        let names = |wanted: fn(&Item) -> bool| -> Vec<&str> {
            self.items.iter().filter(|i| wanted(i)).map(|i| i.path.as_str()).collect()
        };
        let without = names(|item| item.mask.is_none());
        match masks {
            Masks::None => {
                let unused = names(|item| item.mask_beside.is_some());
                if !unused.is_empty() {
                    let files = count(unused.len(), "image");
                    self.notices.push(format!(
                        "masks of {files} are not used, as `data.masks` is `none`: {}",
                        name_some(&unused)
                    ));
                }
            }
            _ if without.len() == self.items.len() => {
                let first = Path::new(without[0]).with_extension("");
                let expected = match masks {
                    Masks::Folder(folder) => folder.join(first.with_extension("png")),
                    _ => self.root.join(format!("{}.mask.png", first.display())),
                };
                return Err(Error::usage("`data.masks` asks for masks, and no image has one")
                    .expected(format!("files such as `{}`", expected.display()), "none")
                    .hint("white trains, black hardly does; without masks set `data.masks: none`"));
            }
            _ if !without.is_empty() => {
                let images = count(without.len(), "image");
                self.notices.push(format!("{images} without a mask, trained evenly: {}", name_some(&without)));
            }
            _ => {}
        }
        Ok(())
    }

    /// Leaves out the items that have a reason, and gives the reasons; there is one entry for each item. The other items
    /// move up: indices from before mean nothing any more. Errors (usage): nothing is left.
    pub fn leave_out(&mut self, reasons: Vec<Option<LeftOut>>) -> Result<Vec<LeftOut>> {
        let mut kept = reasons.iter().map(Option::is_none);
        self.items.retain(|_| kept.next().expect("one reason for each item"));
        let left_out: Vec<LeftOut> = reasons.into_iter().flatten().collect();
        if let (true, Some(first)) = (self.items.is_empty(), left_out.first()) {
            return Err(Error::usage(format!(
                "`data.filter` leaves out all of the {}",
                count(left_out.len(), "image")
            ))
            .detail(format!("{}: {}", first.path, first.reason))
            .hint("ask for less in `data.filter`"));
        }
        let mut by_rule: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for image in &left_out {
            by_rule.entry(image.rule).or_default().push(&image.path);
        }
        for (rule, paths) in by_rule {
            let images = count(paths.len(), "image");
            self.notices.push(format!("`data.filter.{rule}` leaves out {images}: {}", name_some(&paths)));
        }
        Ok(left_out)
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The items, sorted by path: the same order on every machine.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// What the user may want to know: skipped and identical images, empty captions, captions without image.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// All distinct captions, sorted; what dropped ones become always among them.
    pub fn captions(&self) -> Vec<&str> {
        let mut captions = BTreeSet::from([NO_PROMPT]);
        captions.extend(self.items.iter().map(|i| i.caption.as_str()));
        captions.into_iter().collect()
    }

    /// Identity of the images, captions and masks, whatever their names and order: the hex hash of all triples of image
    /// hash, caption and mask hash, sorted.
    pub fn hash(&self) -> String {
        let mask = |i: &'_ Item| i.mask.as_ref().map(|mask| *mask.hash.as_bytes());
        let mut triples: Vec<_> =
            self.items.iter().map(|i| (i.image_hash.as_bytes(), i.caption.as_str(), mask(i))).collect();
        triples.sort_unstable();
        let mut hasher = blake3::Hasher::new();
        for (image, caption, mask) in triples {
            hasher.update(image).update(&(caption.len() as u64).to_le_bytes()).update(caption.as_bytes());
            if let Some(mask) = mask {
                hasher.update(b"mask").update(&mask);
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Decodes the image of one item.
    ///
    /// Errors: a corrupt image, or one that was changed since the dataset was indexed.
    pub fn load(&self, item: usize) -> Result<RgbImage> {
        let item = &self.items[item];
        let path = self.root.join(&item.path);
        let bytes = std::fs::read(&path).map_err(|e| Error::io("read the image", &path, e))?;
        if blake3::hash(&bytes) != item.image_hash {
            return Err(Error::run(format!("the image `{}` was changed while it was in use", path.display()))
                .hint("start again: the dataset is indexed anew"));
        }
        image::decode(&bytes, &path)
    }
}

fn read_item(root: &Path, found: &FoundImage, default_caption: &str) -> Result<Item> {
    let path = root.join(&found.path);
    let bytes = std::fs::read(&path).map_err(|e| Error::io("read the image", &path, e).into_usage())?;
    let size = image::size(&bytes, &path)?;
    let caption = match &found.caption {
        Some(caption) => read_caption(&root.join(caption))?,
        None => default_caption.trim().to_string(),
    };
    let image_hash = blake3::hash(&bytes);
    let mask_beside = found.mask.clone();
    Ok(Item { path: found.path.clone(), size, image_hash, caption, mask_beside, mask: None })
}

/// Reads a caption: UTF-8, with or without byte-order mark; white space at both ends is cut off.
fn read_caption(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read the caption", path, e).into_usage())?;
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(text.trim_start_matches('\u{feff}').trim().to_string()),
        Err(e) => {
            let at = e.valid_up_to();
            let line = 1 + bytes[..at].iter().filter(|&&b| b == b'\n').count();
            let hint = match bytes.as_slice() {
                [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => "this is UTF-16: save the caption as UTF-8",
                _ => "save the caption as UTF-8 (GBK and Shift-JIS are not read)",
            };
            Err(Error::usage(format!("the caption `{}` is not UTF-8", path.display()))
                .detail(format!("at byte offset {at} (line {line}) stands 0x{:02X}", bytes[at]))
                .hint(hint))
        }
    }
}

/// All items, or the first error in the order of the items with a line that names the others.
fn all_or_first_error(results: Vec<Result<Item>>) -> Result<Vec<Item>> {
    let mut items = Vec::with_capacity(results.len());
    let mut errors = Vec::new();
    for result in results {
        match result {
            Ok(item) => items.push(item),
            Err(e) => errors.push(e),
        }
    }
    let mut errors = errors.into_iter();
    let Some(first) = errors.next() else { return Ok(items) };
    let others: Vec<String> = errors.map(|e| e.to_string().lines().next().unwrap_or_default().to_string()).collect();
    Err(if others.is_empty() { first } else { first.detail(format!("also: {}", name_some(&strs(&others)))) })
}

/// The groups of two and more names that have one key, in order of the names, each as a text.
fn groups<'a, K: Ord>(pairs: impl Iterator<Item = (K, &'a str)>) -> Vec<String> {
    let mut by_key: BTreeMap<K, Vec<&str>> = BTreeMap::new();
    for (key, name) in pairs {
        by_key.entry(key).or_default().push(name);
    }
    let mut groups: Vec<_> = by_key.into_values().filter(|names| names.len() > 1).collect();
    groups.sort_unstable();
    groups.iter().map(|names| join_some(names, " = ")).collect()
}

fn strs(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// The first few names, and how many more there are.
fn name_some(names: &[&str]) -> String {
    join_some(names, ", ")
}

/// The same with `between` in place of commas.
fn join_some(names: &[&str], between: &str) -> String {
    const SHOWN: usize = 5;
    let mut text = names[..names.len().min(SHOWN)].join(between);
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}
