//! Small dense f32 matrices: the factors of adapters and the deltas that they make.

use crate::kernels::matmul::{Into, Mat, MatMut, gemm};

/// A row-major matrix of f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// `rows * cols` values.
    pub data: Vec<f32>,
}

impl Matrix {
    /// From row-major values. Panics if their number is not `rows * cols`.
    pub fn new(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * cols, "a {rows} x {cols} matrix");
        Self { rows, cols, data }
    }

    /// All zero.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self::new(rows, cols, vec![0.0; rows * cols])
    }

    /// One row.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// A view for products.
    pub fn view(&self) -> Mat<'_> {
        Mat::new(&self.data, self.rows, self.cols)
    }

    /// The matrix product `self * other`, on all threads.
    pub fn product(&self, other: &Matrix) -> Matrix {
        let mut out = Matrix::zeros(self.rows, other.cols);
        gemm(MatMut::new(&mut out.data, self.rows, other.cols), Into::Overwrite, self.view(), other.view(), 1.0);
        out
    }

    /// The transposed matrix.
    pub fn transposed(&self) -> Matrix {
        let mut data = Vec::with_capacity(self.data.len());
        for j in 0..self.cols {
            data.extend((0..self.rows).map(|i| self.data[i * self.cols + j]));
        }
        Matrix::new(self.cols, self.rows, data)
    }

    /// Every value times `factor`.
    pub fn scaled(mut self, factor: f64) -> Matrix {
        self.data.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
        self
    }

    /// `self += factor * other`, for matrices of one shape.
    pub fn add_scaled(&mut self, other: &Matrix, factor: f32) {
        assert_eq!((self.rows, self.cols), (other.rows, other.cols), "matrices of one shape");
        self.data.iter_mut().zip(&other.data).for_each(|(x, y)| *x += factor * y);
    }

    /// The sum of squares, in f64.
    pub fn energy(&self) -> f64 {
        self.data.iter().map(|&v| f64::from(v) * f64::from(v)).sum()
    }

    /// Matrices of as many rows, side by side.
    pub fn beside(parts: &[Matrix]) -> Matrix {
        let (rows, cols) = (parts.first().map_or(0, |p| p.rows), parts.iter().map(|p| p.cols).sum());
        let mut data = Vec::with_capacity(rows * cols);
        for i in 0..rows {
            parts.iter().for_each(|p| data.extend_from_slice(p.row(i)));
        }
        Matrix::new(rows, cols, data)
    }

    /// Matrices of as many columns, one below the other.
    pub fn stacked(parts: &[Matrix]) -> Matrix {
        let cols = parts.first().map_or(0, |p| p.cols);
        let data: Vec<f32> = parts.iter().flat_map(|p| p.data.iter().copied()).collect();
        Matrix::new(parts.iter().map(|p| p.rows).sum(), cols, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_transposes_and_joins_are_laid_out_by_rows() {
        let a = Matrix::new(2, 3, vec![1., 2., 3., 4., 5., 6.]);
        let b = Matrix::new(3, 1, vec![1., 0., -1.]);
        assert_eq!(a.product(&b).data, [-2., -2.]);
        assert_eq!(a.transposed().data, [1., 4., 2., 5., 3., 6.]);
        let c = Matrix::new(2, 1, vec![7., 8.]);
        let beside = Matrix::beside(&[a.clone(), c]);
        assert_eq!((beside.cols, beside.row(1)), (4, &[4., 5., 6., 8.][..]));
        let stacked = Matrix::stacked(&[b.clone(), b]);
        assert_eq!((stacked.rows, stacked.data.as_slice()), (6, &[1., 0., -1., 1., 0., -1.][..]));
        assert_eq!(a.energy(), 91.0);
    }
}
