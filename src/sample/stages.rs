//! The networks of the pipeline, each loaded for its stage alone.

use crate::error::{Error, Result};
use crate::model::source::PipelineFolder;
use crate::model::text_encoder::{PromptEncoder, Residency, TextEncoder, TextEncoderConfig};
use crate::model::tokenizer::PromptTokenizer;
use crate::model::transformer::{BaseWeights, Precision, QwenImageTransformer, TransformerConfig};
use crate::model::vae::{Vae, VaeConfig};
use crate::prompt::TEXT_TO_IMAGE;
use crate::sample::decode_image;
use crate::sample::denoiser::is_finite;
use candle_core::{Device, Tensor};
use image::RgbImage;

/// The original pipeline's own default, shorter than what the text encoder may be given.
pub const MAX_SEQUENCE_LENGTH: usize = 512;

/// The embeddings of each prompt, (tokens, D). The text encoder is streamed layer by layer and dropped again;
/// `layer_done` is called with the layers done and their number.
pub fn encode_prompts(
    pipeline: &PipelineFolder,
    prompts: &[&str],
    mut layer_done: impl FnMut(usize, usize),
) -> Result<Vec<Tensor>> {
    let tokenizer = PromptTokenizer::load(&pipeline.tokenizer)?;
    let config = TextEncoderConfig::from_file(&pipeline.text_encoder.config)?;
    let layers = config.num_hidden_layers;
    let text_encoder = TextEncoder::from_weights(config, pipeline.text_encoder.open()?, Residency::Streamed)?;
    let mut encoder = PromptEncoder::new(&tokenizer, &text_encoder, TEXT_TO_IMAGE);
    encoder.max_sequence_length = MAX_SEQUENCE_LENGTH;
    encoder.encode(prompts, |layer| layer_done(layer, layers))
}

/// The frozen transformer, on `device`.
pub fn load_transformer(
    pipeline: &PipelineFolder,
    precision: Precision,
    device: &Device,
) -> Result<QwenImageTransformer> {
    let config = TransformerConfig::from_file(&pipeline.transformer.config)?;
    let weights = pipeline.transformer.open()?;
    QwenImageTransformer::from_weights(config, &weights, precision, device, BaseWeights::Frozen)
}

/// The autoencoder. Images above a million pixels are decoded in tiles.
pub fn load_vae(pipeline: &PipelineFolder) -> Result<Vae> {
    Vae::from_weights(VaeConfig::from_file(&pipeline.vae.config)?, &pipeline.vae.open()?)
}

/// Packed, normalised latents of one image (1, S, 4 z_dim) as 8-bit RGB.
///
/// Errors: latents or pixels that are not finite.
pub fn to_image(vae: &Vae, latents: &Tensor, height: usize, width: usize) -> Result<RgbImage> {
    let finite = |what: &str, tensor: &Tensor| match is_finite(tensor)? {
        true => Ok(()),
        false => Err(Error::run(format!("the {what} of an image hold NaN or infinity"))
            .hint("a lower adapter weight may help; else the weights are damaged")),
    };
    finite("latents", latents)?;
    let pixels = decode_image(vae, latents, height, width)?;
    finite("pixels", &pixels)?;
    to_rgb(&pixels, height, width)
}

/// (1, 3, H, W) in [0, 1] to bytes, rounded half to even as numpy does.
fn to_rgb(pixels: &Tensor, height: usize, width: usize) -> Result<RgbImage> {
    let values = pixels.flatten_all()?.to_vec1::<f32>()?;
    let plane = height * width;
    let byte = |i: usize| (values[i] * 255.0).round_ties_even() as u8;
    let bytes = (0..plane).flat_map(|i| [byte(i), byte(plane + i), byte(2 * plane + i)]).collect();
    Ok(RgbImage::from_raw(width as u32, height as u32, bytes).expect("three bytes for each pixel"))
}
