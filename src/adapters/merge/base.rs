//! The forms that a base model comes in, and the same forms written out: a pipeline folder, the folder of one
//! network, a single file.

use super::change::Weighted;
use super::stream::{Job, OutTensor, write_merged};
use crate::adapters::read::table::ModuleTable;
use crate::adapters::read::{Component, key::text_name};
use crate::error::{Error, Result};
use crate::io::atomic::{part_path, rename_synced, sync_parent};
use crate::io::checkpoint::{Checkpoint, CheckpointFile, Stored, bare};
use crate::io::weights::{Choice, index_files};
use crate::io::{JsonObject, disk};
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A base model on disk, its headers read.
pub struct Base {
    root: PathBuf,
    form: Form,
    networks: BTreeMap<Component, Network>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A folder in the diffusers layout.
    Pipeline,
    /// The folder of the transformer alone.
    Folder,
    /// One file, safetensors or GGUF.
    File,
}

/// One network of a base.
struct Network {
    /// Its folder, or its file.
    place: PathBuf,
    checkpoint: Checkpoint,
    index: Option<PathBuf>,
    table: ModuleTable,
}

/// How the merged model is written.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutputForm {
    /// One file with the transformer, whatever the base was.
    pub single_file: bool,
    /// The type of all float tensors; `None`: as in the base, bf16 where the base is quantised.
    pub dtype: Option<Dtype>,
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Weights changed.
    pub changed: usize,
    /// Bytes of all weight files written.
    pub bytes: usize,
}

impl Base {
    /// Opens a pipeline folder, the folder of a transformer, or a single file.
    ///
    /// Errors (usage): nothing of that kind there, a corrupt or unreadable file.
    pub fn open(path: &Path) -> Result<Self> {
        let mut networks = BTreeMap::new();
        let form = if !path.is_dir() {
            networks.insert(Component::Transformer, Network::open_file(path)?);
            Form::File
        } else if path.join("transformer").is_dir() {
            networks.insert(Component::Transformer, Network::open_folder(&path.join("transformer"))?);
            if path.join("text_encoder").is_dir() {
                networks.insert(Component::TextEncoder, Network::open_folder(&path.join("text_encoder"))?);
            }
            Form::Pipeline
        } else {
            networks.insert(Component::Transformer, Network::open_folder(path)?);
            Form::Folder
        };
        Ok(Self { root: path.into(), form, networks })
    }

    /// The modules of one network, if the base has it.
    pub fn table(&self, component: Component) -> Option<&ModuleTable> {
        self.networks.get(&component).map(|n| &n.table)
    }

    /// The modules of the transformer.
    pub fn transformer_table(&self) -> &ModuleTable {
        &self.networks[&Component::Transformer].table
    }

    /// The weight of a module of the transformer, in f32: (out, in).
    pub fn weight(&self, module: &str) -> Result<Option<crate::adapters::matrix::Matrix>> {
        for file in self.networks[&Component::Transformer].checkpoint.files() {
            let found =
                file.tensors().iter().find(|t| module_of(Component::Transformer, t).is_some_and(|name| name == module));
            if let Some(tensor) = found {
                let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
                let mut out = crate::adapters::matrix::Matrix::zeros(rows, cols);
                file.widen(tensor, 0, &mut out.data)?;
                return Ok(Some(out));
            }
        }
        Ok(None)
    }

    /// Whether an output of this form holds a text encoder that adapters can be merged into.
    pub fn writes_text_encoder(&self, form: &OutputForm) -> bool {
        !form.single_file && self.networks.contains_key(&Component::TextEncoder)
    }

    /// Whether it is a single file.
    pub fn is_file(&self) -> bool {
        self.form == Form::File
    }

    /// Names of tensors of the transformer that are no weights of linear layers and differ from those of `other`, or
    /// are missing there.
    pub fn other_differences(&self, other: &Base) -> Result<Vec<String>> {
        let values = |base: &Base| -> Result<BTreeMap<String, Vec<f32>>> {
            let mut out = BTreeMap::new();
            for file in base.networks[&Component::Transformer].checkpoint.files() {
                for tensor in file.tensors().iter().filter(|t| t.shape.len() != 2 && t.is_float()) {
                    let mut values = vec![0.0; tensor.len()];
                    file.widen(tensor, 0, &mut values)?;
                    out.insert(bare(&tensor.name).to_string(), values);
                }
            }
            Ok(out)
        };
        let (ours, theirs) = (values(self)?, values(other)?);
        Ok(ours.into_iter().filter(|(name, v)| theirs.get(name) != Some(v)).map(|(name, _)| name).collect())
    }

    /// Whether a tensor is stored in fp8 without scales, which has lost more than fp8 need lose.
    pub fn has_unscaled_fp8(&self) -> bool {
        self.networks.values().any(|n| n.checkpoint.tensors().any(Stored::is_unscaled_fp8))
    }

    /// Bytes of weight files that [`Base::merge`] will write.
    pub fn output_bytes(&self, adapters: &[Weighted], form: &OutputForm) -> usize {
        self.written_networks(adapters, form)
            .flat_map(|(_, network)| network.checkpoint.tensors())
            .map(|t| t.len() * out_dtype(t, form).bitsize() / 8)
            .sum()
    }

    /// The networks that are written rather than linked.
    fn written_networks<'a>(
        &'a self,
        adapters: &'a [Weighted],
        form: &'a OutputForm,
    ) -> impl Iterator<Item = (Component, &'a Network)> {
        self.networks.iter().map(|(c, n)| (*c, n)).filter(move |(component, _)| match component {
            Component::Transformer => true,
            Component::TextEncoder => !form.single_file && adapters.iter().any(|a| !a.adapter.text_encoder.is_empty()),
        })
    }

    /// Merges `adapters` into the base and writes the result to `out`, which must not exist: the same form as the
    /// base, or one file. It is built beside `out` and renamed when it is whole. `progress` hears of bytes written.
    ///
    /// Errors: `out` exists or lies in the base, an adapter for a network that the output does not hold, no room.
    pub fn merge(
        &self,
        adapters: &[Weighted],
        out: &Path,
        form: &OutputForm,
        progress: &(dyn Fn(usize) + Sync),
    ) -> Result<Written> {
        self.check_output(adapters, out, form)?;
        let part = part_path(out);
        remove(&part)?;
        let merged = if form.single_file || self.form == Form::File {
            self.merge_to_file(adapters, &part, form, progress)
        } else {
            self.merge_to_folder(adapters, &part, form, progress)
        };
        match merged {
            Ok(written) => {
                rename_synced(&part, out)?;
                Ok(written)
            }
            Err(error) => {
                // The failure is what the user needs to hear; the leftover is removed if it can be.
                let _ = remove(&part);
                Err(error)
            }
        }
    }

    fn check_output(&self, adapters: &[Weighted], out: &Path, form: &OutputForm) -> Result<()> {
        check_new(out)?;
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let parent = fs::canonicalize(parent).map_err(|e| {
            Error::io("find the folder", parent, e).into_usage().hint("create the folder that the output shall lie in")
        })?;
        let root = fs::canonicalize(&self.root).map_err(|e| Error::io("find", &self.root, e))?;
        if self.form != Form::File && parent.starts_with(&root) {
            return Err(Error::usage(format!("`{}` lies inside the base `{}`", out.display(), self.root.display()))
                .hint("write the merged model beside it"));
        }
        let file = form.single_file || self.form == Form::File;
        if file && out.extension().is_none_or(|e| e != "safetensors") {
            return Err(Error::usage(format!("`{}` is no name for a merged file", out.display()))
                .expected("a name that ends with .safetensors", out.display()));
        }
        let text = adapters.iter().find(|a| !a.adapter.text_encoder.is_empty());
        if let Some(text) = text.filter(|_| !self.writes_text_encoder(form)) {
            let (name, _) = text.adapter.text_encoder.iter().next().expect("not empty");
            return Err(Error::usage(format!(
                "`{}` also adapts the text encoder (`{name}`), which this output does not hold",
                text.adapter.path().display()
            ))
            .hint(
                "merge into a pipeline folder with a text encoder, or leave that part out with `--allow-unmatched`",
            ));
        }
        let need = self.output_bytes(adapters, form) as u64;
        if let Some(free) = disk::free_bytes(&parent).filter(|free| *free < need) {
            return Err(Error::run(format!("not enough room for `{}`", out.display()))
                .expected(format!("{} free", disk::human(need)), disk::human(free)));
        }
        Ok(())
    }

    fn merge_to_file(
        &self,
        adapters: &[Weighted],
        part: &Path,
        form: &OutputForm,
        progress: &(dyn Fn(usize) + Sync),
    ) -> Result<Written> {
        let network = &self.networks[&Component::Transformer];
        let job = Job { adapters, component: Component::Transformer, progress };
        let files = network.checkpoint.files();
        let tensors: Vec<OutTensor> = files.iter().flat_map(|f| network.out_tensors(f, &job, form)).collect();
        let metadata = files.first().map(|f| f.metadata()).unwrap_or_default();
        let written = Written::of(&tensors);
        write_merged(part, &tensors, &with_format(metadata), &job)?;
        Ok(written)
    }

    fn merge_to_folder(
        &self,
        adapters: &[Weighted],
        part: &Path,
        form: &OutputForm,
        progress: &(dyn Fn(usize) + Sync),
    ) -> Result<Written> {
        fs::create_dir(part).map_err(|e| Error::io("create the folder", part, e))?;
        let mut total = Written::default();
        let mut rewritten: BTreeSet<PathBuf> = BTreeSet::new();
        for (component, network) in self.written_networks(adapters, form) {
            let folder = match network.place.strip_prefix(&self.root) {
                Ok(inside) => part.join(inside),
                Err(_) => part.to_path_buf(),
            };
            fs::create_dir_all(&folder).map_err(|e| Error::io("create the folder", &folder, e))?;
            let job = Job { adapters, component, progress };
            let mut weight_map = BTreeMap::new();
            let mut written = Written::default();
            for file in network.checkpoint.files() {
                let tensors = network.out_tensors(file, &job, form);
                let name = file.path().file_name().expect("opened as a file");
                written = written.and(&Written::of(&tensors));
                let shard = name.to_string_lossy().into_owned();
                weight_map.extend(tensors.iter().map(|t| (t.name.clone(), shard.clone())));
                write_merged(&folder.join(name), &tensors, &with_format(file.metadata()), &job)?;
                rewritten.insert(file.path().to_path_buf());
            }
            if let Some(index) = &network.index {
                write_index(index, &folder, &weight_map, written.bytes)?;
                rewritten.insert(index.clone());
            }
            total = total.and(&written);
        }
        link_tree(&self.root, part, &rewritten)?;
        Ok(total)
    }
}

impl Written {
    fn of(tensors: &[OutTensor]) -> Self {
        Self {
            changed: tensors.iter().filter(|t| t.module.is_some()).count(),
            bytes: tensors.iter().map(|t| t.tensor.len() * t.dtype.bitsize() / 8).sum(),
        }
    }

    fn and(&self, other: &Self) -> Self {
        Self { changed: self.changed + other.changed, bytes: self.bytes + other.bytes }
    }
}

impl Network {
    fn open_file(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(&[path.to_path_buf()])?;
        Self::new(Component::Transformer, path.into(), checkpoint, None)
    }

    fn open_folder(folder: &Path) -> Result<Self> {
        let listing = fs::read_dir(folder).map_err(|e| Error::io("read the folder", folder, e).into_usage())?;
        let mut names: Vec<String> = listing.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        let (files, index) = match Choice::of(&names) {
            Choice::Index(index) => (index_files(&folder.join(&index))?, Some(folder.join(index))),
            Choice::Files(files) => (files, None),
        };
        if files.is_empty() {
            return Err(Error::usage(format!("no base model in `{}`", folder.display()))
                .expected(
                    "a folder `transformer`, or *.safetensors",
                    if names.is_empty() { "an empty folder".into() } else { names.join(", ") },
                )
                .hint("the base is a hub id, a folder in the diffusers layout, or a single file"));
        }
        let paths: Vec<PathBuf> = files.iter().map(|f| folder.join(f)).collect();
        let component = if folder.ends_with("text_encoder") { Component::TextEncoder } else { Component::Transformer };
        Self::new(component, folder.into(), Checkpoint::open(&paths)?, index)
    }

    fn new(component: Component, place: PathBuf, checkpoint: Checkpoint, index: Option<PathBuf>) -> Result<Self> {
        let is_adapter = |t: &Stored| [".lora_", ".hada_", ".lokr_"].iter().any(|part| t.name.contains(part));
        if let Some(part) = checkpoint.tensors().find(|t| is_adapter(t)) {
            return Err(Error::usage(format!("`{}` is an adapter", place.display()))
                .expected("a base model", format!("`{}`", part.name))
                .hint("the base comes first: `merge BASE ADAPTER...`; `--into-adapter` merges adapters alone"));
        }
        let modules: Vec<(String, &[usize])> = checkpoint
            .tensors()
            .filter_map(|t| Some((format!("{}.weight", module_of(component, t)?), t.shape.as_slice())))
            .collect();
        let table = ModuleTable::of_tensors(modules.iter().map(|(n, s)| (n.as_str(), *s)));
        if table.names().next().is_none() {
            return Err(Error::usage(format!("`{}` holds no linear layer", place.display()))
                .hint("the base is the model, not an adapter"));
        }
        Ok(Self { place, checkpoint, index, table })
    }

    fn out_tensors<'a>(&'a self, file: &'a CheckpointFile, job: &Job, form: &OutputForm) -> Vec<OutTensor<'a>> {
        let adapted =
            |module: &String| job.adapters.iter().any(|a| a.adapter.modules(job.component).contains_key(module));
        let out = |tensor: &'a Stored| OutTensor {
            name: tensor.name.clone(),
            dtype: out_dtype(tensor, form),
            file,
            tensor,
            module: module_of(job.component, tensor).filter(adapted),
        };
        file.tensors().iter().map(out).collect()
    }
}

fn out_dtype(tensor: &Stored, form: &OutputForm) -> Dtype {
    match form.dtype {
        Some(dtype) if tensor.is_float() => dtype,
        _ => tensor.plain_dtype(),
    }
}

/// The module whose weight a tensor is: its name without prefix. All-in-one files of ComfyUI put
/// `model.diffusion_model.` before the transformer's names.
fn module_of(component: Component, tensor: &Stored) -> Option<String> {
    let name = tensor.name.strip_suffix(".weight").filter(|_| tensor.shape.len() == 2 && tensor.is_float())?;
    Some(match component {
        Component::TextEncoder => text_name(name),
        Component::Transformer => bare(name).to_string(),
    })
}

/// transformers and diffusers refuse files without this entry.
fn with_format(mut metadata: BTreeMap<String, String>) -> BTreeMap<String, String> {
    metadata.entry("format".into()).or_insert_with(|| "pt".into());
    metadata
}

/// Fails if there is something at `out`.
pub fn check_new(out: &Path) -> Result<()> {
    if out.symlink_metadata().is_ok() {
        return Err(Error::usage(format!("`{}` exists", out.display()))
            .hint("name another output, or remove it first: nothing is overwritten"));
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(m) if m.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
    removed.map_err(|e| Error::io("remove the unfinished", path, e))
}

/// The index beside the shards: as it was, if it still holds.
fn write_index(index: &Path, folder: &Path, weight_map: &BTreeMap<String, String>, bytes: usize) -> Result<()> {
    let name = index.file_name().expect("an index is a file");
    let old = JsonObject::open(index)?;
    let same_map = old.section("weight_map")?.is_some_and(|map| {
        map.entries()
            .map(|(k, v)| (k, v.as_str().unwrap_or_default()))
            .eq(weight_map.iter().map(|(k, v)| (k.as_str(), v.as_str())))
    });
    let old_size = old.section("metadata")?.and_then(|m| m.get::<usize>("total_size").ok());
    let text = if same_map && old_size == Some(bytes) {
        fs::read(index).map_err(|e| Error::io("read", index, e))?
    } else {
        let json = serde_json::json!({"metadata": {"total_size": bytes}, "weight_map": weight_map});
        format!("{json:#}\n").into_bytes()
    };
    crate::io::write_atomic(&folder.join(name), |file| std::io::Write::write_all(file, &text))
}

/// Hard-links, or copies where that cannot be, everything below `from` that is not in `rewritten` and does not exist
/// in `to`. Hidden files are left behind.
fn link_tree(from: &Path, to: &Path, rewritten: &BTreeSet<PathBuf>) -> Result<()> {
    let listing = fs::read_dir(from).map_err(|e| Error::io("read the folder", from, e))?;
    for entry in listing {
        let path = entry.map_err(|e| Error::io("read the folder", from, e))?.path();
        let Some(name) = path.file_name().filter(|n| !n.to_string_lossy().starts_with('.')) else { continue };
        let target = to.join(name);
        if path.is_dir() {
            fs::create_dir_all(&target).map_err(|e| Error::io("create the folder", &target, e))?;
            link_tree(&path, &target, rewritten)?;
        } else if !rewritten.contains(&path) {
            // A snapshot of the hub's cache holds links to the files proper.
            let file = fs::canonicalize(&path).map_err(|e| Error::io("find", &path, e))?;
            if fs::hard_link(&file, &target).is_err() {
                fs::copy(&file, &target).map_err(|e| Error::io("copy", &target, e))?;
                fs::File::open(&target).and_then(|f| f.sync_all()).map_err(|e| Error::io("write", &target, e))?;
            }
        }
    }
    sync_parent(&to.join("x"))
}
