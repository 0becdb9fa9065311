//! Gradient accumulation: the sum over several backward passes, divided once at the end.

use crate::error::Result;
use crate::kernels::tensors;
use candle_core::Tensor;

/// Sums gradients, one slot per parameter. A slot that never got a gradient stays `None`.
pub struct Accumulator {
    sums: Vec<Option<Tensor>>,
    num_added: usize,
}

impl Accumulator {
    /// Empty, for `num_params` parameters.
    pub fn new(num_params: usize) -> Self {
        Self { sums: vec![None; num_params], num_added: 0 }
    }

    /// Adds the gradients of one backward pass.
    pub fn add(&mut self, grads: Vec<Option<Tensor>>) -> Result<()> {
        debug_assert_eq!(grads.len(), self.sums.len());
        for (sum, grad) in self.sums.iter_mut().zip(grads) {
            *sum = match (sum.take(), grad) {
                (None, grad) => grad,
                (sum, None) => sum,
                // Not in place: the first gradient may share its storage with another tensor.
                (Some(sum), Some(grad)) => Some(tensors::add(&sum, &grad)?),
            };
        }
        self.num_added += 1;
        Ok(())
    }

    /// The mean gradients over the passes added since the last call.
    pub fn take_mean(&mut self) -> Result<Vec<Option<Tensor>>> {
        let num_added = std::mem::take(&mut self.num_added);
        let sums = self.sums.iter_mut().map(Option::take);
        if num_added <= 1 {
            return Ok(sums.collect());
        }
        let scale = 1.0 / num_added as f64;
        sums.map(|sum| sum.map(|sum| Ok((sum * scale)?)).transpose()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_mean_of_what_was_added_and_nothing_of_the_step_before() {
        let tensor = |x: f32| Some(Tensor::new(&[x, 10.0 * x], &Device::Cpu).unwrap());
        let first = tensor(1.0);
        let mut accumulator = Accumulator::new(3);
        for _ in 0..2 {
            accumulator.add(vec![first.clone(), None, None]).unwrap();
            accumulator.add(vec![tensor(2.0), tensor(4.0), None]).unwrap();
            let mean = accumulator.take_mean().unwrap();
            assert_eq!(mean[0].as_ref().unwrap().to_vec1::<f32>().unwrap(), [1.5, 15.0]);
            assert_eq!(mean[1].as_ref().unwrap().to_vec1::<f32>().unwrap(), [2.0, 20.0]);
            assert!(mean[2].is_none());
        }
        assert_eq!(first.unwrap().to_vec1::<f32>().unwrap(), [1.0, 10.0], "what was added is not written to");
    }
}
