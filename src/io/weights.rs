//! The weights of one network: a set of files seen as one table of named tensors.

use crate::error::{Error, Result, nearest};
use crate::io::checkpoint::{CheckpointFile, PREFIXES, Stored, is_auxiliary};
use crate::kernels::int8::Int8Matrix;
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Which of a folder's files are its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The shards that this index names.
    Index(String),
    /// These files; none if there are no weights.
    Files(Vec<String>),
}

impl Choice {
    /// Chooses among the names in a folder: an index if there is one, else every `*.safetensors`. Where variants lie
    /// beside the plain files (`x.fp16.safetensors`, `x.safetensors.index.fp16.json`) the plain ones are meant.
    pub fn of(names: &[String]) -> Self {
        let num_dots = |n: &str| n.matches('.').count();
        let visible = || names.iter().filter(|n| !n.starts_with('.'));
        let indexes = visible().filter(|n| n.ends_with(".safetensors.index.json"));
        if let Some(index) = indexes.min_by_key(|n| (num_dots(n), n.as_str())) {
            return Self::Index(index.clone());
        }
        let mut files: Vec<String> = visible().filter(|n| n.ends_with(".safetensors")).cloned().collect();
        if files.iter().any(|n| num_dots(n) == 1) {
            files.retain(|n| num_dots(n) == 1);
        }
        files.sort();
        Self::Files(files)
    }
}

/// Memory-mapped tensors of one network, from a single file, from shards, or from shards with an index: safetensors, also in
/// fp8 with scales, or GGUF. In a file where names begin as ComfyUI's do ([`PREFIXES`]) the tensors of that network are meant,
/// under their names without that.
///
/// Nothing but the headers, and the scales of fp8, is read until a tensor is asked for.
pub struct Weights {
    folder: PathBuf,
    files: Vec<CheckpointFile>,
    /// Indices of file and tensor.
    place_of: BTreeMap<String, (usize, usize)>,
}

impl Weights {
    /// Opens the weights in `folder`: the files of [`Choice::of`] its names.
    ///
    /// Errors: no weights, a shard or tensor that the index names but is not there, a corrupt file, a tensor in two
    /// files.
    pub fn open_folder(folder: &Path) -> Result<Self> {
        let listing = std::fs::read_dir(folder).map_err(|e| {
            Error::io("read the folder", folder, e).into_usage().hint("`model:` wants a folder in the diffusers layout")
        })?;
        let mut names: Vec<String> = listing.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        match Choice::of(&names) {
            Choice::Index(index) => Self::open_index(&folder.join(index)),
            Choice::Files(files) if files.is_empty() => {
                let found = if names.is_empty() { "an empty folder".into() } else { names.join(", ") };
                let mut error =
                    Error::usage(format!("no weights in `{}`", folder.display())).expected("*.safetensors", found);
                if names.iter().any(|n| n.ends_with(".bin") || n.ends_with(".pt") || n.ends_with(".pth")) {
                    error = error.hint("PyTorch pickle files are not read: convert them to safetensors");
                }
                Err(error)
            }
            Choice::Files(files) => Self::open_files(folder, files.iter().map(|f| folder.join(f))),
        }
    }

    /// Opens one safetensors or GGUF file.
    pub fn open_file(path: &Path) -> Result<Self> {
        Self::open_files(path, [path.to_path_buf()])
    }

    /// Opens a folder ([`Weights::open_folder`]) or a file ([`Weights::open_file`]).
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() { Self::open_folder(path) } else { Self::open_file(path) }
    }

    fn open_index(index: &Path) -> Result<Self> {
        let folder = index.parent().unwrap_or(Path::new("."));
        let weight_map = read_index(index)?;
        let shards: BTreeSet<&String> = weight_map.values().collect();
        if let Some(missing) = shards.iter().find(|f| !folder.join(f).is_file()) {
            return Err(Error::usage(format!("`{}` is missing", folder.join(missing).display()))
                .detail(format!("`{}` names it", index.display()))
                .hint("the download is incomplete: fetch this file"));
        }
        let weights = Self::open_files(folder, shards.iter().map(|f| folder.join(f)))?;
        for (name, shard) in weight_map.iter().filter(|(name, _)| !is_auxiliary(name)) {
            let path = folder.join(shard);
            if weights.file_of(name) != Some(path.as_path()) {
                let found = match weights.file_of(name) {
                    Some(other) => format!("it in `{}`", other.display()),
                    None => "no tensor of that name".into(),
                };
                return Err(Error::usage(format!("cannot load `{name}` from `{}`", path.display()))
                    .expected(format!("the tensor there, as `{}` says", index.display()), found)
                    .hint("the index and the shards are of different downloads: fetch them again"));
            }
        }
        Ok(weights)
    }

    fn open_files(folder: &Path, paths: impl IntoIterator<Item = PathBuf>) -> Result<Self> {
        let files = paths.into_iter().map(|path| CheckpointFile::open(&path)).collect::<Result<Vec<_>>>()?;
        let all = || files.iter().flat_map(|f| f.tensors()).map(|t| t.name.as_str());
        let prefix = PREFIXES.into_iter().find(|prefix| all().any(|name| name.starts_with(prefix))).unwrap_or("");
        let mut place_of = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for (j, tensor) in file.tensors().iter().enumerate() {
                let Some(name) = tensor.name.strip_prefix(prefix) else { continue };
                if let Some((first, _)) = place_of.insert(name.to_string(), (i, j)) {
                    let paths = [first, i].map(|i: usize| files[i].path().display());
                    return Err(Error::usage(format!("tensor `{name}` stands in two files"))
                        .detail(format!("`{}` and `{}`", paths[0], paths[1])));
                }
            }
        }
        Ok(Self { folder: folder.into(), files, place_of })
    }

    fn find(&self, name: &str) -> Option<(&CheckpointFile, &Stored)> {
        let (file, tensor) = *self.place_of.get(name)?;
        Some((&self.files[file], &self.files[file].tensors()[tensor]))
    }

    /// The folder (or file) these weights come from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The mapped files, in order.
    pub fn files(&self) -> &[CheckpointFile] {
        &self.files
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place_of.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.place_of.contains_key(name)
    }

    /// The shape of a tensor, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.find(name)?.1.shape)
    }

    /// The file that holds a tensor, if it is there.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        Some(self.find(name)?.0.path())
    }

    /// A tensor of the given shape, converted to `dtype` on `device`.
    ///
    /// Errors: no such tensor, another shape; both name tensor and file.
    pub fn get(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let (file, tensor) = self.check_one(name, shape, &[])?;
        file.tensor(tensor, dtype, device)
    }

    /// A matrix (N, K) quantised to int8 as it is read, on the CPU.
    ///
    /// Errors: as [`get`](Self::get), and those of [`Int8Matrix::from_rows`].
    pub fn int8(&self, name: &str, (n, k): (usize, usize)) -> Result<Int8Matrix> {
        let (file, tensor) = self.check_one(name, &[n, k], &[])?;
        file.check_weights(tensor)?;
        let quantised = Int8Matrix::from_rows(name, (n, k), |first, out| file.widen(tensor, first, out))
            .map_err(|error| error.detail(format!("it lies in `{}`", file.path().display())))?;
        file.release(tensor);
        Ok(quantised)
    }

    /// Some rows of a matrix of the given shape, as a CPU tensor of `dtype`; the rest of it is not read.
    ///
    /// Errors: as [`get`](Self::get), and a row that the matrix does not have.
    pub fn rows(&self, name: &str, shape: &[usize], rows: &[usize], dtype: DType) -> Result<Tensor> {
        let (file, tensor) = self.check_one(name, shape, &[])?;
        file.rows(tensor, rows, dtype)
    }

    /// Checks, from the headers alone, that every tensor in `expected` is there with its shape and in a type that weights are
    /// read from, and that nothing else is, unless `may_ignore` says so of its name.
    pub fn check(&self, expected: &[(String, Vec<usize>)], may_ignore: impl Fn(&str) -> bool) -> Result<()> {
        let known: BTreeSet<&str> = expected.iter().map(|(n, _)| n.as_str()).collect();
        let strangers: Vec<&str> = self.names().filter(|n| !known.contains(n) && !may_ignore(n)).collect();
        for (name, shape) in expected {
            let (file, tensor) = self.check_one(name, shape, &strangers)?;
            file.check_weights(tensor)?;
        }
        let Some(first) = strangers.first() else { return Ok(()) };
        let file = self.file_of(first).expect("a name of this table").display();
        let mut error = Error::usage(format!("unknown tensor `{first}` in `{file}`"));
        if strangers.len() > 1 {
            error = error.detail(format!("and {} more", strangers.len() - 1));
        }
        if let Some(near) = nearest(first, known.iter().copied()) {
            error = error.detail(format!("the nearest known name is `{near}`"));
        }
        Err(error.hint("the weights do not belong to the config.json beside them"))
    }

    /// `strangers`: names there that are not expected; a misnamed tensor is among them.
    fn check_one(&self, name: &str, shape: &[usize], strangers: &[&str]) -> Result<(&CheckpointFile, &Stored)> {
        let Some((file, tensor)) = self.find(name) else {
            return Err(self.missing(name, shape, strangers));
        };
        if tensor.shape != shape {
            return Err(Error::usage(format!("cannot load `{name}` from `{}`", file.path().display()))
                .expected(format!("shape {shape:?}"), format!("{:?}", tensor.shape))
                .hint("the weights do not belong to the config.json beside them"));
        }
        Ok((file, tensor))
    }

    fn missing(&self, name: &str, shape: &[usize], strangers: &[&str]) -> Error {
        let mut error = Error::usage(format!("cannot load `{name}` from `{}`", self.folder.display()))
            .expected(format!("a tensor of shape {shape:?}"), "no tensor of that name");
        let near = nearest(name, strangers.iter().copied()).or_else(|| nearest(name, self.names()));
        if let Some(near) = near {
            let file = self.file_of(near).expect("a name of this table").display();
            error = error.detail(format!("the nearest name there is `{near}` in `{file}`"));
        }
        let prefixed = self.names().find(|n| n.strip_suffix(name).is_some_and(|prefix| prefix.ends_with('.')));
        error.hint(if self.names().any(|n| n.contains("lora_") || n.contains("lokr_") || n.contains("hada_")) {
            "this looks like a LoRA file; `model:` wants a base model".into()
        } else if let Some(prefixed) = prefixed {
            let prefix = &prefixed[..prefixed.len() - name.len()];
            format!("files whose names have `{prefix}` before them are not read: use the model's own folder")
        } else {
            "the file is incomplete, or belongs to another model than the config.json beside it".into()
        })
    }
}

/// The shards that an index names, sorted.
///
/// Errors: the file cannot be read, is no index, or names files outside its folder.
pub fn index_files(index: &Path) -> Result<Vec<String>> {
    let files: BTreeSet<String> = read_index(index)?.into_values().collect();
    Ok(files.into_iter().collect())
}

fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let broken = |why: String| {
        Error::usage(format!("`{}` is not an index of safetensors shards", index.display()))
            .detail(why)
            .hint("download or copy the file again")
    };
    let text = std::fs::read_to_string(index).map_err(|e| Error::io("read", index, e).into_usage())?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| broken(e.to_string()))?;
    if parsed.weight_map.is_empty() {
        return Err(broken("its weight_map is empty".into()));
    }
    match parsed.weight_map.values().find(|f| f.contains(['/', '\\']) || !f.ends_with(".safetensors")) {
        Some(outside) => Err(broken(format!("it names `{outside}`, which is no safetensors file in the same folder"))),
        None => Ok(parsed.weight_map),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_files_go_before_variants_and_an_index_before_both() {
        let choice = |names: &[&str]| Choice::of(&names.iter().map(|n| n.to_string()).collect::<Vec<_>>());
        let files = |names: &[&str]| Choice::Files(names.iter().map(|n| n.to_string()).collect());
        assert_eq!(choice(&["config.json", "m.bin"]), files(&[]));
        assert_eq!(choice(&["m.safetensors", "m.fp16.safetensors", ".m.safetensors"]), files(&["m.safetensors"]));
        assert_eq!(choice(&["m.fp16.safetensors"]), files(&["m.fp16.safetensors"]));
        assert_eq!(choice(&["m-2-of-2.safetensors", "m-1-of-2.safetensors"]).clone(), {
            files(&["m-1-of-2.safetensors", "m-2-of-2.safetensors"])
        });
        let both = ["m.fp16.safetensors.index.json", "m.safetensors.index.json", "m.safetensors"];
        assert_eq!(choice(&both), Choice::Index("m.safetensors.index.json".into()));
    }

    #[test]
    fn an_index_that_points_out_of_its_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("m.safetensors.index.json");
        for (text, why) in [
            (r#"{"weight_map": {"a": "../m.safetensors"}}"#, "../m.safetensors"),
            (r#"{"weight_map": {}}"#, "empty"),
            (r#"{"weight_map": {"a""#, "EOF"),
        ] {
            std::fs::write(&index, text).unwrap();
            let error = Weights::open_folder(dir.path()).err().unwrap().to_string();
            assert!(error.contains("m.safetensors.index.json") && error.contains(why), "{error}");
        }
    }
}
