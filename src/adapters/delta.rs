//! The change of one weight: what the factors of every kind of adapter multiply out to.
//!
//! Shapes: a weight is (out, in).
//! - LoRA: `scale * B A`.
//! - LoHa: `scale * (W1a W1b) . (W2a W2b)`, elementwise (arXiv 2108.06098).
//! - LoKr: `scale * W1 (x) W2`, the Kronecker product (arXiv 2309.14859).
//! - DoRA (arXiv 2402.09353), on top of any of them: the changed weight `W + delta` is brought to stored norms, so that
//!   the change depends on W.
//!
//! Source for the conventions of LoHa, LoKr and their scale:
//! <https://github.com/KohakuBlueleaf/LyCORIS/tree/f49d30d670591ec8841d241d79aaa8449b30a715/lycoris/modules>

use crate::adapters::matrix::Matrix;
use crate::kernels::matmul::{Into, Mat, MatMut, gemm_one_thread};

/// The factors of a module's delta, without its scale.
#[derive(Clone, Debug)]
pub enum Factors {
    /// B (out, r) and A (r, in).
    Lora {
        /// Down projection.
        a: Matrix,
        /// Up projection.
        b: Matrix,
    },
    /// Two low-rank products, multiplied elementwise.
    Loha {
        /// (out, r) and (r, in).
        w1: (Matrix, Matrix),
        /// (out, r) and (r, in).
        w2: (Matrix, Matrix),
    },
    /// The factors of a Kronecker product, multiplied out if they were stored as low-rank products.
    Lokr {
        /// (out / p, in / q): the small one.
        w1: Matrix,
        /// (p, q).
        w2: Matrix,
    },
}

/// Norms that DoRA gives the changed weight.
#[derive(Clone, Debug)]
pub enum Magnitude {
    /// One for each row: PEFT, and LyCORIS with `wd_on_out`.
    Rows(Vec<f32>),
    /// One for each column: LyCORIS and kohya otherwise.
    Columns(Vec<f32>),
}

/// The change that an adapter makes to one weight.
#[derive(Clone, Debug)]
pub struct Delta {
    /// Its factors.
    pub factors: Factors,
    /// The factor on their product: alpha / rank and the like.
    pub scale: f64,
    /// DoRA's norms.
    pub magnitude: Option<Magnitude>,
}

impl Delta {
    /// (out, in) of the weight that it changes.
    pub fn shape(&self) -> (usize, usize) {
        match &self.factors {
            Factors::Lora { a, b } => (b.rows, a.cols),
            Factors::Loha { w1, .. } => (w1.0.rows, w1.1.cols),
            Factors::Lokr { w1, w2 } => (w1.rows * w2.rows, w1.cols * w2.cols),
        }
    }

    /// Adds `weight * scale * product` of the rows from `first_row` on to `out`, which holds whole rows. Without the
    /// magnitude. On the calling thread, so that rows can be shared among threads.
    pub fn add_rows(&self, first_row: usize, out: &mut [f32], weight: f64) {
        let (_, width) = self.shape();
        let rows = out.len() / width;
        let factor = (weight * self.scale) as f32;
        let product = |out: &mut [f32], mode, left: &Matrix, right: &Matrix, factor| {
            let left = Mat::new(&left.data[first_row * left.cols..(first_row + rows) * left.cols], rows, left.cols);
            gemm_one_thread(MatMut::new(out, rows, width), mode, left, right.view(), factor);
        };
        match &self.factors {
            Factors::Lora { a, b } => product(out, Into::Add, b, a, factor),
            Factors::Loha { w1, w2 } => {
                let (mut x, mut y) = (vec![0.0; rows * width], vec![0.0; rows * width]);
                product(&mut x, Into::Overwrite, &w1.0, &w1.1, factor);
                product(&mut y, Into::Overwrite, &w2.0, &w2.1, 1.0);
                out.iter_mut().zip(x.iter().zip(&y)).for_each(|(o, (x, y))| *o += x * y);
            }
            Factors::Lokr { w1, w2 } => {
                for (i, out) in out.chunks_exact_mut(width).enumerate() {
                    let row = first_row + i;
                    let small = w1.row(row / w2.rows);
                    let large = w2.row(row % w2.rows);
                    for (out, s) in out.chunks_exact_mut(w2.cols).zip(small) {
                        let s = s * factor;
                        out.iter_mut().zip(large).for_each(|(o, l)| *o += s * l);
                    }
                }
            }
        }
    }

    /// `scale * product`, multiplied out, without the magnitude.
    pub fn dense(&self) -> Matrix {
        use rayon::prelude::*;
        let (rows, width) = self.shape();
        let mut out = Matrix::zeros(rows, width);
        let chunk = ROWS_AT_ONCE * width.max(1);
        out.data.par_chunks_mut(chunk).enumerate().for_each(|(i, out)| self.add_rows(i * ROWS_AT_ONCE, out, 1.0));
        out
    }

    /// What it changes `base` by, with the magnitude.
    pub fn change_of(&self, base: &Matrix) -> Matrix {
        let mut change = self.dense();
        let Some(magnitude) = &self.magnitude else { return change };
        let scales = {
            let mut changed = base.clone();
            changed.add_scaled(&change, 1.0);
            magnitude.scales(&changed)
        };
        for (i, row) in change.data.chunks_exact_mut(base.cols).enumerate() {
            for (j, (d, w)) in row.iter_mut().zip(base.row(i)).enumerate() {
                let scale = scales[magnitude.index(i, j)];
                *d = scale * (w + *d) - w;
            }
        }
        change
    }

    /// As plain LoRA factors (B with the scale folded in, A), exactly: a LoRA as it is, a LoHa of rank r1 and r2 in
    /// rank r1 r2, if that is at most `max_rank`. `None` for anything else, and for DoRA.
    pub fn exact_factors(&self, max_rank: usize) -> Option<(Matrix, Matrix)> {
        if self.magnitude.is_some() {
            return None;
        }
        match &self.factors {
            Factors::Lora { a, b } => Some((b.clone().scaled(self.scale), a.clone())),
            Factors::Loha { w1, w2 } if w1.0.cols * w2.0.cols <= max_rank => {
                // (W1a W1b) . (W2a W2b) = sum over pairs (k, l) of (W1a[:,k] . W2a[:,l]) (W1b[k,:] . W2b[l,:])
                let pairs =
                    |x: &[f32], y: &[f32]| x.iter().flat_map(|x| y.iter().map(move |y| x * y)).collect::<Vec<f32>>();
                let rank = w1.0.cols * w2.0.cols;
                let b: Vec<f32> = (0..w1.0.rows).flat_map(|i| pairs(w1.0.row(i), w2.0.row(i))).collect();
                let mut a = Vec::with_capacity(rank * w1.1.cols);
                for k in 0..w1.1.rows {
                    for l in 0..w2.1.rows {
                        a.extend(w1.1.row(k).iter().zip(w2.1.row(l)).map(|(x, y)| x * y));
                    }
                }
                Some((Matrix::new(w1.0.rows, rank, b).scaled(self.scale), Matrix::new(rank, w1.1.cols, a)))
            }
            _ => None,
        }
    }

    /// Whether all values are finite.
    pub fn is_finite(&self) -> bool {
        let finite = |m: &Matrix| m.data.iter().all(|v| v.is_finite());
        let factors = match &self.factors {
            Factors::Lora { a, b } => finite(a) && finite(b),
            Factors::Loha { w1, w2 } => [&w1.0, &w1.1, &w2.0, &w2.1].into_iter().all(finite),
            Factors::Lokr { w1, w2 } => finite(w1) && finite(w2),
        };
        let magnitude = match &self.magnitude {
            None => true,
            Some(Magnitude::Rows(v) | Magnitude::Columns(v)) => v.iter().all(|v| v.is_finite()),
        };
        factors && magnitude && self.scale.is_finite()
    }
}

/// Rows that one thread multiplies out at a time: a block of a 3072-wide weight then fits its cache.
pub const ROWS_AT_ONCE: usize = 64;

impl Magnitude {
    /// The factor that brings a row or column whose squares sum up to `squares` to the stored norm.
    pub fn ratio(stored: f32, squares: f64) -> f32 {
        (f64::from(stored) / (squares.sqrt() + f64::from(f32::EPSILON))) as f32
    }

    /// For each row or column: stored norm / norm of the changed weight there.
    fn scales(&self, changed: &Matrix) -> Vec<f32> {
        match self {
            Self::Rows(stored) => {
                let squares = |i: usize| changed.row(i).iter().map(|&v| f64::from(v) * f64::from(v)).sum();
                stored.iter().enumerate().map(|(i, &m)| Self::ratio(m, squares(i))).collect()
            }
            Self::Columns(stored) => {
                let mut squares = vec![0f64; changed.cols];
                for i in 0..changed.rows {
                    squares.iter_mut().zip(changed.row(i)).for_each(|(s, &v)| *s += f64::from(v) * f64::from(v));
                }
                stored.iter().zip(squares).map(|(&m, s)| Self::ratio(m, s)).collect()
            }
        }
    }

    fn index(&self, row: usize, column: usize) -> usize {
        match self {
            Self::Rows(_) => row,
            Self::Columns(_) => column,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    fn random(rows: usize, cols: usize, item: u64) -> Matrix {
        Matrix::new(rows, cols, Stream::new(5, 0, item, Purpose::Bench).normals(rows * cols, 1.0))
    }

    fn assert_close(got: &Matrix, want: impl Fn(usize, usize) -> f64) {
        for i in 0..got.rows {
            for j in 0..got.cols {
                let (got, want) = (f64::from(got.row(i)[j]), want(i, j));
                assert!((got - want).abs() < 1e-5 * (1.0 + want.abs()), "({i}, {j}): {got} {want}");
            }
        }
    }

    fn at(m: &Matrix, i: usize, j: usize) -> f64 {
        f64::from(m.data[i * m.cols + j])
    }

    fn product(x: &Matrix, y: &Matrix, i: usize, j: usize) -> f64 {
        (0..x.cols).map(|k| at(x, i, k) * at(y, k, j)).sum()
    }

    /// More rows than one block, so that the blocks' borders are crossed.
    const OUT: usize = 2 * ROWS_AT_ONCE + 6;

    fn loha() -> Delta {
        let (w1, w2) = ((random(OUT, 2, 1), random(2, 10, 2)), (random(OUT, 3, 3), random(3, 10, 4)));
        Delta { factors: Factors::Loha { w1, w2 }, scale: 0.5, magnitude: None }
    }

    #[test]
    fn each_kind_multiplies_out_to_its_definition() {
        let (a, b) = (random(3, 10, 1), random(OUT, 3, 2));
        let lora = Delta { factors: Factors::Lora { a: a.clone(), b: b.clone() }, scale: 2.5, magnitude: None };
        assert_close(&lora.dense(), |i, j| 2.5 * product(&b, &a, i, j));

        let delta = loha();
        let Factors::Loha { w1, w2 } = &delta.factors else { unreachable!("made above") };
        assert_close(&delta.dense(), |i, j| 0.5 * product(&w1.0, &w1.1, i, j) * product(&w2.0, &w2.1, i, j));

        let (w1, w2) = (random(2, 5, 1), random(OUT / 2, 3, 2));
        let lokr = Delta { factors: Factors::Lokr { w1: w1.clone(), w2: w2.clone() }, scale: -1.5, magnitude: None };
        assert_eq!(lokr.shape(), (OUT, 15));
        assert_close(&lokr.dense(), |i, j| -1.5 * at(&w1, i / w2.rows, j / 3) * at(&w2, i % w2.rows, j % 3));
    }

    #[test]
    fn a_loha_in_lora_form_is_the_same_change() {
        let delta = loha();
        assert!(delta.exact_factors(5).is_none());
        let (b, a) = delta.exact_factors(6).unwrap();
        let dense = delta.dense();
        assert_close(&b.product(&a), |i, j| at(&dense, i, j));
    }

    #[test]
    fn dora_brings_rows_or_columns_to_the_stored_norms() {
        let (base, a, b) = (random(6, 5, 1), random(2, 5, 2), random(6, 2, 3));
        let delta = |magnitude| Delta {
            factors: Factors::Lora { a: a.clone(), b: b.clone() },
            scale: 0.7,
            magnitude: Some(magnitude),
        };
        let changed = |i, j| at(&base, i, j) + 0.7 * product(&b, &a, i, j);
        let norms: Vec<f32> = (1..=6).map(|n| n as f32).collect();
        let rows = delta(Magnitude::Rows(norms.clone())).change_of(&base);
        assert_close(&rows, |i, j| {
            let norm = (0..5).map(|j| changed(i, j).powi(2)).sum::<f64>().sqrt();
            f64::from(norms[i]) * changed(i, j) / norm - at(&base, i, j)
        });
        let columns = delta(Magnitude::Columns(norms[..5].to_vec())).change_of(&base);
        assert_close(&columns, |i, j| {
            let norm = (0..6).map(|i| changed(i, j).powi(2)).sum::<f64>().sqrt();
            f64::from(norms[j]) * changed(i, j) / norm - at(&base, i, j)
        });
        // A single row.
        let thin = random(1, 5, 4);
        let b = random(1, 2, 5);
        let delta = Delta {
            factors: Factors::Lora { a: a.clone(), b },
            scale: 1.0,
            magnitude: Some(Magnitude::Rows(vec![2.0])),
        };
        let mut moved = delta.change_of(&thin);
        moved.add_scaled(&thin, 1.0);
        assert!((moved.energy().sqrt() - 2.0).abs() < 1e-5);
    }
}
