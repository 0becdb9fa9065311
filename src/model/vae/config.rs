//! `vae/config.json`, and the names and shapes of the tensors that belong to it.

use crate::error::{Error, Result};
use crate::io::JsonObject;
use std::path::Path;

/// Dimensions of an `AutoencoderKLQwenImage`.
///
/// Source: <https://github.com/huggingface/diffusers/blob/6a0233eb7aaa69cc531250f49c47aaf4fa7a62e4/src/diffusers/models/autoencoders/autoencoder_kl_qwenimage.py>
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
    /// Channels at full resolution.
    pub base_dim: usize,
    /// Latent channels.
    pub z_dim: usize,
    /// Channels at each level, as multiples of `base_dim`; each level but the last halves height and width.
    pub dim_mult: Vec<usize>,
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub num_res_blocks: usize,
    /// Which halvings also halve time, and so have a `time_conv` (never reached by a single frame).
    pub temperal_downsample: Vec<bool>,
    /// Image channels: 3, or 4 where the alpha channel is coded too (Layered).
    pub input_channels: usize,
    /// Mean of each latent channel, length `z_dim`.
    pub latents_mean: Vec<f64>,
    /// Standard deviation of each latent channel, length `z_dim`.
    pub latents_std: Vec<f64>,
}

impl VaeConfig {
    /// Reads `vae/config.json`.
    ///
    /// Errors: another class of autoencoder, a missing key, a value of the wrong type, lists of contradicting lengths.
    pub fn from_file(path: &Path) -> Result<Self> {
        let json = JsonObject::open(path)?;
        let class: String = json.get_or("_class_name", CLASS.into())?;
        if class != CLASS {
            let error = json.bad_value("_class_name", CLASS, &class);
            return Err(if class == "AutoencoderKLQwenImage21" {
                error.hint("this is the autoencoder of Qwen-Image-2.1, another architecture")
            } else {
                error
            });
        }
        let config = Self {
            base_dim: json.get("base_dim")?,
            z_dim: json.get("z_dim")?,
            dim_mult: json.get("dim_mult")?,
            num_res_blocks: json.get("num_res_blocks")?,
            temperal_downsample: json.get("temperal_downsample")?,
            // Newer than the first published configs, whose models all have three.
            input_channels: json.get_or("input_channels", 3)?,
            latents_mean: json.get("latents_mean")?,
            latents_std: json.get("latents_std")?,
        };
        let attn_scales: Vec<f64> = json.get_or("attn_scales", Vec::new())?;
        if !attn_scales.is_empty() {
            return Err(json.bad_value("attn_scales", "[]", format!("{attn_scales:?}")));
        }
        config.check(&json)?;
        Ok(config)
    }

    fn check(&self, json: &JsonObject) -> Result<()> {
        let positive = |key, value| match value {
            0 => Err(json.bad_value(key, "at least 1", 0)),
            _ => Ok(()),
        };
        positive("base_dim", self.base_dim)?;
        positive("z_dim", self.z_dim)?;
        positive("num_res_blocks", self.num_res_blocks)?;
        positive("input_channels", self.input_channels)?;
        if self.dim_mult.is_empty() || self.dim_mult.contains(&0) {
            return Err(json.bad_value("dim_mult", "positive multiples", format!("{:?}", self.dim_mult)));
        }
        let length = |key, expected: usize, found: usize| -> Result<(), Error> {
            if expected == found {
                return Ok(());
            }
            Err(json.bad_value(key, format!("{expected} entries"), found))
        };
        length("temperal_downsample", self.dim_mult.len() - 1, self.temperal_downsample.len())?;
        length("latents_mean", self.z_dim, self.latents_mean.len())?;
        length("latents_std", self.z_dim, self.latents_std.len())?;
        if let Some(std) = self.latents_std.iter().find(|&&s| s <= 0.0) {
            return Err(json.bad_value("latents_std", "positive numbers", std));
        }
        // The upsampling convolutions halve the channels, in each level but the decoder's last.
        if let Some(odd) = self.dim_mult[1..].iter().find(|&m| (m * self.base_dim) % 2 == 1) {
            return Err(json.bad_value("dim_mult", "even numbers of channels", odd * self.base_dim));
        }
        Ok(())
    }

    /// Pixels per latent along height and along width: 8 in the published models.
    pub fn spatial_compression(&self) -> usize {
        1 << self.temperal_downsample.len()
    }

    /// Channels of the encoder's levels, from the image to the latent.
    pub(super) fn encoder_dims(&self) -> Vec<usize> {
        self.dim_mult.iter().map(|m| m * self.base_dim).collect()
    }

    /// Channels (in, out) of the decoder's levels, from the latent to the image.
    pub(super) fn decoder_dims(&self) -> Vec<(usize, usize)> {
        let out: Vec<usize> = self.encoder_dims().into_iter().rev().collect();
        // Each level but the first starts from what the upsampling before it left: half the channels.
        let input = std::iter::once(out[0]).chain(out.iter().map(|d| d / 2));
        input.zip(out.iter().copied()).collect()
    }

    /// Every tensor of the published layout, with its shape. Causal convolutions are 5-D: (out, in, time, h, w).
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = Manifest::default();
        let dims = self.encoder_dims();
        let widest = dims[dims.len() - 1];

        list.conv("encoder.conv_in", self.base_dim, self.input_channels, &[3, 3, 3]);
        let (mut index, mut channels) = (0, self.base_dim);
        for (level, &dim) in dims.iter().enumerate() {
            for _ in 0..self.num_res_blocks {
                list.res_block(&format!("encoder.down_blocks.{index}"), channels, dim);
                (index, channels) = (index + 1, dim);
            }
            if let Some(&in_time) = self.temperal_downsample.get(level) {
                list.conv(&format!("encoder.down_blocks.{index}.resample.1"), dim, dim, &[3, 3]);
                if in_time {
                    list.conv(&format!("encoder.down_blocks.{index}.time_conv"), dim, dim, &[3, 1, 1]);
                }
                index += 1;
            }
        }
        list.mid_block("encoder.mid_block", widest);
        list.push("encoder.norm_out.gamma", &[widest, 1, 1, 1]);
        list.conv("encoder.conv_out", 2 * self.z_dim, widest, &[3, 3, 3]);
        list.conv("quant_conv", 2 * self.z_dim, 2 * self.z_dim, &[1, 1, 1]);

        list.conv("post_quant_conv", self.z_dim, self.z_dim, &[1, 1, 1]);
        list.conv("decoder.conv_in", widest, self.z_dim, &[3, 3, 3]);
        list.mid_block("decoder.mid_block", widest);
        for (level, (input, dim)) in self.decoder_dims().into_iter().enumerate() {
            let block = format!("decoder.up_blocks.{level}");
            for i in 0..self.num_res_blocks + 1 {
                list.res_block(&format!("{block}.resnets.{i}"), if i == 0 { input } else { dim }, dim);
            }
            if let Some(&in_time) = self.temperal_downsample.iter().rev().nth(level) {
                list.conv(&format!("{block}.upsamplers.0.resample.1"), dim / 2, dim, &[3, 3]);
                if in_time {
                    list.conv(&format!("{block}.upsamplers.0.time_conv"), 2 * dim, dim, &[3, 1, 1]);
                }
            }
        }
        list.push("decoder.norm_out.gamma", &[dims[0], 1, 1, 1]);
        list.conv("decoder.conv_out", self.input_channels, dims[0], &[3, 3, 3]);
        list.0
    }
}

const CLASS: &str = "AutoencoderKLQwenImage";

/// The list under construction.
#[derive(Default)]
struct Manifest(Vec<(String, Vec<usize>)>);

impl Manifest {
    fn push(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.0.push((name.into(), shape.to_vec()));
    }

    fn conv(&mut self, name: &str, output: usize, input: usize, kernel: &[usize]) {
        self.push(format!("{name}.weight"), &[&[output, input], kernel].concat());
        self.push(format!("{name}.bias"), &[output]);
    }

    fn res_block(&mut self, name: &str, input: usize, output: usize) {
        self.push(format!("{name}.norm1.gamma"), &[input, 1, 1, 1]);
        self.conv(&format!("{name}.conv1"), output, input, &[3, 3, 3]);
        self.push(format!("{name}.norm2.gamma"), &[output, 1, 1, 1]);
        self.conv(&format!("{name}.conv2"), output, output, &[3, 3, 3]);
        if input != output {
            self.conv(&format!("{name}.conv_shortcut"), output, input, &[1, 1, 1]);
        }
    }

    fn mid_block(&mut self, name: &str, dim: usize) {
        self.res_block(&format!("{name}.resnets.0"), dim, dim);
        self.push(format!("{name}.attentions.0.norm.gamma"), &[dim, 1, 1]);
        self.conv(&format!("{name}.attentions.0.to_qkv"), 3 * dim, dim, &[1, 1]);
        self.conv(&format!("{name}.attentions.0.proj"), dim, dim, &[1, 1]);
        self.res_block(&format!("{name}.resnets.1"), dim, dim);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `vae/config.json` of the published model.
    pub const PUBLISHED: &str = r#"{"_class_name": "AutoencoderKLQwenImage", "attn_scales": [], "base_dim": 96,
        "dim_mult": [1, 2, 4, 4], "dropout": 0.0, "num_res_blocks": 2, "temperal_downsample": [false, true, true],
        "latents_mean": [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517,
        -0.3632, -0.1922, -0.9497, 0.2503, -0.2921], "latents_std": [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708,
        2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916], "z_dim": 16}"#;

    fn parse(text: &str) -> Result<VaeConfig> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        VaeConfig::from_file(&path)
    }

    #[test]
    fn the_published_model_has_its_published_size() {
        let config = parse(PUBLISHED).unwrap();
        assert_eq!(config.spatial_compression(), 8);
        let tensors = config.tensors();
        let parameters: usize = tensors.iter().map(|(_, s)| s.iter().product::<usize>()).sum();
        // 253.8 MB in bf16; the same count as the Wan-2.1 autoencoder.
        assert_eq!((tensors.len(), parameters), (194, 126_892_531));
        let shape = |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, s)| s.as_slice());
        assert_eq!(shape("decoder.up_blocks.1.resnets.0.conv1.weight"), Some(&[384, 192, 3, 3, 3][..]));
        assert_eq!(shape("decoder.up_blocks.1.upsamplers.0.time_conv.weight"), Some(&[768, 384, 3, 1, 1][..]));
        assert_eq!(shape("encoder.down_blocks.2.time_conv.weight"), None);
    }

    #[test]
    fn what_cannot_be_run_is_refused_by_name() {
        for (from, to, word) in [
            ("\"base_dim\": 96", "\"bas_dim\": 96", "key `base_dim` is missing"),
            ("\"z_dim\": 16", "\"z_dim\": 8", "expected 8 entries, found 16"),
            ("\"attn_scales\": []", "\"attn_scales\": [0.5]", "`attn_scales`"),
            ("[false, true, true]", "[false, true]", "`temperal_downsample`"),
            ("AutoencoderKLQwenImage", "AutoencoderKLQwenImage21", "Qwen-Image-2.1"),
            ("1.916]", "0]", "`latents_std`"),
        ] {
            let error = parse(&PUBLISHED.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
