//! Matrix products on CPU slices, through the `gemm` crate.

use rayon::prelude::*;

/// A read-only view of a matrix inside a slice.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A dense row-major matrix.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows of `cols` elements that begin `row_stride` elements apart.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * row_stride + cols <= data.len(), "the matrix lies inside its slice");
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// A writable row-major view of a matrix inside a slice.
pub struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// A dense row-major matrix.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows of `cols` elements that begin `row_stride` elements apart.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * row_stride + cols <= data.len(), "the matrix lies inside its slice");
        assert!(cols <= row_stride, "rows do not overlap");
        Self { data, rows, cols, row_stride }
    }
}

/// What happens to the previous contents of the output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// `out = scale * a b`; the output may hold anything.
    Overwrite,
    /// `out += scale * a b`.
    Add,
}

/// Products below this many multiply-adds are not worth a second thread.
const MIN_PARALLEL: usize = 1 << 18;
/// The gemm crate shares a product among threads by tiles of the output; outputs with a side below this leave it
/// with one thread's worth of tiles, so the long side is cut here instead.
const SKINNY: usize = 96;

/// `out = scale * a b` (or `+=`), on all rayon threads.
///
/// Every element is summed over the inner dimension by one thread in one order, so the result does not depend on
/// scheduling.
pub fn gemm(out: MatMut, mode: Into, a: Mat, b: Mat, scale: f32) {
    let threads = rayon::current_num_threads();
    let work = out.rows * out.cols * a.cols;
    if threads == 1 || work < MIN_PARALLEL {
        return gemm_one_thread(out, mode, a, b, scale);
    }
    check(&out, a, b);
    if out.rows.min(out.cols) >= SKINNY {
        let pointer = Pointer(out.data.as_mut_ptr());
        // SAFETY: `check` and the constructors have shown that both inputs and the output lie inside their slices.
        unsafe {
            run(pointer, out.rows, out.cols, out.row_stride, mode, a, b, scale, gemm::Parallelism::Rayon(threads))
        };
        return;
    }
    let by_rows = out.rows >= out.cols;
    let side = if by_rows { out.rows } else { out.cols };
    let chunk = side.div_ceil(threads).next_multiple_of(16);
    let pointer = Pointer(out.data.as_mut_ptr());
    let (rows, cols, stride) = (out.rows, out.cols, out.row_stride);
    (0..side.div_ceil(chunk)).into_par_iter().for_each(|i| {
        let (start, len) = (i * chunk, chunk.min(side - i * chunk));
        let (m, n, offset, a, b) = if by_rows {
            (
                len,
                cols,
                start * stride,
                Mat { data: &a.data[(start * a.row_stride).min(a.data.len())..], rows: len, ..a },
                b,
            )
        } else {
            (rows, len, start, a, Mat { data: &b.data[(start * b.col_stride).min(b.data.len())..], cols: len, ..b })
        };
        // SAFETY: as above; the chunks of the output are disjoint rows or disjoint columns.
        unsafe { run(pointer.offset(offset), m, n, stride, mode, a, b, scale, gemm::Parallelism::None) };
    });
}

/// [`gemm()`] on the calling thread, for products inside a parallel loop.
pub fn gemm_one_thread(out: MatMut, mode: Into, a: Mat, b: Mat, scale: f32) {
    check(&out, a, b);
    let pointer = Pointer(out.data.as_mut_ptr());
    // SAFETY: `check` and the constructors have shown that both inputs and the output lie inside their slices.
    unsafe { run(pointer, out.rows, out.cols, out.row_stride, mode, a, b, scale, gemm::Parallelism::None) };
}

/// `out = x w'` for row-major x (m x k) and w (n x k): the product of a linear layer.
pub fn matmul_nt(x: &[f32], w: &[f32], m: usize, k: usize, n: usize, out: &mut [f32]) {
    gemm(MatMut::new(out, m, n), Into::Overwrite, Mat::new(x, m, k), Mat::new(w, n, k).t(), 1.0);
}

fn check(out: &MatMut, a: Mat, b: Mat) {
    assert_eq!((a.rows, a.cols, b.cols), (out.rows, b.rows, out.cols), "the shapes of a product fit");
}

#[derive(Clone, Copy)]
struct Pointer(*mut f32);
// SAFETY: the threads that share the pointer write disjoint parts of the output.
unsafe impl Send for Pointer {}
unsafe impl Sync for Pointer {}

impl Pointer {
    fn offset(self, by: usize) -> Self {
        Self(self.0.wrapping_add(by))
    }
}

/// # Safety
/// `a`, `b` and the `m` x `n` output with `stride` must lie inside their allocations.
#[allow(clippy::too_many_arguments)]
unsafe fn run(
    out: Pointer,
    m: usize,
    n: usize,
    stride: usize,
    mode: Into,
    a: Mat,
    b: Mat,
    scale: f32,
    parallelism: gemm::Parallelism,
) {
    // Asked for as out' = b' a': with row-major operands gemm's packing then runs along rows, measured 1.1 to 1.5
    // times as fast for the shapes of a transformer.
    unsafe {
        gemm::gemm(
            n,
            m,
            a.cols,
            out.0,
            stride as isize,
            1,
            mode == Into::Add,
            b.data.as_ptr(),
            b.row_stride as isize,
            b.col_stride as isize,
            a.data.as_ptr(),
            a.row_stride as isize,
            a.col_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    fn naive(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
        let mut out = vec![0f32; m * n];
        for i in 0..m {
            for j in 0..n {
                out[i * n + j] = (0..k).map(|p| f64::from(a[i * k + p]) * f64::from(b[p * n + j])).sum::<f64>() as f32;
            }
        }
        out
    }

    fn transpose(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..rows * cols).map(|i| x[(i % rows) * cols + i / rows]).collect()
    }

    #[test]
    fn equals_a_naive_product_for_every_layout_and_shape_class() {
        // Tall, wide and square outputs above and below the thresholds, odd sizes.
        for (m, k, n) in [(3, 5, 7), (700, 33, 16), (16, 300, 515), (130, 70, 129), (1, 64, 200), (97, 1, 97)] {
            let mut rng = Stream::new(1, m as u64, n as u64, Purpose::Bench);
            let (a, b) = (rng.normals(m * k, 1.0), rng.normals(k * n, 1.0));
            let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
            let expected = naive(&a, &b, m, k, n);
            for (ma, mb) in [
                (Mat::new(&a, m, k), Mat::new(&b, k, n)),
                (Mat::new(&at, k, m).t(), Mat::new(&b, k, n)),
                (Mat::new(&a, m, k), Mat::new(&bt, n, k).t()),
            ] {
                // Rows of the output lie apart, and what lies between them is not touched.
                let stride = n + 3;
                let mut out = vec![9f32; m * stride];
                gemm(MatMut::strided(&mut out, m, n, stride), Into::Overwrite, ma, mb, 1.0);
                gemm(MatMut::strided(&mut out, m, n, stride), Into::Add, ma, mb, -0.5);
                for i in 0..m {
                    for j in 0..n {
                        let (got, want) = (out[i * stride + j], 0.5 * expected[i * n + j]);
                        assert!((got - want).abs() < 1e-4 * (k as f32).sqrt(), "{m}x{k}x{n} at {i},{j}: {got} {want}");
                    }
                    assert_eq!(&out[i * stride + n..(i + 1) * stride], &[9.0; 3]);
                }
            }
        }
    }
}
