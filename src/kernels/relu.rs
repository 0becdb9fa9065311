//! Elementwise nonlinearities of detection networks. Each keeps its output alone, which the next op keeps anyway.

use crate::error::Result;
use crate::kernels::cpu::{self, GRAIN, uninit, view};
use crate::kernels::math::{exp, vectorized};
use crate::kernels::tape::{Value, record1};
use rayon::prelude::*;

/// `max(x, 0)`; no gradient flows where the output is 0.
pub fn relu(x: &Value) -> Result<Value> {
    bounded(x, f32::INFINITY)
}

/// `min(max(x, 0), 6)`; no gradient flows where the output is 0 or 6.
pub fn relu6(x: &Value) -> Result<Value> {
    bounded(x, 6.0)
}

fn bounded(x: &Value, top: f32) -> Result<Value> {
    pointwise(x, move |x| x.clamp(0.0, top), move |y| if y > 0.0 && y < top { 1.0 } else { 0.0 })
}

/// `1 / (1 + exp(-x))`.
pub fn sigmoid(x: &Value) -> Result<Value> {
    pointwise(x, crate::kernels::math::sigmoid, |y| y * (1.0 - y))
}

/// `bound * tanh(x / bound)`: the soft clamp of the tiny autoencoders.
pub fn soft_clamp(x: &Value, bound: f32) -> Result<Value> {
    pointwise(
        x,
        // tanh u = 1 - 2 / (exp(2u) + 1)
        move |x| bound * (1.0 - 2.0 / (exp(2.0 * x / bound) + 1.0)),
        move |y| 1.0 - (y / bound) * (y / bound),
    )
}

/// `f(x)`, whose derivative is a function of its value.
fn pointwise(
    x: &Value,
    f: impl Fn(f32) -> f32 + Sync,
    derivative_at_output: impl Fn(f32) -> f32 + Sync + 'static,
) -> Result<Value> {
    let xs = view(x.tensor())?;
    let mut out = uninit(xs.len());
    out.par_chunks_mut(GRAIN).zip(xs.par_chunks(GRAIN)).for_each(|(o, x)| {
        vectorized!(o.iter_mut().zip(x).for_each(|(o, &x)| *o = f(x)));
    });
    drop(xs);
    let y = cpu::from_f32(out, x.tensor().shape(), x.dtype())?;
    let kept = y.clone();
    Ok(record1(&[x], y, move |grad| {
        let (ys, dy) = (view(&kept)?, view(&grad)?);
        let mut dx = uninit(ys.len());
        dx.par_chunks_mut(GRAIN).zip(ys.par_chunks(GRAIN)).zip(dy.par_chunks(GRAIN)).for_each(|((dx, y), dy)| {
            vectorized!({
                for ((dx, &y), &dy) in dx.iter_mut().zip(y).zip(dy) {
                    *dx = dy * derivative_at_output(y);
                }
            });
        });
        Ok(vec![Some(cpu::from_f32(dx, kept.shape(), grad.dtype())?)])
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check, randn};

    #[test]
    fn each_equals_its_twin() {
        let x = &[randn(0, &[2, 3, 4, 5], 4.0)];
        check(x, 5e-6, |v| Ok(vec![relu(&v[0])?]), |t| Ok(vec![t[0].relu()?]));
        check(x, 5e-6, |v| Ok(vec![relu6(&v[0])?]), |t| Ok(vec![t[0].maximum(0.0)?.minimum(6.0)?]));
        check(x, 5e-6, |v| Ok(vec![sigmoid(&v[0])?]), |t| Ok(vec![(t[0].neg()?.exp()? + 1.0)?.recip()?]));
        check(x, 5e-6, |v| Ok(vec![soft_clamp(&v[0], 3.0)?]), |t| Ok(vec![((&t[0] / 3.0)?.tanh()? * 3.0)?]));
    }
}
