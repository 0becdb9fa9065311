//! The peak memory of a training step, counted from what the ops keep on the tape.
//!
//! Letters: D width, T tokens of a batch, both streams together. Nothing else stays in memory while the transformer trains:
//! cached latents and embeddings are read from the disk batch by batch, text encoder and VAE are dropped when the caches
//! are filled. Not counted: the program itself (some 30 MB), a VAE that draws previews or serves the structured loss.

use crate::config::{Checkpointing, Config, MemorySize, TrainingMode};
use crate::error::Result;
use crate::kernels::int8::{Int8Matrix, PANEL};
use crate::model::transformer::{Placement, Precision, TransformerConfig};
use crate::train::ahead::window;
use crate::train::setup::{self, RunData};
use candle_core::DType;
use serde::{Serialize, Serializer};
use std::fmt;

/// Values that a block keeps of each token for its backward pass, in units of D, when nothing is computed again:
/// the block's input, the normed input, q and k before and after RoPE, v, the attention's output, the input of the MLP,
/// its norm, and 4 D before the GELU.
const BLOCK_WIDTHS: usize = 14;

/// The same with the MLP computed again: without its norm and the 4 D.
const SELECTIVE_WIDTHS: usize = 9;

/// Full recompute keeps each block's input.
const FULL_WIDTHS: usize = 1;

/// Two more where the modulation gets gradients: the gated residuals then keep what they gate.
const GATED_WIDTHS: usize = 2;

/// The largest op's own buffers in f32, in units of D per token: input and gradient of the MLP's second linear (4 D
/// each), the gradient of its output, and the sum of the stream's gradients.
const WORKSPACE_WIDTHS: usize = 10;

const F32: usize = size_of::<f32>();

/// What a step works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Samples in a forward pass.
    pub batch: usize,
    /// Image tokens of a sample: the most of any bucket.
    pub image_tokens: usize,
    /// Text tokens of a sample.
    pub text_tokens: usize,
    /// Values that are trained.
    pub trained: usize,
    /// Sum of the adapters' ranks in one block (0 when all weights are trained).
    pub ranks_per_block: usize,
    /// Whether gradients flow into the modulation: it has adapters, or all weights are trained.
    pub trains_modulation: bool,
}

/// A step of a network, before it is decided in what types it runs and what its forward pass keeps.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The network.
    pub transformer: &'a TransformerConfig,
    /// What is trained.
    pub mode: TrainingMode,
    /// Whether gradients of several passes are added up.
    pub accumulates: bool,
    /// What it works on.
    pub shape: StepShape,
}

impl<'a> Step<'a> {
    /// The largest step of a run whose longest caption has `text_tokens`.
    ///
    /// Errors: targets that do not fit the model.
    pub fn of(
        config: &Config,
        data: &RunData,
        transformer: &'a TransformerConfig,
        text_tokens: usize,
    ) -> Result<Step<'a>> {
        let training = &config.training;
        let full = training.mode == TrainingMode::Full;
        let targets = if full { Vec::new() } else { setup::targets(config, transformer)? };
        let adapted: usize = targets.iter().map(|t| t.rank * (t.in_features + t.out_features)).sum();
        let shape = StepShape {
            batch: training.batch_size.min(data.samples.len()),
            image_tokens: data.samples.iter().map(|s| s.bucket.image_tokens()).max().unwrap_or_default(),
            text_tokens,
            trained: if full { num_params(transformer) } else { adapted },
            ranks_per_block: targets.iter().map(|t| t.rank).sum::<usize>().div_ceil(transformer.num_layers),
            trains_modulation: full || targets.iter().any(|t| feeds_modulation(&t.name)),
        };
        let accumulates = training.gradient_accumulation > 1;
        Ok(Self { transformer, mode: training.mode, accumulates, shape })
    }

    /// Counts the step's memory with the weights placed like this. Blocks that are swapped wait in the memory of the machine,
    /// which on the CPU is the device's own.
    pub fn forecast(
        &self,
        precision: Precision,
        checkpointing: Checkpointing,
        placement: Placement,
        on_gpu: bool,
    ) -> Forecast {
        let streamed = placement.streamed_modulation;
        let (config, shape) = (self.transformer, &self.shape);
        let (d, layers) = (config.dim(), config.num_layers);
        let tokens = shape.batch * (shape.image_tokens + shape.text_tokens);
        let size = precision.compute.size_in_bytes();
        let trained = shape.trained * F32;

        let gated = if shape.trains_modulation { GATED_WIDTHS } else { 0 };
        // Of the attention: log-sum-exp of each head; of each adapter: x A'. Both f32.
        let small = (config.num_attention_heads + shape.ranks_per_block) * F32;
        let whole = (BLOCK_WIDTHS + gated) * d * size + small;
        let of_a_token = match checkpointing {
            Checkpointing::None => layers * whole,
            // One block's MLP, or one block, exists as a graph while its gradient is computed.
            Checkpointing::Selective => {
                let kept = (SELECTIVE_WIDTHS + gated / 2) * d * size + small;
                layers * kept + (BLOCK_WIDTHS - SELECTIVE_WIDTHS) * d * size
            }
            Checkpointing::Full => layers * FULL_WIDTHS * d * size + whole,
        };
        // A weight of another type than f32 is widened for a product on the CPU; the largest has 4 D x D values. Int8 is
        // widened in panels; on a GPU a whole weight, of the modulation at most (6 D x D), is there in bf16.
        let panel = PANEL.min(6 * d * d) * F32;
        let widened = match (precision.int8, precision.weights == DType::F32) {
            (false, true) => 0,
            (false, false) => 4 * d * d * F32,
            (true, true) => panel,
            (true, false) => (6 * d * d * size).max(panel),
        };
        let bytes = |n: usize| MemorySize(n as u64);
        let swapped = placement.swapped_blocks;
        let block = if swapped > 0 { block_bytes(config, precision, streamed) } else { 0 };
        let waiting = swapped * block;
        let resident = weight_bytes(config, precision, streamed) - waiting + swapped.min(2) * block;
        Forecast {
            weights: bytes(if on_gpu { resident } else { resident + waiting }),
            modulation: bytes(if streamed { self.tables() * size } else { 0 }),
            adapter: bytes(if self.mode == TrainingMode::Lora { trained } else { 0 }),
            gradients: bytes(if self.accumulates { 2 * trained } else { trained }),
            optimizer: bytes(2 * trained),
            activations: bytes(tokens * of_a_token),
            workspace: bytes(tokens * WORKSPACE_WIDTHS * d * F32 + widened),
            host: bytes(if on_gpu { waiting } else { 0 }),
        }
    }
}

/// The base model in memory.
fn weight_bytes(config: &TransformerConfig, precision: Precision, streamed: bool) -> usize {
    config.tensors().iter().map(|(name, shape)| tensor_bytes(name, shape, precision, streamed)).sum()
}

/// The matrices of one block: what is swapped of it.
fn block_bytes(config: &TransformerConfig, precision: Precision, streamed: bool) -> usize {
    let tensors = config.tensors();
    let of_block = tensors.iter().filter(|(name, shape)| name.starts_with("transformer_blocks.0.") && shape.len() == 2);
    of_block.map(|(name, shape)| tensor_bytes(name, shape, precision, streamed)).sum()
}

fn tensor_bytes(name: &str, shape: &[usize], precision: Precision, streamed: bool) -> usize {
    match shape[..] {
        _ if streamed && name.contains("_mod.1.") => 0,
        [n, k] if precision.int8 && name.starts_with("transformer_blocks.") => Int8Matrix::bytes_of((n, k)),
        _ => shape.iter().product::<usize>() * precision.weights.size_in_bytes(),
    }
}

/// Base parameters.
fn num_params(config: &TransformerConfig) -> usize {
    config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

/// Whether an adapter on the linear `name` changes the modulation tables of the blocks.
pub fn feeds_modulation(name: &str) -> bool {
    name.ends_with("_mod.1") || name.starts_with("time_text_embed.")
}

impl Step<'_> {
    /// Values of the modulation tables of a window of steps: six rows for each stream of each block.
    fn tables(&self) -> usize {
        let (d, batch) = (self.transformer.dim(), self.shape.batch);
        window(d, batch) as usize * batch * self.transformer.num_layers * 2 * 6 * d
    }
}

/// Peak memory of a training step by part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// The base model.
    pub weights: MemorySize,
    /// Modulation tables computed ahead, where its weights are on the disk.
    pub modulation: MemorySize,
    /// Adapter, or nothing when the base itself is trained.
    pub adapter: MemorySize,
    /// Gradients of what is trained: those of a pass, and their sum over passes.
    pub gradients: MemorySize,
    /// The two moments of AdamW.
    pub optimizer: MemorySize,
    /// What the forward pass keeps for the backward pass.
    pub activations: MemorySize,
    /// Buffers of the ops.
    pub workspace: MemorySize,
    /// Blocks that wait in the memory of the machine; not part of the sum.
    pub host: MemorySize,
}

impl Forecast {
    /// The sum.
    pub fn total(&self) -> MemorySize {
        MemorySize(self.parts().iter().map(|(_, size)| size.0).sum())
    }

    fn parts(&self) -> [(&'static str, MemorySize); 7] {
        [
            ("weights", self.weights),
            ("modulation", self.modulation),
            ("adapter", self.adapter),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("workspace", self.workspace),
        ]
    }
}

impl Serialize for Forecast {
    /// A map of parts, `total`, and beside it `host`, in bytes.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.parts().into_iter().chain([("total", self.total()), ("host", self.host)]))
    }
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.total())?;
        let shown = self.parts().into_iter().filter(|(_, size)| size.0 > 0);
        shown
            .enumerate()
            .try_for_each(|(i, (name, size))| write!(f, "{} {name} {size}", if i > 0 { "," } else { "" }))?;
        if self.host.0 > 0 { write!(f, "; in host memory {}", self.host) } else { Ok(()) }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::BaseDtype;

    /// 1024x1024, one sample, 512 text tokens, rank 16 on the twelve targets of each block.
    pub fn megapixel(transformer: &TransformerConfig) -> Step<'_> {
        let shape = StepShape {
            batch: 1,
            image_tokens: 4096,
            text_tokens: 512,
            trained: 106_168_320,
            ranks_per_block: 12 * 16,
            trains_modulation: false,
        };
        Step { transformer, mode: TrainingMode::Lora, accumulates: false, shape }
    }

    fn gigabytes(size: MemorySize) -> f64 {
        size.0 as f64 / 1e9
    }

    /// By hand: 20,430,401,088 parameters of two bytes; adapters of 106.2 M; activations of 14 x 3072 x 2 bytes x 60
    /// blocks x 4608 tokens = 23.8 GB; with full recompute 60 inputs of 28.3 MB and one block of 0.4 GB.
    #[test]
    fn the_published_model_takes_what_the_arithmetic_says() {
        let published = TransformerConfig::qwen_image();
        let (resident, away) = (Placement::default(), Placement { streamed_modulation: true, swapped_blocks: 0 });
        let forecast = |c| megapixel(&published).forecast(Precision::uniform(DType::BF16), c, resident, true);
        let none = forecast(Checkpointing::None);
        assert!((gigabytes(none.weights) - 40.86).abs() < 0.01);
        assert!((gigabytes(none.adapter) - 0.425).abs() < 0.001);
        assert_eq!(none.optimizer.0, 2 * none.adapter.0);
        assert!((gigabytes(none.activations) - 24.0).abs() < 0.3, "{none}");
        let int8 = Precision::of(BaseDtype::Int8, DType::BF16);
        let [int8, streamed] =
            [resident, away].map(|p| megapixel(&published).forecast(int8, Checkpointing::Full, p, true));
        // 20.38 of the 20.43 billion are in matrices of blocks: 17/16 bytes each.
        assert!((gigabytes(int8.weights) - 21.75).abs() < 0.01, "{int8}");
        assert!(gigabytes(streamed.total()) < 22.0, "{streamed}");
        let full = forecast(Checkpointing::Full);
        assert!((gigabytes(full.activations) - 2.1).abs() < 0.05, "{full}");
        let selective = forecast(Checkpointing::Selective);
        assert!(full.total() < selective.total() && selective.total() < none.total());
        // The modulation's 60 x 2 x 6 x 3072 x 3073 parameters leave; a sixteenth comes back as tables.
        let streamed = megapixel(&published).forecast(Precision::uniform(DType::BF16), Checkpointing::Full, away, true);
        assert_eq!(none.weights.0 - streamed.weights.0, 60 * 2 * 6 * 3072 * 3073 * 2);
        assert!((gigabytes(streamed.modulation) - 13.59 / 16.0).abs() < 0.01, "{streamed}");
        let json = serde_json::to_value(&full).unwrap();
        let parts = json.as_object().unwrap().iter().filter(|(part, _)| *part != "total" && *part != "host");
        assert_eq!(json["total"].as_u64(), Some(parts.map(|(_, n)| n.as_u64().unwrap()).sum()));
    }

    /// Of each block 339,738,624 values are in the matrices of its linears (a third of them of the modulation).
    #[test]
    fn swapped_blocks_leave_the_gpu_but_for_two_and_wait_in_host_memory() {
        let published = TransformerConfig::qwen_image();
        let bf16 = Precision::uniform(DType::BF16);
        let forecast = |p: Precision, streamed_modulation, swapped_blocks, on_gpu| {
            let placement = Placement { streamed_modulation, swapped_blocks };
            megapixel(&published).forecast(p, Checkpointing::Full, placement, on_gpu)
        };
        let none = forecast(bf16, false, 0, true);
        let half = forecast(bf16, false, 30, true);
        let block = 36 * 3072 * 3072 * 2;
        assert_eq!((none.host.0, half.host.0), (0, 30 * block));
        assert_eq!(none.total().0 - half.total().0, 28 * block);
        assert!(half.to_string().ends_with("; in host memory 20.4 GB"), "{half}");
        assert!(!none.to_string().contains("host"), "{none}");
        // Without the modulation there is two thirds as much to swap; in int8 17/32 of that.
        let streamed = forecast(bf16, true, 30, true);
        assert_eq!(streamed.host.0, half.host.0 / 3 * 2);
        let int8 = Precision::of(BaseDtype::Int8, DType::BF16);
        assert_eq!(forecast(int8, true, 60, true).host.0, streamed.host.0 * 2 / 32 * 17);
        // On the CPU all of them and the two buffers are in the same memory.
        let [cpu, swapped] = [0, 30].map(|n| forecast(bf16, false, n, false));
        assert_eq!((swapped.total().0 - cpu.total().0, swapped.host.0), (2 * block, 0));
    }

    #[test]
    fn adapters_on_the_time_embedding_reach_the_modulation_and_those_on_its_neighbours_do_not() {
        for module in TransformerConfig::qwen_image().modules() {
            let group = module.groups.contains(&"modulation");
            let time = module.name.contains("timestep_embedder");
            assert_eq!(feeds_modulation(&module.name), group || time, "{}", module.name);
        }
    }
}
