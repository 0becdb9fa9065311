//! Gradient accumulation: the sum over several backward passes, divided once at the end.
//!
//! A pass over a short batch counts by its samples, so that the mean is that over samples and an image does not weigh
//! more for being in the last batch of its shape. Passes over batches of one size are summed as they are.

use crate::error::Result;
use crate::kernels::tensors;
use candle_core::Tensor;

/// Sums gradients, one slot per parameter. A slot that never got a gradient stays `None`.
pub struct Accumulator {
    sums: Vec<Option<Tensor>>,
    /// Samples in the first pass, in units of which the others weigh.
    first_samples: usize,
    num_added: usize,
    /// Sum of the weights: the number of passes if all are of one size.
    weight: f64,
}

impl Accumulator {
    /// Empty, for `num_params` parameters.
    pub fn new(num_params: usize) -> Self {
        Self { sums: vec![None; num_params], first_samples: 0, num_added: 0, weight: 0.0 }
    }

    /// Adds the gradients of one backward pass, which are means over its `samples`, at least one.
    pub fn add(&mut self, grads: Vec<Option<Tensor>>, samples: usize) -> Result<()> {
        debug_assert_eq!(grads.len(), self.sums.len());
        if self.num_added == 0 {
            self.first_samples = samples;
        }
        let weight = samples as f64 / self.first_samples as f64;
        let weighed = |grad: Tensor| if weight == 1.0 { Ok(grad) } else { grad * weight };
        for (sum, grad) in self.sums.iter_mut().zip(grads) {
            let grad = grad.map(weighed).transpose()?;
            *sum = match (sum.take(), grad) {
                (None, grad) => grad,
                (sum, None) => sum,
                // Not in place: the first gradient may share its storage with another tensor.
                (Some(sum), Some(grad)) => Some(tensors::add(&sum, &grad)?),
            };
        }
        self.num_added += 1;
        self.weight += weight;
        Ok(())
    }

    /// The mean gradients over the samples of the passes added since the last call.
    pub fn take_mean(&mut self) -> Result<Vec<Option<Tensor>>> {
        let (num_added, weight) = (std::mem::take(&mut self.num_added), std::mem::take(&mut self.weight));
        let sums = self.sums.iter_mut().map(Option::take);
        if num_added <= 1 {
            return Ok(sums.collect());
        }
        let scale = 1.0 / weight;
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
            accumulator.add(vec![first.clone(), None, None], 2).unwrap();
            accumulator.add(vec![tensor(2.0), tensor(4.0), None], 2).unwrap();
            let mean = accumulator.take_mean().unwrap();
            assert_eq!(mean[0].as_ref().unwrap().to_vec1::<f32>().unwrap(), [1.5, 15.0]);
            assert_eq!(mean[1].as_ref().unwrap().to_vec1::<f32>().unwrap(), [2.0, 20.0]);
            assert!(mean[2].is_none());
        }
        assert_eq!(first.unwrap().to_vec1::<f32>().unwrap(), [1.0, 10.0], "what was added is not written to");
    }

    #[test]
    fn a_short_batch_weighs_by_its_samples() {
        let tensor = |x: f32| vec![Some(Tensor::new(&[x], &Device::Cpu).unwrap())];
        let mean = |passes: &[(f32, usize)]| {
            let mut accumulator = Accumulator::new(1);
            passes.iter().for_each(|&(x, samples)| accumulator.add(tensor(x), samples).unwrap());
            accumulator.take_mean().unwrap()[0].as_ref().unwrap().to_vec1::<f32>().unwrap()[0]
        };
        // Means over 4, 4 and 1 samples: the sum over samples is 4 * 3 + 4 * 6 + 9.
        assert_eq!(mean(&[(3.0, 4), (6.0, 4), (9.0, 1)]), 5.0);
        assert_eq!(mean(&[(9.0, 1), (3.0, 4), (6.0, 4)]), 5.0, "in any order");
        assert_eq!(mean(&[(9.0, 1)]), 9.0, "alone it is the step");
    }
}
