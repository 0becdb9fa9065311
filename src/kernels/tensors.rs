//! Arithmetic on tensors of any device, without a tape: what accumulating and updating need.

use crate::error::Result;
use crate::kernels::cpu;
pub use crate::kernels::route::is_composed;
use candle_core::{D, DType, Tensor};

/// `a + b` for tensors of one shape.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if is_composed(a) { Ok((a + b)?) } else { cpu::add(a, b) }
}

/// `a + b`, in the storage of `a` where that can be: nothing else may be using it.
pub fn add_owned(a: Tensor, b: &Tensor) -> Result<Tensor> {
    if is_composed(&a) {
        return Ok((a + b)?);
    }
    cpu::add_assign(&a, b)?;
    Ok(a)
}

/// Replaces the contents of a contiguous tensor by those of `source`, of the same shape and dtype on any device; every
/// clone of `tensor` sees the new values.
pub fn assign(tensor: &Tensor, source: &Tensor) -> Result<()> {
    let source = source.to_device(tensor.device())?.contiguous()?;
    Ok(tensor.slice_set(&source, 0, 0)?)
}

/// The norm of all tensors of a device together: each tensor's sum of squares in f32, those in f64, with one transfer for
/// all; by a kernel of ours all in f64.
pub fn norm(tensors: &[&Tensor]) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if tensors.iter().all(|t| t.device().is_cuda())
        && let Some(norm) = crate::kernels::cuda::multi_tensor::norm(tensors)?
    {
        return Ok(norm);
    }
    let one = |t: &Tensor| -> Result<Tensor> {
        let squares = t.to_dtype(DType::F32)?.sqr()?;
        // By rows first: candle's reduction gives one block of threads to each result.
        let rows = if squares.rank() > 1 { squares.sum(D::Minus1)? } else { squares };
        Ok(rows.sum_all()?)
    };
    let sums = tensors.iter().map(|t| one(t)).collect::<Result<Vec<_>>>()?;
    if sums.is_empty() {
        return Ok(0.0);
    }
    Ok(Tensor::stack(&sums, 0)?.to_vec1::<f32>()?.into_iter().map(f64::from).sum::<f64>().sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn assigning_reaches_every_clone() {
        let tensor = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let clone = tensor.clone();
        let source = Tensor::new(&[[9f32, 8.0, 7.0], [6.0, 5.0, 4.0]], &Device::Cpu).unwrap();
        assign(&tensor, &source.narrow(1, 1, 2).unwrap()).unwrap();
        assert_eq!(clone.to_vec2::<f32>().unwrap(), [[8.0, 7.0], [5.0, 4.0]]);
    }
}
