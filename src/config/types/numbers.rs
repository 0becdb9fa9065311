//! Numbers with limits.

use crate::config::field::{At, Field, Range};
use crate::config::tree::{Content, Node};
use crate::error::{Error, Result};
use serde_json::{Value as Json, json};
use std::fmt;

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
