//! Values of the config file with rules of their own.

mod compute;
mod data;
mod numbers;
mod training;

pub use compute::{
    BaseDtype, Checkpointing, CheckpointingChoice, ComputeDtype, DeviceChoice, ModulationChoice, SwapChoice,
};
pub use data::{HeldOut, Masks, Resolutions};
pub use numbers::{Betas, NonNegative, Positive, Rank};
pub use training::{LoraInit, LossWeighting, LrSchedule, Optimizer, SaveDtype, Shift, SigmaSampling, TrainingMode};
