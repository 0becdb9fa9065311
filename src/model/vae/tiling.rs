//! Large images in overlapping tiles, blended linearly, so that memory stays bounded.
//!
//! As `tiled_encode` and `tiled_decode` of the original, with two differences. The last tile of a row or column is the
//! first one that reaches the border, so that no sliver without context is computed behind it. Where four tiles meet
//! their weights are bilinear; the original blends there what is blended already. Elsewhere the values are the same.
//! Source: <https://github.com/huggingface/diffusers/blob/6a0233eb7aaa69cc531250f49c47aaf4fa7a62e4/src/diffusers/models/autoencoders/autoencoder_kl_qwenimage.py>

use crate::error::{Error, Result};
use candle_core::{Device, Tensor};

/// When an image is cut into tiles, and into which. Sizes in pixels, multiples of the spatial compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    /// Images of at most so many pixels are coded whole.
    pub above: usize,
    /// Side of a tile.
    pub size: usize,
    /// Distance between the starts of neighbouring tiles; they overlap by `size - stride`.
    pub stride: usize,
}

impl Default for Tiling {
    /// Whole up to 1024 x 1024 pixels (the published model then needs 1.6 GB to encode, 2.1 GB to decode); beyond that
    /// tiles of 512, overlapping by 128.
    fn default() -> Self {
        Self { above: 1024 * 1024, size: 512, stride: 384 }
    }
}

impl Tiling {
    /// Checks the sizes against the autoencoder's pixels per latent.
    pub(super) fn check(&self, spatial_compression: usize) -> Result<()> {
        // The encoder halves tiles step by step, and no pixel may lie in more than two tiles of a row.
        let fits = |n: usize| n > 0 && n.is_multiple_of(spatial_compression);
        if fits(self.size) && fits(self.stride) && self.stride < self.size && self.size <= 2 * self.stride {
            return Ok(());
        }
        Err(Error::usage("these tiles cannot be blended").expected(
            format!("multiples of {spatial_compression} with size / 2 <= stride < size"),
            format!("size {} and stride {}", self.size, self.stride),
        ))
    }
}

/// Tile and stride along both axes, in elements of the input or of the output.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub size: usize,
    pub stride: usize,
}

/// One axis of one tile: where it starts, and the weight of each element in the joined image.
struct Span {
    start: usize,
    weights: Vec<f32>,
}

impl Grid {
    /// The tiles of an axis of length `n`. Over an overlap of k elements the later tile's weight rises 0, 1/k, 2/k ...
    /// and the earlier one's falls by as much.
    fn spans(self, n: usize) -> Vec<Span> {
        let count = n.saturating_sub(self.size).div_ceil(self.stride) + 1;
        let overlap = (self.size - self.stride) as f32;
        let risen = |distance: usize| (distance as f32 / overlap).min(1.0);
        let span = |tile: usize| {
            let start = tile * self.stride;
            let weight = |i: usize| {
                let rising = if tile > 0 { risen(i) } else { 1.0 };
                let fallen = if tile + 1 < count { i.checked_sub(self.stride).map_or(0.0, risen) } else { 0.0 };
                rising * (1.0 - fallen)
            };
            Span { start, weights: (0..self.size.min(n - start)).map(weight).collect() }
        };
        (0..count).map(span).collect()
    }
}

/// Runs `code` on the tiles of `x` (B, C, H, W) and joins what it gives, at `output`'s scale, to (B, C', h, w).
pub(super) fn in_tiles(
    x: &Tensor,
    input: Grid,
    output: Grid,
    code: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (_, _, height, width) = x.dims4()?;
    let scaled = |n: usize| n * output.stride / input.stride;
    let (out_h, out_w) = (scaled(height), scaled(width));
    let (rows, columns) = (output.spans(out_h), output.spans(out_w));
    let mut joined: Option<(Vec<usize>, Vec<f32>)> = None;
    for (row, span) in input.spans(height).iter().zip(&rows) {
        for (column, across) in input.spans(width).iter().zip(&columns) {
            let tile = x.narrow(2, row.start, row.weights.len())?.narrow(3, column.start, column.weights.len())?;
            let tile = code(&tile.contiguous()?)?;
            let (b, c, ..) = tile.dims4()?;
            let (_, values) =
                joined.get_or_insert_with(|| (vec![b, c, out_h, out_w], vec![0.0; b * c * out_h * out_w]));
            add_weighted(values, out_h, out_w, &tile, span, across)?;
        }
    }
    let (dims, values) = joined.expect("an image has at least one tile");
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(x.dtype())?)
}

/// Adds a tile, weighted, to the planes of `height` x `width` in `values`.
fn add_weighted(
    values: &mut [f32],
    height: usize,
    width: usize,
    tile: &Tensor,
    down: &Span,
    across: &Span,
) -> Result<()> {
    let tile = tile.flatten_all()?.to_vec1::<f32>()?;
    let (h, w) = (down.weights.len(), across.weights.len());
    for (plane, tile) in values.chunks_exact_mut(height * width).zip(tile.chunks_exact(h * w)) {
        for ((y, weight_y), row) in (down.start..).zip(&down.weights).zip(tile.chunks_exact(w)) {
            let target = &mut plane[y * width + across.start..][..w];
            for ((value, weight_x), new) in target.iter_mut().zip(&across.weights).zip(row) {
                *value += weight_y * weight_x * new;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::randn;

    #[test]
    fn weights_add_up_to_one_and_no_tile_is_a_sliver() {
        let grid = Grid { size: 64, stride: 48 };
        for n in [8, 64, 65, 112, 113, 160, 400] {
            let spans = grid.spans(n);
            let mut total = vec![0f32; n];
            for span in &spans {
                for (t, w) in total[span.start..].iter_mut().zip(&span.weights) {
                    *t += w;
                }
            }
            assert!(total.iter().all(|t| (t - 1.0).abs() < 1e-6), "{n}: {total:?}");
            assert!(spans.len() == 1 || spans.iter().all(|s| s.weights.len() > 16), "{n}");
        }
        // The fade of the original: the later tile's weight is y / extent.
        let spans = grid.spans(112);
        assert_eq!((spans.len(), spans[1].start, spans[1].weights[4], spans[0].weights[52]), (2, 48, 0.25, 0.75));
    }

    #[test]
    fn tiles_of_a_pointwise_code_join_to_the_whole() {
        // A "decoder" that doubles the size by repetition depends on nothing outside a pixel: tiling must be exact.
        let double = |x: &Tensor| -> Result<Tensor> {
            let (b, c, h, w) = x.dims4()?;
            let x = x.reshape((b, c, h, 1, w, 1))?.broadcast_as((b, c, h, 2, w, 2))?;
            Ok(x.reshape((b, c, 2 * h, 2 * w))?)
        };
        let x = randn(0, &[2, 3, 21, 30], 1.0);
        let joined = in_tiles(&x, Grid { size: 8, stride: 6 }, Grid { size: 16, stride: 12 }, double).unwrap();
        let error = crate::kernels::testing::relative_error(&joined, &double(&x).unwrap());
        assert!(error < 1e-6, "{error}");
    }

    #[test]
    fn tiles_that_cannot_be_blended_are_refused() {
        let tiling = |size, stride| Tiling { above: 0, size, stride }.check(8);
        assert!(tiling(64, 48).is_ok());
        for (size, stride) in [(64, 64), (64, 24), (60, 48), (0, 0)] {
            assert!(tiling(size, stride).is_err(), "{size} {stride}");
        }
    }
}
