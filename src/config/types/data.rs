//! What the data set is made of.

use crate::config::field::{At, Field, Number, Range};
use crate::config::tree::{Content, Node};
use crate::error::{Error, Result};
use serde_json::{Value as Json, json};
use std::path::PathBuf;

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
