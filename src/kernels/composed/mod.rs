//! The ops of the training path, composed of candle's tensor operations: the same values and the same hand-derived
//! gradients as the CPU kernels, on whichever device the tensors are.
//!
//! A bf16 tensor stays bf16 in memory; norms, softmax, activations and every sum are computed in f32 and rounded at the
//! op's border. Candle's autograd takes no part. Each op is tested against its CPU kernel, values and all gradients.

pub(super) mod attention;
pub(super) mod linear;
pub(super) mod modulation;
pub(super) mod norm;
pub(super) mod product;
pub(super) mod rope;
#[cfg(test)]
mod tests;

use crate::error::Result;
use crate::kernels::math::Activation;
use candle_core::{DType, Tensor};

/// The tensor in f32; itself if it is.
fn wide(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::F32)?)
}

/// `sqrt(2 / pi)`, and the cubic term of GELU's tanh approximation.
const GELU_C: f64 = 0.797_884_560_802_865_4;
const GELU_K: f64 = 0.044_715;

/// `1 / (1 + e^-x)`; an overflow of the exponential gives the limit 0.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((x.neg()?.exp()? + 1.0)?.recip()?)
}

/// The activation of every element, in the dtype of `x`.
fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if activation == Activation::GeluTanh
        && let Some(out) = crate::kernels::cuda::ops::gelu(x)?
    {
        return Ok(out);
    }
    let dtype = x.dtype();
    let x = wide(x)?;
    let s = match activation {
        Activation::Silu => sigmoid(&x)?,
        Activation::GeluTanh => sigmoid(&gelu_inner(&x)?)?,
    };
    Ok((x * s)?.to_dtype(dtype)?)
}

/// Twice the argument of GELU's tanh: `(1 + tanh u) / 2` is `sigmoid(2u)`.
fn gelu_inner(x: &Tensor) -> Result<Tensor> {
    let cubic = ((x.sqr()? * GELU_K)? + 1.0)?;
    Ok(((x * cubic)? * (2.0 * GELU_C))?)
}

/// `grad` times the activation's derivative at `x`, in the dtype of `grad`, whose storage nothing else may be using.
fn times_derivative(grad: Tensor, x: &Tensor, activation: Activation) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if activation == Activation::GeluTanh && crate::kernels::cuda::ops::gelu_backward(x, &grad)? {
        return Ok(grad);
    }
    let dtype = grad.dtype();
    Ok((wide(&grad)? * derivative(x, activation)?)?.to_dtype(dtype)?)
}

/// The activation's derivative at every element, in f32.
fn derivative(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let x = wide(x)?;
    let (s, inner) = match activation {
        Activation::Silu => (sigmoid(&x)?, None),
        Activation::GeluTanh => (sigmoid(&gelu_inner(&x)?)?, Some(((x.sqr()? * (3.0 * GELU_K))? + 1.0)?)),
    };
    // s + x s (1 - s) u', where u' is 1 for SiLU.
    let slope = (&s * (1.0 - &s)?)?;
    let bend = match inner {
        None => (x * slope)?,
        Some(inner) => (((x * slope)? * inner)? * (2.0 * GELU_C))?,
    };
    Ok((s + bend)?)
}
