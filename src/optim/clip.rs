//! Clipping by global norm.

use crate::error::Result;
use crate::kernels::{cpu, tensors};
use candle_core::Tensor;
use rayon::prelude::*;

/// Scales all gradients down so that their norm, taken over all of them together, is at most `max_norm`; 0 only
/// measures. Returns the norm before clipping, not finite if a gradient is not.
///
/// On the CPU the sum is taken in f64 over chunks of fixed size in fixed order: it does not depend on the number of
/// threads.
/// A norm that is not finite leaves the gradients as they are, for the caller to stop on.
///
/// Source: <https://github.com/pytorch/pytorch/blob/v2.9.1/torch/nn/utils/clip_grad.py>; the same coefficient,
/// `max_norm / (norm + 1e-6)` clamped to 1.
pub fn clip_grad_norm(grads: &mut [Option<Tensor>], max_norm: f64) -> Result<f64> {
    let on_device = grads.iter().flatten().any(tensors::is_composed);
    let norm = match on_device {
        true => tensors::norm(&grads.iter().flatten().collect::<Vec<_>>())?,
        false => {
            let squares = |grad| Ok(sum_of_squares(&cpu::view(grad)?));
            grads.iter().flatten().map(squares).sum::<Result<f64>>()?.sqrt()
        }
    };
    let coefficient = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && coefficient < 1.0 && norm.is_finite() {
        for grad in grads.iter_mut().flatten() {
            *grad = match on_device {
                true => (&*grad * coefficient)?,
                false => {
                    let scaled = cpu::scaled(&cpu::view(grad)?, coefficient as f32);
                    cpu::from_f32(scaled, grad.shape(), grad.dtype())?
                }
            };
        }
    }
    Ok(norm)
}

fn sum_of_squares(x: &[f32]) -> f64 {
    let square = |x: &f32| f64::from(*x) * f64::from(*x);
    let parts: Vec<f64> = x.par_chunks(cpu::GRAIN).map(|chunk| chunk.iter().map(square).sum::<f64>()).collect();
    parts.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::route::composed_only;
    use crate::rng::{Purpose, Stream};
    use candle_core::Device;

    fn grads(values: &[&[f32]]) -> Vec<Option<Tensor>> {
        values.iter().map(|v| Some(Tensor::new(*v, &Device::Cpu).unwrap())).collect()
    }

    fn values(grads: &[Option<Tensor>]) -> Vec<f32> {
        grads.iter().flatten().flat_map(|g| g.to_vec1::<f32>().unwrap()).collect()
    }

    #[test]
    fn the_norm_is_over_all_gradients_and_the_coefficient_is_torchs() {
        let mut all = grads(&[&[3.0, 0.0], &[0.0, -4.0]]);
        all.insert(1, None);
        assert_eq!(clip_grad_norm(&mut all, 1.0).unwrap(), 5.0);
        let c = (1.0 / (5.0 + 1e-6)) as f32;
        assert_eq!(values(&all), [3.0 * c, 0.0, 0.0, -4.0 * c]);
    }

    #[test]
    fn on_a_device_it_is_the_same() {
        let mut here = grads(&[&[3.0, -1.5], &[0.25, -4.0, 2.0]]);
        let mut there = here.clone();
        let norm = clip_grad_norm(&mut here, 1.0).unwrap();
        let composed = composed_only(|| clip_grad_norm(&mut there, 1.0).unwrap());
        assert!((norm - composed).abs() < 1e-6 * norm, "{norm} {composed}");
        for (a, b) in values(&here).into_iter().zip(values(&there)) {
            assert!((a - b).abs() <= 2e-7 * a.abs(), "{a} {b}");
        }
        assert_eq!(composed_only(|| clip_grad_norm(&mut [None], 1.0)).unwrap(), 0.0);
    }

    #[test]
    fn a_small_norm_zero_and_a_broken_gradient_change_nothing() {
        for (value, max_norm) in [(0.5f32, 1.0), (7.0, 0.0), (0.0, 1.0)] {
            let mut all = grads(&[&[value]]);
            assert_eq!(clip_grad_norm(&mut all, max_norm).unwrap(), f64::from(value));
            assert_eq!(values(&all), [value]);
        }
        let mut all = grads(&[&[1.0, f32::INFINITY]]);
        assert!(!clip_grad_norm(&mut all, 1.0).unwrap().is_finite());
        assert_eq!(values(&all), [1.0, f32::INFINITY]);
    }

    #[test]
    fn the_number_of_threads_does_not_matter() {
        let x = Stream::new(1, 0, 0, Purpose::Bench).normals(300_007, 1.0);
        let norm = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| clip_grad_norm(&mut grads(&[&x]), 0.0).unwrap())
        };
        assert_eq!(norm(1).to_bits(), norm(3).to_bits());
    }
}
