//! Sizes of memory, and the limit that a run keeps.

use crate::config::field::{At, Field};
use crate::config::tree::{Content, Node};
use crate::error::{Error, Result};
use serde::Serialize;
use std::fmt;
use std::str::FromStr;

/// A size of memory in bytes, written as `24GB` (10^9 bytes each), `24GiB` (2^30), `500MB` or `500MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct MemorySize(pub u64);

/// The units that a size is read and written in.
const UNITS: [(&str, u64); 5] =
    [("GB", 1_000_000_000), ("GiB", 1 << 30), ("MB", 1_000_000), ("MiB", 1 << 20), ("B", 1)];

impl MemorySize {
    /// The size as it is read: in the first unit of which it is a whole number.
    pub fn exact(self) -> String {
        let (name, unit) =
            UNITS.iter().find(|(_, unit)| self.0.is_multiple_of(*unit)).expect("a byte divides anything");
        format!("{}{name}", self.0 / unit)
    }
}

impl FromStr for MemorySize {
    type Err = Error;

    /// Errors (usage): no unit, an unknown one, no number above 0.
    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(&text[number.len()..]));
        match (number.trim().parse::<f64>(), unit) {
            (Ok(n), Some((_, unit))) if n > 0.0 && n * *unit as f64 >= 1.0 && n.is_finite() => {
                Ok(Self((n * *unit as f64) as u64))
            }
            _ => {
                Err(Error::usage(format!("`{text}` is no size of memory"))
                    .expected("a size such as 24GB or 16GiB", text))
            }
        }
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        if bytes >= 1e9 { write!(f, "{:.1} GB", bytes / 1e9) } else { write!(f, "{:.1} MB", bytes / 1e6) }
    }
}

/// `training.memory`: the most that a run may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryLimit {
    /// What the device has free when the run begins, less a tenth.
    Auto,
    /// This much.
    Size(MemorySize),
}

impl Field for MemoryLimit {
    fn kind() -> String {
        "`auto` or a size such as `24GB` or `16GiB`".into()
    }
    fn schema() -> serde_json::Value {
        serde_json::json!({"type": "string"})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match &node.content {
            Content::Text(t) if t == "auto" => Ok(Self::Auto),
            Content::Text(t) => t.parse().map(Self::Size).map_err(|_| at.unexpected(node, Self::kind())),
            _ => Err(at.unexpected(node, Self::kind())),
        }
    }
    fn write(&self) -> Node {
        match self {
            Self::Auto => Node::text("auto"),
            Self::Size(size) => Node::text(size.exact()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_both_kinds_of_units_and_written_as_they_are_read() {
        let size = |text: &str| text.parse::<MemorySize>().map(|s| s.0);
        assert_eq!(size("24GB").unwrap(), 24_000_000_000);
        assert_eq!(size("1.5 GiB").unwrap(), 1_610_612_736);
        assert_eq!(size("500mb").unwrap(), 500_000_000);
        for wrong in ["24", "GB", "-1GB", "12TB", "nanGB", "infGB", "0GB", "1e-12GB", "4 4GB", "", "GiBGiB", "vier GB"]
        {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        for exact in ["24GB", "16GiB", "1536MiB", "700MB", "1234567B"] {
            assert_eq!(exact.parse::<MemorySize>().unwrap().exact(), exact);
        }
        assert_eq!(MemorySize(24_700_000_000).to_string(), "24.7 GB");
    }
}
