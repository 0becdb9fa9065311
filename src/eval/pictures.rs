//! What is compared: sets of pictures in folders, paired by name.

use crate::data::{files, image};
use crate::error::{Error, Result};
use ::image::RgbImage;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One picture of a set.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Pairs it with those of other sets: its path in its folder, without the extension.
    pub key: String,
    /// The file.
    pub path: PathBuf,
    /// What it should show, if that is known.
    pub prompt: Option<String>,
    /// Pictures of one prompt and different seeds have the same number here.
    pub group: Option<usize>,
    /// What its prompt has to do with the adapter's trigger; none if no trigger is known.
    pub part: Option<Part>,
}

/// Kinds of prompts by the trigger of an adapter: its word for what it was trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Prompts with the trigger.
    Trigger,
    /// Prompts with the ordinary word for what was trained.
    Class,
    /// Other prompts.
    NoTrigger,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Trigger, Self::Class, Self::NoTrigger];

    /// For the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trigger => "with trigger",
            Self::Class => "class word",
            Self::NoTrigger => "without trigger",
        }
    }
}

impl Picture {
    /// Reads the pixels.
    ///
    /// Errors (usage): those of [`image::load`].
    pub fn load(&self) -> Result<RgbImage> {
        image::load(&self.path)
    }
}

/// Pictures under one name: a column of the table.
#[derive(Clone, Debug)]
pub struct Set {
    /// The column's title.
    pub name: String,
    /// Sorted by key.
    pub pictures: Vec<Picture>,
}

impl Set {
    /// All pictures in `folder` and the folders in it. A `.txt` file of the same name beside a picture is its prompt.
    ///
    /// Errors (usage): no such folder, no pictures, two pictures of one name, a caption that is no UTF-8 text.
    pub fn from_folder(name: &str, folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            let found = if folder.exists() { "a file" } else { "nothing there" };
            return Err(Error::usage(format!("cannot read the pictures of `{}`", folder.display()))
                .expected("a folder of jpg, png or webp files", found));
        }
        let mut pictures: BTreeMap<String, Picture> = BTreeMap::new();
        for found in files::list(folder)?.images {
            let key = found.path.rsplit_once('.').map_or(found.path.as_str(), |(stem, _)| stem).to_string();
            let path = folder.join(&found.path);
            let prompt = found.caption.map(|caption| read_prompt(&folder.join(caption))).transpose()?;
            let picture = Picture { key: key.clone(), path, prompt, group: None, part: None };
            if let Some(first) = pictures.insert(key, picture) {
                return Err(Error::usage(format!("two pictures of one name in `{}`", folder.display()))
                    .detail(format!("`{}` and `{}`", first.path.display(), found.path))
                    .hint("pictures are paired by name without extension: rename one"));
            }
        }
        if pictures.is_empty() {
            return Err(Error::usage(format!("no pictures in `{}`", folder.display()))
                .expected("jpg, png or webp files", "none"));
        }
        Ok(Self { name: name.into(), pictures: pictures.into_values().collect() })
    }

    /// The pictures of both sets that have one key, and the numbers of those of each that have no partner.
    pub fn pairs<'a>(&'a self, other: &'a Set) -> (Vec<(&'a Picture, &'a Picture)>, [usize; 2]) {
        let others: BTreeMap<&str, &Picture> = other.pictures.iter().map(|p| (p.key.as_str(), p)).collect();
        let pair = |own: &'a Picture| others.get(own.key.as_str()).map(|&theirs| (own, theirs));
        let pairs: Vec<_> = self.pictures.iter().filter_map(pair).collect();
        let alone = [self.pictures.len() - pairs.len(), other.pictures.len() - pairs.len()];
        (pairs, alone)
    }
}

fn read_prompt(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read the caption", path, e).into_usage())?;
    let text = String::from_utf8(bytes).map_err(|_| {
        Error::usage(format!("the caption `{}` is not UTF-8 text", path.display())).hint("save it as UTF-8")
    })?;
    Ok(text.trim_start_matches('\u{feff}').trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_pair_by_name_and_captions_are_prompts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        for name in ["a/x/1.png", "a/2.png", "a/3.jpg", "b/x/1.jpg", "b/3.png", "b/4.png", "b/5.png"] {
            write(name, "");
        }
        write("a/2.txt", "\u{feff}一只猫\n");
        let (a, b) = (Set::from_folder("A", &dir.path().join("a")), Set::from_folder("B", &dir.path().join("b")));
        let (a, b) = (a.unwrap(), b.unwrap());
        assert_eq!(a.pictures[0].prompt.as_deref(), Some("一只猫"));
        let (pairs, alone) = a.pairs(&b);
        let keys: Vec<&str> = pairs.iter().map(|(p, _)| p.key.as_str()).collect();
        assert_eq!((keys, alone), (vec!["3", "x/1"], [1, 2]));
        write("b/3.webp", "");
        let error = Set::from_folder("B", &dir.path().join("b")).unwrap_err().to_string();
        assert!(error.contains("two pictures of one name"), "{error}");
    }
}
