//! Resizing an image as Pillow does, bit for bit: bilinear with anti-aliasing in 8-bit fixed point.
//!
//! Source: `precompute_coeffs` and `normalize_coeffs_8bpc` with the triangle filter, and the passes after them, in
//! <https://github.com/python-pillow/Pillow/blob/4e5f09f533dbd0d87d39951f48b62f4d1a421cba/src/libImaging/Resample.c#L183-L282>:
//! the filter is widened by the scale when shrinking, coefficients are normalised in f64 and rounded to 22 fractional
//! bits, and each pass (horizontal, then vertical) rounds to 8 bits. Difference: only what the crop needs is computed.

use crate::error::{Error, Result};
use image::RgbImage;
use rayon::prelude::*;
use std::ops::Range;

/// Fractional bits of a coefficient: 32 less 8 for the pixel and 2 for overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// Resizes `image` so that it just covers `height` x `width` and cuts out the centre.
///
/// The scale is `max(height / h, width / w)`; the resized sides and the offsets of the crop are rounded half to even,
/// as Python's `round` does. An image smaller than the target is enlarged by that scale, never more.
/// Errors: an image or a target without pixels.
pub fn cover_crop(image: &RgbImage, height: usize, width: usize) -> Result<RgbImage> {
    let (w, h) = (image.width() as usize, image.height() as usize);
    let Cover { resized: (new_h, new_w), rows, columns } = Cover::new((h, w), (height, width))?;
    Ok(resize_window(image, new_h, new_w, rows, columns))
}

/// How an image is laid over a smaller or larger rectangle: the size it is brought to, and the part of that which is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cover {
    /// Height and width that the image is resized to.
    pub resized: (usize, usize),
    /// The rows of the resized image that are kept.
    pub rows: Range<usize>,
    /// The columns of the resized image that are kept.
    pub columns: Range<usize>,
}

impl Cover {
    /// How [`cover_crop`] brings an image of `from` to `to`, each (height, width). Errors: a side of 0.
    pub fn new(from: (usize, usize), to: (usize, usize)) -> Result<Self> {
        let ((h, w), (height, width)) = (from, to);
        if w == 0 || h == 0 || width == 0 || height == 0 {
            return Err(Error::run(format!("cannot resize an image of {w}x{h} to {width}x{height}")));
        }
        let scale = (height as f64 / h as f64).max(width as f64 / w as f64);
        let resized = |side: usize| (side as f64 * scale).round_ties_even() as usize;
        let window = |covering: usize, side: usize| {
            let start = ((covering - side) as f64 / 2.0).round_ties_even() as usize;
            start..start + side
        };
        let (new_h, new_w) = (resized(h).max(height), resized(w).max(width));
        Ok(Self { resized: (new_h, new_w), rows: window(new_h, height), columns: window(new_w, width) })
    }
}

/// The part `rows` x `columns` of `image` resized to `height` x `width`.
fn resize_window(image: &RgbImage, height: usize, width: usize, rows: Range<usize>, columns: Range<usize>) -> RgbImage {
    let (in_w, in_h) = (image.width() as usize, image.height() as usize);
    let (out_w, out_h) = (columns.len(), rows.len());
    let across = taps(in_w, width, columns);
    let down = taps(in_h, height, rows);
    let first = down[0].start;
    let last = down.iter().map(|t| t.start + t.weights.len()).max().expect("the window is not empty");

    let source = image.as_raw();
    let mut middle = vec![0u8; (last - first) * out_w * 3];
    middle.par_chunks_exact_mut(out_w * 3).enumerate().for_each(|(y, out)| {
        let row = &source[(first + y) * in_w * 3..][..in_w * 3];
        for (out, tap) in out.chunks_exact_mut(3).zip(&across) {
            let mut sum = [HALF; 3];
            for (rgb, &k) in row[tap.start * 3..].chunks_exact(3).zip(&tap.weights) {
                for c in 0..3 {
                    sum[c] += i32::from(rgb[c]) * k;
                }
            }
            out.copy_from_slice(&sum.map(to_byte));
        }
    });

    let mut result = vec![0u8; out_h * out_w * 3];
    result.par_chunks_exact_mut(out_w * 3).zip(&down).for_each(|(out, tap)| {
        let mut sums = vec![HALF; out_w * 3];
        let used = middle[(tap.start - first) * out_w * 3..].chunks_exact(out_w * 3);
        for (row, &k) in used.zip(&tap.weights) {
            for (sum, &v) in sums.iter_mut().zip(row) {
                *sum += i32::from(v) * k;
            }
        }
        for (out, &sum) in out.iter_mut().zip(&sums) {
            *out = to_byte(sum);
        }
    });
    RgbImage::from_raw(out_w as u32, out_h as u32, result).expect("three bytes for each pixel")
}

/// One half in fixed point: sums start here, so that cutting the fraction off rounds.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// What one output pixel takes from a line: `weights` for the inputs from `start` on.
struct Taps {
    start: usize,
    weights: Vec<i32>,
}

/// The taps of the outputs in `window` when a line of `input` pixels is resized to `output`.
fn taps(input: usize, output: usize, window: Range<usize>) -> Vec<Taps> {
    let scale = input as f64 / output as f64;
    // A bilinear filter reaches one pixel to each side: one input pixel when enlarging, one output pixel when shrinking.
    let support = scale.max(1.0);
    let tap = |position: usize| {
        let center = (position as f64 + 0.5) * scale;
        let start = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(input);
        let weights: Vec<f64> =
            (start..end).map(|x| (1.0 - ((x as f64 - center + 0.5) * (1.0 / support)).abs()).max(0.0)).collect();
        let total: f64 = weights.iter().sum();
        let fixed = |w: &f64| (0.5 + w / total * f64::from(1 << PRECISION_BITS)) as i32;
        Taps { start, weights: weights.iter().map(fixed).collect() }
    };
    window.map(tap).collect()
}
