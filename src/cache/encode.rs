//! Filling the caches: captions through the text encoder, images through the VAE, one network in memory at a time.

use super::{CachedSamples, Entry, FillOptions, Filled, Key, LATENTS, MASK, PROMPT_EMBEDS, Store, fill, fingerprint};
use crate::config::NO_PROMPT;
use crate::data::image::to_pixels;
use crate::data::mask::{LATENT_PIXELS, latent_mask};
use crate::data::resample::cover_crop;
use crate::data::{Dataset, Mask, Sample};
use crate::error::{Error, Result};
use crate::model::source::PipelineFolder;
use crate::model::text_encoder::{PromptEncoder, Residency, TextEncoder, TextEncoderConfig};
use crate::model::tokenizer::PromptTokenizer;
use crate::model::vae::{Vae, VaeConfig};
use crate::prompt::{TEXT_TO_IMAGE, Template};
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// What the caches are filled with.
pub struct CacheRequest<'a> {
    /// The networks.
    pub pipeline: &'a PipelineFolder,
    /// The captioned images.
    pub dataset: &'a Dataset,
    /// The shapes in which each image is wanted.
    pub samples: &'a [Sample],
    /// Prompts that are wanted beside the captions.
    pub extra_prompts: &'a [&'a str],
    /// Text tokens kept of a caption at most.
    pub max_sequence_length: usize,
    /// No progress bars.
    pub quiet: bool,
    /// Asked between two entries; true stops with [`Error::interrupted`].
    pub stop: &'a dyn Fn() -> bool,
}

/// What filling did.
pub struct CacheReport {
    /// Embeddings.
    pub prompts: Filled,
    /// The entries of the extra prompts, in order.
    pub extra_prompts: Vec<Key>,
    /// Latents.
    pub latents: Filled,
}

/// Captions that go through the text encoder together: when it is streamed from disk, once for all of them.
const PROMPTS_AT_ONCE: usize = 256;

/// Makes sure that all captions (and what stands for a dropped one) and all images are cached below `dir`.
///
/// First the text encoder runs, streamed layer by layer, then the VAE; a network whose entries are all there is never
/// loaded.
pub fn fill_caches(dir: &Path, request: &CacheRequest) -> Result<(CachedSamples, CacheReport)> {
    let store = Store::open(dir)?;
    let (caption_keys, prompts) = prompt_embeds(&store, request)?;
    let (latents_of, latents) = image_latents(&store, request)?;
    let mask_of = masks(&store, request)?;
    let key_of = |caption: &str| caption_keys[caption];
    let samples = CachedSamples {
        latents: store.clone(),
        prompt_embeds: store,
        latents_of,
        caption_of: request.dataset.items().iter().map(|item| key_of(&item.caption)).collect(),
        no_caption: key_of(NO_PROMPT),
        mask_of,
    };
    let extra_prompts = request.extra_prompts.iter().map(|prompt| key_of(prompt)).collect();
    Ok((samples, CacheReport { prompts, extra_prompts, latents }))
}

fn prompt_embeds<'a>(store: &Store, request: &CacheRequest<'a>) -> Result<(HashMap<&'a str, Key>, Filled)> {
    let template = TEXT_TO_IMAGE;
    let pipeline = request.pipeline;
    let mut files = pipeline.text_encoder.files()?;
    files.extend(folder_files(&pipeline.tokenizer)?);
    let encoder = fingerprint(&files)?;
    let mut captions = request.dataset.captions();
    captions.extend(request.extra_prompts);
    let key =
        |c: &&str| Key::prompt_embeds(c, &template.apply("{}"), request.max_sequence_length, &encoder, DType::F32);
    let keys: Vec<Key> = captions.iter().map(key).collect();
    let cut = cut_captions(request, &template, &captions)?;
    let mut networks = None;
    let options = FillOptions { label: "prompt embeddings", batch_size: PROMPTS_AT_ONCE, quiet: request.quiet };
    let mut filled = fill(store, &keys, options, |missing| {
        check_stop(request)?;
        if networks.is_none() {
            let files = &pipeline.text_encoder;
            let config = TextEncoderConfig::from_file(&files.config)?;
            let text_encoder = TextEncoder::from_weights(config, files.open()?, Residency::Streamed)?;
            networks = Some((PromptTokenizer::load(&pipeline.tokenizer)?, text_encoder));
        }
        let (tokenizer, text_encoder) = networks.as_ref().expect("loaded above");
        encode_prompts(
            tokenizer,
            text_encoder,
            template.clone(),
            request.max_sequence_length,
            missing.iter().map(|&i| captions[i]),
        )
    })?;
    filled.notices.extend(cut);
    Ok((captions.into_iter().zip(keys).collect(), filled))
}

/// A line for each caption that is longer than what is kept of it, with the images that have it.
fn cut_captions(request: &CacheRequest, template: &Template, captions: &[&str]) -> Result<Vec<String>> {
    let kept = request.max_sequence_length;
    // A token is a byte or more, so that few captions need counting, and often not even the tokenizer.
    let around = template.apply("").len();
    let long: Vec<&str> = captions.iter().copied().filter(|caption| caption.len() + around > kept).collect();
    if long.is_empty() {
        return Ok(Vec::new());
    }
    let tokenizer = PromptTokenizer::load(&request.pipeline.tokenizer)?;
    let prefix = tokenizer.num_prefix_tokens(template)?;
    let mut notices = Vec::new();
    for caption in long {
        let tokens = tokenizer.encode(&template.apply(caption))?.len() - prefix;
        if tokens > kept {
            let items = request.dataset.items().iter().filter(|item| item.caption == caption);
            let mut images: Vec<&str> = items.map(|item| item.path.as_str()).collect();
            if images.is_empty() {
                images.push("a preview");
            }
            notices.push(format!(
                "the caption of {} is cut: it has {tokens} tokens, and `data.max_sequence_length` keeps {kept}",
                images.join(", ")
            ));
        }
    }
    Ok(notices)
}

fn encode_prompts<'a>(
    tokenizer: &PromptTokenizer,
    text_encoder: &TextEncoder,
    template: Template,
    max_sequence_length: usize,
    captions: impl Iterator<Item = &'a str>,
) -> Result<Vec<Entry>> {
    let encoder = PromptEncoder { tokenizer, text_encoder, template, max_sequence_length };
    let captions: Vec<&str> = captions.collect();
    let embeds = encoder.encode(&captions, |_| {})?;
    for (caption, embeds) in captions.iter().zip(&embeds) {
        if !is_finite(embeds)? {
            return Err(Error::run(format!("the text encoder made NaN or infinity of the caption `{caption}`"))
                .hint("the text encoder's weights are damaged, or not those of a Qwen-Image text encoder"));
        }
    }
    Ok(embeds.into_iter().map(|e| Entry::from([(PROMPT_EMBEDS.to_string(), e)])).collect())
}

fn image_latents(store: &Store, request: &CacheRequest) -> Result<(HashMap<Sample, Key>, Filled)> {
    let vae_print = fingerprint(&request.pipeline.vae.files()?)?;
    let items = request.dataset.items();
    let key = |s: &Sample| Key::latents(&items[s.item].image_hash, s.bucket, &vae_print);
    let keys: Vec<Key> = request.samples.iter().map(key).collect();
    let mut vae = None;
    let options = FillOptions { label: "latents", batch_size: 1, quiet: request.quiet };
    let filled = fill(store, &keys, options, |missing| {
        check_stop(request)?;
        if vae.is_none() {
            let files = &request.pipeline.vae;
            vae = Some(Vae::from_weights(VaeConfig::from_file(&files.config)?, &files.open()?)?);
        }
        let vae = vae.as_ref().expect("loaded above");
        missing.iter().map(|&i| Ok(Entry::from([(LATENTS.to_string(), encode_image(vae, request, i)?)]))).collect()
    })?;
    Ok((request.samples.iter().copied().zip(keys).collect(), filled))
}

/// The masks of all samples that have one, at the resolution of latents.
fn masks(store: &Store, request: &CacheRequest) -> Result<HashMap<Sample, Key>> {
    let items = request.dataset.items();
    let masked: Vec<(Sample, &Mask)> =
        request.samples.iter().filter_map(|&sample| Some((sample, items[sample.item].mask.as_ref()?))).collect();
    let keys: Vec<Key> = masked.iter().map(|(sample, mask)| Key::mask(&mask.hash, sample.bucket)).collect();
    let options = FillOptions { label: "masks", batch_size: 1, quiet: request.quiet };
    fill(store, &keys, options, |missing| {
        check_stop(request)?;
        let entry = |&i: &usize| -> Result<Entry> {
            let (Sample { bucket, .. }, mask) = &masked[i];
            let shape = (bucket.height() / LATENT_PIXELS, bucket.width() / LATENT_PIXELS);
            let values = Tensor::from_vec(latent_mask(mask, *bucket)?, shape, &Device::Cpu)?;
            Ok(Entry::from([(MASK.to_string(), values)]))
        };
        missing.iter().map(entry).collect()
    })?;
    Ok(masked.into_iter().map(|(sample, _)| sample).zip(keys).collect())
}

/// The normalised latents (C, h, w) of one sample: the posterior's mode.
fn encode_image(vae: &Vae, request: &CacheRequest, sample: usize) -> Result<Tensor> {
    let Sample { bucket, item } = request.samples[sample];
    let image = cover_crop(&request.dataset.load(item)?, bucket.height(), bucket.width())?;
    let pixels = Tensor::from_vec(to_pixels(&image), (1, 3, bucket.height(), bucket.width()), &Device::Cpu)?;
    let latents = vae.config().normalize(&vae.encode(&pixels)?.mean)?;
    if !is_finite(&latents)? {
        return Err(Error::run(format!("the VAE made NaN or infinity of `{}`", request.dataset.items()[item].path))
            .hint("the VAE's weights are damaged, or not those of a Qwen-Image VAE"));
    }
    Ok(latents.squeeze(0)?)
}

fn is_finite(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite())
}

fn check_stop(request: &CacheRequest) -> Result<()> {
    if (request.stop)() {
        return Err(Error::interrupted("stopped while filling the caches").hint("run it again: what is cached stays"));
    }
    Ok(())
}

/// The tokenizer's files.
fn folder_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io("read the folder", folder, e).into_usage())?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.is_file()).collect();
    files.retain(|p| matches!(p.extension().and_then(|e| e.to_str()), Some("json" | "safetensors" | "txt")));
    files.sort();
    Ok(files)
}
