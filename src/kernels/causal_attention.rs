//! Causal attention with grouped heads and half-split rotary positions, as language models have it. Inference only.
//!
//! Sequences of different lengths lie one after the other, without padding. A task holds the scores of a few dozen
//! rows of one head at a time.

use crate::error::Result;
use crate::kernels::cpu::{self, par_rows, uninit, view};
use crate::kernels::math::{exp, max, sum, vectorized};
use crate::kernels::matmul::{Into, Mat, MatMut, gemm_one_thread};
use crate::kernels::tiles::{cut, tiles};
use candle_core::Tensor;
use rayon::prelude::*;

/// Rows of scores that one task holds.
const TILE: usize = 64;

/// Rotary angles: for each position and each of `head_dim / 2` frequencies, cosine and sine.
pub struct HalfRope {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl HalfRope {
    /// Angles `position * theta^(-2k / head_dim)` for the positions below `len`, in f32 as the original's.
    pub fn new(len: usize, head_dim: usize, theta: f64) -> Self {
        let half = head_dim / 2;
        let frequencies: Vec<f32> = (0..half).map(|k| theta.powf(-2.0 * k as f64 / head_dim as f64) as f32).collect();
        let angles = (0..len).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
        let (sin, cos) = angles.map(f32::sin_cos).unzip();
        Self { cos, sin, half }
    }

    /// Rotates element k of each head against element `k + head_dim / 2`, by the angle of `position`.
    fn rotate(&self, position: usize, row: &mut [f32]) {
        let cos = &self.cos[position * self.half..][..self.half];
        let sin = &self.sin[position * self.half..][..self.half];
        for head in row.chunks_exact_mut(2 * self.half) {
            let (low, high) = head.split_at_mut(self.half);
            for k in 0..self.half {
                let (x, y) = (low[k], high[k]);
                low[k] = x * cos[k] - y * sin[k];
                high[k] = y * cos[k] + x * sin[k];
            }
        }
    }
}

/// Every token attends to itself and to those before it in its sequence; scores are scaled by `1 / sqrt(head_dim)`.
/// Queries and keys are rotated by their positions first; consecutive query heads share a key head.
///
/// Shapes: `q` (T, heads * head_dim), `k` and `v` (T, fewer heads * head_dim), T the sum of `lengths`, none longer
/// than `rope` -> (T, heads * head_dim).
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    lengths: &[usize],
    head_dim: usize,
    rope: &HalfRope,
) -> Result<Tensor> {
    let (tokens, width) = q.dims2()?;
    let kv_width = k.dims2()?.1;
    let shared_by = width / kv_width;
    let positions: Vec<usize> = lengths.iter().flat_map(|&n| 0..n).collect();
    let rotated = |x: &Tensor, width: usize| -> Result<Vec<f32>> {
        let mut x = view(x)?.to_vec();
        par_rows(&mut x, width, |i, row| vectorized!(rope.rotate(positions[i], row)));
        Ok(x)
    };
    let (queries, keys, values) = (rotated(q, width)?, rotated(k, kv_width)?, view(v)?);
    let values: &[f32] = &values;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut out = uninit(tokens * width);
    let tiles = tiles(lengths, TILE);
    cut(&mut out, &tiles, width).into_par_iter().zip(&tiles).for_each_init(Vec::new, |scores, (out, tile)| {
        // Keys up to the tile's last row; each row ignores those behind itself.
        let (m, n) = (tile.rows, tile.start + tile.rows);
        scores.resize(m * n, 0.0);
        for head in 0..width / head_dim {
            let queries = &queries[(tile.first + tile.start) * width + head * head_dim..];
            let shared = tile.first * kv_width + head / shared_by * head_dim;
            let keys = Mat::strided(&keys[shared..], n, head_dim, kv_width);
            let values = Mat::strided(&values[shared..], n, head_dim, kv_width);
            let queries = Mat::strided(queries, m, head_dim, width);
            gemm_one_thread(MatMut::new(scores, m, n), Into::Overwrite, queries, keys.t(), scale);
            for (i, row) in scores.chunks_exact_mut(n).enumerate() {
                let (seen, behind) = row.split_at_mut(tile.start + i + 1);
                vectorized!({
                    let top = max(seen);
                    seen.iter_mut().for_each(|s| *s = exp(*s - top));
                    let total = sum(seen);
                    seen.iter_mut().for_each(|s| *s /= total);
                });
                behind.fill(0.0);
            }
            let out = MatMut::strided(&mut out[head * head_dim..], m, head_dim, width);
            gemm_one_thread(out, Into::Overwrite, Mat::new(scores, m, n), values, 1.0);
        }
    });
    cpu::from_f32(out, (tokens, width), q.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{randn, relative_error};
    use candle_core::{DType, Device};

    /// One sequence, with basic candle ops in f64 and the full score matrix.
    fn twin(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, kv: usize, d: usize) -> candle_core::Result<Tensor> {
        let n = q.dims()[0];
        let split = |x: &Tensor, h: usize| {
            let x = x.to_dtype(DType::F64)?.reshape((n, h, d))?.transpose(0, 1)?.contiguous()?;
            let repeated = x.reshape((h, 1, n, d))?.broadcast_as((h, heads / h, n, d))?;
            repeated.reshape((heads, n, d))
        };
        let angles: Vec<f64> = (0..n)
            .flat_map(|p| (0..d).map(move |j| p as f64 * 1e4f64.powf(-2.0 * (j % (d / 2)) as f64 / d as f64)))
            .collect();
        let angles = Tensor::from_vec(angles, (n, d), &Device::Cpu)?;
        let rotate = |x: Tensor| {
            let (low, high) = (x.narrow(2, 0, d / 2)?, x.narrow(2, d / 2, d / 2)?);
            let turned = Tensor::cat(&[high.neg()?, low], 2)?;
            x.broadcast_mul(&angles.cos()?)? + turned.broadcast_mul(&angles.sin()?)?
        };
        let (q, k, v) = (rotate(split(q, heads)?)?, rotate(split(k, kv)?)?, split(v, kv)?);
        let mask: Vec<f64> = (0..n * n).map(|i| if i % n > i / n { f64::NEG_INFINITY } else { 0.0 }).collect();
        let scores = (q.matmul(&k.t()?)? / (d as f64).sqrt())?;
        let scores = scores.broadcast_add(&Tensor::from_vec(mask, (n, n), &Device::Cpu)?)?;
        let scores = scores.broadcast_sub(&scores.max_keepdim(2)?)?.exp()?;
        let p = scores.broadcast_div(&scores.sum_keepdim(2)?)?;
        p.matmul(&v)?.transpose(0, 1)?.reshape((n, heads * d))
    }

    #[test]
    fn sequences_side_by_side_equal_their_twins() {
        // Longer than a tile, exactly a tile, one token.
        let (lengths, heads, kv, d) = ([150, 64, 1], 6, 2, 8);
        let total: usize = lengths.iter().sum();
        let (q, k, v) =
            (randn(0, &[total, heads * d], 1.5), randn(1, &[total, kv * d], 1.5), randn(2, &[total, kv * d], 1.0));
        let out = causal_attention(&q, &k, &v, &lengths, d, &HalfRope::new(150, d, 1e4)).unwrap();
        let mut start = 0;
        for n in lengths {
            let part = |x: &Tensor| x.narrow(0, start, n).unwrap();
            let expected = twin(&part(&q), &part(&k), &part(&v), heads, kv, d).unwrap();
            let error = relative_error(&part(&out), &expected);
            assert!(error < 5e-6, "{n}: {error}");
            start += n;
        }
    }
}
