//! Where a step is to run, as far as its memory goes.

use crate::config::MemorySize;
use crate::device::memory;
use crate::error::Result;
use candle_core::Device;

/// This machine with the device that was opened, or another one that is asked about.
#[derive(Clone, Copy)]
pub enum Machine<'a> {
    /// This one.
    This(&'a Device),
    /// Another one.
    Another {
        /// Whether it computes on a GPU.
        on_gpu: bool,
        /// What it can pin; `None` if it is not known.
        can_pin: Option<MemorySize>,
    },
}

/// Nine tenths: the rest is for what the forecast does not count, such as a GPU's context and the gaps between tensors.
pub fn most_of(memory: MemorySize) -> MemorySize {
    MemorySize(memory.0 / 10 * 9)
}

impl Machine<'_> {
    /// Whether it computes on a GPU.
    pub fn on_gpu(&self) -> bool {
        match self {
            Self::This(device) => !device.is_cpu(),
            Self::Another { on_gpu, .. } => *on_gpu,
        }
    }

    /// What a run may take of the device, if all that is free is its own. Of another machine it is this one's CPU.
    ///
    /// Errors: the system does not tell.
    pub fn free(&self) -> Result<MemorySize> {
        let device = match self {
            Self::This(device) => device,
            Self::Another { .. } => &Device::Cpu,
        };
        Ok(most_of(MemorySize(memory::free(device)?)))
    }

    /// What blocks that wait for a GPU may take of the machine's memory; `None` if it is not known or there is no GPU.
    pub fn can_pin(&self) -> Option<MemorySize> {
        match self {
            Self::This(device) if device.is_cpu() => None,
            Self::This(_) => memory::free(&Device::Cpu).ok().map(|free| most_of(MemorySize(free))),
            Self::Another { can_pin, .. } => *can_pin,
        }
    }
}
