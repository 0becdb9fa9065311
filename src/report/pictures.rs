//! The previews over time, as thumbnails inside the page.

use super::escape;
use crate::config::Preview;
use crate::io::png;
use crate::train::preview::{picture_name, steps_in};
use crate::train::run_dir::RunDir;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;
use image::imageops::{FilterType, resize};
use std::fmt::Write;
use std::path::Path;

/// Thumbnails have at most this width and height: 64 of them make a page of a few megabytes.
const MAX_SIDE: u32 = 192;
const MAX_ROWS: usize = 8;
const MAX_COLUMNS: usize = 8;

/// The section with a row of pictures for each prompt and seed; nothing if there are no pictures.
pub(super) fn section(dir: &RunDir, settings: &Preview) -> String {
    let steps = spread(&steps_in(&dir.samples()), MAX_COLUMNS - 1);
    if settings.every == 0 || steps.is_empty() {
        return String::new();
    }
    let mut columns = vec![("base".to_string(), dir.samples().join("base"))];
    columns.extend(steps.iter().map(|s| (format!("step {s}"), dir.samples().join(format!("step-{s:06}")))));
    let mut out = String::from("<h2>Samples</h2>\n");
    let rows: Vec<(usize, u64)> =
        (0..settings.prompts.len()).flat_map(|i| settings.seeds.iter().map(move |&seed| (i, seed))).collect();
    for &(prompt, seed) in rows.iter().take(MAX_ROWS) {
        let _ = writeln!(
            out,
            "<p class=\"prompt\">{} <span class=\"none\">seed {seed}</span></p>\n<div class=\"strip\"><table><tr>",
            escape(&settings.prompts[prompt])
        );
        for (name, folder) in &columns {
            if let Some(data) = thumbnail(&folder.join(picture_name(prompt, seed))) {
                let _ = writeln!(out, "<td><img alt=\"{name}\" src=\"data:image/png;base64,{data}\">{name}</td>");
            }
        }
        out.push_str("</tr></table></div>\n");
    }
    if rows.len() > MAX_ROWS {
        let _ = writeln!(out, "<p class=\"none\">{} more in samples/</p>", rows.len() - MAX_ROWS);
    }
    out
}

/// At most `max` of the steps, evenly spread, with the first and the last.
fn spread(steps: &[u64], max: usize) -> Vec<u64> {
    if steps.len() <= max {
        return steps.to_vec();
    }
    (0..max).map(|i| steps[i * (steps.len() - 1) / (max - 1)]).collect()
}

/// A picture as base64 of a small PNG; none if it is not there.
fn thumbnail(path: &Path) -> Option<String> {
    let small = shrunk(image::open(path).ok()?.to_rgb8(), MAX_SIDE);
    Some(STANDARD.encode(png::encode(&small, &[]).ok()?))
}

/// A picture whose longer side is at most `max_side`.
pub(crate) fn shrunk(image: RgbImage, max_side: u32) -> RgbImage {
    let scale = f64::from(max_side) / f64::from(image.width().max(image.height()));
    if scale >= 1.0 {
        return image;
    }
    let side = |n: u32| ((f64::from(n) * scale).round() as u32).max(1);
    resize(&image, side(image.width()), side(image.height()), FilterType::Triangle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_spread_with_both_ends() {
        let steps: Vec<u64> = (1..=100).map(|i| i * 10).collect();
        let picked = spread(&steps, 7);
        assert_eq!((picked.len(), picked[0], picked[6]), (7, 10, 1000));
        assert_eq!(spread(&steps[..3], 7), [10, 20, 30]);
    }
}
