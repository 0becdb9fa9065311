//! What a set of weighted adapters changes of one weight, applied to some rows of it at a time.

use crate::adapters::delta::{Delta, Magnitude};
use crate::adapters::matrix::Matrix;
use crate::adapters::read::{AdapterFile, Component};
use crate::error::Result;
use crate::kernels::matmul::{Into, Mat, MatMut, gemm_one_thread};

/// An adapter and the weight with which it is merged; negative weights subtract it.
pub struct Weighted {
    /// The adapter.
    pub adapter: AdapterFile,
    /// The factor on all its deltas.
    pub weight: f64,
}

/// The change of one weight (out, in).
pub struct Change {
    shape: (usize, usize),
    /// All plain LoRAs side by side, weights and scales in B: one product adds them all.
    low_rank: Option<(Matrix, Matrix)>,
    /// LoHa and LoKr.
    dense: Vec<(Delta, f64)>,
    dora: Vec<Dora>,
}

struct Dora {
    delta: Delta,
    weight: f64,
    /// For norms of columns: the factor on each column of the changed weight.
    column_scales: Vec<f32>,
}

/// Reads rows of the base weight: the first row, and the rows to fill.
pub type BaseRows<'a> = dyn Fn(usize, &mut [f32]) -> Result<()> + Sync + 'a;

impl Change {
    /// The change of `module`; `None` if no adapter changes it. `base` is read only for DoRA's norms of columns.
    ///
    /// Errors: an adapter with a value that is not finite, `base` cannot be read.
    pub fn of(adapters: &[Weighted], component: Component, module: &str, base: &BaseRows) -> Result<Option<Self>> {
        let (mut lora, mut dense, mut dora, mut shape) = (Vec::new(), Vec::new(), Vec::new(), None);
        for Weighted { adapter, weight } in adapters {
            let Some(entry) = adapter.modules(component).get(module) else { continue };
            let mut delta = adapter.delta(module, entry)?;
            shape = Some(entry.shape);
            delta.scale *= if delta.magnitude.is_none() { *weight } else { 1.0 };
            match (&delta.magnitude, delta.exact_factors(0)) {
                (Some(_), _) => dora.push(Dora::new(delta, *weight, base)?),
                (None, Some(factors)) => lora.push(factors),
                (None, None) => dense.push((delta, 1.0)),
            }
        }
        let Some(shape) = shape else { return Ok(None) };
        let low_rank = (!lora.is_empty()).then(|| {
            let (b, a): (Vec<Matrix>, Vec<Matrix>) = lora.into_iter().unzip();
            (Matrix::beside(&b), Matrix::stacked(&a))
        });
        Ok(Some(Self { shape, low_rank, dense, dora }))
    }

    /// Applies the change to `rows`, whole rows of the base weight from `first_row` on. On the calling thread.
    pub fn apply(&self, first_row: usize, rows: &mut [f32]) {
        let (_, width) = self.shape;
        let count = rows.len() / width;
        // DoRA changes what the base was, not what other adapters have made of it.
        let base = if self.dora.is_empty() { Vec::new() } else { rows.to_vec() };
        if let Some((b, a)) = &self.low_rank {
            let b = Mat::new(&b.data[first_row * b.cols..(first_row + count) * b.cols], count, b.cols);
            gemm_one_thread(MatMut::new(rows, count, width), Into::Add, b, a.view(), 1.0);
        }
        for (delta, weight) in &self.dense {
            delta.add_rows(first_row, rows, *weight);
        }
        for dora in &self.dora {
            dora.add_rows(first_row, &base, width, rows);
        }
    }
}

/// Rows of a weight that are looked at together when a whole pass over it is needed.
const PASS_ROWS: usize = 64;

impl Dora {
    fn new(delta: Delta, weight: f64, base: &BaseRows) -> Result<Self> {
        let mut column_scales = Vec::new();
        if let Some(Magnitude::Columns(stored)) = &delta.magnitude {
            let (rows, width) = delta.shape();
            let mut squares = vec![0f64; width];
            let mut changed = Vec::new();
            for first in (0..rows).step_by(PASS_ROWS) {
                changed.resize(PASS_ROWS.min(rows - first) * width, 0.0);
                base(first, &mut changed)?;
                delta.add_rows(first, &mut changed, 1.0);
                for row in changed.chunks_exact(width) {
                    squares.iter_mut().zip(row).for_each(|(s, &v)| *s += f64::from(v) * f64::from(v));
                }
            }
            column_scales = stored.iter().zip(&squares).map(|(&m, &s)| Magnitude::ratio(m, s)).collect();
        }
        Ok(Self { delta, weight, column_scales })
    }

    /// `rows += weight * (changed - base)` with the changed weight at its stored norms.
    fn add_rows(&self, first_row: usize, base: &[f32], width: usize, rows: &mut [f32]) {
        let mut changed = base.to_vec();
        self.delta.add_rows(first_row, &mut changed, 1.0);
        let weight = self.weight as f32;
        for (i, row) in changed.chunks_exact_mut(width).enumerate() {
            match &self.delta.magnitude {
                Some(Magnitude::Rows(stored)) => {
                    let squares = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
                    let scale = Magnitude::ratio(stored[first_row + i], squares);
                    row.iter_mut().for_each(|v| *v *= scale);
                }
                _ => row.iter_mut().zip(&self.column_scales).for_each(|(v, s)| *v *= s),
            }
        }
        rows.iter_mut().zip(changed.iter().zip(base)).for_each(|(o, (c, b))| *o += weight * (c - b));
    }
}
