//! Doubling an image: by repeating its pixels, or by laying out groups of channels as squares.

use crate::error::{Error, Result};
use crate::kernels::cpu::{self, uninit, view};
use crate::kernels::tape::{Value, record1};
use candle_core::Tensor;
use rayon::prelude::*;

/// Each pixel becomes a 2x2 square of itself (`nearest-exact` at scale 2).
///
/// Shapes: `x` (B, H, W, C) -> (B, 2H, 2W, C).
pub fn upsample_nearest2x(x: &Value) -> Result<Value> {
    let (b, h, w, c) = x.tensor().dims4()?;
    let xs = view(x.tensor())?;
    let mut out = uninit(4 * xs.len());
    out.par_chunks_exact_mut(4 * w * c).zip(xs.par_chunks_exact(w * c)).for_each(|(out, row)| {
        let (first, second) = out.split_at_mut(2 * w * c);
        for (pair, pixel) in first.chunks_exact_mut(2 * c).zip(row.chunks_exact(c)) {
            pair[..c].copy_from_slice(pixel);
            pair[c..].copy_from_slice(pixel);
        }
        second.copy_from_slice(first);
    });
    let y = cpu::from_f32(out, (b, 2 * h, 2 * w, c), x.dtype())?;
    drop(xs);
    Ok(record1(&[x], y, move |grad| Ok(vec![Some(sum_squares(&grad, (b, h, w, c))?)])))
}

/// Four groups of channels become the pixels of a 2x2 square: upper left, upper right, lower left, lower right.
///
/// Shapes: `x` (B, H, W, 4C) -> (B, 2H, 2W, C). Errors: channels that are no four groups.
pub fn depth_to_space2x(x: &Value) -> Result<Value> {
    let (b, h, w, channels) = x.tensor().dims4()?;
    if channels % 4 != 0 {
        return Err(Error::run("the channels of an image are no four groups").expected("a multiple of 4", channels));
    }
    let y = rearranged(x.tensor(), (b, h, w, channels / 4), true)?;
    Ok(record1(&[x], y, move |grad| Ok(vec![Some(rearranged(&grad, (b, h, w, channels / 4), false)?)])))
}

/// Groups of channels to squares of pixels, or back. `dims`: B, H, W of the smaller image, and C of the larger one.
fn rearranged(x: &Tensor, (b, h, w, c): (usize, usize, usize, usize), to_space: bool) -> Result<Tensor> {
    let xs = view(x)?;
    let mut out = uninit(xs.len());
    // Both forms hold a row of the smaller image in one stretch.
    out.par_chunks_exact_mut(4 * w * c).zip(xs.par_chunks_exact(4 * w * c)).for_each(|(out, row)| {
        for (x, part) in (0..w).flat_map(|x| (0..4).map(move |part| (x, part))) {
            let deep = (4 * x + part) * c;
            let wide = (part / 2 * 2 * w + 2 * x + part % 2) * c;
            let (to, from) = if to_space { (wide, deep) } else { (deep, wide) };
            out[to..to + c].copy_from_slice(&row[from..from + c]);
        }
    });
    let shape = if to_space { (b, 2 * h, 2 * w, c) } else { (b, h, w, 4 * c) };
    cpu::from_f32(out, shape, x.dtype())
}

/// The sum over each 2x2 square, in the order left, right, upper, lower.
fn sum_squares(grad: &Tensor, dims: (usize, usize, usize, usize)) -> Result<Tensor> {
    let (b, h, w, c) = dims;
    let dy = view(grad)?;
    let mut dx = uninit(b * h * w * c);
    dx.par_chunks_exact_mut(w * c).zip(dy.par_chunks_exact(4 * w * c)).for_each(|(row, dy)| {
        let (first, second) = dy.split_at(2 * w * c);
        for (x, pixel) in row.chunks_exact_mut(c).enumerate() {
            let (upper, lower) = (&first[2 * x * c..][..2 * c], &second[2 * x * c..][..2 * c]);
            for (j, v) in pixel.iter_mut().enumerate() {
                *v = (upper[j] + upper[c + j]) + (lower[j] + lower[c + j]);
            }
        }
    });
    cpu::from_f32(dx, dims, grad.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check, randn};

    #[test]
    fn upsampling_equals_its_twin() {
        check(
            &[randn(0, &[2, 3, 4, 5], 1.0)],
            1e-6,
            |v| Ok(vec![upsample_nearest2x(&v[0])?]),
            // By broadcasting: candle's upsample_nearest2d overwrites gradients instead of adding them.
            |t| Ok(vec![t[0].reshape((2, 3, 1, 4, 1, 5))?.broadcast_as((2, 3, 2, 4, 2, 5))?.reshape((2, 6, 8, 5))?]),
        );
    }

    #[test]
    fn squares_of_channel_groups_equal_their_twin() {
        check(
            &[randn(0, &[2, 3, 4, 20], 1.0)],
            1e-6,
            |v| Ok(vec![depth_to_space2x(&v[0])?]),
            |t| {
                let parts = t[0].reshape((2, 3, 4, 2, 2, 5))?.permute((0, 1, 3, 2, 4, 5))?;
                Ok(vec![parts.contiguous()?.reshape((2, 6, 8, 5))?])
            },
        );
        assert!(depth_to_space2x(&Value::constant(randn(0, &[1, 2, 2, 6], 1.0))).is_err());
    }
}
