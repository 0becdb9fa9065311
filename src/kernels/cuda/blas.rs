//! Matrix products by cuBLAS that candle's `matmul` does not offer: adding to what is there, f32 results of bf16
//! operands, operands whose rows lie further apart than they are long.

use crate::error::{Error, Result};
use crate::kernels::cuda::gpu::{address, empty};
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{DType, Tensor};
use std::ffi::c_void;

/// `alpha * a b` in `dtype`, for `a` (m, k) and `b` (k, n), or batches (B, m, k) and (B, k, n).
pub fn product(a: &Tensor, b: &Tensor, dtype: DType, alpha: f32) -> Result<Tensor> {
    let mut shape = a.dims().to_vec();
    *shape.last_mut().expect("a matrix has two sides") = *b.dims().last().expect("a matrix has two sides");
    let out = empty(shape, dtype, a)?;
    gemm(&out, a, b, alpha, 0.0)?;
    Ok(out)
}

/// `out = alpha * a b + beta * out`, summed in f32, in the storage of `out`, which nothing else may be using.
///
/// `a` and `b` are of one type, bf16 or f32; `out` is of that type or f32. A matrix has adjacent elements in its rows or
/// in its columns.
pub fn gemm(out: &Tensor, a: &Tensor, b: &Tensor, alpha: f32, beta: f32) -> Result<()> {
    let (c, a_side, b_side) = (Side::of(out)?, Side::of(a)?, Side::of(b)?);
    let fits = a_side.rows == c.rows && b_side.columns == c.columns && a_side.columns == b_side.rows;
    if !fits || c.batch != a_side.batch || c.batch != b_side.batch || c.transposed {
        return Err(Error::run("the shapes of a product do not fit").detail(format!(
            "{:?} = {:?} x {:?}",
            out.dims(),
            a.dims(),
            b.dims()
        )));
    }
    let kind = |t: &Tensor| match t.dtype() {
        DType::BF16 => Ok(sys::cudaDataType_t::CUDA_R_16BF),
        DType::F32 => Ok(sys::cudaDataType_t::CUDA_R_32F),
        other => Err(Error::run(format!("no product of {} on a GPU", other.as_str()))),
    };
    let operation = |side: &Side| match side.transposed {
        true => sys::cublasOperation_t::CUBLAS_OP_T,
        false => sys::cublasOperation_t::CUBLAS_OP_N,
    };
    let device = out.device().as_cuda_device()?;
    // The library counts by columns: out' = b' a', and a row-major matrix is its transpose by columns.
    // SAFETY: shapes and strides are those of the tensors, whose storage covers them; the addresses stay good until the
    // product has run, because memory is freed in the order of the stream that it runs on.
    let done = unsafe {
        result::gemm_strided_batched_ex(
            *device.cublas_handle().handle(),
            operation(&b_side),
            operation(&a_side),
            c.columns as i32,
            c.rows as i32,
            a_side.columns as i32,
            (&raw const alpha).cast::<c_void>(),
            address(b)? as *const c_void,
            kind(b)?,
            b_side.stride as i32,
            b_side.batch_stride as i64,
            address(a)? as *const c_void,
            kind(a)?,
            a_side.stride as i32,
            a_side.batch_stride as i64,
            (&raw const beta).cast::<c_void>(),
            address(out)? as *mut c_void,
            kind(out)?,
            c.stride as i32,
            c.batch_stride as i64,
            c.batch as i32,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    };
    done.map_err(|e| Error::run("cuBLAS failed").detail(format!("{e:?}")).source(e))
}

/// How an operand lies in memory.
struct Side {
    batch: usize,
    batch_stride: usize,
    rows: usize,
    columns: usize,
    /// Adjacent elements are those of a column.
    transposed: bool,
    /// Between the beginnings of rows (of columns, if transposed).
    stride: usize,
}

impl Side {
    fn of(t: &Tensor) -> Result<Self> {
        let (dims, strides) = (t.dims(), t.stride());
        let (batch, batch_stride, at) = match dims.len() {
            2 => (1, 0, 0),
            3 => (dims[0], strides[0], 1),
            _ => return Err(Error::run("a product wants matrices or batches of them")),
        };
        let (rows, columns) = (dims[at], dims[at + 1]);
        let (by_row, by_column) = (strides[at], strides[at + 1]);
        // A side of length 1 has no stride to speak of.
        let (transposed, stride) = if by_column == 1 || columns == 1 {
            (false, if rows == 1 { columns } else { by_row.max(columns) })
        } else if by_row == 1 || rows == 1 {
            (true, if columns == 1 { rows } else { by_column.max(rows) })
        } else {
            return Err(Error::run("a product wants adjacent elements in rows or columns")
                .detail(format!("shape {dims:?}, strides {strides:?}")));
        };
        Ok(Self { batch, batch_stride, rows, columns, transposed, stride })
    }
}
