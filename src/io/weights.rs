//! The weights of one network: a set of safetensors files seen as one table of named tensors.

use crate::error::{Error, Result, nearest};
use crate::io::safetensors::MappedFile;
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Memory-mapped tensors of one network, from a single file, from shards, or from shards with an index.
///
/// Nothing but the headers is read until a tensor is asked for.
pub struct Weights {
    folder: PathBuf,
    files: Vec<MappedFile>,
    file_of: BTreeMap<String, usize>,
}

impl Weights {
    /// Opens the weights in `folder`: every file that a `*.safetensors.index.json` names, or without an index
    /// every `*.safetensors` there (the plain one where a variant such as `.fp16.` lies beside it).
    ///
    /// Errors: no weights, a shard that the index names but the folder lacks, a corrupt file, a tensor in two files.
    pub fn open_folder(folder: &Path) -> Result<Self> {
        let listing = std::fs::read_dir(folder).map_err(|e| {
            Error::io("read the folder", folder, e).into_usage().hint("`model:` wants a folder in the diffusers layout")
        })?;
        let mut names: Vec<String> = listing.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        let index = names.iter().find(|n| n.ends_with(".safetensors.index.json"));
        let files = match index {
            Some(index) => index_files(&folder.join(index))?,
            None => {
                let plain = |n: &str| !n.starts_with('.') && n.strip_suffix(".safetensors").is_some();
                let all: Vec<String> = names.iter().filter(|n| plain(n)).cloned().collect();
                let unvaried: Vec<String> = all.iter().filter(|n| n.matches('.').count() == 1).cloned().collect();
                if unvaried.is_empty() { all } else { unvaried }
            }
        };
        if files.is_empty() {
            return Err(Error::usage(format!("no weights in `{}`", folder.display())).expected(
                "*.safetensors",
                if names.is_empty() { "an empty folder".into() } else { names.join(", ") },
            ));
        }
        Self::open_files(folder, files.iter().map(|f| folder.join(f)))
    }

    /// Opens one safetensors file.
    pub fn open_file(path: &Path) -> Result<Self> {
        Self::open_files(path, [path.to_path_buf()])
    }

    fn open_files(folder: &Path, paths: impl IntoIterator<Item = PathBuf>) -> Result<Self> {
        let mut weights = Self { folder: folder.into(), files: Vec::new(), file_of: BTreeMap::new() };
        for path in paths {
            let file = MappedFile::open(&path)?;
            for name in file.names() {
                if let Some(first) = weights.file_of.insert(name.clone(), weights.files.len()) {
                    return Err(Error::usage(format!("tensor `{name}` stands in two files")).detail(format!(
                        "`{}` and `{}`",
                        weights.files[first].path().display(),
                        path.display()
                    )));
                }
            }
            weights.files.push(file);
        }
        Ok(weights)
    }

    /// The folder (or file) these weights come from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The mapped files, in order.
    pub fn files(&self) -> &[MappedFile] {
        &self.files
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.file_of.contains_key(name)
    }

    /// The shape of a tensor, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(self.files[*self.file_of.get(name)?].info(name)?.1)
    }

    /// A tensor of the given shape, converted to `dtype` on `device`.
    ///
    /// Errors: no such tensor, another shape; both name tensor and file.
    pub fn get(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        self.check_one(name, shape)?;
        self.files[self.file_of[name]].tensor(name, dtype, device)
    }

    /// Checks, from the headers alone, that every tensor in `expected` is there with its shape, and that nothing
    /// else is, unless `may_ignore` says so of its name.
    pub fn check(&self, expected: &[(String, Vec<usize>)], may_ignore: impl Fn(&str) -> bool) -> Result<()> {
        for (name, shape) in expected {
            self.check_one(name, shape)?;
        }
        let known: BTreeSet<&str> = expected.iter().map(|(n, _)| n.as_str()).collect();
        let strangers: Vec<&str> = self.names().filter(|n| !known.contains(n) && !may_ignore(n)).collect();
        match strangers.first() {
            None => Ok(()),
            Some(first) => {
                let file = self.files[self.file_of[*first]].path().display();
                let mut error = Error::usage(format!("unknown tensor `{first}` in `{file}`"));
                if strangers.len() > 1 {
                    error = error.detail(format!("and {} more", strangers.len() - 1));
                }
                if let Some(near) = nearest(first, known.iter().copied()) {
                    error = error.detail(format!("the nearest known name is `{near}`"));
                }
                Err(error.hint("the weights do not belong to the config.json beside them"))
            }
        }
    }

    fn check_one(&self, name: &str, shape: &[usize]) -> Result<()> {
        let Some(&file) = self.file_of.get(name) else {
            let mut error = Error::usage(format!("cannot load `{name}` from `{}`", self.folder.display()))
                .expected(format!("a tensor of shape {shape:?}"), "no tensor of that name");
            if let Some(near) = nearest(name, self.names()) {
                error = error.detail(format!("the nearest name there is `{near}`"));
            }
            return Err(error.hint(if self.names().any(|n| n.contains("lora_")) {
                "this looks like a LoRA file; `model:` wants a base model"
            } else {
                "the file is incomplete, or belongs to another model than the config.json beside it"
            }));
        };
        let file = &self.files[file];
        let found = file.info(name).expect("the table was made from this file").1;
        if found != shape {
            return Err(Error::usage(format!("cannot load `{name}` from `{}`", file.path().display()))
                .expected(format!("shape {shape:?}"), format!("{found:?}"))
                .hint("the weights do not belong to the config.json beside them"));
        }
        Ok(())
    }
}

fn index_files(index: &Path) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(|e| Error::io("read", index, e).into_usage())?;
    let index_json: Index = serde_json::from_str(&text).map_err(|e| {
        Error::usage(format!("`{}` is not an index of safetensors shards", index.display())).detail(e.to_string())
    })?;
    let files: BTreeSet<String> = index_json.weight_map.into_values().collect();
    let folder = index.parent().unwrap_or(Path::new("."));
    if let Some(missing) = files.iter().find(|f| !folder.join(f).is_file()) {
        return Err(Error::usage(format!("`{}` is missing", folder.join(missing).display()))
            .detail(format!("`{}` names it", index.display()))
            .hint("the download is incomplete: fetch this file"));
    }
    Ok(files.into_iter().collect())
}
