//! Modulated layer norm and RMS norm; see `kernels::norm`.

use crate::error::Result;
use crate::kernels::composed::modulation::{collect, spread};
use crate::kernels::composed::wide;
#[cfg(feature = "cuda")]
use crate::kernels::cuda::ops;
use crate::kernels::modulation::TokenRows;
use crate::kernels::tape::{Value, record1};
use candle_core::{D, Tensor};

/// [`modulated_norm`](crate::kernels::norm::modulated_norm).
pub fn modulated_norm(
    x: &Value,
    mods: &Value,
    shift: usize,
    scale: usize,
    rows: &TokenRows,
    eps: f32,
) -> Result<Value> {
    let norm = Modulated {
        x: x.tensor().clone(),
        mods: mods.tensor().clone(),
        shift,
        scale,
        rows: rows.clone(),
        eps,
        #[cfg(feature = "cuda")]
        stats: None,
    };
    let (y, norm) = norm.forward()?;
    let (x_needs, mods_need) = (x.needs_grad(), mods.needs_grad());
    Ok(record1(&[x, mods], y, move |grad| {
        let dx = x_needs.then(|| norm.gradient(&grad)).transpose()?;
        let d_mods = mods_need.then(|| norm.table_gradient(&grad)).transpose()?;
        Ok(vec![dx, d_mods])
    }))
}

/// A modulated norm and its operands.
struct Modulated {
    x: Tensor,
    mods: Tensor,
    shift: usize,
    scale: usize,
    rows: TokenRows,
    eps: f32,
    /// Mean and 1 / std of every token, if a kernel of ours made the output.
    #[cfg(feature = "cuda")]
    stats: Option<Tensor>,
}

impl Modulated {
    #[cfg(feature = "cuda")]
    fn entries(&self) -> ops::Entries {
        ops::Entries { shift: self.shift, scale: self.scale }
    }

    /// `1 + scale` for every token, f32.
    fn factor(&self) -> Result<Tensor> {
        Ok((spread(&self.mods, self.scale, &self.rows)? + 1.0)?)
    }

    fn forward(self) -> Result<(Tensor, Self)> {
        #[cfg(feature = "cuda")]
        if let Some((y, stats)) = ops::modulated_norm(&self.x, &self.mods, self.entries(), &self.rows, self.eps)? {
            return Ok((y, Self { stats: Some(stats), ..self }));
        }
        let (normed, _) = normalised(&self.x, self.eps)?;
        let y = normed.broadcast_mul(&self.factor()?)?.broadcast_add(&spread(&self.mods, self.shift, &self.rows)?)?;
        Ok((y.to_dtype(self.x.dtype())?, self))
    }

    /// With respect to x.
    fn gradient(&self, grad: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(stats) = &self.stats
            && let Some(dx) =
                ops::modulated_norm_backward(&self.x, &self.mods, stats, grad, self.entries(), &self.rows)?
        {
            return Ok(dx);
        }
        let (normed, inv_std) = normalised(&self.x, self.eps)?;
        let g = wide(grad)?.broadcast_mul(&self.factor()?)?;
        let mean_g = g.mean_keepdim(D::Minus1)?;
        let mean_gx = (&g * &normed)?.mean_keepdim(D::Minus1)?;
        let dx = (g.broadcast_sub(&mean_g)? - normed.broadcast_mul(&mean_gx)?)?;
        Ok(dx.broadcast_mul(&inv_std)?.to_dtype(self.x.dtype())?)
    }

    fn table_gradient(&self, grad: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(stats) = &self.stats
            && let Some(d_mods) =
                ops::modulated_norm_table_gradient(&self.x, &self.mods, stats, grad, self.entries(), &self.rows)?
        {
            return Ok(d_mods.to_dtype(self.mods.dtype())?);
        }
        let dy = wide(grad)?;
        let d_scale = (&dy * normalised(&self.x, self.eps)?.0)?;
        collect(&self.mods, &self.rows, &[(self.scale, d_scale), (self.shift, dy)])
    }
}

/// `(x - mean) / std` over the last dimension and `1 / std`, in f32.
fn normalised(x: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let x = wide(x)?;
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let inv_std = (centred.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?.recip()?;
    Ok((centred.broadcast_mul(&inv_std)?, inv_std))
}

/// [`rms_norm`](crate::kernels::norm::rms_norm).
pub fn rms_norm(x: &Value, weight: &Value, eps: f32) -> Result<Value> {
    let dtype = x.dtype();
    let y = scaled_to_unit(x.tensor(), eps)?.0.broadcast_mul(&wide(weight.tensor())?)?.to_dtype(dtype)?;
    let (x_tensor, w_tensor) = (x.tensor().clone(), weight.tensor().clone());
    let (x_needs, w_needs) = (x.needs_grad(), weight.needs_grad());
    Ok(record1(&[x, weight], y, move |grad| {
        let dy = wide(&grad)?;
        let dx = x_needs.then(|| rms_norm_backward(&x_tensor, &w_tensor, &dy, eps)).transpose()?;
        let dw = w_needs.then(|| rms_norm_weight_grad(&x_tensor, &w_tensor, &dy, eps)).transpose()?;
        Ok(vec![dx, dw])
    }))
}

/// `x / rms` over the last dimension and `1 / rms`, in f32.
pub fn scaled_to_unit(x: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let x = wide(x)?;
    let inv_rms = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?.recip()?;
    Ok((x.broadcast_mul(&inv_rms)?, inv_rms))
}

/// The gradient of [`rms_norm`] with respect to `x`, in its dtype, from `dy` in f32.
pub fn rms_norm_backward(x: &Tensor, weight: &Tensor, dy: &Tensor, eps: f32) -> Result<Tensor> {
    let (unit, inv_rms) = scaled_to_unit(x, eps)?;
    let g = dy.broadcast_mul(&wide(weight)?)?;
    let mean = (&g * &unit)?.mean_keepdim(D::Minus1)?;
    Ok((g - unit.broadcast_mul(&mean)?)?.broadcast_mul(&inv_rms)?.to_dtype(x.dtype())?)
}

/// The gradient of [`rms_norm`] with respect to its weight, in the weight's dtype, from `dy` in f32.
pub fn rms_norm_weight_grad(x: &Tensor, weight: &Tensor, dy: &Tensor, eps: f32) -> Result<Tensor> {
    let products = (scaled_to_unit(x, eps)?.0 * dy)?;
    let d = weight.elem_count();
    Ok(products.reshape((products.elem_count() / d, d))?.sum(0)?.to_dtype(weight.dtype())?)
}
