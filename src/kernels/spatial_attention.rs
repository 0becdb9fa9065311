//! Single-head attention among all pixels of an image, as the autoencoder's middle block has it.
//!
//! A task holds the scores of a few dozen rows at a time, never the whole matrix. The backward keeps each row's
//! log-sum-exp and computes the probabilities again.

use crate::error::Result;
use crate::kernels::cpu::{self, uninit, view};
use crate::kernels::math::{dot, exp, max, sum_over, vectorized};
use crate::kernels::matmul::{Into, Mat, MatMut, gemm_one_thread};
use crate::kernels::tape::{Value, record1};
use crate::kernels::tiles::{cut, tiles};
use candle_core::Tensor;
use rayon::prelude::*;

/// Rows of scores that one task holds.
const TILE: usize = 64;

/// `softmax(q k' / sqrt(C)) v`.
///
/// Shapes: `qkv` (B, N, 3C), queries, keys and values side by side -> (B, N, C).
pub fn spatial_attention(qkv: &Value) -> Result<Value> {
    let (b, n, width) = qkv.tensor().dims3()?;
    let c = width / 3;
    let scale = 1.0 / (c as f32).sqrt();
    let xs = view(qkv.tensor())?;
    let mut out = uninit(b * n * c);
    let mut log_sums = vec![0f32; b * n];
    let tiles = tiles(&vec![n; b], TILE);
    cut(&mut out, &tiles, c).into_par_iter().zip(cut(&mut log_sums, &tiles, 1)).zip(&tiles).for_each_init(
        Vec::new,
        |scores, ((out, log_sums), tile)| {
            let m = tile.rows;
            let image = Image { qkv: &xs[tile.first * width..][..n * width], n, c };
            scores.resize(m * n, 0.0);
            let queries = image.part(0, tile.start, m);
            gemm_one_thread(MatMut::new(scores, m, n), Into::Overwrite, queries, image.part(1, 0, n).t(), scale);
            for (row, log_sum) in scores.chunks_exact_mut(n).zip(&mut *log_sums) {
                vectorized!({
                    let top = max(row);
                    row.iter_mut().for_each(|s| *s = exp(*s - top));
                    let sum = sum_over(n, |j| row[j]);
                    row.iter_mut().for_each(|s| *s /= sum);
                    *log_sum = top + sum.ln();
                });
            }
            gemm_one_thread(MatMut::new(out, m, c), Into::Overwrite, Mat::new(scores, m, n), image.part(2, 0, n), 1.0);
        },
    );
    let y = cpu::from_f32(out, (b, n, c), qkv.dtype())?;
    drop(xs);
    let (qkv_tensor, y_tensor) = (qkv.tensor().clone(), y.clone());
    Ok(record1(&[qkv], y, move |grad| Ok(vec![Some(backward(&qkv_tensor, &y_tensor, &grad, &log_sums)?)])))
}

/// The gradient of queries, keys and values. Each task computes those of its own rows: as queries it needs their
/// scores against all keys, as keys and values the scores of all queries against them.
fn backward(qkv: &Tensor, y: &Tensor, grad: &Tensor, log_sums: &[f32]) -> Result<Tensor> {
    let (b, n, width) = qkv.dims3()?;
    let c = width / 3;
    let scale = 1.0 / (c as f32).sqrt();
    let (xs, ys, dys) = (view(qkv)?, view(y)?, view(grad)?);
    // Per query the dot product of output and gradient: what the softmax's backward subtracts.
    let mut deltas = vec![0f32; b * n];
    deltas.par_iter_mut().with_min_len(TILE).enumerate().for_each(|(i, delta)| {
        *delta = vectorized!(dot(&ys[i * c..(i + 1) * c], &dys[i * c..(i + 1) * c]));
    });
    let mut dx = uninit(xs.len());
    let tiles = tiles(&vec![n; b], TILE);
    cut(&mut dx, &tiles, width).into_par_iter().zip(&tiles).for_each_init(Default::default, |scratch, (dx, tile)| {
        let (p, dp): &mut (Vec<f32>, Vec<f32>) = scratch;
        let (start, m, first) = (tile.start, tile.rows, tile.first);
        let image = Image { qkv: &xs[first * width..][..n * width], n, c };
        let dy = Mat::new(&dys[first * c..][..n * c], n, c);
        let dy_rows = Mat::new(&dys[(first + start) * c..][..m * c], m, c);
        let (log_sums, deltas) = (&log_sums[first..][..n], &deltas[first..][..n]);
        p.resize(m * n, 0.0);
        dp.resize(m * n, 0.0);

        // As queries: dq = scale * (p * (dy v' - delta)) k.
        gemm_one_thread(MatMut::new(p, m, n), Into::Overwrite, image.part(0, start, m), image.part(1, 0, n).t(), scale);
        gemm_one_thread(MatMut::new(dp, m, n), Into::Overwrite, dy_rows, image.part(2, 0, n).t(), 1.0);
        for (i, (p, dp)) in p.chunks_exact(n).zip(dp.chunks_exact_mut(n)).enumerate() {
            let (log_sum, delta) = (log_sums[start + i], deltas[start + i]);
            vectorized!((0..n).for_each(|j| dp[j] = exp(p[j] - log_sum) * (dp[j] - delta)));
        }
        let dq = MatMut::strided(dx, m, c, width);
        gemm_one_thread(dq, Into::Overwrite, Mat::new(dp, m, n), image.part(1, 0, n), scale);

        // As keys and values: dv = p' dy and dk = scale * (p' * (v dy' - delta')) q, with p' (rows, queries).
        gemm_one_thread(MatMut::new(p, m, n), Into::Overwrite, image.part(1, start, m), image.part(0, 0, n).t(), scale);
        gemm_one_thread(MatMut::new(dp, m, n), Into::Overwrite, image.part(2, start, m), dy.t(), 1.0);
        for (p, dp) in p.chunks_exact_mut(n).zip(dp.chunks_exact_mut(n)) {
            vectorized!({
                for j in 0..n {
                    p[j] = exp(p[j] - log_sums[j]);
                    dp[j] = p[j] * (dp[j] - deltas[j]);
                }
            });
        }
        let dk = MatMut::strided(&mut dx[c..], m, c, width);
        gemm_one_thread(dk, Into::Overwrite, Mat::new(dp, m, n), image.part(0, 0, n), scale);
        let dv = MatMut::strided(&mut dx[2 * c..], m, c, width);
        gemm_one_thread(dv, Into::Overwrite, Mat::new(p, m, n), dy, 1.0);
    });
    cpu::from_f32(dx, (b, n, width), grad.dtype())
}

/// Queries, keys and values of one image.
struct Image<'a> {
    qkv: &'a [f32],
    n: usize,
    c: usize,
}

impl<'a> Image<'a> {
    /// `rows` pixels from `start` of the queries (0), keys (1) or values (2).
    fn part(&self, which: usize, start: usize, rows: usize) -> Mat<'a> {
        debug_assert!(start + rows <= self.n);
        Mat::strided(&self.qkv[start * 3 * self.c + which * self.c..], rows, self.c, 3 * self.c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check, randn};

    #[test]
    fn spatial_attention_equals_its_twin() {
        // 2 images of 150 pixels: three tiles each, the last ragged.
        for (b, n, c) in [(2, 150, 4), (1, 3, 8)] {
            check(
                &[randn(0, &[b, n, 3 * c], 1.5)],
                5e-6,
                |v| Ok(vec![spatial_attention(&v[0])?]),
                |t| {
                    let part = |i: usize| t[0].narrow(2, i * c, c)?.contiguous();
                    let scores = (part(0)?.matmul(&part(1)?.t()?)? / (c as f64).sqrt())?;
                    let scores = scores.broadcast_sub(&scores.max_keepdim(2)?.detach())?.exp()?;
                    let p = scores.broadcast_div(&scores.sum_keepdim(2)?)?;
                    Ok(vec![p.matmul(&part(2)?)?])
                },
            );
        }
    }
}
