//! What an image was made of, written into it and read back from it.

use crate::config::{ImageSize, NO_PROMPT};
use crate::error::{Error, Result};
use crate::io::png;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The keyword of the PNG text chunk that holds a recipe.
pub const KEYWORD: &str = "qwen-lora";

/// An adapter file and how strongly it is applied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraUse {
    /// The file, as it was named.
    pub file: String,
    /// Factor on what the adapter adds.
    pub weight: f64,
    /// Hash of the file's bytes; empty until it is read.
    pub hash: String,
}

/// Everything that the pixels depend on: every prompt with every seed, at every strength.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name and version of the program.
    pub program: String,
    /// Hub id, folder or built-in model.
    pub model: String,
    /// Branch, tag or commit of a hub id.
    pub revision: Option<String>,
    /// A file or folder in place of the model's own transformer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transformer: Option<String>,
    /// Fingerprint of the transformer's files; empty until they are read.
    pub base_fingerprint: String,
    /// What to show.
    pub prompts: Vec<String>,
    /// What not to show; unused when `guidance` is 1.
    pub negative_prompt: String,
    /// One image for each.
    pub seeds: Vec<u64>,
    /// The adapters.
    pub loras: Vec<LoraUse>,
    /// Adapters of single prompts, beside `loras`: a list for each prompt, or no list at all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routed: Vec<Vec<LoraUse>>,
    /// Factors on all adapter weights, one image for each; empty for one image at the weights as they are.
    pub strengths: Vec<f64>,
    /// Denoising steps.
    pub steps: usize,
    /// Scale of true classifier-free guidance; 1 is none.
    pub guidance: f64,
    /// `WIDTHxHEIGHT`.
    pub size: String,
    /// Type of the transformer's weights: `f32`, `bf16` or `int8`.
    pub dtype: String,
}

/// The recipe's program.
pub const PROGRAM: &str = concat!("qwen-lora ", env!("CARGO_PKG_VERSION"));

impl Recipe {
    /// One square image of `model` with each prompt, as the published pipeline is used: 50 steps, guidance 4, f32.
    pub fn of(model: &str, prompts: Vec<String>) -> Self {
        Self {
            program: PROGRAM.into(),
            model: model.into(),
            revision: None,
            transformer: None,
            base_fingerprint: String::new(),
            prompts,
            negative_prompt: NO_PROMPT.into(),
            seeds: vec![0],
            loras: Vec::new(),
            routed: Vec::new(),
            strengths: Vec::new(),
            steps: 50,
            guidance: 4.0,
            size: ImageSize::default().to_string(),
            dtype: "f32".into(),
        }
    }

    /// Reads the recipe of an image.
    ///
    /// Errors (usage): not a PNG file, one without a recipe, a recipe of another version.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let text = png::read_text(path, KEYWORD)?.ok_or_else(|| {
            Error::usage(format!("`{name}` holds no recipe"))
                .detail(format!("there is no text `{KEYWORD}` in it"))
                .hint("only images made by `qwen-lora generate` have one, and some programs remove it")
        })?;
        serde_json::from_str(&text).map_err(|e| {
            Error::usage(format!("the recipe in `{name}` cannot be read"))
                .detail(e.to_string())
                .hint("another version of qwen-lora may have written it")
        })
    }

    /// The recipe as the text of a PNG file.
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).expect("a recipe is plain data")
    }

    /// The size of the images.
    pub fn image_size(&self) -> Result<ImageSize> {
        self.size.parse()
    }

    /// The adapters of a prompt at `strength`. Weights are rounded to six decimals: short numbers are the same after
    /// being written and read.
    pub fn loras_of(&self, prompt: usize, strength: Option<f64>) -> Vec<LoraUse> {
        let weight = |lora: &LoraUse| (lora.weight * strength.unwrap_or(1.0) * 1e6).round() / 1e6;
        let own = self.routed.get(prompt).into_iter().flatten();
        self.loras.iter().chain(own).map(|lora| LoraUse { weight: weight(lora), ..lora.clone() }).collect()
    }

    /// Every use of an adapter.
    pub fn uses_mut(&mut self) -> impl Iterator<Item = &mut LoraUse> {
        self.loras.iter_mut().chain(self.routed.iter_mut().flatten())
    }

    /// The recipe of one image of this one, which makes that image and nothing else.
    pub fn single(&self, prompt: usize, seed: u64, strength: Option<f64>) -> Self {
        Self {
            prompts: vec![self.prompts[prompt].clone()],
            seeds: vec![seed],
            loras: self.loras_of(prompt, strength),
            routed: Vec::new(),
            strengths: Vec::new(),
            ..self.clone()
        }
    }

    /// Checks the values that no other part checks. Errors (usage): nothing to make, numbers out of range.
    pub fn check(&self) -> Result<()> {
        self.image_size()?;
        if self.prompts.is_empty() {
            return Err(Error::usage("there is no prompt").hint("give one with `--prompt`"));
        }
        if self.seeds.is_empty() {
            return Err(Error::usage("there is no seed"));
        }
        if !(1..=1000).contains(&self.steps) {
            return Err(Error::usage("wrong number of steps").expected("1 to 1000", self.steps));
        }
        if !(1.0..=100.0).contains(&self.guidance) {
            return Err(Error::usage("wrong guidance scale").expected("1 (no guidance) to 100", self.guidance));
        }
        if !self.routed.is_empty() && self.routed.len() != self.prompts.len() {
            return Err(Error::usage("wrong number of lists of adapters")
                .expected(format!("one for each of {} prompts", self.prompts.len()), self.routed.len()));
        }
        let uses = self.loras.iter().chain(self.routed.iter().flatten());
        for value in self.strengths.iter().chain(uses.map(|l| &l.weight)) {
            if !(-100.0..=100.0).contains(value) {
                return Err(Error::usage("wrong adapter strength").expected("a number from -100 to 100", value));
            }
        }
        if !self.strengths.is_empty() && self.loras.is_empty() && self.routed.iter().all(Vec::is_empty) {
            return Err(Error::usage("`--strengths` sweeps over adapters, and there is none")
                .hint("name one with `--lora FILE`"));
        }
        Ok(())
    }
}
