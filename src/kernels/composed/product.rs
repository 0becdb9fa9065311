//! Matrix products on any device.
//!
//! Operands are 2-D or batched 3-D, each contiguous or the transpose of a contiguous matrix. On a GPU they go to
//! cuBLAS, which sums bf16 products in f32 and can add to what is there; elsewhere to candle.

use crate::error::Result;
use crate::kernels::composed::wide;
use candle_core::{DType, Tensor};

/// `a b` in the operands' dtype.
pub fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if a.device().is_cuda() {
        return crate::kernels::cuda::blas::product(a, b, a.dtype(), 1.0);
    }
    Ok(a.matmul(b)?)
}

/// `scale * a b` in f32, whatever the dtype of the operands.
pub fn product_f32(a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if a.device().is_cuda() {
        return crate::kernels::cuda::blas::product(a, b, DType::F32, scale as f32);
    }
    let product = wide(a)?.matmul(&wide(b)?)?;
    Ok(if scale == 1.0 { product } else { (product * scale)? })
}

/// `out + scale * a b` in the dtype of `out`, in its storage where that can be: nothing else may be using it.
pub fn add_product(out: Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if out.device().is_cuda() {
        crate::kernels::cuda::blas::gemm(&out, a, b, scale as f32, 1.0)?;
        return Ok(out);
    }
    if out.dtype() == DType::F32 {
        return Ok((out + product_f32(a, b, scale)?)?);
    }
    let dtype = out.dtype();
    Ok((wide(&out)? + product_f32(a, b, scale)?)?.to_dtype(dtype)?)
}
