//! `stages:`: a run in several parts, each with its own images, modules, noise levels and learning rate.

use crate::config::field::{At, Field, Range, section};
use crate::config::sections::LossWeights;
use crate::config::tree::{Content, Node};
use crate::config::types::{NonNegative, Positive, Resolutions};
use crate::error::{Error, Result};
use serde_json::{Value as Json, json};
use std::ops::Range as Steps;

section! {
    /// One stage of the training. What a stage does not say is as in the rest of the file.
    pub struct Stage {
        /// How progress, metrics and report call it.
        name: String;
        /// Where it ends: after this many steps of the run, or, as a number with a decimal point, after this share of
        /// them (`0.4`); null means the end of the run. The next stage begins there.
        until: Until = Until::End;
        /// Factor on the learning rate.
        learning_rate: f64 = 1.0, Range::between(0.0, 100.0);
        /// Which of the trained modules go on learning, written as in `lora.target_modules`; the others stay as they
        /// are, in weights and optimizer state. Null means all of them.
        target_modules: Option<Vec<String>> = None;
        /// Lowest and highest noise level in place of `flow.sigma_min` and `flow.sigma_max`.
        sigma: Option<SigmaRange> = None;
        /// In place of `data.resolution`.
        resolution: Option<Resolutions> = None;
        /// Shares of the terms of the loss in place of those of `loss.weights`.
        loss: StageLoss = StageLoss::default();
        /// Weights in the loss in place of those of `regions`.
        regions: Multipliers = Multipliers::default();
        /// Which of the images are shown.
        filter: StageFilter = StageFilter::default();
    }
}

section! {
    /// Shares of a stage; null means as in `loss.weights`. Pose and count are multiplied by `data.pose_loss_weight`; with
    /// both at 0 the stage trains on the reconstruction alone.
    pub struct StageLoss {
        /// The squared error of the latents, where pose and count act.
        reconstruction: Option<NonNegative> = None;
        /// Distance of the pose maps from those of the target.
        pose: Option<NonNegative> = None;
        /// Numbers of hands or limb ends against those of the target.
        count: Option<NonNegative> = None;
    }
}

impl StageLoss {
    /// The shares of the stage in a run with these ones.
    pub fn or(&self, run: &LossWeights) -> LossWeights {
        let own = |own: Option<NonNegative>, run| own.map_or(run, NonNegative::get);
        LossWeights {
            reconstruction: own(self.reconstruction, run.reconstruction),
            pose: own(self.pose, run.pose),
            count: own(self.count, run.count),
        }
    }
}

section! {
    /// Weights of a stage; null means as in `regions`.
    pub struct Multipliers {
        /// Weight of where a person is.
        person: Option<Positive> = None;
        /// Weight of arms and legs.
        limbs: Option<Positive> = None;
        /// Weight of hands.
        hands: Option<Positive> = None;
    }
}

section! {
    /// Which images a stage shows: those that pass every rule given here.
    pub struct StageFilter {
        /// Globs for the path below `data.path`, such as `hands/*`: one of them must match. An empty list takes all.
        paths: Vec<String> = Vec::new();
        /// Texts, one of which the caption must contain; upper and lower case are the same. An empty list takes all.
        captions: Vec<String> = Vec::new();
        /// Hands that the pose network must find in an image at least.
        min_hands: usize = 0, Range::between(0.0, 1000.0);
        /// Whether it must find a person.
        require_person: bool = false;
    }
}

/// Where a stage ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Until {
    /// At the end of the run.
    End,
    /// After so many steps of the run; at least 1.
    Step(usize),
    /// After this share of the run's steps, in (0, 1].
    Fraction(f64),
}

impl Until {
    /// The number of steps after which it ends, in a run of `max_steps`. A share is rounded to the nearest step.
    pub fn step(self, max_steps: usize) -> usize {
        match self {
            Self::End => max_steps,
            Self::Step(step) => step,
            Self::Fraction(share) => (share * max_steps as f64).round() as usize,
        }
    }
}

impl Field for Until {
    fn kind() -> String {
        "a number of steps, a share of them above 0.0 and up to 1.0, or null".into()
    }
    fn schema() -> Json {
        json!({"anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            {"type": "null"},
        ]})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match node.content {
            Content::Null => Some(Self::End),
            Content::Int(step) if step > 0 => usize::try_from(step).ok().map(Self::Step),
            Content::Float(share) if share > 0.0 && share <= 1.0 => Some(Self::Fraction(share)),
            _ => None,
        }
        .ok_or_else(|| at.unexpected(node, Self::kind()))
    }
    fn write(&self) -> Node {
        match self {
            Self::End => Node::made(Content::Null),
            Self::Step(step) => step.write(),
            Self::Fraction(share) => share.write(),
        }
    }
}

/// A range of noise levels, `min < max`, both in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SigmaRange {
    min: f64,
    max: f64,
}

impl SigmaRange {
    /// `None` unless `0 <= min < max <= 1`.
    pub fn new(min: f64, max: f64) -> Option<Self> {
        (min >= 0.0 && min < max && max <= 1.0).then_some(Self { min, max })
    }

    /// Lowest and highest.
    pub fn get(self) -> (f64, f64) {
        (self.min, self.max)
    }
}

impl Field for SigmaRange {
    fn kind() -> String {
        "a list of two numbers from 0 to 1, the lower first".into()
    }
    fn schema() -> Json {
        let each = json!({"type": "number", "minimum": 0, "maximum": 1});
        json!({"type": "array", "items": each, "minItems": 2, "maxItems": 2})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        let range = match &node.content {
            Content::List(list) => match list.as_slice() {
                [min, max] => Self::new(f64::read(min, &at.child(0))?, f64::read(max, &at.child(1))?),
                _ => None,
            },
            _ => None,
        };
        range.ok_or_else(|| at.unexpected(node, Self::kind()))
    }
    fn write(&self) -> Node {
        Node::made(Content::List(vec![self.min.write(), self.max.write()]))
    }
}

/// The stages of a run, in order; none for a run in one piece.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stages {
    list: Vec<Stage>,
    /// Whether the file says `progressive`.
    is_progressive: bool,
}

/// The word for [`Stages::progressive`].
const PROGRESSIVE: &str = "progressive";

impl Stages {
    /// These stages.
    pub fn new(stages: Vec<Stage>) -> Self {
        Self { list: stages, is_progressive: false }
    }

    /// From the whole to the parts: all of the image for 0.4 of the run, then limbs at three times the weight until 0.7,
    /// then hands at six times and limbs at twice.
    pub fn progressive() -> Self {
        let stage = |name: &str, until, limbs, hands| Stage {
            name: name.into(),
            until,
            regions: Multipliers { person: None, limbs: Positive::new(limbs), hands: Positive::new(hands) },
            ..Stage::default()
        };
        let list = vec![
            stage("global", Until::Fraction(0.4), 1.0, 1.0),
            stage("limbs", Until::Fraction(0.7), 3.0, 3.0),
            stage("hands", Until::End, 2.0, 6.0),
        ];
        Self { list, is_progressive: true }
    }

    /// Each stage with its steps, counted from 0, which together are those of a run of `max_steps`.
    ///
    /// Errors: two stages of one name, a stage that ends before or where the one before it does, one that ends after
    /// the run, steps after the last stage.
    pub fn spans(&self, max_steps: usize) -> Result<Vec<(Steps<u64>, &Stage)>> {
        let mut spans: Vec<(Steps<u64>, &Stage)> = Vec::with_capacity(self.list.len());
        let mut start = 0;
        for (i, stage) in self.list.iter().enumerate() {
            let name = &stage.name;
            if name.trim().is_empty() {
                return Err(Error::usage(format!("`stages.{i}.name` is empty")).hint("call it by what it trains"));
            }
            if self.list[..i].iter().any(|other| other.name == *name) {
                return Err(Error::usage(format!("two stages are called `{name}`"))
                    .hint("metrics and report tell stages apart by their names"));
            }
            let end = stage.until.step(max_steps);
            if end <= start {
                let before = match i {
                    0 => "the run begins with it".to_string(),
                    _ => format!("the stage before it, `{}`, ends after step {start}", self.list[i - 1].name),
                };
                return Err(Error::usage(format!("the stage `{name}` has no steps: it ends after step {end}"))
                    .detail(before)
                    .hint("each `until` must lie behind the one before it; shares of a short run may round together"));
            }
            if end > max_steps {
                return Err(Error::usage(format!("the stage `{name}` ends after the run"))
                    .expected(format!("`until` of at most `training.max_steps`, {max_steps}"), end));
            }
            spans.push((start as u64..end as u64, stage));
            start = end;
        }
        match self.list.last() {
            Some(last) if start < max_steps => {
                Err(Error::usage(format!("no stage covers the steps after {start}, up to {max_steps}"))
                    .detail(format!("the last stage, `{}`, ends after step {start}", last.name))
                    .hint("leave its `until` out: then it lasts to the end of the run"))
            }
            _ => Ok(spans),
        }
    }
}

impl Field for Stages {
    fn kind() -> String {
        format!("`{PROGRESSIVE}` or a list of maps")
    }
    fn schema() -> Json {
        json!({"anyOf": [{"enum": [PROGRESSIVE]}, {"type": "array", "items": Stage::schema()}]})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match &node.content {
            Content::Null => Ok(Self::default()),
            Content::Text(word) if word == PROGRESSIVE => Ok(Self::progressive()),
            Content::List(_) => Vec::read(node, at).map(Self::new),
            _ => Err(at.unexpected(node, Self::kind())),
        }
    }
    fn write(&self) -> Node {
        if self.is_progressive { Node::text(PROGRESSIVE) } else { self.list.write() }
    }
}
