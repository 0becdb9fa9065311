//! RMS norm of every head followed by rotary position embedding; see `kernels::rope`.

use crate::error::Result;
use crate::kernels::composed::norm::{rms_norm_backward, rms_norm_weight_grad, scaled_to_unit};
use crate::kernels::composed::wide;
use crate::kernels::rope::Rope;
use crate::kernels::tape::{Value, record1};
use candle_core::Tensor;

/// [`norm_rope`](crate::kernels::rope::norm_rope).
pub fn norm_rope(x: &Value, weight: &Value, rope: &Rope, eps: f32) -> Result<Value> {
    let y = forward(x.tensor(), weight.tensor(), rope, eps)?;
    let (x_tensor, w_tensor, rope) = (x.tensor().clone(), weight.tensor().clone(), rope.clone());
    let (x_needs, w_needs) = (x.needs_grad(), weight.needs_grad());
    Ok(record1(&[x, weight], y, move |grad| {
        let dx = x_needs.then(|| gradient(&x_tensor, &w_tensor, &rope, &grad, eps)).transpose()?;
        let dw = w_needs.then(|| weight_gradient(&x_tensor, &w_tensor, &rope, &grad, eps)).transpose()?;
        Ok(vec![dx, dw])
    }))
}

/// (B, S, H * head) as (B, S, H, head).
fn split(x: &Tensor, head: usize) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    Ok(x.reshape((batch, tokens, width / head, head))?)
}

fn forward(x: &Tensor, weight: &Tensor, rope: &Rope, eps: f32) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(y) = crate::kernels::cuda::ops::norm_rope(x, weight, rope, eps)? {
        return Ok(y);
    }
    let normed = scaled_to_unit(&split(x, weight.elem_count())?, eps)?.0.broadcast_mul(&wide(weight)?)?;
    Ok(rotate(&normed, rope, Turn::Forward)?.reshape(x.shape())?.to_dtype(x.dtype())?)
}

/// The gradient of the rotation's input, f32 by head.
fn unrotated(grad: &Tensor, head: usize, rope: &Rope) -> Result<Tensor> {
    rotate(&split(&wide(grad)?, head)?, rope, Turn::Back)
}

/// With respect to x.
fn gradient(x: &Tensor, weight: &Tensor, rope: &Rope, grad: &Tensor, eps: f32) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(dx) = crate::kernels::cuda::ops::norm_rope_backward(x, weight, rope, grad, eps)? {
        return Ok(dx);
    }
    let head = weight.elem_count();
    let dx = rms_norm_backward(&split(x, head)?, weight, &unrotated(grad, head, rope)?, eps)?;
    Ok(dx.reshape(x.shape())?)
}

fn weight_gradient(x: &Tensor, weight: &Tensor, rope: &Rope, grad: &Tensor, eps: f32) -> Result<Tensor> {
    let head = weight.elem_count();
    rms_norm_weight_grad(&split(x, head)?, weight, &unrotated(grad, head, rope)?, eps)
}

#[derive(PartialEq)]
enum Turn {
    Forward,
    /// By the negative angle: the gradient of the rotation.
    Back,
}

/// Rotates adjacent pairs (2i, 2i + 1) of each head of `x` (B, S, H, head), f32.
fn rotate(x: &Tensor, rope: &Rope, turn: Turn) -> Result<Tensor> {
    let (batch, tokens, heads, head) = x.dims4()?;
    let [cos, sin] = rope.tables(x.device())?; // each (1, S, 1, head / 2)
    let sin = if turn == Turn::Back { sin.neg()? } else { sin };
    let pairs = x.reshape((batch, tokens, heads, head / 2, 2))?;
    let half = |i: usize| pairs.narrow(4, i, 1)?.squeeze(4);
    let (a, b) = (half(0)?, half(1)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    Ok(Tensor::stack(&[first, second], 4)?.reshape((batch, tokens, heads, head))?)
}
