//! Pictures during training: fixed prompts and seeds, by the base model and with what is trained.
//!
//! `samples/base/` and `samples/step-000100/` hold single pictures, `samples/step-000100.png` both side by side. Nothing
//! here reaches the training: the noise has its own stream, no gradient is recorded, and a failure becomes a note.

use crate::cache::{Key, PROMPT_EMBEDS, Store};
use crate::config::{self, Config, ImageSize};
use crate::error::{Error, Result};
use crate::flow::FlowMatchEuler;
use crate::io::png;
use crate::model::source::PipelineFolder;
use crate::model::transformer::QwenImageTransformer;
use crate::model::vae::VaeConfig;
use crate::sample::{Denoiser, Guidance, PromptBatch, grid, initial_latents, label, stages};
use crate::train::run_dir::RunDir;
use crate::train::trainable::Trainable;
use candle_core::Tensor;
use image::RgbImage;
use serde_json::json;
use std::path::{Path, PathBuf};

/// The keyword under which a picture says what it was made of.
const KEYWORD: &str = "qwen-lora-preview";

/// Makes the pictures of one run.
pub struct Previews {
    settings: config::Preview,
    max_steps: u64,
    size: ImageSize,
    dir: RunDir,
    pipeline: PipelineFolder,
    /// Identity of the base weights.
    base_fingerprint: String,
    /// Embeddings of the prompts, (tokens, D), and of the negative prompt.
    embeds: Vec<Tensor>,
    negative: Option<Tensor>,
    base: Option<Vec<RgbImage>>,
}

/// The prompts whose embeddings the caches must hold: none if previews are off.
pub fn prompts(settings: &config::Preview) -> Vec<&str> {
    if settings.every == 0 {
        return Vec::new();
    }
    settings.prompts.iter().chain([&settings.negative_prompt]).map(String::as_str).collect()
}

impl Previews {
    /// The previews that the config asks for, with the cached embeddings of [`prompts`]; `None` if they are off.
    ///
    /// Errors: a cache entry that cannot be read.
    pub fn new(
        config: &Config,
        dir: &RunDir,
        pipeline: &PipelineFolder,
        base_fingerprint: &str,
        keys: &[Key],
    ) -> Result<Option<Self>> {
        let settings = config.preview.clone();
        if settings.every == 0 {
            return Ok(None);
        }
        let store = Store::open(&config.cache_dir())?;
        let read = |key: &Key| -> Result<Tensor> {
            let embeds = store.get(key)?.and_then(|mut entry| entry.remove(PROMPT_EMBEDS));
            embeds.ok_or_else(|| Error::run("the embedding of a preview's prompt has vanished from the cache"))
        };
        let mut embeds: Vec<Tensor> = keys.iter().map(read).collect::<Result<_>>()?;
        let negative = embeds.pop().filter(|_| settings.guidance > 1.0);
        Ok(Some(Self {
            size: settings.size.unwrap_or_else(|| ImageSize::square(config.data.resolution.sides()[0])),
            settings,
            max_steps: config.training.max_steps as u64,
            dir: dir.clone(),
            pipeline: pipeline.clone(),
            base_fingerprint: base_fingerprint.into(),
            embeds,
            negative,
            base: None,
        }))
    }

    /// Whether pictures are due after `step` steps.
    pub fn is_due(&self, step: u64) -> bool {
        step == self.max_steps || step.is_multiple_of(self.settings.every as u64)
    }

    /// Removes pictures of steps that are yet to come and makes those of the base model, unless they are there.
    /// Gives a note if that fails.
    pub fn begin(&mut self, step: u64, model: &mut QwenImageTransformer, trainable: &Trainable) -> Option<String> {
        self.try_begin(step, model, trainable).err().map(|e| format!("no pictures of the base model: {e}"))
    }

    /// Makes the pictures after `step` steps. Gives a note if that fails.
    pub fn make(&self, step: u64, model: &QwenImageTransformer) -> Option<String> {
        self.try_make(step, model).err().map(|e| format!("no pictures after step {step}: {e}"))
    }

    fn try_begin(&mut self, step: u64, model: &mut QwenImageTransformer, trainable: &Trainable) -> Result<()> {
        remove_later(&self.dir.samples(), step)?;
        let paths = self.paths("base");
        let made_of = self.made_of().to_string();
        let there = |path: &PathBuf| match png::read_text(path, KEYWORD) {
            Ok(Some(text)) if text == made_of => Some(image::open(path).ok()?.to_rgb8()),
            _ => None,
        };
        self.base = paths.iter().map(there).collect();
        // All weights after the first step are no longer the base model.
        if self.base.is_none() && (trainable.is_adapter() || step == 0) {
            trainable.set_active(model, false);
            let images = self.images(model);
            trainable.set_active(model, true);
            let images = images?;
            self.write(&paths, &images)?;
            self.base = Some(images);
        }
        Ok(())
    }

    fn try_make(&self, step: u64, model: &QwenImageTransformer) -> Result<()> {
        let images = self.images(model)?;
        let name = format!("step-{step:06}");
        self.write(&self.paths(&name), &images)?;
        let head = format!("step {step}");
        let (columns, cells) = match &self.base {
            Some(base) => {
                let pairs = base.iter().zip(&images).flat_map(|(a, b)| [a.clone(), b.clone()]);
                (vec!["base".to_string(), head], pairs.collect::<Vec<_>>())
            }
            None => (vec![head], images),
        };
        let rows: Vec<String> = self
            .pairs()
            .map(|(i, seed)| {
                let number = format!("prompt {}", i + 1);
                format!("{} (seed {seed})", label::writable(&self.settings.prompts[i], &number))
            })
            .collect();
        let path = self.dir.samples().join(format!("{name}.png"));
        png::write(&path, &grid::draw(&columns, &rows, &cells), &[(KEYWORD, &self.made_of().to_string())])
    }

    /// Every prompt's index with every seed.
    fn pairs(&self) -> impl Iterator<Item = (usize, u64)> {
        let prompts = 0..self.settings.prompts.len();
        prompts.flat_map(|i| self.settings.seeds.iter().map(move |&seed| (i, seed)))
    }

    fn paths(&self, folder: &str) -> Vec<PathBuf> {
        let folder = self.dir.samples().join(folder);
        self.pairs().map(|(i, seed)| folder.join(picture_name(i, seed))).collect()
    }

    /// What the pictures depend on beside what is trained.
    fn made_of(&self) -> serde_json::Value {
        let s = &self.settings;
        json!({
            "prompts": s.prompts, "negative_prompt": s.negative_prompt, "seeds": s.seeds, "steps": s.steps,
            "size": self.size.to_string(), "guidance": s.guidance, "base_fingerprint": self.base_fingerprint,
        })
    }

    fn write(&self, paths: &[PathBuf], images: &[RgbImage]) -> Result<()> {
        let text = self.made_of().to_string();
        for (path, image) in paths.iter().zip(images) {
            let folder = path.parent().expect("a picture lies in a folder");
            std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
            png::write(path, image, &[(KEYWORD, &text)])?;
        }
        Ok(())
    }

    /// One picture for each of [`Self::pairs`]. The VAE is in memory only at the end.
    fn images(&self, model: &QwenImageTransformer) -> Result<Vec<RgbImage>> {
        let vae = VaeConfig::from_file(&self.pipeline.vae.config)?;
        let side = vae.spatial_compression() * model.config().patch_size;
        let (rows, columns) = (self.size.height() / side, self.size.width() / side);
        let scheduler = FlowMatchEuler::from_file(&self.pipeline.scheduler)?;
        let denoiser = Denoiser { transformer: model, scheduler: &scheduler, image_shape: (1, rows, columns) };
        let batch = |embeds: &Tensor| PromptBatch::new(std::slice::from_ref(embeds));
        let negative = self.negative.as_ref().map(batch).transpose()?;
        let mut latents = Vec::new();
        for (i, seed) in self.pairs() {
            let noise = initial_latents(seed, vae.z_dim, rows, columns)?;
            let scale = self.settings.guidance;
            let guidance = negative.as_ref().map(|negative| Guidance { negative, scale });
            latents.push(denoiser.run(noise, self.settings.steps, &batch(&self.embeds[i])?, guidance, |_| {})?);
        }
        let vae = stages::load_vae(&self.pipeline)?;
        latents.iter().map(|z| stages::to_image(&vae, z, self.size.height(), self.size.width())).collect()
    }
}

/// The file of one picture in its folder.
pub fn picture_name(prompt: usize, seed: u64) -> String {
    format!("{}-{seed}.png", prompt + 1)
}

/// The steps in `samples` that have a folder of pictures, in order.
pub fn steps_in(samples: &Path) -> Vec<u64> {
    let Ok(entries) = std::fs::read_dir(samples) else { return Vec::new() };
    let step = |name: String| name.strip_prefix("step-")?.parse().ok();
    let mut steps: Vec<u64> = entries.filter_map(|e| step(e.ok()?.file_name().into_string().ok()?)).collect();
    steps.sort_unstable();
    steps
}

/// Removes what a longer run, of which this one is resumed, has made after `step`.
fn remove_later(samples: &Path, step: u64) -> Result<()> {
    for later in steps_in(samples).into_iter().filter(|&s| s > step) {
        let folder = samples.join(format!("step-{later:06}"));
        std::fs::remove_dir_all(&folder).map_err(|e| Error::io("remove", &folder, e))?;
        // Its picture side by side may be missing.
        let _ = std::fs::remove_file(folder.with_extension("png"));
    }
    Ok(())
}
