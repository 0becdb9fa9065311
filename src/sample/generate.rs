//! A recipe carried out: prompts through the text encoder, noise through the transformer, latents through the VAE,
//! with one network in memory at a time.

use crate::adapters::read::ModuleTable;
use crate::adapters::runtime::{combine, read_lora};
use crate::adapters::{LoraAdapter, LoraModule};
use crate::cache::fingerprint;
use crate::config::{BaseDtype, ImageSize};
use crate::error::{Error, Result};
use crate::flow::FlowMatchEuler;
use crate::kernels::Value;
use crate::kernels::linear::Lora;
use crate::model::source::{ModelSource, ModelSpec, PipelineFolder};
use crate::model::transformer::{Precision, QwenImageTransformer, TransformerConfig};
use crate::model::vae::VaeConfig;
use crate::progress;
use crate::sample::{Denoiser, Guidance, LoraUse, PromptBatch, Recipe, initial_latents, stages};
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

/// One image to make: an index into the recipe's prompts, a seed, and the adapters' strength if there is a sweep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Job {
    /// Index of the prompt.
    pub prompt: usize,
    /// The seed.
    pub seed: u64,
    /// Factor on all adapter weights.
    pub strength: Option<f64>,
}

/// An image and what it was made for.
pub struct Image {
    /// Index of its job in [`Generator::jobs`].
    pub index: usize,
    /// What it was made for.
    pub job: Job,
    /// The pixels.
    pub pixels: RgbImage,
}

/// Seconds that the stages took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// Text encoder.
    pub encode_s: f64,
    /// Loading the transformer.
    pub load_s: f64,
    /// All denoising steps of all images.
    pub denoise_s: f64,
    /// VAE, loading included, and what is done with the images.
    pub decode_s: f64,
}

/// A recipe whose model and adapters are found and checked.
pub struct Generator {
    recipe: Recipe,
    size: ImageSize,
    pipeline: PipelineFolder,
    scheduler: FlowMatchEuler,
    precision: Precision,
    device: Device,
    latent_channels: usize,
    /// Pixels per side of an image token.
    token_side: usize,
    /// By name of the file.
    adapters: BTreeMap<String, LoraAdapter>,
    notes: Vec<String>,
}

impl Generator {
    /// Finds model and adapters, fills their fingerprints into the recipe, and checks everything that can be checked
    /// without running a network. With `offline` a hub model is taken from the local cache only. The transformer runs on
    /// `device`, the text encoder and the VAE on the CPU.
    ///
    /// Errors (usage): values out of range, a missing or unfitting model or adapter, an adapter whose content is not
    /// the one that the recipe names.
    pub fn open(mut recipe: Recipe, offline: bool, device: Device) -> Result<Self> {
        recipe.check()?;
        let size = recipe.image_size()?;
        let base = match recipe.dtype.as_str() {
            "f32" => BaseDtype::F32,
            "bf16" => BaseDtype::Bf16,
            "int8" => BaseDtype::Int8,
            other => return Err(Error::usage("wrong weight type").expected("f32, bf16 or int8", other)),
        };
        // Activations on the CPU are f32 whatever the weights are; on a GPU bf16 beside all but f32.
        let compute = if device.is_cpu() || base == BaseDtype::F32 { DType::F32 } else { DType::BF16 };
        let mut hashes: BTreeMap<String, String> = BTreeMap::new();
        for lora in recipe.uses_mut() {
            let hash = match hashes.get(&lora.file) {
                Some(hash) => hash.clone(),
                None => adapter_hash(Path::new(&lora.file))?,
            };
            hashes.insert(lora.file.clone(), hash.clone());
            if !lora.hash.is_empty() && lora.hash != hash {
                return Err(Error::usage(format!("`{}` is not the adapter that the image was made with", lora.file))
                    .expected(format!("hash {}", lora.hash), hash)
                    .hint("name the adapter to use with `--lora`"));
            }
            lora.hash = hash;
        }
        let spec = ModelSpec {
            revision: recipe.revision.clone(),
            offline,
            transformer: recipe.transformer.as_deref().map(Into::into),
            ..ModelSpec::new(&recipe.model)
        };
        let pipeline = ModelSource::resolve(&spec)?;
        let transformer = TransformerConfig::from_file(&pipeline.transformer.config)?;
        let vae = VaeConfig::from_file(&pipeline.vae.config)?;
        let mut notes = Vec::new();
        let print = fingerprint(&pipeline.transformer.files()?)?;
        if !recipe.base_fingerprint.is_empty() && recipe.base_fingerprint != print {
            notes.push("the model is not the one that the image was made with; the result will differ".into());
        }
        recipe.base_fingerprint = print;
        let table = ModuleTable::new(&transformer.modules());
        let mut adapters = BTreeMap::new();
        for file in hashes.into_keys() {
            let (adapter, warnings) = read_lora(Path::new(&file), &table)?;
            notes.extend(warnings);
            adapters.insert(file, adapter);
        }
        Ok(Self {
            scheduler: FlowMatchEuler::from_file(&pipeline.scheduler)?,
            precision: Precision::of(base, compute),
            device,
            latent_channels: vae.z_dim,
            token_side: vae.spatial_compression() * transformer.patch_size,
            recipe,
            size,
            pipeline,
            adapters,
            notes,
        })
    }

    /// The recipe, with fingerprints.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// What the user should know.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The images in the order of a grid: for each prompt its seeds, for each of them the strengths.
    pub fn jobs(&self) -> Vec<Job> {
        let strengths = self.strengths();
        let prompts = 0..self.recipe.prompts.len();
        let pairs = prompts.flat_map(|prompt| self.recipe.seeds.iter().map(move |&seed| (prompt, seed)));
        pairs.flat_map(|(prompt, seed)| strengths.iter().map(move |&strength| Job { prompt, seed, strength })).collect()
    }

    /// The jobs by the adapters that they need: indices of `jobs`. Only these can share a batch, since a network
    /// carries its adapters for all of a batch.
    fn by_adapters(&self, jobs: &[Job]) -> Vec<(Vec<LoraUse>, Vec<usize>)> {
        let mut groups: Vec<(Vec<LoraUse>, Vec<usize>)> = Vec::new();
        for (i, job) in jobs.iter().enumerate() {
            let uses = self.recipe.loras_of(job.prompt, job.strength);
            match groups.iter_mut().find(|(group, _)| *group == uses) {
                Some((_, own)) => own.push(i),
                None => groups.push((uses, vec![i])),
            }
        }
        groups
    }

    fn strengths(&self) -> Vec<Option<f64>> {
        match self.recipe.strengths.as_slice() {
            [] => vec![None],
            strengths => strengths.iter().copied().map(Some).collect(),
        }
    }

    /// Makes the images, `batch_size` at a time in the transformer, and hands each to `image_done`. An image does not
    /// depend on those beside it.
    pub fn run(
        &self,
        batch_size: usize,
        quiet: bool,
        mut image_done: impl FnMut(Image) -> Result<()>,
    ) -> Result<Timing> {
        let mut timing = Timing::default();
        let began = Instant::now();
        let (positive, negative) = self.encode(quiet)?;
        timing.encode_s = began.elapsed().as_secs_f64();

        let began = Instant::now();
        let mut transformer = stages::load_transformer(&self.pipeline, self.precision, &self.device)?;
        timing.load_s = began.elapsed().as_secs_f64();

        let began = Instant::now();
        let jobs = self.jobs();
        let bar = progress::bar(jobs.len() * self.recipe.steps, "denoising", quiet);
        let mut latents: Vec<Option<Tensor>> = vec![None; jobs.len()];
        for (uses, own) in self.by_adapters(&jobs) {
            let weighted: Vec<_> = uses.iter().map(|lora| (&self.adapters[&lora.file], lora.weight)).collect();
            let combined = combine(&weighted)?;
            put_on(&mut transformer, &combined)?;
            for batch in own.chunks(batch_size.max(1)) {
                let of: Vec<Job> = batch.iter().map(|&i| jobs[i]).collect();
                let out = self.denoise(&transformer, &of, &positive, negative.as_ref(), || bar.inc(of.len() as u64))?;
                for (row, &i) in batch.iter().enumerate() {
                    latents[i] = Some(out.narrow(0, row, 1)?);
                }
            }
            take_off(&mut transformer, &combined);
        }
        bar.finish_and_clear();
        drop(transformer);
        timing.denoise_s = began.elapsed().as_secs_f64();

        let began = Instant::now();
        let vae = stages::load_vae(&self.pipeline)?;
        let bar = progress::bar(jobs.len(), "decoding", quiet);
        for (index, (job, latents)) in jobs.into_iter().zip(latents).enumerate() {
            let latents = latents.expect("every job has one of the strengths");
            let pixels = stages::to_image(&vae, &latents, self.size.height(), self.size.width())?;
            image_done(Image { index, job, pixels })?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        timing.decode_s = began.elapsed().as_secs_f64();
        Ok(timing)
    }

    /// The embeddings of the prompts, and of the negative prompt if there is guidance. Each text is encoded once.
    fn encode(&self, quiet: bool) -> Result<(Vec<Tensor>, Option<Tensor>)> {
        let negative = (self.recipe.guidance > 1.0).then_some(&self.recipe.negative_prompt);
        let texts: BTreeSet<&str> = self.recipe.prompts.iter().chain(negative).map(String::as_str).collect();
        let texts: Vec<&str> = texts.into_iter().collect();
        let bar = progress::bar(0, "encoding prompts", quiet);
        let embeds = stages::encode_prompts(&self.pipeline, &texts, |layer, layers| {
            bar.set_length(layers as u64);
            bar.set_position(layer as u64);
        })?;
        bar.finish_and_clear();
        let of = |text: &String| embeds[texts.binary_search(&text.as_str()).expect("every text is encoded")].clone();
        Ok((self.recipe.prompts.iter().map(of).collect(), negative.map(of)))
    }

    fn denoise(
        &self,
        transformer: &QwenImageTransformer,
        jobs: &[Job],
        positive: &[Tensor],
        negative: Option<&Tensor>,
        mut step_done: impl FnMut(),
    ) -> Result<Tensor> {
        let (rows, columns) = (self.size.height() / self.token_side, self.size.width() / self.token_side);
        let noise = |job: &Job| initial_latents(job.seed, self.latent_channels, rows, columns);
        let noise = Tensor::cat(&jobs.iter().map(noise).collect::<Result<Vec<_>>>()?, 0)?;
        let prompt = PromptBatch::new(&jobs.iter().map(|job| positive[job.prompt].clone()).collect::<Vec<_>>())?;
        let negative = negative.map(|embeds| PromptBatch::new(&vec![embeds.clone(); jobs.len()])).transpose()?;
        let guidance = negative.as_ref().map(|negative| Guidance { negative, scale: self.recipe.guidance });
        let denoiser = Denoiser { transformer, scheduler: &self.scheduler, image_shape: (1, rows, columns) };
        denoiser.run(noise, self.recipe.steps, &prompt, guidance, |_| step_done())
    }
}

/// Puts an adapter on the network for inference. Errors: a module that the network does not have.
fn put_on(transformer: &mut QwenImageTransformer, adapter: &LoraAdapter) -> Result<()> {
    for (name, LoraModule { a, b, scale, .. }) in &adapter.modules {
        let there = |t: &Tensor| t.to_device(transformer.device()).map(Value::constant);
        let lora = Lora { a: there(a)?, b: there(b)?, scale: *scale };
        if !transformer.set_adapter(name, Some(lora)) {
            return Err(Error::usage(format!("the adapter has a module `{name}` that the model does not have"))
                .hint("was it trained on another model?"));
        }
    }
    Ok(())
}

fn take_off(transformer: &mut QwenImageTransformer, adapter: &LoraAdapter) {
    for name in adapter.modules.keys() {
        transformer.set_adapter(name, None);
    }
}

/// The hash of an adapter's file, or of all safetensors files of its folder.
fn adapter_hash(path: &Path) -> Result<String> {
    let unreadable = |e| Error::io("read the adapter", path, e).into_usage();
    let mut files = BTreeSet::new();
    if path.is_dir() {
        for entry in std::fs::read_dir(path).map_err(unreadable)? {
            let file = entry.map_err(unreadable)?.path();
            if file.extension().is_some_and(|e| e == "safetensors") {
                files.insert(file);
            }
        }
    } else {
        files.insert(path.to_path_buf());
    }
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(&std::fs::read(file).map_err(unreadable)?);
    }
    Ok(hasher.finalize().to_hex().to_string())
}
