//! Several images as one: a table with labels above its columns and left of its rows.

use crate::sample::label;
use image::{Rgb, RgbImage, imageops};

/// Space between images, and around labels, at scale 1.
const GAP: usize = 4;

/// Letters in a line of a row's label at most.
const LABEL_COLUMNS: usize = 20;

/// Draws `cells`, all of one size, row by row under `columns` and beside `rows`. Rows or columns that need no label
/// have an empty one.
///
/// Panics if there are not as many cells as rows times columns.
pub fn draw(columns: &[String], rows: &[String], cells: &[RgbImage]) -> RgbImage {
    assert_eq!(cells.len(), columns.len() * rows.len(), "one cell for each row and column");
    let Some(first) = cells.first() else { return RgbImage::new(1, 1) };
    let (width, height) = (first.width() as usize, first.height() as usize);
    let scale = (width / 256).max(1);
    let (gap, line) = (GAP * scale, label::line_height(scale));

    let heads: Vec<Vec<String>> = columns.iter().map(|c| label::wrap(c, label::columns_in(width, scale))).collect();
    let head_height = heads.iter().map(Vec::len).max().unwrap_or(0) * line;
    let fitting = (height / line).max(1);
    let sides: Vec<Vec<String>> = rows.iter().map(|r| label::shorten(label::wrap(r, LABEL_COLUMNS), fitting)).collect();
    let letters = sides.iter().flatten().map(|l| l.chars().count()).max().unwrap_or(0);
    let side_width = label::width_of(letters, scale);

    let left = gap + if side_width > 0 { side_width + gap } else { 0 };
    let top = gap + if head_height > 0 { head_height + gap } else { 0 };
    let (step_x, step_y) = (width + gap, height + gap);
    let (full_width, full_height) = (left + columns.len() * step_x, top + rows.len() * step_y);
    let mut out = RgbImage::from_pixel(full_width as u32, full_height as u32, Rgb([255; 3]));
    for (column, head) in heads.iter().enumerate() {
        label::draw(&mut out, head, left + column * step_x, gap, scale);
    }
    for (row, side) in sides.iter().enumerate() {
        label::draw(&mut out, side, gap, top + row * step_y, scale);
    }
    for (i, cell) in cells.iter().enumerate() {
        let (row, column) = (i / columns.len(), i % columns.len());
        imageops::replace(&mut out, cell, (left + column * step_x) as i64, (top + row * step_y) as i64);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_is_whole_and_in_its_place() {
        let cell = |v: u8| RgbImage::from_pixel(64, 32, Rgb([v, 0, 200]));
        let cells: Vec<RgbImage> = (0..6).map(|i| cell(10 + i)).collect();
        let labels = |texts: &[&str]| texts.iter().map(|t| t.to_string()).collect::<Vec<_>>();
        let out = draw(&labels(&["seed 1", "seed 2", "strength 0.5"]), &labels(&["a cat", "a dog"]), &cells);
        for v in 10..16u8 {
            let own: Vec<(u32, u32)> =
                out.enumerate_pixels().filter(|(.., p)| p.0 == [v, 0, 200]).map(|(x, y, _)| (x, y)).collect();
            assert_eq!(own.len(), 64 * 32, "cell {v} is not covered");
        }
        let at = |v: u8| out.enumerate_pixels().find(|(.., p)| p.0 == [v, 0, 200]).map(|(x, y, _)| (x, y)).unwrap();
        assert!(at(10).0 < at(11).0 && at(10).1 == at(12).1 && at(10).1 < at(13).1 && at(10).0 == at(13).0);
        assert!(out.pixels().any(|p| p.0 == [0, 0, 0]), "labels are written");
        let bare = draw(&labels(&["", ""]), &labels(&[""]), &cells[..2]);
        assert_eq!((bare.width(), bare.height()), (4 + 2 * 68, 4 + 36));
    }
}
