//! One reader for every spelling of an adapter: diffusers, PEFT, kohya and musubi, ai-toolkit, DiffSynth,
//! diffusion-pipe, SimpleTuner and LyCORIS, OneTrainer, Lightning; LoRA, DoRA, LoHa, LoKr.
//!
//! Opening reads the header and a few scalars. The factors of a module are read when asked for, so that an adapter
//! of any size can be merged in constant memory.

pub mod alpha;
mod assemble;
pub mod key;
pub mod table;

pub use alpha::{AlphaSource, StatedAlpha};
pub use key::{Component, Part, PartStyle, Prefix};
pub use table::ModuleTable;

use crate::adapters::delta::{Delta, Factors, Magnitude};
use crate::adapters::matrix::Matrix;
use crate::error::{Error, Result};
use crate::io::safetensors::MappedFile;
use key::Stranger;
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// How an adapter is read.
#[derive(Clone, Copy)]
pub struct ReadOptions<'a> {
    /// The modules of the transformer.
    pub table: &'a ModuleTable,
    /// The modules of the text encoder, if they are known.
    pub text_encoder: Option<&'a ModuleTable>,
    /// Alpha of modules for which the file states none.
    pub alpha: Option<f64>,
    /// Leave out what cannot be used instead of failing.
    pub allow_unmatched: bool,
}

/// What the factors of a module make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Low-rank product.
    Lora,
    /// Elementwise product of two low-rank products.
    Loha,
    /// Kronecker product.
    Lokr,
}

/// The adapter of one module, as it stands in the file.
#[derive(Clone, Debug)]
pub struct ModuleEntry {
    /// What its factors make.
    pub kind: Kind,
    /// (out_features, in_features) of the weight that it changes.
    pub shape: (usize, usize),
    /// The inner dimension of its factors; `None` for a LoKr of two full factors.
    pub rank: Option<usize>,
    /// Alpha, if the file states one.
    pub alpha: Option<f64>,
    /// The factor on the product of its factors.
    pub scale: f64,
    /// Where the scale comes from.
    pub alpha_source: AlphaSource,
    /// Whether DoRA's norms are there.
    pub dora: bool,
    /// Storage type of its first factor.
    pub dtype: Dtype,
    /// Its parts, with the keys that hold them.
    pub keys: BTreeMap<Part, SourceKey>,
}

/// A key of the file and its spelling.
#[derive(Clone, Debug)]
pub struct SourceKey {
    /// As it stands in the file.
    pub key: String,
    /// Spelling of the module.
    pub prefix: Prefix,
    /// Spelling of the part.
    pub style: PartStyle,
}

/// Something in the file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// A key that means nothing here.
    Stranger(String, Stranger),
    /// Two keys for one part of one module.
    Twice(String, String),
    /// A module with a part missing: a key of it, and what is missing.
    Incomplete(String, &'static str),
    /// A module whose shapes do not fit each other or the model: a key of it, and how.
    Misshapen(String, String),
    /// A and B have changed places: a key of the module.
    Swapped(String),
}

impl Problem {
    /// In words; the nearest name in `table` is looked up where that can help.
    pub fn text(&self, table: &ModuleTable) -> String {
        match self {
            Self::Stranger(key, stranger) => format!("`{key}` {}", stranger.reason(table)),
            Self::Twice(key, first) => format!("`{key}` says again what `{first}` says"),
            Self::Incomplete(key, missing) => format!("`{key}` has no {missing} beside it"),
            Self::Misshapen(key, how) => format!("`{key}` {how}"),
            Self::Swapped(key) => format!("`{key}`: A and B have changed places"),
        }
    }
}

/// An adapter file: what is in it, by module.
pub struct AdapterFile {
    file: MappedFile,
    /// Adapters of the transformer's modules.
    pub transformer: BTreeMap<String, ModuleEntry>,
    /// Adapters of the text encoder's modules.
    pub text_encoder: BTreeMap<String, ModuleEntry>,
    /// What cannot be used.
    pub problems: Vec<Problem>,
    /// What the user should know about the scale.
    pub warnings: Vec<String>,
    /// What the header and `adapter_config.json` say about the scale.
    pub stated: StatedAlpha,
}

impl AdapterFile {
    /// Opens an adapter: a file, or a folder that holds one by a usual name, with `adapter_config.json` beside it if
    /// there is one.
    ///
    /// Errors (usage): not a whole safetensors file, no adapter in it, a key that cannot be used unless
    /// `allow_unmatched`.
    pub fn open(path: &Path, options: &ReadOptions) -> Result<Self> {
        Self::survey(path, options)?.strict(options)
    }

    /// Opens an adapter and leaves its problems to the caller.
    ///
    /// Errors (usage): not a whole safetensors file.
    pub fn survey(path: &Path, options: &ReadOptions) -> Result<Self> {
        let path = find_file(path)?;
        let config = std::fs::read_to_string(path.with_file_name("adapter_config.json")).ok();
        Ok(Self::assemble(MappedFile::open(&path)?, config.as_deref(), options))
    }

    /// The same from bytes in memory; `path` is what errors call them.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>, config_file: Option<&str>, options: &ReadOptions) -> Result<Self> {
        Self::assemble(MappedFile::from_bytes(path, bytes)?, config_file, options).strict(options)
    }

    fn strict(self, options: &ReadOptions) -> Result<Self> {
        let path = self.path().display();
        if self.transformer.is_empty() && self.text_encoder.is_empty() {
            let mut error = Error::usage(format!("`{path}` holds no adapter that can be used"));
            for problem in self.problems.iter().take(3) {
                error = error.detail(problem.text(options.table));
            }
            let weights = self.file.names().iter().any(|n| n.ends_with("norm_q.weight"));
            return Err(error.hint(if weights {
                "these are the weights of a whole model, not an adapter"
            } else {
                "this is no adapter, or one for another model"
            }));
        }
        if self.problems.is_empty() || options.allow_unmatched {
            return Ok(self);
        }
        let mut error = Error::usage(format!("{} of `{path}` cannot be used", count(self.problems.len(), "key")));
        for problem in self.problems.iter().take(5) {
            error = error.detail(problem.text(options.table));
        }
        if self.problems.len() > 5 {
            error = error.detail(format!("and {} more", self.problems.len() - 5));
        }
        Err(error.hint("`--allow-unmatched` leaves them out and uses the rest"))
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file itself.
    pub fn file(&self) -> &MappedFile {
        &self.file
    }

    /// The adapters of one network.
    pub fn modules(&self, component: Component) -> &BTreeMap<String, ModuleEntry> {
        match component {
            Component::Transformer => &self.transformer,
            Component::TextEncoder => &self.text_encoder,
        }
    }

    /// All module adapters of both networks.
    pub fn entries(&self) -> impl Iterator<Item = &ModuleEntry> {
        self.transformer.values().chain(self.text_encoder.values())
    }

    /// Every spelling of modules and parts in the file.
    pub fn spellings(&self) -> BTreeSet<(Prefix, PartStyle)> {
        self.entries().flat_map(|e| e.keys.values()).map(|k| (k.prefix, k.style)).collect()
    }

    /// Reads the factors of one module.
    ///
    /// Errors: a value that is not finite.
    pub fn delta(&self, name: &str, entry: &ModuleEntry) -> Result<Delta> {
        let delta = self.delta_unchecked(entry)?;
        if !delta.is_finite() {
            return Err(Error::usage(format!("`{}` holds NaN or infinite values for `{name}`", self.path().display()))
                .hint("the training that made it has diverged; use an earlier checkpoint"));
        }
        Ok(delta)
    }

    /// Reads the factors of one module, finite or not.
    pub fn delta_unchecked(&self, entry: &ModuleEntry) -> Result<Delta> {
        let matrix = |part: Part| -> Result<Matrix> {
            let key = &entry.keys[&part].key;
            let (rows, cols) = assemble::matrix_shape(self.file.info(key).expect("assembled from this file").1)
                .expect("assemble has checked the shape");
            Ok(Matrix::new(rows, cols, self.file.floats(key)?))
        };
        let kron = |full: Part, left: Part, right: Part| -> Result<Matrix> {
            if entry.keys.contains_key(&full) { matrix(full) } else { Ok(matrix(left)?.product(&matrix(right)?)) }
        };
        let factors = match entry.kind {
            Kind::Lora => Factors::Lora { a: matrix(Part::LoraA)?, b: matrix(Part::LoraB)? },
            Kind::Loha => Factors::Loha {
                w1: (matrix(Part::HadaW1A)?, matrix(Part::HadaW1B)?),
                w2: (matrix(Part::HadaW2A)?, matrix(Part::HadaW2B)?),
            },
            Kind::Lokr => Factors::Lokr {
                w1: kron(Part::LokrW1, Part::LokrW1A, Part::LokrW1B)?,
                w2: kron(Part::LokrW2, Part::LokrW2A, Part::LokrW2B)?,
            },
        };
        let magnitude = match entry.keys.get(&Part::Magnitude) {
            None => None,
            Some(source) => {
                let values = self.file.floats(&source.key)?;
                let shape = self.file.info(&source.key).expect("assembled from this file").1;
                Some(if assemble::magnitude_is_of_rows(shape, entry.shape) {
                    Magnitude::Rows(values)
                } else {
                    Magnitude::Columns(values)
                })
            }
        };
        Ok(Delta { factors, scale: entry.scale, magnitude })
    }
}

/// `1 key`, `2 keys`.
pub fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// The adapter's file in a folder: PEFT's name, diffusers' name, ours, or the only safetensors file there.
fn find_file(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.into());
    }
    for name in ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter.safetensors"] {
        if path.join(name).is_file() {
            return Ok(path.join(name));
        }
    }
    let listing = std::fs::read_dir(path).map_err(|e| Error::io("read the folder", path, e).into_usage())?;
    let files: Vec<PathBuf> = listing
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    match files.as_slice() {
        [one] => Ok(one.clone()),
        _ => Err(Error::usage(format!("`{}` is a folder without an adapter of a usual name", path.display()))
            .expected("adapter_model.safetensors, or one safetensors file", count(files.len(), "safetensors file"))
            .hint("name the file itself")),
    }
}
