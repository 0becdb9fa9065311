//! Shares of right pictures, with intervals.

use crate::world::check::{Verdict, style_measure};
use crate::world::{Scene, Style};
use image::RgbImage;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// So many of so many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// The cases that count.
    pub hits: usize,
    /// All cases.
    pub of: usize,
}

impl Share {
    /// Adds a case.
    pub fn add(&mut self, hit: bool) {
        self.hits += usize::from(hit);
        self.of += 1;
    }

    /// Hits of all; not a number without cases.
    pub fn rate(self) -> f64 {
        self.hits as f64 / self.of as f64
    }

    /// The 95% Wilson score interval; all of [0, 1] without cases.
    pub fn wilson(self) -> [f64; 2] {
        if self.of == 0 {
            return [0.0, 1.0];
        }
        let (n, p, z) = (self.of as f64, self.rate(), 1.959_963_984_540_054);
        let middle = (p + z * z / (2.0 * n)) / (1.0 + z * z / n);
        let half = z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        [(middle - half).max(0.0), (middle + half).min(1.0)]
    }
}

/// The rows of a report, in its order.
const ROWS: [&str; 14] = [
    "shape",
    "colour",
    "count",
    "position",
    "all attributes",
    "objects: colour",
    "objects: count",
    "objects: position",
    "figures: colour",
    "figures: count",
    "figures: position",
    "figures: pose",
    "figures: hand errors",
    "figures: limb errors",
];

/// How many pictures are right.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    shares: BTreeMap<&'static str, Share>,
    styles: BTreeMap<&'static str, f64>,
    pictures: usize,
}

impl Report {
    /// Counts a picture in.
    pub fn add(&mut self, image: &RgbImage, asked: Scene, verdict: &Verdict) {
        self.pictures += 1;
        let mut add = |row, hit| self.shares.entry(row).or_default().add(hit);
        let own = match asked {
            Scene::Objects { .. } => {
                add("shape", verdict.form);
                ["objects: colour", "objects: count", "objects: position"]
            }
            Scene::Figures { .. } => {
                add("figures: pose", verdict.form);
                let anatomy = verdict.found.anatomy.clone().unwrap_or_default();
                add("figures: hand errors", anatomy.hand_error());
                add("figures: limb errors", anatomy.limb_error());
                ["figures: colour", "figures: count", "figures: position"]
            }
        };
        let of_all = ["colour", "count", "position"];
        for ((all, own), hit) in of_all.into_iter().zip(own).zip([verdict.colour, verdict.count, verdict.place]) {
            add(all, hit);
            add(own, hit);
        }
        add("all attributes", verdict.all());
        for style in [Style::Ink, Style::Hat] {
            *self.styles.entry(style.name()).or_default() += style_measure(image, style);
        }
    }

    /// The share of a row, if any picture concerns it.
    pub fn share(&self, row: &str) -> Option<Share> {
        self.shares.get(row).copied()
    }

    /// The mean measure of a style, from 0 to 1.
    pub fn style(&self, style: Style) -> f64 {
        self.styles.get(style.name()).map_or(0.0, |sum| sum / self.pictures as f64)
    }

    /// Number of pictures.
    pub fn pictures(&self) -> usize {
        self.pictures
    }

    /// As one JSON object.
    pub fn to_json(&self) -> Value {
        let entry = |row: &&str| {
            let share = self.share(row)?;
            let [low, high] = share.wilson();
            let value = json!({"hits": share.hits, "of": share.of, "rate": share.rate(), "low": low, "high": high});
            Some((row.to_string(), value))
        };
        let rows: Map<String, Value> = ROWS.iter().filter_map(entry).collect();
        json!({
            "pictures": self.pictures,
            "shares": rows,
            "styles": {"ink": self.style(Style::Ink), "hat": self.style(Style::Hat)},
        })
    }

    /// As lines of text.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("{:<22} {:>7}   {:<15} {:>9}", "", "share", "95% interval", "pictures")];
        for row in ROWS {
            if let Some(share) = self.share(row) {
                let [low, high] = share.wilson().map(|v| 100.0 * v);
                let interval = format!("{low:.1} to {high:.1}");
                let count = format!("{}/{}", share.hits, share.of);
                lines.push(format!("{row:<22} {:>6.1}%   {interval:<15} {count:>9}", 100.0 * share.rate()));
            }
        }
        for style in [Style::Ink, Style::Hat] {
            lines.push(format!("{:<22} {:>7.3}", format!("style: {}", style.name()), self.style(style)));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_intervals_are_those_of_the_textbook() {
        // Newcombe 1998, table I: 81 of 263 and 15 of 148 by method 3 (score, without continuity correction).
        for (hits, of, low, high) in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)] {
            let [found_low, found_high] = Share { hits, of }.wilson();
            assert!((found_low - low).abs() < 5e-5 && (found_high - high).abs() < 5e-5, "{found_low} {found_high}");
        }
    }
}
