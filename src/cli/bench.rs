//! `qwen-lora bench`.

use crate::cli::{Threads, print_line};
use crate::config::{BaseDtype, Checkpointing, DeviceChoice, LossGate, LossWeights};
use crate::device;
use crate::error::{Error, Result};
use crate::flow::gate::Gate;
use crate::kernels::route::composed_only;
use crate::model::synth::tiny_in_cache;
use crate::model::transformer::{BaseWeights, Placement, Precision, QwenImageTransformer, TransformerConfig};
use crate::model::vae::{CropDecoder, Vae};
use crate::pose::posenet::PoseNet;
use crate::progress::tell;
use crate::train::bench::{Guided, Shape, bench};
use crate::train::structured::{Structured, TermWeights};
use candle_core::DType;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Time real training steps (noising, forward, loss, backward, clipping, AdamW); the last line is JSON.
#[derive(Args)]
pub struct BenchArgs {
    /// Folder of a transformer: config.json and weights. Without it, random weights of the geometry below.
    #[arg(long, value_name = "TRANSFORMER_DIR", conflicts_with_all = ["preset", "layers", "heads", "head_dim", "axes", "joint_dim"])]
    model: Option<PathBuf>,
    /// Dimensions of a published model (random weights), a 1024x1024 image and 512 text tokens where nothing else is
    /// said. Its 41 GB of bf16 weights are made on the device.
    #[arg(long, value_enum, conflicts_with_all = ["heads", "head_dim", "axes", "joint_dim"])]
    preset: Option<Preset>,
    /// Blocks [default: 6, with a preset its own].
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Attention heads.
    #[arg(long, value_name = "N", default_value_t = 8)]
    heads: usize,
    /// Width of a head.
    #[arg(long, value_name = "N", default_value_t = 64)]
    head_dim: usize,
    /// Rotary dimensions of frame, height and width.
    #[arg(long, value_name = "T,H,W", value_delimiter = ',', default_values_t = [8, 28, 28])]
    axes: Vec<usize>,
    /// Width of the text features.
    #[arg(long, value_name = "N", default_value_t = 512)]
    joint_dim: usize,
    /// Rows and columns of the image in latent patches of 16 pixels [default: 16,16, with a preset 64,64].
    #[arg(long, value_name = "H,W", value_delimiter = ',')]
    grid: Vec<usize>,
    /// Text tokens; the last sample of a larger batch has three quarters of them [default: 64, with a preset 512].
    #[arg(long, value_name = "N")]
    text: Option<usize>,
    /// Samples in a step [default: 2, with a preset 1].
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Rank of the adapter.
    #[arg(long, value_name = "N", default_value_t = 16)]
    rank: usize,
    /// What is adapted, as in `lora.target_modules`.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = ["qkv", "mlp", "fusion"].map(String::from))]
    targets: Vec<String>,
    /// Timed steps.
    #[arg(long, value_name = "N", default_value_t = 8)]
    steps: usize,
    /// Steps before the timed ones.
    #[arg(long, value_name = "N", default_value_t = 2)]
    warmup: usize,
    #[command(flatten)]
    threads: Threads,
    /// Where to compute: auto, cpu or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Type of base weights and activations; int8 is of the weights, activations are then f32, on a GPU bf16 [default: f32, on
    /// a GPU bf16].
    #[arg(long, value_enum)]
    dtype: Option<BenchDtype>,
    /// What the forward pass keeps.
    #[arg(long, value_enum, default_value = "none")]
    checkpointing: BenchCheckpointing,
    /// Where the weights of the modulation are, with random weights: `resident` in memory; `streamed`: not held, but the
    /// tables of a whole window of steps, as in training. Making these is not timed.
    #[arg(long, value_enum, default_value = "resident", conflicts_with = "model")]
    modulation: BenchModulation,
    /// Blocks whose random weights wait in host memory, as `model.blocks_to_swap`.
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "model")]
    blocks_to_swap: usize,
    /// Run every op composed of candle's operations, without kernels of our own (slow; to compare).
    #[arg(long)]
    composed: bool,
    /// Add the structured loss in every so manyth step: PoseNet behind the VAE of `synthetic:tiny`; 0 times plain steps.
    #[arg(long, value_name = "N", default_value_t = 0)]
    structured_every: usize,
    /// Longest side in pixels of the piece that the structured loss decodes.
    #[arg(long, value_name = "PIXELS", default_value_t = 256)]
    crop: usize,
    /// Folder of another VAE for the structured loss.
    #[arg(long, value_name = "VAE_DIR")]
    vae: Option<PathBuf>,
    /// Seed of random weights and data.
    #[arg(long, default_value_t = 7)]
    seed: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Preset {
    /// Qwen/Qwen-Image: 60 blocks of 24 heads of 128, 20.4 billion parameters.
    QwenImage,
}

#[derive(Clone, Copy, ValueEnum)]
enum BenchDtype {
    F32,
    Bf16,
    Int8,
}

#[derive(Clone, Copy, ValueEnum)]
enum BenchCheckpointing {
    None,
    Selective,
    Full,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BenchModulation {
    Resident,
    Streamed,
}

/// Runs the verb.
pub fn run(args: &BenchArgs) -> Result<()> {
    args.threads.start()?;
    let compute = device::open(args.device)?;
    compute.notes.iter().for_each(|note| tell(format_args!("note: {note}")));
    let own = if compute.device.is_cpu() { DType::F32 } else { DType::BF16 };
    let precision = match args.dtype {
        Some(BenchDtype::F32) => Precision::uniform(DType::F32),
        Some(BenchDtype::Bf16) => Precision::uniform(DType::BF16),
        Some(BenchDtype::Int8) => Precision::of(BaseDtype::Int8, own),
        None => Precision::uniform(own),
    };
    let checkpointing = match args.checkpointing {
        BenchCheckpointing::None => Checkpointing::None,
        BenchCheckpointing::Selective => Checkpointing::Selective,
        BenchCheckpointing::Full => Checkpointing::Full,
    };
    let list = |flag: &str, list: &[usize], n: usize| match list.len() == n && list.iter().all(|&v| v > 0) {
        true => Ok(list.to_vec()),
        false => Err(Error::usage(format!("`--{flag}` wants {n} positive numbers")).expected(n, format!("{list:?}"))),
    };
    let (side, text, batch) = if args.preset.is_some() { (64, 512, 1) } else { (16, 64, 2) };
    let (text, batch) = (args.text.unwrap_or(text), args.batch.unwrap_or(batch));
    let grid = if args.grid.is_empty() { vec![side, side] } else { list("grid", &args.grid, 2)? };
    for (flag, value) in [("text", text), ("batch", batch), ("rank", args.rank), ("steps", args.steps)] {
        if value == 0 {
            return Err(Error::usage(format!("`--{flag}` is 0")).expected("1 or more", 0));
        }
    }
    let model = match &args.model {
        Some(folder) => QwenImageTransformer::load(folder, precision, &compute.device, BaseWeights::Frozen)?,
        None => {
            let axes = list("axes", &args.axes, 3)?;
            let published = TransformerConfig::qwen_image();
            let mut config = match args.preset {
                Some(Preset::QwenImage) => published,
                None => TransformerConfig {
                    num_layers: 6,
                    attention_head_dim: args.head_dim,
                    num_attention_heads: args.heads,
                    joint_attention_dim: args.joint_dim,
                    axes_dims_rope: [axes[0], axes[1], axes[2]],
                    ..published
                },
            };
            config.num_layers = args.layers.unwrap_or(config.num_layers);
            config.check().map_err(|e| Error::usage("these dimensions do not fit together").detail(e))?;
            let placement = Placement {
                streamed_modulation: args.modulation == BenchModulation::Streamed,
                swapped_blocks: args.blocks_to_swap,
            };
            if args.blocks_to_swap > config.num_layers {
                return Err(Error::usage("`--blocks-to-swap` is more than there are blocks")
                    .expected(format!("at most {}", config.num_layers), args.blocks_to_swap));
            }
            QwenImageTransformer::random_placed(config, args.seed, precision, &compute.device, placement)?
        }
    };
    let shape = Shape {
        grid: (grid[0], grid[1]),
        text_tokens: text,
        batch,
        rank: args.rank,
        targets: args.targets.clone(),
        steps: args.steps,
        warmup: args.warmup,
        checkpointing,
        seed: args.seed,
    };
    let guided = if args.structured_every > 0 { Some(guided(args)?) } else { None };
    let timed = || bench(model, &shape, guided, |step, seconds| tell(format_args!("step {step}: {seconds:.4} s")));
    let report = if args.composed { composed_only(timed)? } else { timed()? };
    print_line(serde_json::to_string(&report).expect("a report is plain data"))
}

/// The structured loss with the defaults of the config.
fn guided(args: &BenchArgs) -> Result<Guided> {
    let folder = match &args.vae {
        Some(folder) => folder.clone(),
        None => tiny_in_cache()?.join("vae"),
    };
    let vae = Vae::load(&folder)?;
    let latent = vae.config().spatial_compression();
    let (weights, gate) = (LossWeights::default(), LossGate::default());
    let weights = TermWeights { reconstruction: weights.reconstruction, pose: weights.pose, count: weights.count };
    let loss = Structured::new(Box::new(PoseNet::embedded()?), CropDecoder::Full(Box::new(vae)), weights);
    Ok(Guided {
        loss,
        gate: Gate::new(gate.from, gate.to, gate.taper),
        every: args.structured_every,
        crop: (args.crop / latent).max(2),
    })
}
