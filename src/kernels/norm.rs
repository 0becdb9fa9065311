//! Normalisations: adaLN's modulated layer norm, and RMS norm with a weight.

use crate::error::Result;
use crate::kernels::composed;
use crate::kernels::cpu::{self, column_sums, par_rows, uninit, view};
use crate::kernels::math::{dot, sum, sum_over, vectorized};
use crate::kernels::modulation::TokenRows;
use crate::kernels::route::is_composed;
use crate::kernels::tape::{Value, record1};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// Layer norm without weights, then `* (1 + scale) + shift` with rows of a modulation table.
///
/// Shapes: `x` (B, S, D); `mods` (R, C, D), of which entries `shift` and `scale` of C are used; `rows` says which of
/// the R rows a token takes.
pub fn modulated_norm(
    x: &Value,
    mods: &Value,
    shift: usize,
    scale: usize,
    rows: &TokenRows,
    eps: f32,
) -> Result<Value> {
    if is_composed(x.tensor()) {
        return composed::norm::modulated_norm(x, mods, shift, scale, rows, eps);
    }
    let d = *x.dims().last().expect("a token has a width");
    let chunks = mods.dims()[1];
    let (xs, ms) = (view(x.tensor())?, view(mods.tensor())?);
    let tokens = xs.len() / d;
    let mut out = uninit(xs.len());
    let mut stats = vec![(0f32, 0f32); tokens];
    out.par_chunks_exact_mut(d).zip(stats.par_iter_mut()).with_min_len(8).enumerate().for_each(|(i, (out, stats))| {
        let x = &xs[i * d..(i + 1) * d];
        let table = &ms[rows.row(i) * chunks * d..];
        let (shift, scale) = (&table[shift * d..][..d], &table[scale * d..][..d]);
        vectorized!({
            let mean = sum(x) / d as f32;
            let variance = sum_over(d, |j| (x[j] - mean) * (x[j] - mean)) / d as f32;
            let inv_std = 1.0 / (variance + eps).sqrt();
            *stats = (mean, inv_std);
            for j in 0..d {
                out[j] = (x[j] - mean) * inv_std * (1.0 + scale[j]) + shift[j];
            }
        });
    });
    let y = cpu::from_f32(out, x.tensor().shape(), x.dtype())?;
    drop((xs, ms));

    let (x_tensor, mods_tensor, rows) = (x.tensor().clone(), mods.tensor().clone(), rows.clone());
    let (x_needs, mods_need) = (x.needs_grad(), mods.needs_grad());
    Ok(record1(&[x, mods], y, move |grad| {
        let (xs, ms, dy) = (view(&x_tensor)?, view(&mods_tensor)?, view(&grad)?);
        let dx = x_needs.then(|| {
            let mut dx = uninit(xs.len());
            par_rows(&mut dx, d, |i, dx| {
                let (x, dy, (mean, inv_std)) = (&xs[i * d..(i + 1) * d], &dy[i * d..(i + 1) * d], stats[i]);
                let scale = &ms[(rows.row(i) * chunks + scale) * d..][..d];
                vectorized!({
                    let normed = |j: usize| (x[j] - mean) * inv_std;
                    let mean_g = sum_over(d, |j| dy[j] * (1.0 + scale[j])) / d as f32;
                    let mean_gx = sum_over(d, |j| dy[j] * (1.0 + scale[j]) * normed(j)) / d as f32;
                    for j in 0..d {
                        dx[j] = inv_std * (dy[j] * (1.0 + scale[j]) - mean_g - normed(j) * mean_gx);
                    }
                });
            });
            cpu::from_f32(dx, x_tensor.shape(), x_tensor.dtype())
        });
        let d_mods = mods_need.then(|| {
            rows.sum_into_table(&mods_tensor, tokens, |i, from, table| {
                let (mean, inv_std) = stats[i];
                let (x, dy) = (&xs[i * d + from..], &dy[i * d + from..]);
                for (j, s) in table.column(shift).iter_mut().enumerate() {
                    *s += dy[j];
                }
                for (j, s) in table.column(scale).iter_mut().enumerate() {
                    *s += dy[j] * (x[j] - mean) * inv_std;
                }
            })
        });
        Ok(vec![dx.transpose()?, d_mods.transpose()?])
    }))
}

/// RMS norm over the last dimension: `x / sqrt(mean(x^2) + eps) * weight`.
///
/// Shapes: `x` (.., D); `weight` (D,).
pub fn rms_norm(x: &Value, weight: &Value, eps: f32) -> Result<Value> {
    if is_composed(x.tensor()) {
        return composed::norm::rms_norm(x, weight, eps);
    }
    let d = *x.dims().last().expect("a token has a width");
    let (xs, w) = (view(x.tensor())?, view(weight.tensor())?);
    let mut out = uninit(xs.len());
    par_rows(&mut out, d, |i, out| {
        let x = &xs[i * d..(i + 1) * d];
        vectorized!({
            let inv_rms = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
            for j in 0..d {
                out[j] = x[j] * inv_rms * w[j];
            }
        });
    });
    let y = cpu::from_f32(out, x.tensor().shape(), x.dtype())?;
    drop((xs, w));

    let (x_tensor, w_tensor) = (x.tensor().clone(), weight.tensor().clone());
    let (x_needs, w_needs) = (x.needs_grad(), weight.needs_grad());
    Ok(record1(&[x, weight], y, move |grad| {
        let (xs, w, dy) = (view(&x_tensor)?, view(&w_tensor)?, view(&grad)?);
        let dx = x_needs.then(|| {
            let mut dx = uninit(xs.len());
            par_rows(&mut dx, d, |i, dx| {
                let (x, dy) = (&xs[i * d..(i + 1) * d], &dy[i * d..(i + 1) * d]);
                vectorized!(rms_norm_backward(x, &w, dy, eps, dx));
            });
            cpu::from_f32(dx, x_tensor.shape(), x_tensor.dtype())
        });
        let dw = w_needs.then(|| rms_norm_weight_grad(&xs, &dy, d, eps, w_tensor.dtype()));
        Ok(vec![dx.transpose()?, dw.transpose()?])
    }))
}

/// The gradient of one row of [`rms_norm`] with respect to `x`.
#[inline(always)]
pub(super) fn rms_norm_backward(x: &[f32], w: &[f32], dy: &[f32], eps: f32, dx: &mut [f32]) {
    let d = x.len();
    let (w, dy, dx) = (&w[..d], &dy[..d], &mut dx[..d]);
    let inv_rms = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
    let mean_gx = sum_over(d, |j| dy[j] * w[j] * x[j]) * inv_rms * inv_rms / d as f32;
    for j in 0..d {
        dx[j] = inv_rms * (dy[j] * w[j] - x[j] * mean_gx);
    }
}

/// The gradient of [`rms_norm`] with respect to its weight: rows of `d` summed in order.
pub(super) fn rms_norm_weight_grad(x: &[f32], dy: &[f32], d: usize, eps: f32, dtype: DType) -> Result<Tensor> {
    let mut products = uninit(x.len());
    par_rows(&mut products, d, |i, out| {
        let (x, dy) = (&x[i * d..(i + 1) * d], &dy[i * d..(i + 1) * d]);
        vectorized!({
            let inv_rms = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
            for j in 0..d {
                out[j] = dy[j] * x[j] * inv_rms;
            }
        });
    });
    cpu::from_f32(column_sums(&products, d), d, dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::modulation::testing::{rows_twin, two_sample_rows};
    use crate::kernels::testing::{check_both, randn};

    #[test]
    fn modulated_norm_equals_its_twin() {
        for conditioned in [false, true] {
            let rows = two_sample_rows(5, conditioned);
            let table_rows = if conditioned { 4 } else { 2 };
            let inputs = [randn(0, &[2, 5, 24], 1.5), randn(1, &[table_rows, 3, 24], 0.5)];
            check_both(
                &inputs,
                5e-6,
                |v| Ok(vec![modulated_norm(&v[0], &v[1], 2, 0, &rows, 1e-6)?]),
                |t| {
                    let x = &t[0];
                    let centred = x.broadcast_sub(&x.mean_keepdim(2)?)?;
                    let normed = centred.broadcast_div(&(centred.sqr()?.mean_keepdim(2)? + 1e-6)?.sqrt()?)?;
                    let (shift, scale) = (rows_twin(&t[1], 2, 5, conditioned)?, rows_twin(&t[1], 0, 5, conditioned)?);
                    Ok(vec![((normed * (scale + 1.0)?)? + shift)?])
                },
            );
        }
    }

    #[test]
    fn rms_norm_equals_its_twin() {
        check_both(
            &[randn(0, &[2, 7, 20], 1.5), randn(1, &[20], 1.0)],
            5e-6,
            |v| Ok(vec![rms_norm(&v[0], &v[1], 1e-6)?]),
            |t| {
                let inv = (t[0].sqr()?.mean_keepdim(2)? + 1e-6)?.sqrt()?.recip()?;
                Ok(vec![t[0].broadcast_mul(&inv)?.broadcast_mul(&t[1])?])
            },
        );
    }
}
