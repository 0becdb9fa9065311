//! How pictures are made: the flags that `generate` and `eval` share.

use crate::config::{DeviceChoice, ImageSize};
use crate::error::{Error, Result};
use crate::prompt::structured::expand_all;
use crate::sample::Recipe;
use clap::{Args, ValueEnum};

/// What a recipe does not take from the prompts and adapters.
#[derive(Args, Clone, Debug)]
pub(super) struct Sampling {
    /// What not to show [default: one space, as the model card advises]
    #[arg(long, value_name = "TEXT")]
    negative_prompt: Option<String>,
    /// Denoising steps [default: 50]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Scale of true classifier-free guidance; 1 turns it off and halves the time [default: 4]
    #[arg(long, value_name = "SCALE")]
    guidance: Option<f64>,
    /// One image of each prompt for each of these seeds: `1,2,3` [default: 0; of `eval` 0,1,2,3]
    #[arg(long = "seeds", visible_alias = "seed", value_name = "LIST", value_delimiter = ',')]
    seeds: Vec<u64>,
    /// WIDTHxHEIGHT, or a published aspect ratio: 1:1, 16:9, 9:16, 4:3, 3:4, 3:2, 2:3 [default: 1:1, 1328x1328]
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// Type of the transformer's weights in memory; int8 is made as they are read [default: f32, on a GPU bf16]
    #[arg(long, value_name = "TYPE")]
    dtype: Option<WeightType>,
    /// Where the transformer runs: auto, cpu or cuda:N; text encoder and VAE run on the CPU
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Images that go through the transformer together
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch_size: usize,
}

/// Type of the transformer's weights.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum WeightType {
    F32,
    Bf16,
    Int8,
}

impl Sampling {
    /// Errors (usage): a batch of nothing.
    pub fn check(&self) -> Result<()> {
        if self.batch_size == 0 {
            return Err(Error::usage("`--batch-size` is 0").expected("1 or more", 0));
        }
        Ok(())
    }

    /// The recipe's `dtype` where nobody chose one.
    pub fn dtype(on_cpu: bool) -> &'static str {
        if on_cpu { "f32" } else { "bf16" }
    }

    /// Changes in `recipe` what the flags say, and puts its prompts together where they are given in parts.
    ///
    /// Errors (usage): a size or a prompt that cannot be read.
    pub fn apply(&self, recipe: &mut Recipe) -> Result<()> {
        if !self.seeds.is_empty() {
            recipe.seeds = self.seeds.clone();
        }
        if let Some(size) = &self.size {
            recipe.size = size.parse::<ImageSize>()?.to_string();
        }
        if let Some(dtype) = self.dtype {
            recipe.dtype = match dtype {
                WeightType::F32 => "f32",
                WeightType::Bf16 => "bf16",
                WeightType::Int8 => "int8",
            }
            .into();
        }
        recipe.steps = self.steps.unwrap_or(recipe.steps);
        recipe.guidance = self.guidance.unwrap_or(recipe.guidance);
        expand_all(&mut recipe.prompts, &mut recipe.negative_prompt, self.negative_prompt.as_deref())
    }
}
