//! What is trained, how, and in what type it is saved.

use crate::config::field::{At, Field, Range, choice};
use crate::config::tree::{Content, Node};
use crate::error::Result;
use candle_core::DType;
use serde_json::{Value as Json, json};

choice! {
    /// Storage type of the exported adapter.
    pub enum SaveDtype {
        /// 32-bit floats.
        F32 = "f32",
        /// 16-bit floats with the range of f32.
        Bf16 = "bf16",
        /// IEEE half precision.
        F16 = "f16",
    }
}

impl SaveDtype {
    /// The tensor type.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

choice! {
    /// How the learning rate moves over the run.
    pub enum LrSchedule {
        /// `learning_rate` throughout, after the warm-up.
        Constant = "constant",
        /// Falls in a straight line to 0 at `max_steps`.
        Linear = "linear",
        /// Falls along half a cosine to 0 at `max_steps`; takes no warm-up.
        Cosine = "cosine",
        /// Rises over `warmup_steps`, then falls along half a cosine to 0 at `max_steps`.
        CosineWithWarmup = "cosine_with_warmup",
    }
}

choice! {
    /// Which optimizer updates the weights.
    pub enum Optimizer {
        /// Adam with decoupled weight decay.
        AdamW = "adamw",
    }
}

choice! {
    /// What is trained.
    pub enum TrainingMode {
        /// A LoRA adapter; the model stays frozen.
        Lora = "lora",
        /// All weights of the transformer.
        Full = "full",
    }
}

choice! {
    /// How the A matrices start (the B matrices start at 0).
    pub enum LoraInit {
        /// Normal with standard deviation 1/rank, as in the reference script.
        Gaussian = "gaussian",
        /// Kaiming uniform with a = sqrt(5), as in PEFT's default.
        Kaiming = "kaiming",
    }
}

choice! {
    /// The distribution that noise levels are drawn from, before the shift.
    pub enum SigmaSampling {
        /// Every noise level is as likely.
        Uniform = "uniform",
        /// The sigmoid of a normal: middle noise levels are likelier.
        LogitNormal = "logit_normal",
    }
}

choice! {
    /// Weight of a sample in the loss, by its noise level.
    pub enum LossWeighting {
        /// 1 for every noise level.
        None = "none",
        /// A bell around sigma 0.5, with mean 1.
        Bell = "bell",
    }
}

/// How drawn noise levels are moved towards more noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shift {
    /// Not at all.
    None,
    /// By the scheduler's rule: the larger the image, the more.
    Dynamic,
    /// By this factor.
    By(f64),
}

impl Field for Shift {
    fn kind() -> String {
        format!("`dynamic` or `none` or {} {}", f64::kind(), Range::above(0.0))
    }
    fn schema() -> Json {
        json!({"anyOf": [{"enum": ["dynamic", "none"]}, {"type": "number", "exclusiveMinimum": 0}]})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match &node.content {
            Content::Text(t) if t == "dynamic" => Ok(Self::Dynamic),
            Content::Text(t) if t == "none" => Ok(Self::None),
            _ => match f64::read(node, at) {
                Ok(factor) if factor > 0.0 => Ok(Self::By(factor)),
                _ => Err(at.unexpected(node, Self::kind())),
            },
        }
    }
    fn write(&self) -> Node {
        match self {
            Self::None => Node::text("none"),
            Self::Dynamic => Node::text("dynamic"),
            Self::By(factor) => factor.write(),
        }
    }
}
