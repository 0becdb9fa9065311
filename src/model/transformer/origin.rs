//! Where base weights come from, and where they are kept.

use super::Precision;
use crate::error::Result;
use crate::io::Weights;
use crate::kernels::int8::Int8Matrix;
use crate::rng::{Purpose, Stream};
use candle_core::{Device, Tensor};
use std::rc::Rc;

/// Which frozen weights are not on the device all the time. The default: all are.
///
/// What is computed is the same bit for bit, wherever they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Those of the modulation are left where they come from, and read when they are needed: see
    /// [`modulate_ahead`](super::QwenImageTransformer::modulate_ahead). Its linears can carry no adapter.
    pub streamed_modulation: bool,
    /// So many blocks, spread evenly, have the matrices of their linears in host memory, from where they are copied into one
    /// of two buffers of the device when they are needed: see [`Swap`](crate::kernels::swap::Swap). Adapters, biases
    /// and norms stay.
    pub swapped_blocks: usize,
}

impl Placement {
    /// The fewest blocks that are worth swapping: of fewer the device has the values of all at any time.
    pub const LEAST_SWAPPED: usize = 3;

    /// Whether block `i` of `blocks` is swapped.
    pub fn swaps(self, i: usize, blocks: usize) -> bool {
        (i + 1) * self.swapped_blocks / blocks > i * self.swapped_blocks / blocks
    }
}

/// What gives a weight by its name, as often as it is asked.
#[derive(Clone)]
pub(super) enum Origin {
    /// Files.
    Files(Rc<Weights>),
    /// Random numbers: normal with variance 1 / inputs, norm weights one, biases zero. On the CPU they are a function of
    /// seed and name; on a GPU they are drawn there in another stream, which begins with [`Origin::random`].
    Random(u64),
}

impl Origin {
    /// Random weights for `device`.
    pub(super) fn random(seed: u64, device: &Device) -> Result<Self> {
        if !device.is_cpu() {
            device.set_seed(seed)?;
        }
        Ok(Self::Random(seed))
    }

    /// Where a weight is made that is to wait in host memory: what is drawn on a GPU is drawn there.
    pub(super) fn home(&self, device: &Device) -> Device {
        match self {
            Self::Files(_) => Device::Cpu,
            Self::Random(_) => device.clone(),
        }
    }

    /// A weight as floats on `device`.
    pub(super) fn float(&self, name: &str, shape: &[usize], p: Precision, device: &Device) -> Result<Tensor> {
        let seed = match self {
            Self::Files(weights) => return weights.get(name, shape, p.weights, device),
            Self::Random(seed) => *seed,
        };
        if let ([_, inputs], false) = (shape, device.is_cpu()) {
            let std = 1.0 / (*inputs as f32).sqrt();
            return Ok(Tensor::randn(0f32, std, shape, device)?.to_dtype(p.weights)?);
        }
        let n: usize = shape.iter().product();
        let values = match shape {
            [_, inputs] => Stream::named(seed, name, Purpose::Bench).normals(n, 1.0 / (*inputs as f64).sqrt()),
            _ if name.contains("norm") && name.ends_with("weight") => vec![1.0; n],
            _ => vec![0.0; n],
        };
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(p.weights)?.to_device(device)?)
    }

    /// A matrix in int8 on `device`. From a file it is quantised as it is read.
    pub(super) fn int8(&self, name: &str, (n, k): (usize, usize), p: Precision, device: &Device) -> Result<Int8Matrix> {
        match self {
            Self::Files(weights) => weights.int8(name, (n, k))?.to_device(device),
            Self::Random(_) => Int8Matrix::quantise(name, &self.float(name, &[n, k], p, device)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swapped_blocks_are_spread_evenly() {
        let swapped = |n: usize, blocks: usize| -> Vec<usize> {
            let placement = Placement { swapped_blocks: n, ..Default::default() };
            (0..blocks).filter(|i| placement.swaps(*i, blocks)).collect()
        };
        assert!(swapped(0, 60).is_empty());
        assert_eq!(swapped(3, 9), [2, 5, 8]);
        assert_eq!(swapped(4, 6), [1, 2, 4, 5]);
        for n in 0..=60 {
            let blocks = swapped(n, 60);
            assert_eq!(blocks.len(), n);
            let gaps: Vec<usize> = blocks.windows(2).map(|w| w[1] - w[0]).collect();
            let (least, most) = (gaps.iter().min().unwrap_or(&1), gaps.iter().max().unwrap_or(&1));
            assert!(most - least <= 1, "{blocks:?}");
        }
    }
}
