//! The config file: strict YAML in, one validated [`Config`] out.
//!
//! `section!` declares each section once ([`sections`]): struct, documentation, defaults, ranges. [`tree`] keeps the
//! place of every value, so that each error names file, line and column, or the `--set` it came from.

pub mod field;
pub mod memory;
pub mod reference;
pub mod sections;
pub mod size;
pub mod stages;
pub mod tree;
pub mod types;

pub use memory::{MemoryLimit, MemorySize};
pub use sections::{
    Data, Evaluation, Filter, Flow, Lora, Loss, LossGate, LossWeights, Model, Pose, Preview, Regions, Save, Target,
    Targets, Training,
};
pub use size::ImageSize;
pub use stages::{Multipliers, SigmaRange, Stage, StageFilter, StageLoss, Stages, Until};
pub use types::{
    BaseDtype, Betas, Checkpointing, CheckpointingChoice, ComputeDtype, DeviceChoice, HeldOut, LoraInit, LossWeighting,
    LrSchedule, Masks, ModulationChoice, Optimizer, Positive, Rank, Resolutions, SaveDtype, Shift, SigmaSampling,
    SwapChoice, TrainingMode,
};

use crate::error::{Error, Result};
use field::{At, Field, Range, section};
use std::path::{Path, PathBuf};
use tree::{Node, Place};

/// The prompt that stands for none: in place of a caption that is dropped, and as the negative prompt unless there is one.
/// Qwen-Image's model card passes a space where nothing is to be avoided.
pub const NO_PROMPT: &str = " ";

section! {
    /// One training run. Everything but `model` and `data.path` has a default.
    pub struct Config {
        /// The base model: a hub id, a folder, `synthetic:world` or `synthetic:tiny`; or a map with the keys below.
        model: Model;
        /// The run directory: what the run writes goes there.
        output: PathBuf = PathBuf::from("runs/train");
        /// Seed of everything random in the run.
        seed: u64 = 0, Range::at_least(0.0);
        /// `auto` (a GPU if this build can use one, else the CPU), `cpu`, or `cuda:N`.
        device: DeviceChoice = DeviceChoice::Auto;
        /// How the weights are updated.
        training: Training = Training::default();
        /// The adapter.
        lora: Lora = Lora::default();
        /// The images.
        data: Data;
        /// Noise levels.
        flow: Flow = Flow::default();
        /// The structured loss.
        loss: Loss = Loss::default();
        /// The network that finds persons: a name or a file, or a map with the keys below.
        pose: Pose = Pose::default();
        /// Weights of hands, limbs, persons and masks in the loss.
        regions: Regions = Regions::default();
        /// Staged training: a list of stages as described below, which follow one another, or `progressive`: everything
        /// for 0.4 of the run, then limbs at three times the weight until 0.7, then hands at six times and limbs at twice.
        /// An empty list trains in one piece.
        stages: Stages = Stages::default();
        /// What is written during the run.
        save: Save = Save::default();
        /// The held-out loss.
        evaluation: Evaluation = Evaluation::default();
        /// Pictures made during the run.
        preview: Preview = Preview::default();
    }
}

/// Keys that may change between a checkpoint and its resumption: none of them reaches the weights. All others must
/// stay, `training.max_steps` too, because the learning rate of every step depends on it. (`preview` may change too; it
/// `training.memory`, `model.modulation` and
/// `model.blocks_to_swap` are not part of what is compared.)
const MAY_CHANGE: [&str; 10] = [
    "output",
    "device",
    "training.checkpointing",
    "save.every",
    "save.keep",
    "save.dtype",
    "evaluation.every",
    "data.prefetch",
    "data.cache_dir",
    "model.offline",
];

impl Config {
    /// Reads a config file and applies the `--set` arguments in order.
    ///
    /// Errors (all usage): unreadable or not UTF-8, not YAML, unknown or repeated key, wrong type, out of range.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| {
            Error::usage(format!("cannot read the config file `{}`", path.display())).detail(e.to_string()).source(e)
        })?;
        let text = String::from_utf8(bytes).map_err(|e| {
            Error::usage(format!("the config file `{}` is not UTF-8 text", path.display()))
                .detail(format!("the first bad byte is at offset {}", e.utf8_error().valid_up_to()))
                .hint("save it as UTF-8")
        })?;
        Self::parse(&text, path, sets)
    }

    /// [`Config::load`] on a text; `name` is the file in errors, and its stem the default name of the run.
    pub fn parse(text: &str, name: &Path, sets: &[String]) -> Result<Self> {
        let mut root = tree::parse(text, &format!("`{}` is not a valid config file", name.display()))?;
        for argument in sets {
            tree::set(&mut root, argument, |path| match path {
                "model" => Some("path"),
                "pose" => Some("network"),
                _ if path.starts_with("lora.target_modules.") => Some("name"),
                _ => None,
            })?;
        }
        fill_in(&mut root, name);
        let config = Self::read(&root, &At::root(name))?;
        config.check_combinations()?;
        Ok(config)
    }

    /// Rules between several keys.
    fn check_combinations(&self) -> Result<()> {
        let training = &self.training;
        if training.warmup_steps > training.max_steps {
            return Err(Error::usage("`training.warmup_steps` is longer than the run")
                .expected(format!("at most `training.max_steps`, {}", training.max_steps), training.warmup_steps));
        }
        if self.flow.sigma_min >= self.flow.sigma_max {
            return Err(Error::usage("the range of noise levels is empty")
                .expected("`flow.sigma_min` below `flow.sigma_max`", self.flow.sigma_min)
                .detail(format!("`flow.sigma_max` is {}", self.flow.sigma_max)));
        }
        if training.checkpointing == CheckpointingChoice::Auto && training.memory.is_none() {
            return Err(Error::usage("`training.checkpointing: auto` needs to know how much memory there is")
                .expected("`training.memory` beside it", "none")
                .hint("`training.memory: auto` takes what is free, `training.memory: 24GB` that much"));
        }
        self.stages.spans(training.max_steps)?;
        for (_, stage) in self.stages.spans(training.max_steps)? {
            let LossWeights { reconstruction, pose, count } = stage.loss.or(&self.loss.weights);
            if reconstruction + pose + count == 0.0 {
                return Err(Error::usage(format!("the weights of the loss are all 0 in the stage `{}`", stage.name))
                    .expected("one of its `loss` above 0", "reconstruction 0, pose 0, count 0"));
            }
        }
        let (weights, gate) = (&self.loss.weights, &self.loss.gate);
        if weights.reconstruction + weights.pose + weights.count == 0.0 {
            return Err(Error::usage("the weights of the loss are all 0")
                .expected("one of `loss.weights` above 0", "reconstruction 0, pose 0, count 0"));
        }
        if gate.from > gate.to {
            return Err(Error::usage("the gate of the structured loss is empty")
                .expected("`loss.gate.from` at most `loss.gate.to`", gate.from)
                .detail(format!("`loss.gate.to` is {}", gate.to)));
        }
        let preview = &self.preview;
        if preview.every > 0 && (preview.prompts.is_empty() || preview.seeds.is_empty()) {
            let empty = if preview.prompts.is_empty() { "prompts" } else { "seeds" };
            return Err(Error::usage(format!("`preview.every` is {}, but `preview.{empty}` is empty", preview.every))
                .hint("say what to show: `preview: {every: 100, prompts: [a cat on a chair], seeds: [1]}`"));
        }
        if self.data.caption_weight == 0.0 && self.data.caption_dropout == 0.0 {
            return Err(Error::usage("every sample would have weight 0")
                .detail("`data.caption_weight` is 0 and no caption is dropped (`data.caption_dropout` is 0)"));
        }
        Ok(())
    }

    /// Fails if the config asks for what this build cannot do. Reading a config does not, nor is it asked where a run is planned
    /// for another machine.
    pub fn check_supported(&self) -> Result<()> {
        if matches!(self.device, DeviceChoice::Cuda(_)) && cfg!(not(feature = "cuda")) {
            return Err(crate::device::no_cuda(self.device));
        }
        Ok(())
    }

    /// The resolved config as YAML: every key, in the order of the reference page. Parses back to this config.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(&self.write()).expect("a tree of plain values is YAML")
    }

    /// The config for the adapter's metadata: JSON with sorted keys, without `output`, `device`, `preview`, `training.memory`, `model.modulation` and `model.blocks_to_swap`,
    /// which reach no weight (nor does `loss` where `data.pose_loss_weight` is 0, nor then a `pose` that was left alone), and without paths of this machine (a model or data folder is reduced to its name, the cache folder left out).
    pub fn embedded_json(&self) -> String {
        let mut root = self.embedded();
        if self.data.pose_loss_weight == 0.0 {
            root.remove("loss");
            if self.pose == Pose::default() {
                root.remove("pose");
            }
        }
        serde_json::to_value(root).expect("a tree of plain values is JSON").to_string()
    }

    fn embedded(&self) -> Node {
        let mut config = self.clone();
        let model = Path::new(&config.model.path);
        if model.is_absolute() || model.starts_with("~") || model.exists() {
            config.model.path = last_component(model);
        }
        for file in [&mut config.model.transformer, &mut config.model.vae, &mut config.model.text_encoder] {
            *file = file.as_deref().map(|path| last_component(path).into());
        }
        config.data.path = last_component(&config.data.path).into();
        if let Masks::Folder(folder) = &config.data.masks {
            config.data.masks = Masks::Folder(last_component(folder).into());
        }
        config.loss.decoder = config.loss.decoder.as_deref().map(|path| last_component(path).into());
        for source in [Some(&mut config.pose.network), Some(&mut config.pose.body), config.pose.hand.as_mut()] {
            // A name or a hub id is no path of this machine; its file may have moved since.
            if let Some(source) = source
                && (Path::new(&*source).exists() || Path::new(&*source).extension().is_some())
            {
                *source = last_component(Path::new(&*source));
            }
        }
        let mut root = config.write();
        root.remove("output");
        root.remove("device");
        root.remove("preview");
        root.get_mut("training").expect("a section of the config").remove("memory");
        let model = root.get_mut("model").expect("a section of the config");
        ["modulation", "blocks_to_swap"].into_iter().for_each(|key| model.remove(key));
        root.get_mut("data").expect("a section of the config").remove("cache_dir");
        root
    }

    /// What differs between two configs in a way that a resumed run must not: `key: theirs -> ours` per key. Of paths
    /// only the last component counts, so that a dataset or model may move; their contents are checked elsewhere.
    pub fn differences(&self, saved: &Config) -> Vec<String> {
        let mut found = Vec::new();
        compare("", &saved.embedded(), &self.embedded(), &mut found);
        found
    }

    /// Takes over what this config leaves open and the config of an earlier part of the run has: the types of the base and of
    /// what is computed, and what is kept for the backward pass.
    pub fn take_over(&mut self, saved: &Config) {
        if self.model.dtype == BaseDtype::Auto {
            self.model.dtype = saved.model.dtype;
        }
        let (training, saved) = (&mut self.training, &saved.training);
        if training.dtype == ComputeDtype::Auto {
            training.dtype = saved.dtype;
        }
        if training.checkpointing == CheckpointingChoice::Auto {
            training.checkpointing = saved.checkpointing;
        }
    }

    /// The folder for cached latents and embeddings.
    pub fn cache_dir(&self) -> PathBuf {
        match &self.data.cache_dir {
            Some(dir) => dir.clone(),
            None => self.output.parent().unwrap_or(Path::new("")).join(".cache"),
        }
    }
}

/// Defaults that depend on other values, as the reference page shows them; [`fill_in`] applies them.
const DERIVED_DEFAULTS: [(&str, &str); 2] = [("output", "runs/<name of the config file>"), ("lora.alpha", "lora.rank")];

/// Adds the defaults that depend on other values.
fn fill_in(root: &mut Node, name: &Path) {
    if root.get("output").is_none()
        && let Some(stem) = name.file_stem()
    {
        let output = Node::text(format!("runs/{}", stem.to_string_lossy()));
        root.insert("output", Place::Made, output);
    }
    if let Some(training) = root.get_mut("training")
        && training.get("memory").is_some_and(|memory| !matches!(memory.content, tree::Content::Null))
        && training.get("checkpointing").is_none()
    {
        training.insert("checkpointing", Place::Made, CheckpointingChoice::Auto.write());
    }
    if let Some(lora) = root.get_mut("lora")
        && lora.get("alpha").is_none()
        && let Some(rank) = lora.get("rank").cloned()
    {
        lora.insert("alpha", Place::Made, rank);
    }
}

fn last_component(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn compare(key: &str, saved: &Node, now: &Node, found: &mut Vec<String>) {
    if MAY_CHANGE.contains(&key) || saved == now {
        return;
    }
    match (&saved.content, &now.content) {
        (tree::Content::Map(a), tree::Content::Map(b)) if a.len() == b.len() => {
            for ((name, saved), (_, now)) in a.iter().zip(b) {
                let key = if key.is_empty() { name.name.clone() } else { format!("{key}.{}", name.name) };
                compare(&key, saved, now, found);
            }
        }
        _ => found.push(format!("{key}: {} -> {}", saved.inline(), now.inline())),
    }
}

#[cfg(test)]
mod tests;
