//! Synthetic pipelines in the published layout. Random weights under the real names, for tests, benchmarks and the
//! first run on a machine without a model: every value is a function of the seed and the tensor's name. And a small
//! trained one, of the drawn world.

mod cached;
mod configs;
mod dense;
mod shards;
mod tokenizer;
mod world;

pub use cached::{tiny_in, tiny_in_cache};
pub use world::{world_in, world_in_cache};

use crate::error::{Error, Result};
use crate::io::atomic::rename_synced;
use crate::model::text_encoder::TextEncoderConfig;
use crate::model::transformer::TransformerConfig;
use crate::model::vae::VaeConfig;
use configs::PipelineConfigs;
use dense::Law;
use shards::Content;
use std::fs;
use std::path::{Path, PathBuf};

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// A whole pipeline of a few megabytes whose activations have unit size.
    Tiny,
    /// The transformer alone, in the geometry of the speed comparison.
    Bench,
    /// All names and shapes of the published model, as sparse files of zeros.
    QwenImage,
}

/// Storage type of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
}

impl Precision {
    fn dtype(self) -> safetensors::Dtype {
        match self {
            Self::F32 => safetensors::Dtype::F32,
            Self::Bf16 => safetensors::Dtype::BF16,
        }
    }

    fn bytes(self) -> usize {
        self.dtype().bitsize() / 8
    }
}

/// Dimensions of the transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Double-stream blocks.
    pub num_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rotary dimensions of the frame, height and width axes; they add up to the width of a head.
    pub axes: [usize; 3],
    /// Width of the prompt embeddings.
    pub joint_dim: usize,
}

/// A pipeline to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynthOptions {
    /// What to make.
    pub preset: Preset,
    /// Dimensions of the transformer.
    pub geometry: Geometry,
    /// Storage type of all weights.
    pub precision: Precision,
    /// Seed of the random weights.
    pub seed: u64,
}

impl SynthOptions {
    /// The preset with its own dimensions, precision and seed 0.
    pub fn preset(preset: Preset) -> Self {
        let (num_layers, num_heads, head_dim, axes, joint_dim, precision) = match preset {
            Preset::Tiny => (2, 4, 16, [4, 6, 6], 64, Precision::F32),
            Preset::Bench => (6, 8, 64, [8, 28, 28], 512, Precision::F32),
            Preset::QwenImage => (60, 24, 128, [16, 56, 56], 3584, Precision::Bf16),
        };
        let geometry = Geometry { num_layers, num_heads, head_dim, axes, joint_dim };
        Self { preset, geometry, precision, seed: 0 }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Tensors in all networks.
    pub num_tensors: usize,
    /// Weight files.
    pub num_files: usize,
    /// Length of all weight files.
    pub num_bytes: u64,
}

/// Writes the pipeline (for [`Preset::Bench`] the transformer's folder) as the new folder `out`.
///
/// It is built beside and renamed, so that `out` is whole or absent. Errors: `out` is there and not empty; dimensions
/// that do not fit together; a file system without sparse files where they are needed; a full disk.
pub fn write(options: &SynthOptions, out: &Path) -> Result<Written> {
    if out.is_file() || fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::usage(format!("`{}` is there and is not empty", out.display()))
            .hint("name a new folder: nothing is overwritten"));
    }
    let part = beside(out)?;
    let result = write_into(options, &part).and_then(|written| {
        // An empty folder in the place would be in the way on some systems.
        let _ = fs::remove_dir(out);
        rename_synced(&part, out)?;
        Ok(written)
    });
    if result.is_err() {
        // The failure itself is what the user needs to hear about.
        let _ = fs::remove_dir_all(&part);
    }
    result
}

/// A new folder beside `out`, with a name of this process's own.
fn beside(out: &Path) -> Result<PathBuf> {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let Some(name) = out.file_name() else {
        return Err(Error::usage(format!("`{}` does not name a folder", out.display())));
    };
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let part = out.with_file_name(format!(".{}.{}-{number}.part", name.to_string_lossy(), std::process::id()));
    fs::create_dir_all(&part).map_err(|e| Error::io("create", &part, e))?;
    Ok(part)
}

fn write_into(options: &SynthOptions, folder: &Path) -> Result<Written> {
    if options.preset == Preset::Bench {
        return write_transformer(options, folder);
    }
    let configs = PipelineConfigs::of(options)?;
    let subfolder = |name: &str| -> Result<PathBuf> {
        let path = folder.join(name);
        fs::create_dir_all(&path).map_err(|e| Error::io("create", &path, e))?;
        Ok(path)
    };
    configs::save(&folder.join("model_index.json"), &configs.model_index)?;
    configs::save(&subfolder("scheduler")?.join("scheduler_config.json"), &configs.scheduler)?;
    tokenizer::save(&subfolder("tokenizer")?)?;
    let mut written = write_transformer(options, &subfolder("transformer")?)?;

    let vae = subfolder("vae")?;
    configs::save(&vae.join("config.json"), &configs.vae)?;
    let tensors = VaeConfig::from_file(&vae.join("config.json"))?.tensors();
    written += shards::save(&vae, DIFFUSERS_STEM, tensors, options.precision, &content(options, "vae", dense::VAE))?;

    let text_encoder = subfolder("text_encoder")?;
    configs::save(&text_encoder.join("config.json"), &configs.text_encoder)?;
    let tensors = TextEncoderConfig::from_file(&text_encoder.join("config.json"))?.tensors();
    let content = content(options, "text_encoder", dense::TEXT_ENCODER);
    written += shards::save(&text_encoder, "model", tensors, options.precision, &content)?;
    Ok(written)
}

/// What diffusers calls the weight files of its own networks.
const DIFFUSERS_STEM: &str = "diffusion_pytorch_model";

fn write_transformer(options: &SynthOptions, folder: &Path) -> Result<Written> {
    let config = folder.join("config.json");
    configs::save(&config, &configs::transformer(&options.geometry))?;
    let tensors = TransformerConfig::from_file(&config)?.tensors();
    let law = if options.preset == Preset::Bench { dense::BENCH } else { dense::TRANSFORMER };
    shards::save(folder, DIFFUSERS_STEM, tensors, options.precision, &content(options, "transformer", law))
}

fn content(options: &SynthOptions, part: &'static str, law: Law) -> Content {
    match options.preset {
        Preset::QwenImage => Content::Zeros,
        _ => Content::Random { seed: options.seed, part, law },
    }
}

impl std::ops::AddAssign for Written {
    fn add_assign(&mut self, other: Self) {
        self.num_tensors += other.num_tensors;
        self.num_files += other.num_files;
        self.num_bytes += other.num_bytes;
    }
}
