//! Where a model comes from: a hub id, a folder in the diffusers layout, or the synthetic pipeline.
//!
//! What `model:` names is decided in this order:
//! 1. `synthetic:tiny` and `synthetic:world` are the built-in pipelines ([`crate::model::synth`]).
//! 2. A folder that exists is that folder, even if its name looks like a hub id; `~/` is the home directory.
//! 3. `owner/name` is a hub id. A folder that does not exist is never meant by such a name: write `./owner/name`.

use crate::error::{Error, Result, nearest};
use crate::flow::FlowMatchEuler;
use crate::io::Weights;
use crate::io::hub::{self, HubOptions, Part, RepoId, Wanted};
use crate::model::identify::{self, PARTS};
use crate::model::synth;
use crate::model::text_encoder::TextEncoderConfig;
use crate::model::transformer::TransformerConfig;
use crate::model::vae::VaeConfig;
use std::path::{Path, PathBuf};

/// The parts of the config file's `model:` that say where the weights are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelSpec {
    /// Hub id, folder, or a built-in model ([`Synthetic`]).
    pub path: String,
    /// Branch, tag or commit of a hub id.
    pub revision: Option<String>,
    /// Use the hub's cache only.
    pub offline: bool,
    /// A safetensors file or a folder that replaces the transformer's weights.
    pub transformer: Option<PathBuf>,
    /// The same for the autoencoder.
    pub vae: Option<PathBuf>,
    /// The same for the text encoder.
    pub text_encoder: Option<PathBuf>,
}

impl ModelSpec {
    /// A model without overrides.
    pub fn new(path: impl Into<String>) -> Self {
        Self { path: path.into(), ..Self::default() }
    }

    fn overrides(&self) -> [(&'static str, Option<&PathBuf>); 3] {
        [
            ("transformer", self.transformer.as_ref()),
            ("vae", self.vae.as_ref()),
            ("text_encoder", self.text_encoder.as_ref()),
        ]
    }

    fn is_overridden(&self, part: &str) -> bool {
        self.overrides().iter().any(|(name, path)| *name == part && path.is_some())
    }
}

/// What the text after `model:` means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A repository on the hub.
    Hub(RepoId),
    /// A folder on this machine.
    Folder(PathBuf),
    /// A built-in pipeline.
    Synthetic(Synthetic),
}

/// The built-in pipelines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Synthetic {
    /// `synthetic:tiny`: random weights.
    Tiny,
    /// `synthetic:world`: trained on the drawn world.
    World,
}

/// The files of one network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkFiles {
    /// Its `config.json`.
    pub config: PathBuf,
    /// The folder with its weights, or the one file that holds them.
    pub weights: PathBuf,
}

impl NetworkFiles {
    /// Maps the weights; see [`Weights::open`].
    pub fn open(&self) -> Result<Weights> {
        Weights::open(&self.weights)
    }

    /// The config and every weight file, which together are the network's identity in cache keys.
    ///
    /// Errors: those of [`Weights::open`].
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let weights = self.open()?;
        let mut files = vec![self.config.clone()];
        files.extend(weights.files().iter().map(|f| f.path().to_path_buf()));
        Ok(files)
    }
}

/// A whole pipeline whose configs are read and fit together, and whose weight files are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PipelineFolder {
    /// `QwenImageTransformer2DModel`.
    pub transformer: NetworkFiles,
    /// `AutoencoderKLQwenImage`.
    pub vae: NetworkFiles,
    /// `Qwen2_5_VLForConditionalGeneration`.
    pub text_encoder: NetworkFiles,
    /// Folder of the tokenizer's files.
    pub tokenizer: PathBuf,
    /// `scheduler_config.json`.
    pub scheduler: PathBuf,
}

impl ModelSource {
    /// Decides what `text` means; see the module's description.
    ///
    /// Errors: neither an existing folder nor of the form of a hub id; a file.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(name) = text.strip_prefix("synthetic:") {
            return match name {
                "tiny" => Ok(Self::Synthetic(Synthetic::Tiny)),
                "world" => Ok(Self::Synthetic(Synthetic::World)),
                other => Err(Error::usage(format!("no synthetic model `{other}`"))
                    .expected("synthetic:tiny or synthetic:world", text)),
            };
        }
        let path = expand_home(text);
        if path.is_dir() {
            return Ok(Self::Folder(path));
        }
        if path.is_file() {
            return Err(Error::usage(format!("`{text}` is a file")).hint(
                "`model:` wants a folder in the diffusers layout or a hub id; a single file replaces one network: \
                 `model: {path: Qwen/Qwen-Image, transformer: FILE}`",
            ));
        }
        if let Some(repo) = RepoId::parse(text) {
            return Ok(Self::Hub(repo));
        }
        let mut error = Error::usage(format!("no model at `{text}`"))
            .expected("a folder, a hub id (owner/name), synthetic:tiny or synthetic:world", "nothing of that name");
        if let Some(near) = near_sibling(&path) {
            error = error.detail(format!("the nearest name there is `{near}`"));
        }
        Err(error)
    }

    /// Brings the model to this machine if need be, and checks its parts. Downloads show a progress bar.
    pub fn resolve(spec: &ModelSpec) -> Result<PipelineFolder> {
        Self::resolve_with(spec, HubOptions { observer: Some(hub::progress_bar(&spec.path)), ..HubOptions::from_env() })
    }

    /// [`ModelSource::resolve`] with the given way to the hub; `spec` decides about revision, and about offline if it
    /// says so.
    ///
    /// Errors: what [`ModelSource::parse`] and [`hub::fetch`] give; a missing part; a model of another family;
    /// configs that do not fit together.
    pub fn resolve_with(spec: &ModelSpec, hub_options: HubOptions) -> Result<PipelineFolder> {
        let source = Self::parse(&spec.path)?;
        if let (Some(revision), Self::Folder(_) | Self::Synthetic(_)) = (&spec.revision, &source) {
            return Err(Error::usage(format!("`revision: {revision}` has no meaning for `{}`", spec.path))
                .hint("only models of the hub have revisions"));
        }
        let folder = match &source {
            Self::Folder(folder) => folder.clone(),
            Self::Synthetic(Synthetic::Tiny) => synth::tiny_in_cache()?,
            Self::Synthetic(Synthetic::World) => synth::world_in_cache()?,
            Self::Hub(repo) => {
                let options = HubOptions {
                    revision: spec.revision.clone(),
                    offline: spec.offline || hub_options.offline,
                    ..hub_options
                };
                hub::fetch(repo, &wanted(spec), &|folder| check_configs(&locate(folder, spec)?), &options)?
            }
        };
        identify::check_layout(&folder, &|part| spec.is_overridden(part))?;
        let pipeline = locate(&folder, spec)?;
        check_configs(&pipeline)?;
        Ok(pipeline)
    }
}

/// The files that a pipeline needs of a repository. Weights that are replaced need not be fetched.
fn wanted(spec: &ModelSpec) -> Wanted {
    let part = |folder: &&str| Part {
        folder: folder.to_string(),
        weights: identify::is_network(folder) && !spec.is_overridden(folder),
    };
    let parts = PARTS.iter().map(part).collect();
    Wanted { files: vec!["model_index.json".into()], parts, ..Wanted::default() }
}

fn locate(folder: &Path, spec: &ModelSpec) -> Result<PipelineFolder> {
    let network = |part: &str| -> Result<NetworkFiles> {
        let own = folder.join(part);
        let base = NetworkFiles { config: own.join("config.json"), weights: own };
        match spec.overrides().into_iter().find(|(name, _)| *name == part) {
            Some((_, Some(path))) => replaced(part, path, base),
            _ => Ok(base),
        }
    };
    Ok(PipelineFolder {
        transformer: network("transformer")?,
        vae: network("vae")?,
        text_encoder: network("text_encoder")?,
        tokenizer: folder.join("tokenizer"),
        scheduler: folder.join("scheduler").join("scheduler_config.json"),
    })
}

/// The files of a network that `model: {part: path}` replaces. A file takes the base's config; so does a folder
/// without one; of a whole pipeline's folder the part is meant.
fn replaced(part: &str, path: &Path, base: NetworkFiles) -> Result<NetworkFiles> {
    let path = expand_home(&path.to_string_lossy());
    let inner = path.join(part);
    let path = if inner.is_dir() { inner } else { path };
    if !path.exists() {
        let mut error = Error::usage(format!("`model.{part}`: nothing at `{}`", path.display()));
        if let Some(near) = near_sibling(&path) {
            error = error.detail(format!("the nearest name there is `{near}`"));
        }
        return Err(error.hint("a safetensors file or a folder on this machine is wanted here"));
    }
    let own_config = path.join("config.json");
    let config = if own_config.is_file() { own_config } else { base.config };
    Ok(NetworkFiles { config, weights: path })
}

/// Reads every config and holds them against each other.
fn check_configs(pipeline: &PipelineFolder) -> Result<()> {
    if let Some(folder) = pipeline.tokenizer.parent() {
        identify::check_pipeline_class(folder)?;
    }
    let transformer = TransformerConfig::from_file(&pipeline.transformer.config)?;
    let vae = VaeConfig::from_file(&pipeline.vae.config)?;
    let text_encoder = TextEncoderConfig::from_file(&pipeline.text_encoder.config)?;
    FlowMatchEuler::from_file(&pipeline.scheduler)?;
    let agree = |what: &str, config: &Path, expected: usize, other: &Path, found: usize| {
        if expected == found {
            return Ok(());
        }
        Err(Error::usage("the parts of the model do not fit together")
            .detail(format!("{what}: {expected} in `{}`, {found} in `{}`", config.display(), other.display()))
            .hint("take all parts from one model"))
    };
    let (tf, te) = (&pipeline.transformer.config, &pipeline.text_encoder.config);
    let patch = transformer.patch_size * transformer.patch_size;
    agree("width of the prompt embeddings", tf, transformer.joint_attention_dim, te, text_encoder.hidden_size)?;
    agree("channels of a packed latent", tf, transformer.in_channels, &pipeline.vae.config, vae.z_dim * patch)?;
    agree("latent channels", tf, transformer.out_channels, &pipeline.vae.config, vae.z_dim)
}

fn expand_home(text: &str) -> PathBuf {
    match (text.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => text.into(),
    }
}

/// The name beside `path` that is nearest to it in spelling.
fn near_sibling(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let names: Vec<String> =
        std::fs::read_dir(parent).ok()?.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    nearest(name, names.iter().map(String::as_str)).map(String::from)
}
