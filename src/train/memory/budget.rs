//! The ways to run a step, against a given memory.

use crate::config::{
    BaseDtype, Checkpointing, ComputeDtype, Config, MemorySize, ModulationChoice, SwapChoice, TrainingMode,
};
use crate::model::transformer::{Placement, Precision};
use crate::train::memory::{Machine, Step};
use crate::train::setup;
use serde::Serialize;
use std::fmt;
use std::ops::RangeInclusive;

/// One way to run, and what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// `model.dtype`; never `auto`.
    pub base: BaseDtype,
    /// `training.dtype`.
    pub dtype: ComputeDtype,
    /// `training.checkpointing`.
    pub checkpointing: Checkpointing,
    /// `model.modulation`: `resident` or `streamed`.
    pub modulation: ModulationChoice,
    /// `model.blocks_to_swap`.
    pub blocks_to_swap: usize,
    /// Peak of a step.
    #[serde(rename = "total_bytes")]
    pub total: MemorySize,
    /// Blocks that wait in the memory of the machine, beside that.
    #[serde(rename = "host_bytes")]
    pub host: MemorySize,
    /// Whether it stays within the given memory, and the machine can hold the blocks.
    pub fits: bool,
}

/// Every way to run, the most exact types and the fastest policy first: int8 weights come after all floats.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Budget {
    /// What a run may take.
    #[serde(rename = "available_bytes")]
    pub available: MemorySize,
    /// The ways.
    pub choices: Vec<Choice>,
}

impl Budget {
    /// What to do where nothing fits.
    pub const ADVICE: &str = "a smaller `data.resolution`, `training.batch_size` or `lora.rank` takes less";

    /// The ways to run `step` with the base as `model.dtype` of the config has it, and, where an adapter is trained, with one
    /// in int8, held against `available` and, for blocks that wait, against the memory of the machine.
    ///
    /// Blocks are swapped where the config says how many, in each way; where it leaves that open, on a GPU, and beside full
    /// recompute alone: up to half of them before less exact types, more of them after all types.
    pub fn new(config: &Config, step: &Step, machine: &Machine, available: MemorySize) -> Self {
        let on_gpu = machine.on_gpu();
        let ways = Ways { step, on_gpu, available, host: machine.can_pin() };
        let own = config.model.dtype;
        let mut bases = vec![own];
        if own != BaseDtype::Int8 && step.mode == TrainingMode::Lora {
            bases.push(BaseDtype::Int8);
        }
        let types = bases.into_iter().flat_map(|base| [ComputeDtype::F32, ComputeDtype::Bf16].map(|c| (base, c)));
        let types: Vec<(ComputeDtype, Precision)> = types
            .filter_map(|(base, dtype)| {
                let mut config = config.clone();
                (config.model.dtype, config.training.dtype) = (base, dtype);
                Some((dtype, setup::precision(&config, on_gpu).ok()?))
            })
            .collect();
        let (swapped, open) = match config.model.blocks_to_swap {
            SwapChoice::Blocks(n) => (n, false),
            SwapChoice::Auto => (0, on_gpu && step.mode == TrainingMode::Lora),
        };
        let resident_only = step.shape.trains_modulation;
        // Where both are open, what is streamed need not be swapped.
        let streamed = !resident_only && config.model.modulation != ModulationChoice::Resident;
        let (layers, least) = (step.transformer.num_layers, Placement::LEAST_SWAPPED);
        let mut choices = Vec::new();
        for &types in &types {
            for checkpointing in [Checkpointing::None, Checkpointing::Selective, Checkpointing::Full] {
                // A reading of the modulation's weights now and then is cheaper than computing blocks twice in each step.
                for streamed_modulation in [false, true] {
                    if !(streamed_modulation && resident_only) {
                        let placement = Placement { streamed_modulation, swapped_blocks: swapped };
                        choices.push(ways.choice(types, checkpointing, placement));
                    }
                }
            }
            if open && layers / 2 >= least {
                choices.push(ways.fewest(types, streamed, least..=layers / 2));
            }
        }
        if open && layers >= least {
            choices.extend(types.iter().map(|&types| ways.fewest(types, streamed, least.max(layers / 2 + 1)..=layers)));
        }
        Self { available, choices }
    }
}

/// What all ways have in common.
struct Ways<'a> {
    step: &'a Step<'a>,
    on_gpu: bool,
    available: MemorySize,
    /// `None` if it is not known.
    host: Option<MemorySize>,
}

impl Ways<'_> {
    fn choice(
        &self,
        (dtype, precision): (ComputeDtype, Precision),
        checkpointing: Checkpointing,
        placement: Placement,
    ) -> Choice {
        let forecast = self.step.forecast(precision, checkpointing, placement, self.on_gpu);
        let (total, host) = (forecast.total(), forecast.host);
        Choice {
            base: precision.base(),
            dtype,
            checkpointing,
            modulation: ModulationChoice::of(placement.streamed_modulation),
            blocks_to_swap: placement.swapped_blocks,
            total,
            host,
            fits: total <= self.available && self.host.is_none_or(|free| host <= free),
        }
    }

    /// Full recompute with the fewest swapped blocks that make it fit, or with all of `counts`, which are not empty.
    fn fewest(&self, types: (ComputeDtype, Precision), streamed: bool, counts: RangeInclusive<usize>) -> Choice {
        let mut choices = counts.map(|swapped_blocks| {
            let placement = Placement { streamed_modulation: streamed, swapped_blocks };
            self.choice(types, Checkpointing::Full, placement)
        });
        let mut last = choices.next().expect("the caller has looked");
        while last.total > self.available
            && let Some(more) = choices.next()
        {
            last = more;
        }
        last
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = format!("in {}", self.available);
        write!(f, "{head:<14} base  dtype  checkpointing  modulation  swapped  takes")?;
        for c in &self.choices {
            let verdict = match c.fits {
                true => "fits",
                false if c.total > self.available => "too large",
                false => "host too small",
            };
            let (base, dtype) = (c.base.as_str(), c.dtype.as_str());
            let (policy, modulation) = (c.checkpointing.as_str(), c.modulation.as_str());
            write!(
                f,
                "\n{verdict:<14} {base:<5} {dtype:<6} {policy:<14} {modulation:<11} {:<8} {}",
                c.blocks_to_swap, c.total
            )?;
            if c.host.0 > 0 {
                write!(f, ", in host memory {}", c.host)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::transformer::TransformerConfig;
    use crate::train::memory::forecast::tests::megapixel;

    const GPU: Machine = Machine::Another { on_gpu: true, can_pin: None };
    const CPU: Machine = Machine::Another { on_gpu: false, can_pin: None };

    fn config(more: &str) -> Config {
        let text = format!("{{data: {{path: p}}, {more}}}");
        Config::parse(&text, "c.yaml".as_ref(), &[]).unwrap()
    }

    #[test]
    fn in_48_gb_the_published_model_trains_in_bf16_and_in_24_gb_its_weights_are_in_int8() {
        let published = TransformerConfig::qwen_image();
        let budget =
            |more: &str, size: &str| Budget::new(&config(more), &megapixel(&published), &GPU, size.parse().unwrap());
        let fitting = |more: &str, size: &str| {
            let fitting = budget(more, size).choices.into_iter().filter(|c| c.fits && c.dtype == ComputeDtype::Bf16);
            fitting.map(|c| (c.base, c.checkpointing, c.modulation, c.blocks_to_swap)).collect::<Vec<_>>()
        };
        let (resident, streamed) = (ModulationChoice::Resident, ModulationChoice::Streamed);
        let [none, selective, full] = [Checkpointing::None, Checkpointing::Selective, Checkpointing::Full];
        let kept = "model: {path: m, blocks_to_swap: 0}";
        let floats = [(selective, streamed), (full, resident), (full, streamed)];
        let floats = floats.map(|(c, m)| (BaseDtype::Bf16, c, m, 0));
        let int8 = [(none, streamed), (selective, resident), (selective, streamed), (full, resident), (full, streamed)];
        let int8 = int8.map(|(c, m)| (BaseDtype::Int8, c, m, 0));
        assert_eq!(fitting(kept, "48GB"), [&floats[..], &int8[..]].concat());
        assert_eq!(fitting(kept, "24GB"), [(BaseDtype::Int8, full, streamed, 0)]);
        let text = budget(kept, "24GB").to_string();
        assert!(text.starts_with("in 24.0 GB     base  dtype") && text.matches("\nfits").count() == 2, "{text}");
        assert!(text.contains("\nfits           int8  bf16   full           streamed    0        19.9 GB"), "{text}");
        // Weights in f32 take 82 GB, without the modulation 55 GB, whatever is computed in; int8 is listed beside them.
        let wide = budget("model: {path: m, dtype: f32, blocks_to_swap: 0}", "80GiB").choices;
        let (f32s, int8): (Vec<Choice>, _) = wide.into_iter().partition(|c| c.base == BaseDtype::F32);
        assert!(f32s.iter().all(|c| c.total.0 > 55_000_000_000) && f32s.len() == 12);
        assert!(int8.iter().all(|c| c.base == BaseDtype::Int8) && int8.len() == 12);
        assert_eq!(budget("model: {path: m, dtype: int8, blocks_to_swap: 0}", "80GiB").choices, int8);
    }

    #[test]
    fn half_of_the_blocks_are_swapped_before_the_types_get_narrower_and_more_of_them_at_the_very_end() {
        let published = TransformerConfig::qwen_image();
        let choices = |more: &str, size: &str, machine: &Machine| {
            Budget::new(&config(more), &megapixel(&published), machine, size.parse().unwrap()).choices
        };
        let swaps = |size: &str| {
            let swapped = choices("model: m", size, &GPU).into_iter().filter(|c| c.blocks_to_swap > 0);
            swapped.map(|c| (c.base.as_str(), c.dtype.as_str(), c.blocks_to_swap, c.fits)).collect::<Vec<_>>()
        };
        // The fewest that fit; where none do, as many as there are at this place.
        let swapped = swaps("24GB");
        assert_eq!(swapped.len(), 8);
        let bf16 = swapped[1];
        assert!((bf16.0, bf16.1, bf16.3) == ("bf16", "bf16", true) && (3..=30).contains(&bf16.2), "{swapped:?}");
        assert_eq!((swapped[0].2, swapped[0].3, swapped[4].0), (30, false, "f32"), "{swapped:?}");
        let places = |size: &str| -> Vec<usize> {
            let choices = choices("model: m", size, &GPU);
            (0..choices.len()).filter(|i| choices[*i].blocks_to_swap > 0).collect()
        };
        assert_eq!(places("24GB"), [6, 13, 20, 27, 28, 29, 30, 31]);
        let one_less = Placement { streamed_modulation: true, swapped_blocks: bf16.2 - 1 };
        let step = megapixel(&published);
        let forecast = step.forecast(Precision::uniform(candle_core::DType::BF16), Checkpointing::Full, one_less, true);
        assert!(forecast.total().0 > 24_000_000_000, "{forecast}");
        // In 14 GB int8 fits with up to half of its blocks in host memory, bf16 with more.
        let swapped = swaps("14GB");
        let fits: Vec<_> = swapped.iter().filter(|s| s.1 == "bf16" && s.3).map(|s| (s.0, s.1, s.2 > 30)).collect();
        assert_eq!(fits, [("int8", "bf16", false), ("bf16", "bf16", true), ("int8", "bf16", true)], "{swapped:?}");
        // What the config says holds in each way; on the CPU nothing is won.
        let eight = choices("model: {path: m, blocks_to_swap: 8}", "24GB", &GPU);
        assert!(eight.iter().all(|c| c.blocks_to_swap == 8) && eight.len() == 24);
        assert!(choices("model: m", "24GB", &CPU).iter().all(|c| c.blocks_to_swap == 0));
    }

    #[test]
    fn blocks_wait_only_in_a_machine_that_has_the_memory() {
        let published = TransformerConfig::qwen_image();
        let budget = |can_pin: &str| {
            let machine = Machine::Another { on_gpu: true, can_pin: Some(can_pin.parse().unwrap()) };
            Budget::new(&config("model: m"), &megapixel(&published), &machine, "24GB".parse().unwrap())
        };
        let swapped = |budget: &Budget| -> Vec<Choice> {
            budget.choices.iter().filter(|c| c.blocks_to_swap > 0 && c.base == BaseDtype::Bf16).copied().collect()
        };
        let (large, small) = (budget("32GB"), budget("4GB"));
        assert!(swapped(&large).iter().any(|c| c.fits && c.host.0 > 4_000_000_000), "{large}");
        assert!(swapped(&small).iter().all(|c| !c.fits), "{small}");
        // More would fit into less memory of the GPU, but not into the machine: what is shown is the smallest that the GPU takes.
        assert!(small.to_string().contains("\nhost too small bf16  bf16"), "{small}");
        assert!(large.to_string().contains(", in host memory "), "{large}");
        assert!(small.choices.iter().any(|c| c.fits && c.base == BaseDtype::Int8), "{small}");
    }

    #[test]
    fn all_weights_are_trained_in_f32_only() {
        let published = TransformerConfig::qwen_image();
        let full = config("model: m, training: {mode: full}");
        let step = Step { mode: TrainingMode::Full, ..megapixel(&published) };
        let budget = Budget::new(&full, &step, &CPU, MemorySize(1 << 40));
        assert!(budget.choices.iter().all(|c| c.base == BaseDtype::F32));
        assert_eq!(budget.choices.iter().filter(|c| c.dtype == ComputeDtype::F32).count(), 6);
        assert_eq!(budget.choices.len(), 12);
    }
}
