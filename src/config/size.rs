//! The size of a generated image: in pixels, or as one of the published aspect ratios.

use crate::config::field::{At, Field};
use crate::config::tree::{Content, Node};
use crate::error::{Error, Result};
use serde_json::{Value as Json, json};
use std::fmt;
use std::str::FromStr;

/// Sides are multiples of this: eight pixels a latent, two latents a token.
const STEP: usize = 16;

/// The largest side: beyond it rotary positions and memory are far from anything the model has seen.
const MAX_SIDE: usize = 8192;

/// The sizes of the model card, by aspect ratio: (name, width, height).
///
/// Source: <https://huggingface.co/Qwen/Qwen-Image>; 4:3 is 1472x1104, as in the later cards, because 1140 is no
/// multiple of 16.
pub const ASPECTS: [(&str, usize, usize); 7] = [
    ("1:1", 1328, 1328),
    ("16:9", 1664, 928),
    ("9:16", 928, 1664),
    ("4:3", 1472, 1104),
    ("3:4", 1104, 1472),
    ("3:2", 1584, 1056),
    ("2:3", 1056, 1584),
];

/// Width and height in pixels, both positive multiples of 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    width: usize,
    height: usize,
}

impl ImageSize {
    /// An image of `width` x `height` pixels. Errors: a side that is no multiple of 16, 0, or above 8192.
    pub fn new(width: usize, height: usize) -> Result<Self> {
        let fits = |side: usize| (STEP..=MAX_SIDE).contains(&side) && side.is_multiple_of(STEP);
        if fits(width) && fits(height) {
            return Ok(Self { width, height });
        }
        let near = |side: usize| ((side + STEP / 2) / STEP * STEP).clamp(STEP, MAX_SIDE);
        Err(Error::usage(format!("the model makes no images of {width}x{height}"))
            .expected(format!("sides that are multiples of {STEP}, up to {MAX_SIDE}"), format!("{width}x{height}"))
            .hint(format!("the nearest size is {}x{}", near(width), near(height))))
    }

    /// The largest square whose side is at most `side`, which is 16 or more.
    pub fn square(side: usize) -> Self {
        let side = (side / STEP * STEP).clamp(STEP, MAX_SIDE);
        Self { width: side, height: side }
    }

    /// Pixels in a row.
    pub fn width(self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(self) -> usize {
        self.height
    }
}

impl Default for ImageSize {
    /// The published 1:1.
    fn default() -> Self {
        let (_, width, height) = ASPECTS[0];
        Self { width, height }
    }
}

impl FromStr for ImageSize {
    type Err = Error;

    /// Reads `1328x1328` or `16:9`. Errors: neither, an aspect ratio without a published size, an impossible size.
    fn from_str(text: &str) -> Result<Self> {
        if let Some(&(_, width, height)) = ASPECTS.iter().find(|(name, ..)| *name == text) {
            return Ok(Self { width, height });
        }
        let names = ASPECTS.map(|(name, ..)| name);
        let sides = text.split_once(['x', 'X', '×']).map(|(w, h)| (w.trim().parse(), h.trim().parse()));
        if let Some((Ok(width), Ok(height))) = sides {
            return Self::new(width, height);
        }
        let error = Error::usage(format!("`{text}` is no image size"))
            .detail(format!("expected WIDTHxHEIGHT, or one of {}", names.join(", ")));
        Err(match text.split_once(':').map(|(w, h)| (w.trim().parse::<f64>(), h.trim().parse::<f64>())) {
            Some((Ok(width), Ok(height))) => {
                let error_of = |a: &&(&str, usize, usize)| (a.1 as f64 / a.2 as f64 * height / width).ln().abs();
                let near = ASPECTS.iter().min_by(|a, b| error_of(a).total_cmp(&error_of(b)));
                let (name, ..) = near.expect("there are aspect ratios");
                error.hint(format!("the nearest aspect ratio is `{name}`; others are written in pixels"))
            }
            _ => error,
        })
    }
}

impl fmt::Display for ImageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl Field for ImageSize {
    fn kind() -> String {
        "a size such as `512x768`, or an aspect ratio such as `16:9`".into()
    }
    fn schema() -> Json {
        json!({"type": "string"})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match &node.content {
            Content::Text(text) => text.parse().map_err(|_| {
                at.unexpected(node, Self::kind()).detail(format!("sides are multiples of {STEP}, up to {MAX_SIDE}"))
            }),
            _ => Err(at.unexpected(node, Self::kind())),
        }
    }
    fn write(&self) -> Node {
        Node::text(self.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_pixels_or_published_aspects() {
        let parse = |text: &str| text.parse::<ImageSize>().map(|s| s.to_string()).map_err(|e| e.to_string());
        assert_eq!(parse("16:9").unwrap(), "1664x928");
        assert_eq!(parse("64x96").unwrap(), "64x96");
        assert!(ASPECTS.iter().all(|&(_, w, h)| ImageSize::new(w, h).is_ok()));
        let error = parse("100x64").unwrap_err();
        assert!(error.contains("multiples of 16") && error.contains("nearest size is 96x64"), "{error}");
        assert!(parse("0x64").is_err() && parse("64x16384").is_err());
        assert!(parse("16:10").unwrap_err().contains("the nearest aspect ratio is `3:2`"));
        assert!(parse("large").unwrap_err().contains("WIDTHxHEIGHT"));
        assert_eq!(ImageSize::square(500).to_string(), "496x496");
    }
}
