//! The sum of all singular values of a dense matrix, in f64.
//!
//! Householder reflections bring the matrix to bidiagonal form; its singular values are the positive eigenvalues of the
//! Golub-Kahan tridiagonal matrix, found by bisection with Sturm counts. No squares of the matrix are formed, so small
//! singular values keep an error of about 1e-16 of the largest one, where eigenvalues of a Gram matrix would leave 1e-8.

use rayon::prelude::*;

/// A row-major matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// The rows, one after the other.
    pub values: Vec<f64>,
}

/// Rows that one task sums up: fixed, so that the order of the sums does not depend on the threads.
const ROWS: usize = 64;

impl Matrix {
    /// A matrix from its rows.
    pub fn new(rows: usize, columns: usize, values: Vec<f64>) -> Self {
        assert_eq!(values.len(), rows * columns, "the values fill the matrix");
        Self { rows, columns, values }
    }

    fn transposed(&self) -> Self {
        let column = |j: usize| self.values.iter().skip(j).step_by(self.columns).copied();
        Self::new(self.columns, self.rows, (0..self.columns).flat_map(column).collect())
    }

    /// Elements `k..` of column `k`.
    fn column(&self, k: usize) -> Vec<f64> {
        (k..self.rows).map(|i| self.values[i * self.columns + k]).collect()
    }

    /// `v` times the rows from `first` on: one number for each column.
    fn left_product(&self, v: &[f64], first: usize) -> Vec<f64> {
        let parts: Vec<Vec<f64>> = self.values[first * self.columns..]
            .par_chunks(ROWS * self.columns)
            .zip(v.par_chunks(ROWS))
            .map(|(rows, v)| {
                let mut sums = vec![0.0; self.columns];
                for (row, v) in rows.chunks_exact(self.columns).zip(v) {
                    sums.iter_mut().zip(row).for_each(|(s, x)| *s += v * x);
                }
                sums
            })
            .collect();
        let mut sums = vec![0.0; self.columns];
        parts.iter().for_each(|part| sums.iter_mut().zip(part).for_each(|(s, p)| *s += p));
        sums
    }

    /// The upper triangle R of a QR decomposition, with as many rows as columns. Needs rows >= columns.
    /// `R' R` is the Gram matrix of the columns, and R is found without forming it.
    pub fn triangle(mut self) -> Self {
        let n = self.columns;
        for k in 0..n {
            let Some((v, _)) = reflector(self.column(k)) else { continue };
            let w = self.left_product(&v, k);
            self.values[k * n..].par_chunks_exact_mut(n).zip(&v).for_each(|(row, v)| {
                row[k..].iter_mut().zip(&w[k..]).for_each(|(x, w)| *x -= 2.0 * v * w);
            });
        }
        self.values.truncate(n * n);
        self.rows = n;
        for i in 1..n {
            self.values[i * n..i * n + i].fill(0.0);
        }
        self
    }

    /// The sum of the singular values.
    pub fn nuclear_norm(self) -> f64 {
        let tall = if self.rows < self.columns { self.transposed() } else { self };
        singular_values(&tall.bidiagonal()).iter().sum()
    }

    /// Diagonal and superdiagonal, alternating: the off-diagonal of the Golub-Kahan matrix. Needs rows >= columns.
    fn bidiagonal(mut self) -> Vec<f64> {
        let n = self.columns;
        let mut out = Vec::with_capacity(2 * n);
        for k in 0..n {
            let (v, diagonal) = reflector(self.column(k)).unwrap_or((vec![0.0; self.rows - k], 0.0));
            out.push(diagonal);
            if k + 1 == n {
                break;
            }
            let w = self.left_product(&v, k);
            let apply = |row: &mut [f64], v: f64| row.iter_mut().zip(&w[k + 1..]).for_each(|(x, w)| *x -= 2.0 * v * w);
            let first = &mut self.values[k * n + k + 1..(k + 1) * n];
            apply(first, v[0]);
            let (u, beside) = reflector(first.to_vec()).unwrap_or((vec![0.0; n - k - 1], 0.0));
            out.push(beside);
            self.values[(k + 1) * n..].par_chunks_exact_mut(n).zip(&v[1..]).for_each(|(row, &v)| {
                let row = &mut row[k + 1..];
                apply(row, v);
                let along: f64 = row.iter().zip(&u).map(|(x, u)| x * u).sum();
                row.iter_mut().zip(&u).for_each(|(x, u)| *x -= 2.0 * along * u);
            });
        }
        out
    }
}

/// The unit vector whose reflection takes `x` to a multiple of the first axis, and that multiple; `None` for zeros.
fn reflector(mut x: Vec<f64>) -> Option<(Vec<f64>, f64)> {
    let norm = x.iter().map(|v| v * v).sum::<f64>().sqrt();
    if norm == 0.0 {
        return None;
    }
    // The sign that avoids cancellation.
    let target = if x[0] > 0.0 { -norm } else { norm };
    x[0] -= target;
    let inv_length = 1.0 / x.iter().map(|v| v * v).sum::<f64>().sqrt();
    x.iter_mut().for_each(|v| *v *= inv_length);
    Some((x, target))
}

/// The singular values, largest first, of the bidiagonal matrix whose diagonal and superdiagonal alternate in `beside`.
fn singular_values(beside: &[f64]) -> Vec<f64> {
    let n = beside.len().div_ceil(2);
    let squares: Vec<f64> = beside.iter().map(|b| b * b).collect();
    // Gershgorin: no eigenvalue is larger than two neighbours together.
    let pairs = beside.windows(2).map(|w| w[0].abs() + w[1].abs());
    let bound = pairs.fold(beside.first().map_or(0.0, |b| b.abs()), f64::max) * (1.0 + 1e-12);
    let smallest = f64::MIN_POSITIVE / f64::EPSILON;
    // Eigenvalues of the 2n x 2n matrix that are below x: the negative pivots of its factorisation less x.
    let below = |x: f64| {
        let mut pivot = -x;
        let mut count = usize::from(pivot < 0.0);
        for square in &squares {
            if pivot.abs() < smallest {
                pivot = -smallest;
            }
            pivot = -x - square / pivot;
            count += usize::from(pivot < 0.0);
        }
        count
    };
    let find = |i: usize| {
        // The eigenvalue with 2n - 1 - i others below it.
        let (mut low, mut high) = (0.0, bound);
        while high - low > f64::EPSILON * bound {
            let middle = 0.5 * (low + high);
            if middle <= low || middle >= high {
                break;
            }
            if below(middle) > 2 * n - 1 - i { high = middle } else { low = middle }
        }
        0.5 * (low + high)
    };
    (0..n).into_par_iter().map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    fn random(rows: usize, columns: usize, seed: u64) -> Matrix {
        let mut stream = Stream::new(seed, 0, 0, Purpose::Bench);
        Matrix::new(rows, columns, (0..rows * columns).map(|_| stream.normal()).collect())
    }

    fn product(a: &Matrix, b: &Matrix) -> Matrix {
        let at =
            |i: usize, j: usize| (0..a.columns).map(move |k| a.values[i * a.columns + k] * b.values[k * b.columns + j]);
        let values = (0..a.rows).flat_map(|i| (0..b.columns).map(move |j| at(i, j).sum())).collect();
        Matrix::new(a.rows, b.columns, values)
    }

    #[test]
    fn known_singular_values_are_found() {
        let diagonal = Matrix::new(4, 3, vec![3.0, 0.0, 0.0, 0.0, 0.0, -2.0, 0.0, 1e-9, 0.0, 0.0, 0.0, 0.0]);
        assert!((diagonal.clone().nuclear_norm() - 5.000000001).abs() < 1e-14);
        assert_eq!(singular_values(&diagonal.bidiagonal()).len(), 3);
        assert_eq!(Matrix::new(2, 2, vec![0.0; 4]).nuclear_norm(), 0.0);
        // [[1, 1], [0, 1]] has the golden ratio and its inverse.
        assert!((Matrix::new(2, 2, vec![1.0, 1.0, 0.0, 1.0]).nuclear_norm() - 5f64.sqrt()).abs() < 1e-14);
    }

    #[test]
    fn squares_and_rank_are_right() {
        // The squares of the singular values sum up to those of the elements, in either orientation.
        for matrix in [random(70, 31, 1), random(31, 70, 1)] {
            let squares: f64 = matrix.values.iter().map(|v| v * v).sum();
            let tall = if matrix.rows < matrix.columns { matrix.transposed() } else { matrix };
            let values = singular_values(&tall.bidiagonal());
            assert!((values.iter().map(|v| v * v).sum::<f64>() - squares).abs() < 1e-10 * squares);
            assert!(values.windows(2).all(|w| w[0] >= w[1]));
        }
        let thin = product(&random(90, 4, 2), &random(4, 50, 3));
        let values = singular_values(&thin.bidiagonal());
        assert!(values[3] > 1.0 && values[4] < 1e-13 * values[0], "{:?}", &values[..6]);
    }

    #[test]
    fn the_triangle_has_the_gram_matrix_of_the_columns() {
        let x = random(150, 20, 4);
        let r = x.clone().triangle();
        let (expected, found) = (product(&x.transposed(), &x), product(&r.transposed(), &r));
        let error = expected.values.iter().zip(&found.values).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(error < 1e-11, "{error}");
        assert_eq!((r.rows, r.values[20]), (20, 0.0));
    }
}
