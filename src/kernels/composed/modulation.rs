//! The gated residual, and rows of modulation tables; see `kernels::modulation`.

use crate::error::Result;
use crate::kernels::composed::wide;
use crate::kernels::modulation::TokenRows;
use crate::kernels::tape::{Value, record1};
use candle_core::{DType, Tensor};

/// Entry `entry` of a table (R, C, D) for every token, in f32: (B, 1, D) where a sample has one row, else (B, S, D).
pub fn spread(mods: &Tensor, entry: usize, rows: &TokenRows) -> Result<Tensor> {
    let d = mods.dims()[2];
    let column = wide(&mods.narrow(1, entry, 1)?)?.contiguous()?; // (R, 1, D)
    match rows.ids(mods.device())? {
        None => Ok(column),
        Some(ids) => Ok(column.index_select(&ids, 0)?.reshape((rows.batch(), rows.tokens(), d))?),
    }
}

/// The gradient of a table (R, C, D) from those of its entries for every token, each (B, S, D) in f32.
pub fn collect(mods: &Tensor, rows: &TokenRows, entries: &[(usize, Tensor)]) -> Result<Tensor> {
    let (r, _, d) = mods.dims3()?;
    let out = Tensor::zeros(mods.shape(), DType::F32, mods.device())?;
    for (entry, tokens) in entries {
        let column = match rows.ids(mods.device())? {
            None => tokens.sum(1)?, // R = B
            Some(ids) => {
                let zeros = Tensor::zeros((r, d), DType::F32, mods.device())?;
                zeros.index_add(&ids, &tokens.reshape((rows.batch() * rows.tokens(), d))?.contiguous()?, 0)?
            }
        };
        out.slice_set(&column.reshape((r, 1, d))?.contiguous()?, 1, *entry)?;
    }
    Ok(out.to_dtype(mods.dtype())?)
}

/// [`gated_residual`](crate::kernels::modulation::gated_residual).
pub fn gated_residual(x: &Value, y: &Value, mods: &Value, gate: usize, rows: &TokenRows) -> Result<Value> {
    let sum = forward(x.tensor(), y.tensor(), mods.tensor(), gate, rows)?;
    // y is needed again only for the gradient of the gate.
    let y_tensor = mods.needs_grad().then(|| y.tensor().clone());
    let (mods_tensor, rows, y_needs) = (mods.tensor().clone(), rows.clone(), y.needs_grad());
    Ok(record1(&[x, y, mods], sum, move |grad| {
        let dy = y_needs.then(|| gradient(&grad, &mods_tensor, gate, &rows)).transpose()?;
        let d_mods = y_tensor.map(|y| table_gradient(&y, &grad, &mods_tensor, gate, &rows)).transpose()?;
        Ok(vec![Some(grad), dy, d_mods])
    }))
}

fn forward(x: &Tensor, y: &Tensor, mods: &Tensor, gate: usize, rows: &TokenRows) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(sum) = crate::kernels::cuda::ops::gated_residual(x, y, mods, gate, rows)? {
        return Ok(sum);
    }
    let gated = wide(y)?.broadcast_mul(&spread(mods, gate, rows)?)?;
    Ok((wide(x)? + gated)?.to_dtype(x.dtype())?)
}

/// With respect to y.
fn gradient(grad: &Tensor, mods: &Tensor, gate: usize, rows: &TokenRows) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(dy) = crate::kernels::cuda::ops::gated_residual_backward(grad, mods, gate, rows)? {
        return Ok(dy);
    }
    Ok(wide(grad)?.broadcast_mul(&spread(mods, gate, rows)?)?.to_dtype(grad.dtype())?)
}

fn table_gradient(y: &Tensor, grad: &Tensor, mods: &Tensor, gate: usize, rows: &TokenRows) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(d_mods) = crate::kernels::cuda::ops::gated_residual_table_gradient(y, grad, mods, gate, rows)? {
        return Ok(d_mods.to_dtype(mods.dtype())?);
    }
    collect(mods, rows, &[(gate, (wide(grad)? * wide(y)?)?)])
}
