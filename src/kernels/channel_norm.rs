//! The autoencoder's norm over channels, fused with the activation that follows it.

use crate::error::Result;
use crate::kernels::cpu::{self, par_rows, uninit, view};
use crate::kernels::math::{Activation, dot, sum_over, vectorized};
use crate::kernels::tape::{Value, record1};
use candle_core::Tensor;

/// Norms below this count as this, as in PyTorch's `normalize`.
const MIN_NORM: f32 = 1e-12;

/// `activation(x / max(|x|_2, 1e-12) * sqrt(C) * gamma)`, the norm taken over the channels of each pixel.
///
/// Shapes: `x` (.., C); `gamma` (C,), frozen.
/// Source: <https://github.com/huggingface/diffusers/blob/6a0233eb7aaa69cc531250f49c47aaf4fa7a62e4/src/diffusers/models/autoencoders/autoencoder_kl_qwenimage.py>
pub fn channel_norm(x: &Value, gamma: &Tensor, activation: Option<Activation>) -> Result<Value> {
    let c = gamma.elem_count();
    let (xs, g) = (view(x.tensor())?, view(gamma)?);
    let mut out = uninit(xs.len());
    par_rows(&mut out, c, |i, out| {
        let x = &xs[i * c..(i + 1) * c];
        vectorized!({
            let scale = (c as f32).sqrt() / dot(x, x).sqrt().max(MIN_NORM);
            match activation {
                None => (0..c).for_each(|j| out[j] = x[j] * scale * g[j]),
                Some(a) => (0..c).for_each(|j| out[j] = a.apply(x[j] * scale * g[j])),
            }
        });
    });
    let y = cpu::from_f32(out, x.tensor().shape(), x.dtype())?;
    drop((xs, g));

    let (x_tensor, gamma) = (x.tensor().clone(), gamma.clone());
    Ok(record1(&[x], y, move |grad| {
        let (xs, g, dy) = (view(&x_tensor)?, view(&gamma)?, view(&grad)?);
        let mut dx = uninit(xs.len());
        par_rows(&mut dx, c, |i, dx| {
            let (x, dy) = (&xs[i * c..(i + 1) * c], &dy[i * c..(i + 1) * c]);
            vectorized!({
                let norm = dot(x, x).sqrt();
                let scale = (c as f32).sqrt() / norm.max(MIN_NORM);
                // dx holds the gradient of the normed pixel, before the projection.
                match activation {
                    None => (0..c).for_each(|j| dx[j] = dy[j] * g[j]),
                    Some(a) => (0..c).for_each(|j| dx[j] = dy[j] * a.derivative(x[j] * scale * g[j]) * g[j]),
                }
                // Where the norm is clamped it is a constant, and nothing is projected out.
                let along = if norm > MIN_NORM { sum_over(c, |j| dx[j] * x[j]) / norm / norm } else { 0.0 };
                (0..c).for_each(|j| dx[j] = scale * (dx[j] - x[j] * along));
            });
        });
        Ok(vec![Some(cpu::from_f32(dx, x_tensor.shape(), x_tensor.dtype())?)])
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check, randn};
    use candle_core::{DType, Device};

    #[test]
    fn channel_norm_equals_its_twin_with_and_without_activation() {
        let gamma = randn(9, &[20], 1.0);
        for activation in [None, Some(Activation::Silu)] {
            check(
                &[randn(0, &[2, 3, 4, 20], 1.5)],
                5e-6,
                |v| Ok(vec![channel_norm(&v[0], &gamma, activation)?]),
                |t| {
                    let norm = t[0].sqr()?.sum_keepdim(3)?.sqrt()?;
                    let z = t[0].broadcast_div(&norm)?.broadcast_mul(&gamma.to_dtype(DType::F64)?)?;
                    let z = (z * 20f64.sqrt())?;
                    Ok(vec![if activation.is_some() { (&z / ((z.neg()?.exp()? + 1.0)?))? } else { z }])
                },
            );
        }
    }

    #[test]
    fn a_black_pixel_stays_black_and_its_gradient_finite() {
        let x = Value::leaf(Tensor::zeros((1, 1, 1, 4), DType::F32, &Device::Cpu).unwrap());
        let y = channel_norm(&x, &randn(0, &[4], 1.0), None).unwrap();
        assert_eq!(y.tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.0; 4]);
        let seed = (y.tensor() + 1e-20).unwrap();
        let grad = crate::kernels::backward(vec![(y, seed)]).unwrap().take(&x).unwrap();
        assert!(grad.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|g| g.is_finite() && *g != 0.0));
    }
}
