//! Values of the config file with rules of their own.

use crate::config::field::{At, Field, Number, Range, choice};
use crate::config::tree::{Content, Node};
use crate::error::{Error, Result};
use candle_core::DType;
use serde_json::{Value as Json, json};
use std::fmt;
use std::path::PathBuf;

/// Rank of an adapter: at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank(usize);

impl Rank {
    /// The largest rank that is accepted: the width of the published model.
    pub const MAX: usize = 3072;

    /// `None` for 0 and above [`Rank::MAX`].
    pub fn new(rank: usize) -> Option<Self> {
        (1..=Self::MAX).contains(&rank).then_some(Self(rank))
    }

    /// The number.
    pub fn get(self) -> usize {
        self.0
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Field for Rank {
    fn kind() -> String {
        format!("a whole number from 1 to {}", Self::MAX)
    }
    fn schema() -> Json {
        json!({"type": "integer", "minimum": 1, "maximum": Self::MAX})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        let rank = usize::read(node, at).ok().and_then(Self::new);
        rank.ok_or_else(|| at.unexpected(node, Self::kind()))
    }
    fn write(&self) -> Node {
        self.0.write()
    }
}

/// A number above 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Positive(f64);

impl Positive {
    /// `None` unless `value` is finite and above 0.
    pub fn new(value: f64) -> Option<Self> {
        Range::above(0.0).contains(value).then_some(Self(value))
    }

    /// The number.
    pub fn get(self) -> f64 {
        self.0
    }
}

impl Field for Positive {
    fn kind() -> String {
        format!("{} {}", f64::kind(), Range::above(0.0))
    }
    fn schema() -> Json {
        json!({"type": "number", "exclusiveMinimum": 0})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        f64::read(node, at).ok().and_then(Self::new).ok_or_else(|| at.unexpected(node, Self::kind()))
    }
    fn write(&self) -> Node {
        self.0.write()
    }
}

/// A number of 0 or more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NonNegative(f64);

impl NonNegative {
    /// `None` unless `value` is finite and 0 or more.
    pub fn new(value: f64) -> Option<Self> {
        Range::at_least(0.0).contains(value).then_some(Self(value))
    }

    /// The number.
    pub fn get(self) -> f64 {
        self.0
    }
}

impl Field for NonNegative {
    fn kind() -> String {
        format!("{} {}", f64::kind(), Range::at_least(0.0))
    }
    fn schema() -> Json {
        json!({"type": "number", "minimum": 0})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        f64::read(node, at).ok().and_then(Self::new).ok_or_else(|| at.unexpected(node, Self::kind()))
    }
    fn write(&self) -> Node {
        self.0.write()
    }
}

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

/// One or several training resolutions: the side of the square with as many pixels as the image gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolutions(Vec<usize>);

impl Resolutions {
    const EACH: Range = Range::between(16.0, 8192.0);

    /// `None` if there is none, one twice, or one outside 16 to 8192.
    pub fn new(sides: Vec<usize>) -> Option<Self> {
        let mut sorted = sides.clone();
        sorted.sort_unstable();
        sorted.dedup();
        let ok = !sides.is_empty() && sorted.len() == sides.len();
        (ok && sides.iter().all(|s| Self::EACH.contains(*s as f64))).then_some(Self(sides))
    }

    /// The sides in pixels, in the order of the file; at least one.
    pub fn sides(&self) -> &[usize] {
        &self.0
    }
}

impl Default for Resolutions {
    fn default() -> Self {
        Self(vec![1024])
    }
}

impl Field for Resolutions {
    fn kind() -> String {
        format!("{} {}, or a list of different ones", usize::kind(), Self::EACH)
    }
    fn schema() -> Json {
        let mut each = json!({"type": "integer"});
        Self::EACH.add_to_schema(&mut each);
        json!({"anyOf": [each, {"type": "array", "items": each, "minItems": 1, "uniqueItems": true}]})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        let Content::List(list) = &node.content else {
            return usize::read_within(node, at, Self::EACH)
                .map(|side| Self(vec![side]))
                .map_err(|_| at.unexpected(node, Self::kind()));
        };
        let sides = list.iter().enumerate().map(|(i, n)| usize::read_within(n, &at.child(i), Self::EACH));
        Self::new(sides.collect::<Result<_>>()?).ok_or_else(|| at.unexpected(node, Self::kind()))
    }
    fn write(&self) -> Node {
        match self.0.as_slice() {
            [one] => one.write(),
            several => Node::made(Content::List(several.iter().map(Field::write).collect())),
        }
    }
}

/// How many images are kept out of training for the held-out loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HeldOut {
    /// This many.
    Count(usize),
    /// This share, in (0, 1).
    Fraction(f64),
}

impl HeldOut {
    /// What a share never exceeds: more images make the held-out loss slower, not better.
    pub const MAX_BY_FRACTION: usize = 32;

    /// How many of `num_items` images are held out. A share is rounded down, so that very small sets lose nothing.
    ///
    /// Errors: a count that leaves nothing to train on.
    pub fn count(self, num_items: usize) -> Result<usize> {
        match self {
            Self::Count(n) if n > 0 && n >= num_items => {
                Err(Error::usage("`data.held_out` leaves nothing to train on")
                    .expected(format!("fewer than the {num_items} images of the dataset"), n))
            }
            Self::Count(n) => Ok(n),
            Self::Fraction(share) => Ok(((num_items as f64 * share) as usize).min(Self::MAX_BY_FRACTION)),
        }
    }
}

impl Field for HeldOut {
    fn kind() -> String {
        "a number of images, or a share of them between 0 and 1".into()
    }
    fn schema() -> Json {
        json!({"anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        ]})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match node.content {
            Content::Int(n) => usize::try_from(n).ok().map(Self::Count),
            Content::Float(share) if share > 0.0 && share < 1.0 => Some(Self::Fraction(share)),
            _ => None,
        }
        .ok_or_else(|| at.unexpected(node, Self::kind()))
    }
    fn write(&self) -> Node {
        match self {
            Self::Count(n) => n.write(),
            Self::Fraction(share) => share.write(),
        }
    }
}

/// AdamW's decay rates of the two moments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Betas(f64, f64);

impl Betas {
    /// `None` unless both lie in [0, 1).
    pub fn new(beta1: f64, beta2: f64) -> Option<Self> {
        let ok = |b: f64| (0.0..1.0).contains(&b);
        (ok(beta1) && ok(beta2)).then_some(Self(beta1, beta2))
    }

    /// (beta1, beta2).
    pub fn get(self) -> (f64, f64) {
        (self.0, self.1)
    }
}

impl Default for Betas {
    fn default() -> Self {
        Self(0.9, 0.999)
    }
}

impl Field for Betas {
    fn kind() -> String {
        "a list of two numbers from 0 to below 1".into()
    }
    fn schema() -> Json {
        let each = json!({"type": "number", "minimum": 0, "exclusiveMaximum": 1});
        json!({"type": "array", "items": each, "minItems": 2, "maxItems": 2})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        let betas = match &node.content {
            Content::List(list) => match list.as_slice() {
                [a, b] => Self::new(f64::read(a, &at.child(0))?, f64::read(b, &at.child(1))?),
                _ => None,
            },
            _ => None,
        };
        betas.ok_or_else(|| {
            Error::usage(format!("wrong value for `{}` {}", at.key(), at.place(&node.place)))
                .expected(Self::kind(), node.inline())
        })
    }
    fn write(&self) -> Node {
        Node::made(Content::List(vec![self.0.write(), self.1.write()]))
    }
}

/// Where the masks of the images are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Masks {
    /// No masks are used.
    None,
    /// `name.mask.png` beside `name.jpg`.
    Beside,
    /// In a folder, under the path of the image with the ending `.png`.
    Folder(PathBuf),
}

impl Field for Masks {
    fn kind() -> String {
        "`none` or `beside` or a folder".into()
    }
    fn schema() -> Json {
        json!({"type": "string"})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match &node.content {
            Content::Text(t) if t == "none" => Ok(Self::None),
            Content::Text(t) if t == "beside" => Ok(Self::Beside),
            Content::Text(t) if t.is_empty() => Err(at.unexpected(node, Self::kind())),
            Content::Text(t) => Ok(Self::Folder(t.into())),
            _ => Err(at.unexpected(node, Self::kind())),
        }
    }
    fn write(&self) -> Node {
        match self {
            Self::None => Node::text("none"),
            Self::Beside => Node::text("beside"),
            Self::Folder(folder) => folder.write(),
        }
    }
}
