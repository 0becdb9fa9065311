//! Text in images: the 8x8 bitmap font of old PCs, in whole multiples of its size. ASCII only.

use font8x8::legacy::BASIC_LEGACY;
use image::{Rgb, RgbImage};

/// Side of a letter's cell at scale 1.
const CELL: usize = 8;

/// Space between lines at scale 1.
const LEADING: usize = 3;

/// `text` if the font can write it, else `instead`.
pub fn writable<'a>(text: &'a str, instead: &'a str) -> &'a str {
    if text.chars().all(|c| c == ' ' || c.is_ascii_graphic()) { text } else { instead }
}

/// Lines of at most `columns` letters: broken between words, or inside a word that is longer than a line.
pub fn wrap(text: &str, columns: usize) -> Vec<String> {
    let columns = columns.max(1);
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let letters: Vec<char> = word.chars().collect();
        for (i, piece) in letters.chunks(columns).enumerate() {
            match lines.last_mut() {
                Some(line) if i == 0 && line.chars().count() + 1 + piece.len() <= columns => {
                    line.push(' ');
                    line.extend(piece);
                }
                _ => lines.push(piece.iter().collect()),
            }
        }
    }
    lines
}

/// At most `max` of the lines; three dots stand for the rest.
pub fn shorten(mut lines: Vec<String>, max: usize) -> Vec<String> {
    if lines.len() > max {
        lines.truncate(max);
        if let Some(last) = lines.last_mut() {
            let keep = last.chars().count().saturating_sub(3);
            *last = last.chars().take(keep).chain("...".chars()).collect();
        }
    }
    lines
}

/// Letters that fit into `width` pixels.
pub fn columns_in(width: usize, scale: usize) -> usize {
    width / (CELL * scale)
}

/// Pixels that `columns` letters take.
pub fn width_of(columns: usize, scale: usize) -> usize {
    columns * CELL * scale
}

/// Pixels from one line to the next.
pub fn line_height(scale: usize) -> usize {
    (CELL + LEADING) * scale
}

/// Writes `lines` in black, the first one's top left corner at (`x`, `y`). What lies outside the image is cut off, and
/// letters that the font lacks are written as `?`.
pub fn draw(image: &mut RgbImage, lines: &[String], x: usize, y: usize, scale: usize) {
    for (row, line) in lines.iter().enumerate() {
        for (column, letter) in line.chars().enumerate() {
            let code = if letter.is_ascii() { letter as usize } else { '?' as usize };
            let (left, top) = (x + width_of(column, scale), y + row * line_height(scale));
            for dy in 0..CELL * scale {
                for dx in 0..CELL * scale {
                    let ink = BASIC_LEGACY[code][dy / scale] >> (dx / scale) & 1 == 1;
                    if let (true, Some(pixel)) =
                        (ink, image.get_pixel_mut_checked((left + dx) as u32, (top + dy) as u32))
                    {
                        *pixel = Rgb([0, 0, 0]);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_words_and_long_words_break_too() {
        assert_eq!(wrap("a red apple on the table", 9), ["a red", "apple on", "the table"]);
        assert_eq!(wrap("strength 0.5", 5), ["stren", "gth", "0.5"]);
        assert_eq!(shorten(wrap("a red apple on the table", 9), 2), ["a red", "apple..."]);
        assert_eq!(writable("a cat", "prompt 1"), "a cat");
        assert_eq!(writable("一只猫", "prompt 1"), "prompt 1");
    }

    #[test]
    fn letters_are_upright_and_not_mirrored() {
        let mut image = RgbImage::from_pixel(16, 16, Rgb([255; 3]));
        draw(&mut image, &["L".into()], 0, 0, 2);
        let ink = |x: std::ops::Range<u32>, y: std::ops::Range<u32>| {
            y.flat_map(|y| x.clone().map(move |x| (x, y))).filter(|&(x, y)| image.get_pixel(x, y).0 == [0; 3]).count()
        };
        // The stem of an L is on the left, its foot at the bottom.
        assert!(ink(0..8, 0..8) > ink(8..16, 0..8));
        assert!(ink(8..16, 8..16) > ink(8..16, 0..8));
    }
}
