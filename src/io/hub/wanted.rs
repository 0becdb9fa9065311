//! Which files of a repository are needed, and whether a folder holds them all.

use crate::error::Result;
use crate::io::weights::{self, Choice};
use std::path::Path;

/// One folder of a repository.
#[derive(Clone, Debug)]
pub struct Part {
    /// Its name, such as `transformer`.
    pub folder: String,
    /// The weights are wanted too, not only the small files (`*.json`, `*.txt`).
    pub weights: bool,
}

/// The files wanted of a repository: some by name, and some folders. In a folder that is every `*.json` and `*.txt`
/// (configs, `vocab.json`, `merges.txt`), and of the weights exactly those that [`Choice::of`] picks.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Files at the top, such as `model_index.json`.
    pub files: Vec<String>,
    /// Files at the top that are fetched where the repository has them.
    pub optional: Vec<String>,
    /// Folders.
    pub parts: Vec<Part>,
}

impl Wanted {
    /// The small files among `listed`.
    pub(super) fn select_small<'a>(&self, listed: impl Iterator<Item = &'a str>) -> Vec<String> {
        let small = |path: &str| match path.split_once('/') {
            None => self.files.iter().chain(&self.optional).any(|f| f == path),
            Some((folder, name)) => self.part(folder).is_some() && is_small(name),
        };
        listed.filter(|p| small(p)).map(String::from).collect()
    }

    /// The weight files: those that the indexes in `folder` name, or without index those among `listed`.
    pub(super) fn select_weights<'a>(
        &self,
        folder: &Path,
        listed: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Vec<String>> {
        let mut chosen = Vec::new();
        for part in self.parts.iter().filter(|p| p.weights) {
            let names = names_in(&part.folder, listed.clone());
            let files = match Choice::of(&names) {
                Choice::Index(index) => weights::index_files(&folder.join(&part.folder).join(index))?,
                Choice::Files(files) => files,
            };
            chosen.extend(files.into_iter().map(|f| format!("{}/{f}", part.folder)));
        }
        Ok(chosen)
    }

    /// The first wanted thing of which `listed` has nothing: a file, a folder, a folder's weights.
    pub(super) fn first_missing<'a>(&self, listed: impl Iterator<Item = &'a str> + Clone) -> Option<String> {
        if let Some(file) = self.files.iter().find(|f| !listed.clone().any(|l| l == f.as_str())) {
            return Some(file.clone());
        }
        self.parts.iter().find_map(|part| {
            let names = names_in(&part.folder, listed.clone());
            if !names.iter().any(|n| is_small(n)) {
                return Some(format!("{}/*.json", part.folder));
            }
            let no_weights = matches!(Choice::of(&names), Choice::Files(files) if files.is_empty());
            (part.weights && no_weights).then(|| format!("{}/*.safetensors", part.folder))
        })
    }

    /// Whether `folder` holds everything wanted; if not, what is missing first. An index must find its shards, and
    /// every weight file must have the length that its own header says.
    pub fn check_whole(&self, folder: &Path) -> std::result::Result<(), String> {
        // A link into the blobs that leads nowhere is no file: `is_file` follows links.
        let mut listed = Vec::new();
        listed.extend(files_in(folder));
        for part in &self.parts {
            listed.extend(files_in(&folder.join(&part.folder)).into_iter().map(|n| format!("{}/{n}", part.folder)));
        }
        let listed = || listed.iter().map(String::as_str);
        if let Some(missing) = self.first_missing(listed()) {
            return Err(format!("no `{missing}`"));
        }
        for small in self.select_small(listed()) {
            if std::fs::metadata(folder.join(&small)).is_ok_and(|m| m.len() == 0) {
                return Err(format!("`{small}` is empty"));
            }
        }
        for path in self.select_weights(folder, listed()).map_err(|e| e.to_string())? {
            let file = folder.join(&path);
            if !file.is_file() {
                return Err(format!("no `{path}`"));
            }
            crate::io::safetensors::MappedFile::open(&file).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    fn part(&self, folder: &str) -> Option<&Part> {
        self.parts.iter().find(|p| p.folder == folder)
    }
}

fn is_small(name: &str) -> bool {
    !name.contains('/') && (name.ends_with(".json") || name.ends_with(".txt"))
}

/// The names directly under `folder/`.
fn names_in<'a>(folder: &str, listed: impl Iterator<Item = &'a str>) -> Vec<String> {
    let direct = |path: &'a str| path.strip_prefix(folder)?.strip_prefix('/').filter(|n| !n.contains('/'));
    listed.filter_map(direct).map(String::from).collect()
}

fn files_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().filter(|e| e.path().is_file()).filter_map(|e| e.file_name().into_string().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_needed_is_selected() {
        let part = |folder: &str, weights| Part { folder: folder.into(), weights };
        let wanted = Wanted {
            files: vec!["model_index.json".into()],
            optional: vec!["config.json".into(), "tokenizer.json".into()],
            parts: vec![part("vae", true), part("tokenizer", false), part("transformer", false)],
        };
        let listed = [
            "README.md",
            "config.json",
            "model_index.json",
            "tokenizer/merges.txt",
            "tokenizer/vocab.json",
            "tokenizer/deeper/vocab.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.bin",
            "vae/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "vae2/config.json",
        ];
        let small = wanted.select_small(listed.into_iter());
        let expected = [
            "config.json",
            "model_index.json",
            "tokenizer/merges.txt",
            "tokenizer/vocab.json",
            "transformer/config.json",
            "vae/config.json",
        ];
        assert_eq!(small, expected);
        let weights = wanted.select_weights(Path::new("."), listed.into_iter()).unwrap();
        assert_eq!(weights, ["vae/diffusion_pytorch_model.safetensors"]);
        assert_eq!(wanted.first_missing(listed.into_iter()), None);
        let without = |gone: &'static str| listed.into_iter().filter(move |l| !l.contains(gone));
        assert_eq!(wanted.first_missing(without("model_index")).unwrap(), "model_index.json");
        assert_eq!(wanted.first_missing(without("tokenizer/")).unwrap(), "tokenizer/*.json");
        assert_eq!(wanted.first_missing(without(".safetensors")).unwrap(), "vae/*.safetensors");
    }
}
