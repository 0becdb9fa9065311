//! The ways to run a step, against a given memory.

use crate::config::{Checkpointing, ComputeDtype, Config, MemorySize, ModulationChoice};
use crate::train::memory::Step;
use crate::train::setup;
use serde::Serialize;
use std::fmt;

/// One way to run, and what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Choice {
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

/// Every way to run, the most exact type and the fastest policy first.
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

    /// The ways to run `step` that `training.mode` and `model.dtype` of the config leave, held against `available`.
    pub fn new(config: &Config, step: &Step, on_gpu: bool, available: MemorySize) -> Self {
        let mut choices = Vec::new();
        for dtype in [ComputeDtype::F32, ComputeDtype::Bf16] {
            let mut config = config.clone();
            config.training.dtype = dtype;
            let Ok(precision) = setup::precision(&config, on_gpu) else { continue };
            for checkpointing in [Checkpointing::None, Checkpointing::Selective, Checkpointing::Full] {
                // A reading of the modulation's weights now and then is cheaper than computing blocks twice in each step.
                for modulation in [ModulationChoice::Resident, ModulationChoice::Streamed] {
                    let streamed = modulation == ModulationChoice::Streamed;
                    if streamed && step.shape.trains_modulation {
                        continue;
                    }
                    let total = step.forecast(precision, checkpointing, streamed).total();
                    choices.push(Choice { dtype, checkpointing, modulation, total, fits: total <= available });
                }
            }
        }
        Self { available, choices }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = format!("in {}", self.available);
        write!(f, "{head:<14} dtype  checkpointing  modulation  takes")?;
        for c in &self.choices {
            let verdict = if c.fits { "fits" } else { "too large" };
            let (dtype, policy, modulation) = (c.dtype.as_str(), c.checkpointing.as_str(), c.modulation.as_str());
            write!(f, "\n{verdict:<14} {dtype:<6} {policy:<14} {modulation:<11} {}", c.total)?;
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
    fn in_48_gb_the_published_model_trains_in_bf16_with_full_recompute_or_its_modulation_on_the_disk() {
        let published = TransformerConfig::qwen_image();
        let budget = |size: &str| Budget::new(&config("model: m"), &megapixel(&published), true, size.parse().unwrap());
        let fitting = budget("48GB").choices.into_iter().filter(|c| c.fits);
        let fitting: Vec<_> = fitting.map(|c| (c.dtype, c.checkpointing, c.modulation)).collect();
        let bf16 = |c, m| (ComputeDtype::Bf16, c, m);
        let (resident, streamed) = (ModulationChoice::Resident, ModulationChoice::Streamed);
        let [selective, full] = [Checkpointing::Selective, Checkpointing::Full];
        assert_eq!(fitting, [bf16(selective, streamed), bf16(full, resident), bf16(full, streamed)]);
        let text = budget("24GB").to_string();
        assert!(!text.contains("\nfits") && text.starts_with("in 24.0 GB     dtype"), "{text}");
        // Weights in f32 take 82 GB, without the modulation 55 GB, whatever is computed in.
        let wide =
            Budget::new(&config("model: {path: m, dtype: f32}"), &megapixel(&published), true, MemorySize(80 << 30));
        assert!(wide.choices.iter().all(|c| c.total.0 > 55_000_000_000) && wide.choices.len() == 12);
    }

    #[test]
    fn all_weights_are_trained_in_f32_only() {
        let published = TransformerConfig::qwen_image();
        let full = config("model: m, training: {mode: full}");
        let budget = Budget::new(&full, &megapixel(&published), false, MemorySize(1 << 40));
        assert!(budget.choices.iter().all(|c| c.dtype == ComputeDtype::F32) && budget.choices.len() == 6);
    }
}
