//! CLIP and Chinese CLIP: pictures and texts as vectors that can be compared.
//!
//! The networks are candle-transformers'; here are the files around them: config, tokenizer, preprocessing.

use crate::data::resample::{Filter, resize};
use crate::error::{Error, Result};
use crate::io::{JsonObject, Weights};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::chinese_clip::text_model::ChineseClipTextConfig;
use candle_transformers::models::chinese_clip::vision_model::ChineseClipVisionConfig;
use candle_transformers::models::chinese_clip::{Activation as ChineseActivation, ChineseClipConfig, ChineseClipModel};
use candle_transformers::models::clip::text_model::{Activation, ClipTextConfig};
use candle_transformers::models::clip::vision_model::ClipVisionConfig;
use candle_transformers::models::clip::{ClipConfig, ClipModel};
use image::RgbImage;
use image::imageops::crop_imm;
use std::path::Path;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{Tokenizer, TruncationParams};

/// The files of a model besides its weights; those that are not there have defaults or another file in their place.
pub const SMALL_FILES: [&str; 4] = ["config.json", "tokenizer.json", "vocab.txt", "preprocessor_config.json"];

/// A model with its tokenizer.
pub struct Clip {
    network: Network,
    tokenizer: Tokenizer,
    preprocessing: Preprocessing,
}

enum Network {
    Clip(ClipModel),
    Chinese(ChineseClipModel),
}

/// How pixels are brought to the network.
struct Preprocessing {
    /// Side of the square that the network sees.
    side: usize,
    /// Whether the shorter side is resized to it and the middle cut out; else the picture is squeezed into it.
    crop: bool,
    mean: [f32; 3],
    std: [f32; 3],
}

impl Clip {
    /// Loads a folder in the layout of transformers: `config.json`, `*.safetensors`, `tokenizer.json` (or `vocab.txt`
    /// of Chinese CLIP), `preprocessor_config.json`.
    ///
    /// Errors (usage): a file that is missing or broken, a model of another kind, weights that do not fit the config.
    pub fn load(folder: &Path) -> Result<Self> {
        let config = JsonObject::open(&folder.join("config.json"))?;
        let kind: String = config.get("model_type")?;
        let weights = Weights::open_folder(folder)?;
        let vars = variables(&weights)?;
        let unfit = |e: candle_core::Error| {
            Error::usage(format!("cannot load the weights in `{}`", folder.display()))
                .detail(e.to_string().lines().next().unwrap_or_default())
                .hint("they do not belong to the config.json beside them")
        };
        let (network, side, max_tokens) = match kind.as_str() {
            "clip" => {
                let clip = clip_config(&config)?;
                let (side, tokens) = (clip.image_size, clip.text_config.max_position_embeddings);
                (Network::Clip(ClipModel::new(vars, &clip).map_err(unfit)?), side, tokens)
            }
            "chinese_clip" => {
                let clip = chinese_config(&config)?;
                let (side, tokens) = (clip.image_size, clip.text_config.max_position_embeddings);
                (Network::Chinese(ChineseClipModel::new(vars, &clip).map_err(unfit)?), side, tokens)
            }
            other => return Err(config.bad_value("model_type", "`clip` or `chinese_clip`", format!("`{other}`"))),
        };
        let chinese = matches!(network, Network::Chinese(_));
        let tokenizer = tokenizer(folder, chinese, max_tokens)?;
        Ok(Self { network, tokenizer, preprocessing: Preprocessing::read(folder, chinese, side)? })
    }

    /// Whether texts should be Chinese.
    pub fn is_chinese(&self) -> bool {
        matches!(self.network, Network::Chinese(_))
    }

    /// A picture as a vector of length 1.
    pub fn image(&self, image: &RgbImage) -> Result<Vec<f32>> {
        let pixels = self.preprocessing.apply(image)?;
        unit(match &self.network {
            Network::Clip(clip) => clip.get_image_features(&pixels)?,
            Network::Chinese(clip) => clip.get_image_features(&pixels)?,
        })
    }

    /// A text as a vector of length 1, and whether it was too long and lost its end.
    pub fn text(&self, text: &str) -> Result<(Vec<f32>, bool)> {
        let failed = |e: tokenizers::Error| Error::run("cannot tokenize a prompt for CLIP").detail(e.to_string());
        let encoding = self.tokenizer.encode(text, true).map_err(failed)?;
        let ids = Tensor::new(encoding.get_ids(), &Device::Cpu)?.unsqueeze(0)?; // (1, tokens)
        let features = match &self.network {
            Network::Clip(clip) => clip.get_text_features(&ids)?,
            Network::Chinese(clip) => clip.get_text_features(&ids, None, None)?,
        };
        Ok((unit(features)?, !encoding.get_overflowing().is_empty()))
    }
}

/// CLIPScore without the weight of its paper: 100 times the cosine, or 0 if that is negative, of two unit vectors.
pub fn score(image: &[f32], text: &[f32]) -> f64 {
    let cosine: f64 = image.iter().zip(text).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    (100.0 * cosine).max(0.0)
}

fn unit(features: Tensor) -> Result<Vec<f32>> {
    let values = features.flatten_all()?.to_vec1::<f32>()?;
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    Ok(values.iter().map(|v| v / length).collect())
}

/// All float tensors, in f32.
fn variables(weights: &Weights) -> Result<VarBuilder<'static>> {
    let names: Vec<&str> = weights.names().filter(|n| !n.ends_with("position_ids")).collect();
    let tensor = |name: &str| -> Result<(String, Tensor)> {
        let shape = weights.shape(name).expect("a name of this table").to_vec();
        Ok((name.to_string(), weights.get(name, &shape, DType::F32, &Device::Cpu)?))
    };
    let tensors = names.into_iter().map(tensor).collect::<Result<_>>()?;
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

/// The sections of a config; what transformers leaves out as a default is absent.
fn sections(config: &JsonObject) -> Result<(JsonObject, JsonObject)> {
    let section = |key: &str| {
        let found = config.section(key)?;
        found.ok_or_else(|| {
            Error::usage(format!("key `{key}` is missing in `{}`", config.path().display()))
                .hint("configs of a text or vision model alone are not those of a whole CLIP")
        })
    };
    Ok((section("text_config")?, section("vision_config")?))
}

/// Defaults: <https://github.com/huggingface/transformers/blob/v4.57.1/src/transformers/models/clip/configuration_clip.py>
fn clip_config(config: &JsonObject) -> Result<ClipConfig> {
    let (text, vision) = sections(config)?;
    for section in [&text, &vision] {
        let act = section.get_or("hidden_act", "quick_gelu".to_string())?;
        if act != "quick_gelu" {
            // candle-transformers knows no other here.
            return Err(section.bad_value("hidden_act", "`quick_gelu`, as OpenAI's models have", format!("`{act}`")));
        }
    }
    let projection_dim = config.get_or("projection_dim", 512)?;
    let text_config = ClipTextConfig {
        vocab_size: text.get_or("vocab_size", 49408)?,
        embed_dim: text.get_or("hidden_size", 512)?,
        activation: Activation::QuickGelu,
        intermediate_size: text.get_or("intermediate_size", 2048)?,
        max_position_embeddings: text.get_or("max_position_embeddings", 77)?,
        pad_with: None,
        num_hidden_layers: text.get_or("num_hidden_layers", 12)?,
        num_attention_heads: text.get_or("num_attention_heads", 8)?,
        projection_dim,
    };
    let image_size = vision.get_or("image_size", 224)?;
    let vision_config = ClipVisionConfig {
        embed_dim: vision.get_or("hidden_size", 768)?,
        activation: Activation::QuickGelu,
        intermediate_size: vision.get_or("intermediate_size", 3072)?,
        num_hidden_layers: vision.get_or("num_hidden_layers", 12)?,
        num_attention_heads: vision.get_or("num_attention_heads", 12)?,
        projection_dim,
        num_channels: 3,
        image_size,
        patch_size: vision.get_or("patch_size", 32)?,
    };
    Ok(ClipConfig { text_config, vision_config, logit_scale_init_value: 2.6592, image_size })
}

/// Defaults: <https://github.com/huggingface/transformers/blob/v4.57.1/src/transformers/models/chinese_clip/configuration_chinese_clip.py>
fn chinese_config(config: &JsonObject) -> Result<ChineseClipConfig> {
    let (text, vision) = sections(config)?;
    let activation = |section: &JsonObject, default: &str| -> Result<ChineseActivation> {
        let act = section.get_or("hidden_act", default.to_string())?;
        match act.as_str() {
            "quick_gelu" => Ok(ChineseActivation::QuickGelu),
            "gelu" => Ok(ChineseActivation::Gelu),
            other => Err(section.bad_value("hidden_act", "`gelu` or `quick_gelu`", format!("`{other}`"))),
        }
    };
    let text_config = ChineseClipTextConfig {
        vocab_size: text.get_or("vocab_size", 30522)?,
        hidden_size: text.get_or("hidden_size", 768)?,
        num_hidden_layers: text.get_or("num_hidden_layers", 12)?,
        num_attention_heads: text.get_or("num_attention_heads", 12)?,
        intermediate_size: text.get_or("intermediate_size", 3072)?,
        hidden_act: activation(&text, "gelu")?,
        max_position_embeddings: text.get_or("max_position_embeddings", 512)?,
        type_vocab_size: text.get_or("type_vocab_size", 2)?,
        layer_norm_eps: text.get_or("layer_norm_eps", 1e-12)?,
        ..ChineseClipTextConfig::default()
    };
    let (image_size, projection_dim) = (vision.get_or("image_size", 224)?, config.get_or("projection_dim", 512)?);
    let vision_config = ChineseClipVisionConfig {
        hidden_size: vision.get_or("hidden_size", 768)?,
        intermediate_size: vision.get_or("intermediate_size", 3072)?,
        projection_dim,
        num_hidden_layers: vision.get_or("num_hidden_layers", 12)?,
        num_attention_heads: vision.get_or("num_attention_heads", 12)?,
        image_size,
        patch_size: vision.get_or("patch_size", 32)?,
        hidden_act: activation(&vision, "quick_gelu")?,
        layer_norm_eps: vision.get_or("layer_norm_eps", 1e-5)?,
        ..ChineseClipVisionConfig::default()
    };
    Ok(ChineseClipConfig { text_config, vision_config, projection_dim, logit_scale_init_value: 2.6592, image_size })
}

fn tokenizer(folder: &Path, chinese: bool, max_tokens: usize) -> Result<Tokenizer> {
    let (fast, words) = (folder.join("tokenizer.json"), folder.join("vocab.txt"));
    let bad = |path: &Path, why: String| {
        let error = Error::usage(format!("`{}` is not a tokenizer", path.display())).detail(why);
        error.hint("download or copy the file again")
    };
    let mut tokenizer = if fast.is_file() {
        Tokenizer::from_file(&fast).map_err(|e| bad(&fast, e.to_string()))?
    } else if chinese && words.is_file() {
        bert_tokenizer(&words).map_err(|e| bad(&words, e.to_string()))?
    } else {
        let wanted = if chinese { "tokenizer.json or vocab.txt" } else { "tokenizer.json" };
        return Err(Error::usage(format!("no tokenizer in `{}`", folder.display())).expected(wanted, "neither"));
    };
    tokenizer.with_padding(None);
    let truncation = TruncationParams { max_length: max_tokens, ..TruncationParams::default() };
    tokenizer.with_truncation(Some(truncation)).map_err(|e| bad(&fast, e.to_string()))?;
    Ok(tokenizer)
}

/// BERT's tokenizer for texts in lower case, from its list of words.
fn bert_tokenizer(words: &Path) -> std::result::Result<Tokenizer, tokenizers::Error> {
    let model = WordPiece::from_file(&words.to_string_lossy()).unk_token("[UNK]".into()).build()?;
    let mut tokenizer = Tokenizer::new(model);
    let special = |name: &str| match tokenizer.token_to_id(name) {
        Some(id) => Ok((name.to_string(), id)),
        None => Err(format!("it has no `{name}`")),
    };
    let (separator, class) = (special("[SEP]")?, special("[CLS]")?);
    tokenizer.with_normalizer(Some(BertNormalizer::new(true, true, None, true)))?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_post_processor(Some(BertProcessing::new(separator, class)));
    Ok(tokenizer)
}

impl Preprocessing {
    /// From `preprocessor_config.json` if it is there; else OpenAI's constants, and the middle of the picture for CLIP,
    /// all of it for Chinese CLIP, as published.
    fn read(folder: &Path, chinese: bool, side: usize) -> Result<Self> {
        let standard = Self {
            side,
            crop: !chinese,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        };
        let path = folder.join("preprocessor_config.json");
        if !path.is_file() {
            return Ok(standard);
        }
        let config = JsonObject::open(&path)?;
        let three = |key: &str, default: [f32; 3]| -> Result<[f32; 3]> {
            let Some(values) = config.optional::<Vec<f64>>(key)? else { return Ok(default) };
            let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            values.as_slice().try_into().map_err(|_| config.bad_value(key, "three numbers", values.len()))
        };
        Ok(Self {
            crop: config.get_or("do_center_crop", standard.crop)?,
            mean: three("image_mean", standard.mean)?,
            std: three("image_std", standard.std)?,
            ..standard
        })
    }

    /// (1, 3, side, side), bicubic as Pillow resizes.
    fn apply(&self, image: &RgbImage) -> Result<Tensor> {
        let side = self.side;
        let square = if self.crop {
            let (w, h) = (image.width() as usize, image.height() as usize);
            let shorter = w.min(h);
            let scaled = |n: usize| (side * n / shorter).max(side);
            let covering = resize(image, scaled(h), scaled(w), Filter::Bicubic)?;
            let start = |n: u32| (n - side as u32) / 2;
            crop_imm(&covering, start(covering.width()), start(covering.height()), side as u32, side as u32).to_image()
        } else {
            resize(image, side, side, Filter::Bicubic)?
        };
        let plane = |c: usize| {
            let value = move |&v: &u8| (f32::from(v) / 255.0 - self.mean[c]) / self.std[c];
            square.as_raw().iter().skip(c).step_by(3).map(value)
        };
        let values: Vec<f32> = (0..3).flat_map(plane).collect();
        Ok(Tensor::from_vec(values, (1, 3, side, side), &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_cut_out_or_all_is_squeezed_in() {
        // Left half black, right half white, twice as wide as high.
        let image = RgbImage::from_fn(80, 40, |x, _| image::Rgb([if x < 40 { 0 } else { 255 }; 3]));
        let apply = |crop: bool| {
            let preprocessing = Preprocessing { side: 20, crop, mean: [0.0; 3], std: [1.0; 3] };
            let row = preprocessing.apply(&image).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            row[200..220].to_vec()
        };
        for row in [apply(true), apply(false)] {
            assert!(row[..8].iter().all(|&v| v == 0.0) && row[12..].iter().all(|&v| v == 1.0), "{row:?}");
        }
        assert_eq!(score(&[0.6, 0.8], &[0.6, 0.8]).round(), 100.0);
        assert_eq!(score(&[1.0, 0.0], &[-1.0, 0.0]), 0.0);
    }
}
