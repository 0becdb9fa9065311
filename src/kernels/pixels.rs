//! Small ops on images: the clamp of their values, and the order of their dimensions.

use crate::error::Result;
use crate::kernels::cpu::{self, GRAIN, uninit, view};
use crate::kernels::math::vectorized;
use crate::kernels::tape::{Value, record1};
use rayon::prelude::*;

/// `x` with every element moved into `[min, max]`; no gradient flows where it was outside.
pub fn clamp(x: &Value, min: f32, max: f32) -> Result<Value> {
    let xs = view(x.tensor())?;
    let mut out = cpu::uninit(xs.len());
    out.par_chunks_mut(cpu::GRAIN).zip(xs.par_chunks(cpu::GRAIN)).for_each(|(o, x)| {
        vectorized!(o.iter_mut().zip(x).for_each(|(o, &x)| *o = x.clamp(min, max)));
    });
    drop(xs);
    let y = cpu::from_f32(out, x.tensor().shape(), x.dtype())?;
    let x_tensor = x.tensor().clone();
    Ok(record1(&[x], y, move |grad| {
        let (xs, dy) = (view(&x_tensor)?, view(&grad)?);
        let mut dx = uninit(xs.len());
        dx.par_chunks_mut(GRAIN).zip(xs.par_chunks(GRAIN)).zip(dy.par_chunks(GRAIN)).for_each(|((dx, x), dy)| {
            vectorized!({
                for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
                    *dx = if (min..=max).contains(&x) { dy } else { 0.0 };
                }
            });
        });
        Ok(vec![Some(cpu::from_f32(dx, x_tensor.shape(), grad.dtype())?)])
    }))
}

/// (B, C, H, W) to (B, H, W, C), the order that the image kernels work in.
pub fn channels_last(x: &Value) -> Result<Value> {
    let out = x.tensor().permute((0, 2, 3, 1))?.contiguous()?;
    Ok(record1(&[x], out, |grad| Ok(vec![Some(grad.permute((0, 3, 1, 2))?.contiguous()?)])))
}

/// (B, H, W, C) to (B, C, H, W).
pub fn channels_first(x: &Value) -> Result<Value> {
    let out = x.tensor().permute((0, 3, 1, 2))?.contiguous()?;
    Ok(record1(&[x], out, |grad| Ok(vec![Some(grad.permute((0, 2, 3, 1))?.contiguous()?)])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check, randn};

    #[test]
    fn each_equals_its_twin() {
        let x = &[randn(0, &[2, 3, 4, 5], 1.0)];
        check(x, 1e-6, |v| Ok(vec![clamp(&v[0], -0.5, 0.75)?]), |t| Ok(vec![t[0].maximum(-0.5)?.minimum(0.75)?]));
        check(x, 1e-6, |v| Ok(vec![channels_last(&v[0])?]), |t| Ok(vec![t[0].permute((0, 2, 3, 1))?]));
        check(x, 1e-6, |v| Ok(vec![channels_first(&v[0])?]), |t| Ok(vec![t[0].permute((0, 3, 1, 2))?]));
    }
}
