//! Singular values of deltas, in f64.
//!
//! A delta is either a product of thin factors, whose SVD is exact and cheap (QR of both factors, SVD of a core as
//! small as the rank), or dense, where a randomised range finder gets the leading part.
//! Own code rather than a linear algebra crate: the kept one (faer) takes over two minutes of a core to compile, and
//! a one-sided Jacobi SVD of the small core is as accurate and fast enough.

use crate::adapters::matrix::Matrix;
use crate::kernels::math::vectorized;
use crate::rng::Stream;

/// A thin SVD `u diag(s) v'`: columns of `u` and `v` are orthonormal where `s` is not zero, `s` falls.
pub struct Svd {
    /// Left singular vectors as columns.
    pub u: Columns,
    /// Singular values, largest first.
    pub s: Vec<f64>,
    /// Right singular vectors as columns.
    pub v: Columns,
}

/// An f64 matrix stored by columns.
#[derive(Clone, Debug)]
pub struct Columns {
    /// Length of a column.
    pub rows: usize,
    /// The columns.
    pub cols: Vec<Vec<f64>>,
}

impl Columns {
    fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols: vec![vec![0.0; rows]; cols] }
    }

    fn from_matrix(m: &Matrix) -> Self {
        let column = |j: usize| (0..m.rows).map(|i| f64::from(m.data[i * m.cols + j])).collect();
        Self { rows: m.rows, cols: (0..m.cols).map(column).collect() }
    }

    /// The transpose of a matrix: its rows are the columns.
    fn from_rows(m: &Matrix) -> Self {
        let column = |i: usize| m.row(i).iter().map(|&v| f64::from(v)).collect();
        Self { rows: m.cols, cols: (0..m.rows).map(column).collect() }
    }

    fn to_matrix(&self) -> Matrix {
        let data = (0..self.rows).flat_map(|i| self.cols.iter().map(move |c| c[i] as f32)).collect();
        Matrix::new(self.rows, self.cols.len(), data)
    }

    fn transposed(&self) -> Self {
        let column = |i: usize| self.cols.iter().map(|c| c[i]).collect();
        Self { rows: self.cols.len(), cols: (0..self.rows).map(column).collect() }
    }

    /// `self * other`.
    fn product(&self, other: &Columns) -> Columns {
        let column = |weights: &Vec<f64>| {
            let mut out = vec![0.0; self.rows];
            weights.iter().zip(&self.cols).for_each(|(&w, c)| axpy(&mut out, w, c));
            out
        };
        Columns { rows: self.rows, cols: other.cols.iter().map(column).collect() }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Eight running sums, so that the loop vectorises.
    vectorized!({
        let mut sums = [0.0; 8];
        let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
        let tail: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
        for (x, y) in a8.zip(b8) {
            for l in 0..8 {
                sums[l] += x[l] * y[l];
            }
        }
        sums.iter().sum::<f64>() + tail
    })
}

fn axpy(out: &mut [f64], factor: f64, x: &[f64]) {
    vectorized!(out.iter_mut().zip(x).for_each(|(o, x)| *o += factor * x));
}

/// Thin QR by Householder reflections: `q` has min(rows, cols) orthonormal columns, `r` is upper triangular.
fn thin_qr(mut m: Columns) -> (Columns, Columns) {
    let (rows, cols) = (m.rows, m.cols.len());
    let k = rows.min(cols);
    let mut reflectors: Vec<Option<Vec<f64>>> = Vec::with_capacity(k);
    for j in 0..k {
        let norm = dot(&m.cols[j][j..], &m.cols[j][j..]).sqrt();
        if norm == 0.0 {
            reflectors.push(None);
            continue;
        }
        // The sign that avoids cancellation.
        let alpha = if m.cols[j][j] > 0.0 { -norm } else { norm };
        let mut v = m.cols[j][j..].to_vec();
        v[0] -= alpha;
        let inv_norm = 1.0 / dot(&v, &v).sqrt();
        v.iter_mut().for_each(|x| *x *= inv_norm);
        for column in &mut m.cols[j..] {
            let factor = -2.0 * dot(&v, &column[j..]);
            axpy(&mut column[j..], factor, &v);
        }
        reflectors.push(Some(v));
    }
    let r = Columns { rows: k, cols: m.cols.iter().map(|c| c[..k].to_vec()).collect() };
    let mut r = r;
    r.cols.iter_mut().enumerate().for_each(|(j, c)| c.iter_mut().skip(j + 1).for_each(|x| *x = 0.0));
    // Q's columns are the reflections, last first, of the unit vectors.
    let mut q = Columns::zeros(rows, k);
    for (j, column) in q.cols.iter_mut().enumerate() {
        column[j] = 1.0;
        for (i, v) in reflectors.iter().enumerate().take(j + 1).rev() {
            if let Some(v) = v {
                let factor = -2.0 * dot(v, &column[i..]);
                axpy(&mut column[i..], factor, v);
            }
        }
    }
    (q, r)
}

/// One-sided Jacobi: rotates pairs of columns until all are orthogonal. Exact to rounding for any matrix, and simple;
/// meant for cores of at most a few hundred columns.
fn jacobi_svd(m: Columns) -> Svd {
    if m.rows < m.cols.len() {
        let Svd { u, s, v } = jacobi_svd(m.transposed());
        return Svd { u: v, s, v: u };
    }
    let n = m.cols.len();
    let mut work = m;
    let mut v = Columns::zeros(n, n);
    (0..n).for_each(|j| v.cols[j][j] = 1.0);
    // Each sweep converges quadratically in the end; a dozen is usual.
    for _ in 0..60 {
        let mut rotated = false;
        for p in 0..n {
            for q in p + 1..n {
                let (pp, qq) = (dot(&work.cols[p], &work.cols[p]), dot(&work.cols[q], &work.cols[q]));
                let pq = dot(&work.cols[p], &work.cols[q]);
                if pq.abs() <= 1e-15 * (pp * qq).sqrt() {
                    continue;
                }
                rotated = true;
                let zeta = (qq - pp) / (2.0 * pq);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let cos = 1.0 / (1.0 + t * t).sqrt();
                rotate(&mut work.cols, p, q, cos, cos * t);
                rotate(&mut v.cols, p, q, cos, cos * t);
            }
        }
        if !rotated {
            break;
        }
    }
    let norms: Vec<f64> = work.cols.iter().map(|c| dot(c, c).sqrt()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| norms[j].total_cmp(&norms[i]));
    let unit = |i: &usize| {
        let inv = if norms[*i] > 0.0 { 1.0 / norms[*i] } else { 0.0 };
        work.cols[*i].iter().map(|x| x * inv).collect()
    };
    Svd {
        u: Columns { rows: work.rows, cols: order.iter().map(unit).collect() },
        s: order.iter().map(|&i| norms[i]).collect(),
        v: Columns { rows: n, cols: order.iter().map(|&i| v.cols[i].clone()).collect() },
    }
}

fn rotate(cols: &mut [Vec<f64>], p: usize, q: usize, cos: f64, sin: f64) {
    let (head, tail) = cols.split_at_mut(q);
    let (x, y) = (&mut head[p], &mut tail[0]);
    vectorized!({
        for (x, y) in x.iter_mut().zip(y.iter_mut()) {
            let (a, b) = (*x, *y);
            *x = cos * a - sin * b;
            *y = sin * a + cos * b;
        }
    });
}

impl Svd {
    /// Of `b a` with b (out, r) and a (r, in): exact, at the cost of two QRs of the factors.
    pub fn of_product(b: &Matrix, a: &Matrix) -> Self {
        let (qb, rb) = thin_qr(Columns::from_matrix(b));
        let (qa, ra) = thin_qr(Columns::from_rows(a));
        let core = jacobi_svd(rb.product(&ra.transposed()));
        Self { u: qb.product(&core.u), s: core.s, v: qa.product(&core.v) }
    }

    /// The leading `rank` singular triplets of a dense matrix (all of them if it is no larger), by a randomised range
    /// finder with power iterations (Halko, Martinsson, Tropp 2011, algorithm 4.4). `random` draws the test matrix.
    pub fn leading(m: &Matrix, rank: usize, random: &mut Stream) -> Self {
        const OVERSAMPLING: usize = 16;
        const POWER_ITERATIONS: usize = 3;
        let width = rank + OVERSAMPLING;
        let mut svd = if 2 * width >= m.rows.min(m.cols) {
            // Nearly everything is asked for: take everything.
            let (q, r) = thin_qr(if m.rows >= m.cols { Columns::from_matrix(m) } else { Columns::from_rows(m) });
            let core = jacobi_svd(r);
            let (tall, wide) = (q.product(&core.u), core.v);
            if m.rows >= m.cols { Self { u: tall, s: core.s, v: wide } } else { Self { u: wide, s: core.s, v: tall } }
        } else {
            let transposed = m.transposed();
            let test = Matrix::new(m.cols, width, random.normals(m.cols * width, 1.0));
            let orthonormal = |y: Matrix| thin_qr(Columns::from_matrix(&y)).0.to_matrix();
            let mut q = orthonormal(m.product(&test));
            for _ in 0..POWER_ITERATIONS {
                q = orthonormal(m.product(&orthonormal(transposed.product(&q))));
            }
            // m ~ q (q' m), and (q' m)' = m' q is tall.
            let (qz, rz) = thin_qr(Columns::from_matrix(&transposed.product(&q)));
            let core = jacobi_svd(rz);
            Self { u: Columns::from_matrix(&q).product(&core.v), s: core.s, v: qz.product(&core.u) }
        };
        svd.truncate(rank);
        svd
    }

    /// Keeps the leading `rank` triplets.
    pub fn truncate(&mut self, rank: usize) {
        self.s.truncate(rank);
        self.u.cols.truncate(rank);
        self.v.cols.truncate(rank);
    }

    /// The sum of squared singular values.
    pub fn energy(&self) -> f64 {
        self.s.iter().map(|s| s * s).sum()
    }

    /// As LoRA factors (B, A) of exactly `rank`, the singular values shared evenly between them; missing ranks are
    /// zero.
    pub fn factors(&self, rank: usize) -> (Matrix, Matrix) {
        let half = |columns: &Columns, i: usize, k: usize| match columns.cols.get(k) {
            Some(column) => (column[i] * self.s[k].sqrt()) as f32,
            None => 0.0,
        };
        let b = (0..self.u.rows).flat_map(|i| (0..rank).map(move |k| half(&self.u, i, k))).collect();
        let a = (0..rank).flat_map(|k| (0..self.v.rows).map(move |i| half(&self.v, i, k))).collect();
        (Matrix::new(self.u.rows, rank, b), Matrix::new(rank, self.v.rows, a))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;

    fn random(rows: usize, cols: usize, item: u64) -> Matrix {
        Matrix::new(rows, cols, Stream::new(3, 0, item, Purpose::Bench).normals(rows * cols, 1.0))
    }

    fn worst(a: &Matrix, b: &Matrix) -> f32 {
        a.data.iter().zip(&b.data).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
    }

    fn assert_orthonormal(c: &Columns) {
        for (i, x) in c.cols.iter().enumerate() {
            for (j, y) in c.cols.iter().enumerate() {
                let want = f64::from(u8::from(i == j));
                assert!((dot(x, y) - want).abs() < 1e-12, "({i}, {j}): {}", dot(x, y));
            }
        }
    }

    #[test]
    fn a_products_svd_rebuilds_it_with_orthonormal_sides() {
        // Tall, wide, and thinner than the rank.
        for (out, rank, width) in [(40, 6, 30), (30, 6, 40), (5, 8, 30), (30, 8, 5), (7, 1, 9)] {
            let (b, a) = (random(out, rank, 1), random(rank, width, 2));
            let svd = Svd::of_product(&b, &a);
            let k = out.min(rank).min(width);
            assert_eq!(svd.s.len(), k);
            assert_orthonormal(&svd.u);
            assert_orthonormal(&svd.v);
            assert!(svd.s.windows(2).all(|w| w[0] >= w[1]));
            let (b2, a2) = svd.factors(rank);
            let (got, want) = (b2.product(&a2), b.product(&a));
            assert!(worst(&got, &want) < 2e-5, "{out} {rank} {width}: {}", worst(&got, &want));
            assert!((svd.energy() / want.energy() - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn known_singular_values_come_out() {
        // diag(3, 2, 0) turned by rotations on both sides: the values survive, one of them exactly zero.
        let (c, s) = (0.6f32, 0.8f32);
        let left = Matrix::new(3, 3, vec![c, -s, 0., s, c, 0., 0., 0., 1.]);
        let scaled = Matrix::new(3, 3, vec![3., 0., 0., 0., 2., 0., 0., 0., 0.]);
        let right = Matrix::new(3, 3, vec![1., 0., 0., 0., c, s, 0., -s, c]);
        let svd = Svd::of_product(&left.product(&scaled), &right);
        for (got, want) in svd.s.iter().zip([3.0, 2.0, 0.0]) {
            assert!((got - want).abs() < 1e-6, "{:?}", svd.s);
        }
    }

    #[test]
    fn zero_and_rank_deficient_factors_do_no_harm() {
        let svd = Svd::of_product(&Matrix::zeros(6, 3), &random(3, 5, 1));
        assert!(svd.s.iter().all(|&s| s == 0.0));
        let (b, a) = svd.factors(2);
        assert!(b.data.iter().chain(&a.data).all(|v| *v == 0.0));
        // Two equal columns.
        let one = random(6, 1, 1);
        let svd = Svd::of_product(&Matrix::beside(&[one.clone(), one]), &random(2, 5, 2));
        assert!(svd.s[1] < 1e-12 * svd.s[0] && svd.s[0] > 0.1);
    }

    #[test]
    fn the_randomised_svd_finds_the_best_approximation() {
        for (rows, cols) in [(120, 90), (90, 120)] {
            // Rank 8 on a floor of noise: the best rank-8 error is that of the exact SVD.
            let mut m = random(rows, 8, 1).product(&random(8, cols, 2));
            m.add_scaled(&random(rows, cols, 3), 0.05);
            let mut draws = Stream::new(1, 0, 0, Purpose::Adapters);
            let leading = Svd::leading(&m, 8, &mut draws);
            assert_orthonormal(&leading.v);
            let exact = Svd::leading(&m, rows.min(cols), &mut draws);
            assert!((exact.energy() / m.energy() - 1.0).abs() < 1e-9);
            for (got, want) in leading.s.iter().zip(&exact.s) {
                assert!((got / want - 1.0).abs() < 1e-5, "{got} {want}");
            }
            let (b, a) = leading.factors(8);
            let mut rest = m.clone();
            rest.add_scaled(&b.product(&a), -1.0);
            let best: f64 = exact.s[8..].iter().map(|s| s * s).sum();
            assert!((rest.energy() / best - 1.0).abs() < 1e-3, "{} {best}", rest.energy());
        }
    }
}
