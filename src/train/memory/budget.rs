//! The ways to run a step, against a given memory.

use crate::config::{BaseDtype, Checkpointing, ComputeDtype, Config, MemorySize, ModulationChoice, TrainingMode};
use crate::train::memory::Step;
use crate::train::setup;
use serde::Serialize;
use std::fmt;

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
    /// Peak of a step.
    #[serde(rename = "total_bytes")]
    pub total: MemorySize,
    /// Whether it stays within the given memory.
    pub fits: bool,
}

/// Every way to run, the most exact types and the fastest policy first: int8 weights come after all floats.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Budget {
    /// What there is.
    #[serde(rename = "available_bytes")]
    pub available: MemorySize,
    /// The ways.
    pub choices: Vec<Choice>,
}

impl Budget {
    /// What to do where nothing fits.
    pub const ADVICE: &str = "a smaller `data.resolution`, `training.batch_size` or `lora.rank` takes less";

    /// The ways to run `step` with the base as `model.dtype` of the config has it, and, where an adapter is trained, with one
    /// in int8, held against `available`.
    pub fn new(config: &Config, step: &Step, on_gpu: bool, available: MemorySize) -> Self {
        let own = config.model.dtype;
        let mut bases = vec![own];
        if own != BaseDtype::Int8 && step.mode == TrainingMode::Lora {
            bases.push(BaseDtype::Int8);
        }
        let types = bases.into_iter().flat_map(|base| [ComputeDtype::F32, ComputeDtype::Bf16].map(|c| (base, c)));
        let mut choices = Vec::new();
        for (base, dtype) in types {
            let mut config = config.clone();
            (config.model.dtype, config.training.dtype) = (base, dtype);
            let Ok(precision) = setup::precision(&config, on_gpu) else { continue };
            let base = precision.base();
            for checkpointing in [Checkpointing::None, Checkpointing::Selective, Checkpointing::Full] {
                // A reading of the modulation's weights now and then is cheaper than computing blocks twice in each step.
                for modulation in [ModulationChoice::Resident, ModulationChoice::Streamed] {
                    let streamed = modulation == ModulationChoice::Streamed;
                    if streamed && step.shape.trains_modulation {
                        continue;
                    }
                    let total = step.forecast(precision, checkpointing, streamed).total();
                    choices.push(Choice { base, dtype, checkpointing, modulation, total, fits: total <= available });
                }
            }
        }
        Self { available, choices }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = format!("in {}", self.available);
        write!(f, "{head:<14} base  dtype  checkpointing  modulation  takes")?;
        for c in &self.choices {
            let verdict = if c.fits { "fits" } else { "too large" };
            let (base, dtype) = (c.base.as_str(), c.dtype.as_str());
            let (policy, modulation) = (c.checkpointing.as_str(), c.modulation.as_str());
            write!(f, "\n{verdict:<14} {base:<5} {dtype:<6} {policy:<14} {modulation:<11} {}", c.total)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::transformer::TransformerConfig;
    use crate::train::memory::forecast::tests::megapixel;

    fn config(more: &str) -> Config {
        let text = format!("{{data: {{path: p}}, {more}}}");
        Config::parse(&text, "c.yaml".as_ref(), &[]).unwrap()
    }

    #[test]
    fn in_48_gb_the_published_model_trains_in_bf16_and_in_24_gb_its_weights_are_in_int8() {
        let published = TransformerConfig::qwen_image();
        let budget =
            |more: &str, size: &str| Budget::new(&config(more), &megapixel(&published), true, size.parse().unwrap());
        let fitting = |more: &str, size: &str| {
            let fitting = budget(more, size).choices.into_iter().filter(|c| c.fits && c.dtype == ComputeDtype::Bf16);
            fitting.map(|c| (c.base, c.checkpointing, c.modulation)).collect::<Vec<_>>()
        };
        let (resident, streamed) = (ModulationChoice::Resident, ModulationChoice::Streamed);
        let [none, selective, full] = [Checkpointing::None, Checkpointing::Selective, Checkpointing::Full];
        let floats = [(selective, streamed), (full, resident), (full, streamed)].map(|(c, m)| (BaseDtype::Bf16, c, m));
        let int8 = [(none, streamed), (selective, resident), (selective, streamed), (full, resident), (full, streamed)];
        let int8 = int8.map(|(c, m)| (BaseDtype::Int8, c, m));
        assert_eq!(fitting("model: m", "48GB"), [&floats[..], &int8[..]].concat());
        assert_eq!(fitting("model: m", "24GB"), [(BaseDtype::Int8, full, streamed)]);
        let text = budget("model: m", "24GB").to_string();
        assert!(text.starts_with("in 24.0 GB     base  dtype") && text.matches("\nfits").count() == 2, "{text}");
        assert!(text.contains("\nfits           int8  bf16   full           streamed    19.9 GB"), "{text}");
        // Weights in f32 take 82 GB, without the modulation 55 GB, whatever is computed in; int8 is listed beside them.
        let wide = budget("model: {path: m, dtype: f32}", "80GiB").choices;
        let (f32s, int8): (Vec<Choice>, _) = wide.into_iter().partition(|c| c.base == BaseDtype::F32);
        assert!(f32s.iter().all(|c| c.total.0 > 55_000_000_000) && f32s.len() == 12);
        assert!(int8.iter().all(|c| c.base == BaseDtype::Int8) && int8.len() == 12);
        assert_eq!(budget("model: {path: m, dtype: int8}", "80GiB").choices, int8);
    }

    #[test]
    fn all_weights_are_trained_in_f32_only() {
        let published = TransformerConfig::qwen_image();
        let full = config("model: m, training: {mode: full}");
        let step = Step { mode: TrainingMode::Full, ..megapixel(&published) };
        let budget = Budget::new(&full, &step, false, MemorySize(1 << 40));
        assert!(budget.choices.iter().all(|c| c.base == BaseDtype::F32 && c.dtype == ComputeDtype::F32));
        assert_eq!(budget.choices.len(), 6);
    }
}
