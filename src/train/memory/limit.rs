//! `training.memory`: choosing how a run works so that it fits, and noticing that it does not.

use crate::config::{
    BaseDtype, Checkpointing, ComputeDtype, Config, MemoryLimit, MemorySize, ModulationChoice, SwapChoice, TrainingMode,
};
use crate::device::memory::Peak;
use crate::error::{Error, Result};
use crate::model::transformer::{Placement, Precision};
use crate::train::memory::{Budget, Choice, Forecast, Machine, Step};
use crate::train::setup;
use candle_core::Device;

/// How a run works, with nothing left open.
pub struct Settled {
    /// Types of base and activations.
    pub precision: Precision,
    /// What the forward pass keeps.
    pub checkpointing: Checkpointing,
    /// Which weights are not on the device all the time.
    pub placement: Placement,
    /// What a step takes.
    pub forecast: Forecast,
    /// What it may take.
    pub limit: Option<MemorySize>,
}

impl Settled {
    /// Decides what the config leaves open and writes it there. The types stay as they are in a run that goes on (`fresh`
    /// false): its weights were trained in them.
    ///
    /// Errors (usage): nothing that the config allows fits; the system does not tell how much memory is free; weights are
    /// trained that the config wants elsewhere; a number of blocks that cannot be swapped, or that the machine cannot hold.
    pub fn settle(config: &mut Config, step: &Step, machine: &Machine, fresh: bool) -> Result<Self> {
        let on_gpu = machine.on_gpu();
        let limit = match config.training.memory {
            None => None,
            Some(MemoryLimit::Size(size)) => Some(size),
            Some(MemoryLimit::Auto) => Some(machine.free()?),
        };
        let mut streamed = config.model.modulation == ModulationChoice::Streamed;
        if streamed && step.shape.trains_modulation {
            return Err(Error::usage(
                "`model.modulation: streamed` leaves weights on the disk that this run trains or trains through",
            )
            .hint("with adapters on the modulation or the time embedding it is `resident`"));
        }
        let mut swapped_blocks = match config.model.blocks_to_swap {
            SwapChoice::Auto => 0,
            SwapChoice::Blocks(n) => check_swapped(n, step)?,
        };
        if let Some(limit) = limit {
            let budget = Budget::new(config, step, machine, limit);
            let choice =
                choose(config, &budget, on_gpu, fresh).ok_or_else(|| too_large(config, &budget, on_gpu, fresh))?;
            streamed = choice.modulation == ModulationChoice::Streamed;
            swapped_blocks = choice.blocks_to_swap;
            let training = &mut config.training;
            training.checkpointing = choice.checkpointing.into();
            if training.dtype.resolve(on_gpu) != choice.dtype.resolve(on_gpu) {
                training.dtype = choice.dtype;
            }
            if choice.base == BaseDtype::Int8 {
                config.model.dtype = BaseDtype::Int8;
            }
        }
        let precision = setup::precision(config, on_gpu)?;
        // Open only in a dry run for another machine.
        let checkpointing = config.training.checkpointing.policy().unwrap_or(Checkpointing::Full);
        let placement = Placement { streamed_modulation: streamed, swapped_blocks };
        let forecast = step.forecast(precision, checkpointing, placement, on_gpu);
        if let Some(free) = machine.can_pin().filter(|free| forecast.host > *free) {
            return Err(Error::usage("the machine has not the memory for so many `model.blocks_to_swap`")
                .expected(format!("at most {free}, nine tenths of what is free"), forecast.host)
                .hint("swap fewer blocks, hold them in int8 (`model.dtype: int8`), or leave it to `training.memory: auto`"));
        }
        Ok(Self { precision, checkpointing, placement, forecast, limit })
    }

    /// One line for the user; none without a limit.
    pub fn note(&self) -> Option<String> {
        let (precision, policy) = (self.precision, self.checkpointing.as_str());
        let modulation = self.modulation().as_str();
        let limit = self.limit?;
        let swapped = match self.placement.swapped_blocks {
            0 => String::new(),
            n => format!(", {n} blocks swapped"),
        };
        Some(format!(
            "within the {limit} that the run may take: {precision}, checkpointing {policy}, modulation \
             {modulation}{swapped}"
        ))
    }

    /// `model.modulation`, decided.
    pub fn modulation(&self) -> ModulationChoice {
        ModulationChoice::of(self.placement.streamed_modulation)
    }
}

/// `model.blocks_to_swap`, if the model can do that.
fn check_swapped(blocks: usize, step: &Step) -> Result<usize> {
    let (least, all) = (Placement::LEAST_SWAPPED, step.transformer.num_layers);
    if blocks > 0 && step.mode == TrainingMode::Full {
        return Err(Error::usage(
            "`model.blocks_to_swap` is for `training.mode: lora`: what waits in host memory is frozen",
        )
        .expected(0, blocks));
    }
    if blocks > 0 && !(least..=all).contains(&blocks) {
        let expected = if all < least { "0".into() } else { format!("0, or from {least} to {all}") };
        let error = Error::usage("`model.blocks_to_swap` is a number of blocks that cannot be swapped");
        return Err(error
            .detail("two of them are on the device at any time, so that swapping two or fewer saves nothing")
            .expected(expected, blocks));
    }
    Ok(blocks)
}

/// The first way that fits and that the config allows.
fn choose(config: &Config, budget: &Budget, on_gpu: bool, fresh: bool) -> Option<Choice> {
    let training = &config.training;
    // On a GPU `auto` is bf16, the narrowest type there is.
    let any_type = training.dtype == ComputeDtype::Auto && fresh && !on_gpu;
    let any_base = config.model.dtype == BaseDtype::Auto && fresh;
    let allowed = |c: &&Choice| {
        (any_type || is_own_type(config, c, on_gpu))
            && (any_base || is_own_base(config, c))
            && training.checkpointing.policy().is_none_or(|policy| policy == c.checkpointing)
            && (config.model.modulation == ModulationChoice::Auto || config.model.modulation == c.modulation)
    };
    budget.choices.iter().filter(allowed).find(|c| c.fits).copied()
}

/// Whether a way computes in the config's own type.
fn is_own_type(config: &Config, c: &Choice, on_gpu: bool) -> bool {
    c.dtype.resolve(on_gpu) == config.training.dtype.resolve(on_gpu)
}

/// Whether a way has the config's own base: of int8 there is one, and all others are those of `model.dtype`.
fn is_own_base(config: &Config, c: &Choice) -> bool {
    (c.base == BaseDtype::Int8) == (config.model.dtype == BaseDtype::Int8)
}

fn too_large(config: &Config, budget: &Budget, on_gpu: bool, fresh: bool) -> Error {
    let of = match config.training.memory {
        Some(MemoryLimit::Size(_)) => "`training.memory`",
        _ => "memory that the run may take, nine tenths of what is free",
    };
    let error = Error::usage(format!("a training step does not fit into the {} of {of}", budget.available))
        .detail(budget.to_string());
    // A run that goes on keeps its types.
    let open = |c: &&Choice| fresh || is_own_type(config, c, on_gpu) && is_own_base(config, c);
    match budget.choices.iter().filter(open).find(|c| c.fits) {
        Some(c) => {
            let base = if is_own_base(config, c) { "" } else { "--set model.dtype=int8 " };
            let swap = match c.blocks_to_swap {
                0 => String::new(),
                n => format!(" --set model.blocks_to_swap={n}"),
            };
            error.hint(format!(
                "`{base}--set training.dtype={} --set training.checkpointing={} --set model.modulation={}{swap}` fits",
                c.dtype.as_str(),
                c.checkpointing.as_str(),
                c.modulation.as_str()
            ))
        }
        None => error.hint(Budget::ADVICE),
    }
}

/// Watches over the limit while the run goes on.
pub struct Watch {
    limit: Option<MemorySize>,
    peak: Peak,
    checkpointing: Checkpointing,
    /// Whether a new run could have its weights in int8.
    int8_is_open: bool,
}

impl Watch {
    /// Begins to watch.
    pub fn new(config: &Config, settled: &Settled, device: &Device) -> Result<Self> {
        Ok(Self {
            limit: settled.limit,
            peak: Peak::watch(device)?,
            checkpointing: settled.checkpointing,
            int8_is_open: !settled.precision.int8 && config.training.mode == TrainingMode::Lora,
        })
    }

    /// The error to end the run with after `done` steps, once they are saved; none while it keeps to its limit.
    pub fn exceeded(&self, done: u64) -> Result<Option<Error>> {
        let Some(limit) = self.limit else { return Ok(None) };
        let Some(held) = self.peak.bytes()?.map(MemorySize).filter(|held| *held > limit) else { return Ok(None) };
        let less = match self.checkpointing {
            Checkpointing::None => "or with `--set training.checkpointing=selective`, which takes less",
            Checkpointing::Selective => "or with `--set training.checkpointing=full`, which takes less",
            Checkpointing::Full if self.int8_is_open => {
                "or begin a new run with `model.dtype: int8`, or a smaller `data.resolution`, `batch_size` or `lora.rank`"
            }
            Checkpointing::Full => "or begin a new run with a smaller `data.resolution`, `batch_size` or `lora.rank`",
        };
        Ok(Some(
            Error::run(format!("stopped after step {done}: the run took more memory than it may; saved"))
                .expected(format!("at most {limit}"), held)
                .hint(format!("continue with `--resume auto` and a larger `training.memory`, {less}")),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::transformer::TransformerConfig;
    use crate::train::memory::forecast::tests::megapixel;

    #[test]
    fn more_blocks_than_the_machine_can_hold_are_refused() {
        let published = TransformerConfig::qwen_image();
        let settle = |can_pin: Option<&str>| {
            let text = "{data: {path: p}, model: {path: m, blocks_to_swap: 30}}";
            let mut config = Config::parse(text, "c.yaml".as_ref(), &[]).unwrap();
            let can_pin = can_pin.map(|size| size.parse().unwrap());
            Settled::settle(&mut config, &megapixel(&published), &Machine::Another { on_gpu: true, can_pin }, true)
        };
        let host = settle(None).unwrap().forecast.host;
        assert_eq!(settle(Some("32GB")).unwrap().forecast.host, host);
        let error = settle(Some("16GB")).err().expect("30 blocks take 20.4 GB").to_string();
        assert!(error.contains("at most 16.0 GB") && error.contains("found 20.4 GB"), "{error}");
    }
}
