//! The parts of adaLN besides its norm: which modulation a token takes, and the gated residual.

use crate::error::Result;
use crate::kernels::composed;
use crate::kernels::cpu::{self, par_rows, uninit, view};
use crate::kernels::math::vectorized;
use crate::kernels::route::is_composed;
use crate::kernels::tape::{Value, record1};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Which row of a modulation table (R, C, D) each token of a batch takes.
#[derive(Clone, Debug)]
pub struct TokenRows {
    batch: usize,
    tokens: usize,
    conditioned: Option<Arc<[bool]>>,
    /// The row of every token, on the GPU that first asked for it.
    #[cfg(feature = "cuda")]
    on_device: Arc<std::sync::OnceLock<Tensor>>,
}

impl TokenRows {
    /// Every token of a sample takes the sample's row; R = B.
    pub fn per_sample(batch: usize, tokens: usize) -> Self {
        Self::new(batch, tokens, None)
    }

    /// Tokens marked in `conditioned` (one flag per token of a sample) take row B + b, the others row b; R = 2B.
    pub fn with_conditions(batch: usize, conditioned: Vec<bool>) -> Self {
        Self::new(batch, conditioned.len(), Some(conditioned.into()))
    }

    fn new(batch: usize, tokens: usize, conditioned: Option<Arc<[bool]>>) -> Self {
        Self {
            batch,
            tokens,
            conditioned,
            #[cfg(feature = "cuda")]
            on_device: Arc::default(),
        }
    }

    /// The row of every token of the flattened batch, (B * S) i32 on `device`.
    #[cfg(feature = "cuda")]
    pub(super) fn on_device(&self, device: &Device) -> Result<Tensor> {
        if let Some(rows) = self.on_device.get().filter(|t| t.device().same_device(device)) {
            return Ok(rows.clone());
        }
        let rows = Tensor::from_iter((0..self.batch * self.tokens).map(|i| self.row(i) as i32), device)?;
        let _ = self.on_device.set(rows.clone());
        Ok(rows)
    }

    /// Samples in the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of a sample.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The row of every token of the flattened batch, as a tensor (B * S) of indices; `None` where token and sample
    /// have the same row.
    pub(super) fn ids(&self, device: &Device) -> Result<Option<Tensor>> {
        if self.conditioned.is_none() {
            return Ok(None);
        }
        let ids = (0..self.batch * self.tokens).map(|i| self.row(i) as u32);
        Ok(Some(Tensor::from_iter(ids, device)?))
    }

    /// The row for token `i` of the flattened batch.
    #[inline(always)]
    pub fn row(&self, i: usize) -> usize {
        let sample = i / self.tokens;
        match &self.conditioned {
            Some(flags) if flags[i % self.tokens] => self.batch + sample,
            _ => sample,
        }
    }

    /// A gradient for the table: `add(token, first column, slice of the token's row)` runs for every token in order,
    /// in parallel over ranges of columns.
    pub(super) fn sum_into_table(
        &self,
        table: &Tensor,
        tokens: usize,
        add: impl Fn(usize, usize, &mut TableSlice) + Sync,
    ) -> Result<Tensor> {
        let (rows, chunks, d) = table.dims3()?;
        const COLUMNS: usize = 64;
        let parts: Vec<Vec<f32>> = (0..d.div_ceil(COLUMNS))
            .into_par_iter()
            .map(|p| {
                let width = COLUMNS.min(d - p * COLUMNS);
                let mut sums = vec![0f32; rows * chunks * width];
                for i in 0..tokens {
                    let row = &mut sums[self.row(i) * chunks * width..][..chunks * width];
                    add(i, p * COLUMNS, &mut TableSlice { row, width });
                }
                sums
            })
            .collect();
        let mut out = vec![0f32; rows * chunks * d];
        for (p, part) in parts.iter().enumerate() {
            let width = COLUMNS.min(d - p * COLUMNS);
            for (entry, sums) in part.chunks_exact(width).enumerate() {
                out[entry * d + p * COLUMNS..][..width].copy_from_slice(sums);
            }
        }
        cpu::from_f32(out, (rows, chunks, d), DType::F32)?.to_dtype(table.dtype()).map_err(Into::into)
    }
}

/// A range of columns of one row (C, D) of a modulation table.
pub(super) struct TableSlice<'a> {
    row: &'a mut [f32],
    width: usize,
}

impl TableSlice<'_> {
    /// The columns of entry `c` of C.
    pub(super) fn column(&mut self, c: usize) -> &mut [f32] {
        &mut self.row[c * self.width..(c + 1) * self.width]
    }
}

/// `x + gate * y`, with entry `gate` of a modulation table.
///
/// Shapes: `x`, `y` (B, S, D); `mods` (R, C, D).
pub fn gated_residual(x: &Value, y: &Value, mods: &Value, gate: usize, rows: &TokenRows) -> Result<Value> {
    if is_composed(x.tensor()) {
        return composed::modulation::gated_residual(x, y, mods, gate, rows);
    }
    let d = *x.dims().last().expect("a token has a width");
    let chunks = mods.dims()[1];
    let (xs, ys, ms) = (view(x.tensor())?, view(y.tensor())?, view(mods.tensor())?);
    let tokens = xs.len() / d;
    let mut out = uninit(xs.len());
    par_rows(&mut out, d, |i, out| {
        let (x, y) = (&xs[i * d..(i + 1) * d], &ys[i * d..(i + 1) * d]);
        let gate = &ms[(rows.row(i) * chunks + gate) * d..][..d];
        vectorized!((0..d).for_each(|j| out[j] = x[j] + gate[j] * y[j]));
    });
    let sum = cpu::from_f32(out, x.tensor().shape(), x.dtype())?;
    drop((xs, ys, ms));

    // y is needed again only for the gradient of the gate.
    let y_tensor = mods.needs_grad().then(|| y.tensor().clone());
    let (mods_tensor, rows, y_needs) = (mods.tensor().clone(), rows.clone(), y.needs_grad());
    Ok(record1(&[x, y, mods], sum, move |grad| {
        let (ms, g) = (view(&mods_tensor)?, view(&grad)?);
        let dy = y_needs.then(|| {
            let mut dy = uninit(g.len());
            par_rows(&mut dy, d, |i, dy| {
                let g = &g[i * d..(i + 1) * d];
                let gate = &ms[(rows.row(i) * chunks + gate) * d..][..d];
                vectorized!((0..d).for_each(|j| dy[j] = gate[j] * g[j]));
            });
            cpu::from_f32(dy, grad.shape(), grad.dtype())
        });
        let d_mods = y_tensor.map(|y| {
            let ys = view(&y)?;
            rows.sum_into_table(&mods_tensor, tokens, |i, from, table| {
                let (y, g) = (&ys[i * d + from..], &g[i * d + from..]);
                table.column(gate).iter_mut().enumerate().for_each(|(j, s)| *s += g[j] * y[j]);
            })
        });
        let (dy, d_mods) = (dy.transpose()?, d_mods.transpose()?);
        drop(g);
        Ok(vec![Some(grad), dy, d_mods])
    }))
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// Rows for a batch of two; with conditions the last two of each sample's tokens are condition tokens.
    pub fn two_sample_rows(tokens: usize, conditioned: bool) -> TokenRows {
        match conditioned {
            false => TokenRows::per_sample(2, tokens),
            true => TokenRows::with_conditions(2, (0..tokens).map(|i| i + 2 >= tokens).collect()),
        }
    }

    /// Entry `c` of a modulation table spread over the tokens of [`two_sample_rows`], (2, S, D).
    pub fn rows_twin(mods: &Tensor, c: usize, tokens: usize, conditioned: bool) -> candle_core::Result<Tensor> {
        let sample = |b: usize| {
            let spread =
                |row: usize, n: usize| mods.narrow(0, row, 1)?.narrow(1, c, 1)?.broadcast_as((1, n, mods.dims()[2]));
            match conditioned {
                false => spread(b, tokens),
                true => Tensor::cat(&[spread(b, tokens - 2)?, spread(2 + b, 2)?], 1),
            }
        };
        Tensor::cat(&[sample(0)?, sample(1)?], 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check_both, randn};
    use testing::{rows_twin, two_sample_rows};

    #[test]
    fn gated_residual_equals_its_twin() {
        for conditioned in [false, true] {
            let rows = two_sample_rows(6, conditioned);
            let table_rows = if conditioned { 4 } else { 2 };
            check_both(
                &[randn(0, &[2, 6, 70], 1.0), randn(1, &[2, 6, 70], 1.0), randn(2, &[table_rows, 2, 70], 1.0)],
                5e-6,
                |v| Ok(vec![gated_residual(&v[0], &v[1], &v[2], 1, &rows)?]),
                |t| Ok(vec![(&t[0] + (&t[1] * rows_twin(&t[2], 1, 6, conditioned)?)?)?]),
            );
        }
    }
}
