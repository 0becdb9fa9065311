//! Where and how the networks are computed.

use crate::config::field::{At, Field, choice};
use crate::config::tree::{Content, Node};
use crate::error::{Error, Result};
use candle_core::DType;
use serde_json::{Value as Json, json};
use std::fmt;

/// Which device trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if this build can use one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this index.
    Cuda(usize),
}

impl Field for DeviceChoice {
    fn kind() -> String {
        "`auto` or `cpu` or `cuda:N`".into()
    }
    fn schema() -> Json {
        json!({"type": "string", "pattern": "^(auto|cpu|cuda(:[0-9]+)?)$"})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        let device = match &node.content {
            Content::Text(text) => text.parse().ok(),
            _ => None,
        };
        device.ok_or_else(|| at.unexpected(node, Self::kind()))
    }
    fn write(&self) -> Node {
        Node::text(self.to_string())
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl std::str::FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |n: &str| n.parse().ok().map(Self::Cuda);
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            other => other
                .strip_prefix("cuda:")
                .and_then(number)
                .ok_or_else(|| Error::usage("no such device").expected(<Self as Field>::kind(), format!("`{other}`"))),
        }
    }
}

choice! {
    /// Compute type of the frozen networks.
    pub enum ComputeDtype {
        /// bf16 on a GPU, f32 on the CPU.
        Auto = "auto",
        /// 32-bit floats.
        F32 = "f32",
        /// 16-bit floats with the range of f32.
        Bf16 = "bf16",
    }
}

impl ComputeDtype {
    /// The type to compute in on a CPU (`on_gpu` false) or a GPU.
    pub fn resolve(self, on_gpu: bool) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::Auto if on_gpu => DType::BF16,
            Self::Auto => DType::F32,
        }
    }
}

choice! {
    /// Type in which the frozen base weights are held.
    pub enum BaseDtype {
        /// The compute type.
        Auto = "auto",
        /// 32-bit floats.
        F32 = "f32",
        /// 16-bit floats with the range of f32.
        Bf16 = "bf16",
        /// 8-bit integers in blocks of 32 with a 16-bit scale each.
        Int8 = "int8",
    }
}

choice! {
    /// Where the weights of the modulation are.
    pub enum ModulationChoice {
        /// In memory, or on the disk where only that fits into `training.memory`.
        Auto = "auto",
        /// In memory.
        Resident = "resident",
        /// On the disk; what they give is computed ahead.
        Streamed = "streamed",
    }
}

impl ModulationChoice {
    /// Where they are, decided.
    pub fn of(streamed: bool) -> Self {
        if streamed { Self::Streamed } else { Self::Resident }
    }
}

/// How many blocks wait in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwapChoice {
    /// None, or, on a GPU, as many as make the run fit into `training.memory`.
    Auto,
    /// So many.
    Blocks(usize),
}

impl Field for SwapChoice {
    fn kind() -> String {
        "`auto` or a whole number of 0 or more".into()
    }
    fn schema() -> Json {
        json!({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 0}]})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match &node.content {
            Content::Text(text) if text == "auto" => Ok(Self::Auto),
            _ => usize::read(node, at).map(Self::Blocks).map_err(|_| at.unexpected(node, Self::kind())),
        }
    }
    fn write(&self) -> Node {
        match self {
            Self::Auto => Node::text("auto"),
            Self::Blocks(n) => n.write(),
        }
    }
}

choice! {
    /// What is kept of the forward pass for the backward pass.
    pub enum Checkpointing {
        /// Everything: fastest, most memory.
        None = "none",
        /// What is dear to compute; the rest is computed again.
        Selective = "selective",
        /// Only the input of each block; the block is computed again.
        Full = "full",
    }
}

choice! {
    /// What is kept of the forward pass, or that `training.memory` decides it.
    pub enum CheckpointingChoice {
        /// The fastest that fits.
        Auto = "auto",
        /// As [`Checkpointing::None`].
        None = "none",
        /// As [`Checkpointing::Selective`].
        Selective = "selective",
        /// As [`Checkpointing::Full`].
        Full = "full",
    }
}

impl CheckpointingChoice {
    /// The policy; `None` if it is left open.
    pub fn policy(self) -> Option<Checkpointing> {
        match self {
            Self::Auto => None,
            Self::None => Some(Checkpointing::None),
            Self::Selective => Some(Checkpointing::Selective),
            Self::Full => Some(Checkpointing::Full),
        }
    }
}

impl From<Checkpointing> for CheckpointingChoice {
    fn from(policy: Checkpointing) -> Self {
        match policy {
            Checkpointing::None => Self::None,
            Checkpointing::Selective => Self::Selective,
            Checkpointing::Full => Self::Full,
        }
    }
}
