//! Access to CPU tensors as `f32` slices, and the parallel loops that the kernels share.
//!
//! Every CPU kernel computes in f32. A bf16 tensor is widened on the way in and rounded on the way out.

use crate::error::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor};
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;

/// Elements per task of an elementwise loop: large enough to hide rayon's overhead, small enough to share.
pub const GRAIN: usize = 16 * 1024;

/// Calls `f` with the elements of a float tensor, row-major, in f32: borrowed if the tensor is contiguous f32,
/// else converted.
pub fn with_f32<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().expect("made contiguous above");
    match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => Ok(f(&v[start..end])),
        Storage::Cpu(CpuStorage::BF16(v)) => Ok(f(&widen(&v[start..end]))),
        Storage::Cpu(_) => Err(Error::run(format!("a CPU kernel wants f32 or bf16, got {}", tensor.dtype().as_str()))),
        _ => Err(Error::run("this op has no kernel for the device of its input").hint("use `device: cpu`")),
    }
}

/// The elements of a float tensor as f32, row-major.
pub fn to_f32(tensor: &Tensor) -> Result<Vec<f32>> {
    with_f32(tensor, |x| x.to_vec())
}

/// A CPU tensor of `dtype` (f32 or bf16) from computed f32 values.
pub fn from_f32(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    Ok(match dtype {
        DType::F32 => Tensor::from_vec(values, shape, &Device::Cpu)?,
        DType::BF16 => Tensor::from_vec(narrow(&values), shape, &Device::Cpu)?,
        other => return Err(Error::run(format!("CPU kernels compute f32 and bf16, not {}", other.as_str()))),
    })
}

/// A buffer of `n` floats with unspecified contents, for kernels that write every element.
pub fn uninit(n: usize) -> Vec<f32> {
    let mut v = Vec::with_capacity(n);
    // SAFETY: the capacity is n and every bit pattern is a valid f32; callers write each element before reading it.
    // Zeroing first would cost a pass over memory that the single-digit GB/s of one core make visible in a step.
    #[allow(clippy::uninit_vec)]
    unsafe {
        v.set_len(n)
    };
    v
}

/// Splits `out` into rows of `width` and fills them in parallel; `f` gets the row number.
pub fn par_rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) {
    let min_rows = (GRAIN / width.max(1)).max(1);
    out.par_chunks_exact_mut(width).with_min_len(min_rows).enumerate().for_each(|(i, row)| f(i, row));
}

/// Widens bf16 to f32, in parallel.
pub fn widen(x: &[bf16]) -> Cow<'static, [f32]> {
    let mut out = uninit(x.len());
    out.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(o, x)| {
        for (o, x) in o.iter_mut().zip(x) {
            *o = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    });
    Cow::Owned(out)
}

/// Rounds f32 to bf16 (to nearest even), in parallel.
pub fn narrow(x: &[f32]) -> Vec<bf16> {
    x.par_iter().with_min_len(GRAIN).map(|&v| bf16::from_f32(v)).collect()
}

/// `a + b` for tensors of one shape.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let out = with_f32(a, |a| {
        with_f32(b, |b| {
            let mut out = uninit(a.len());
            out.par_chunks_mut(GRAIN).zip(a.par_chunks(GRAIN)).zip(b.par_chunks(GRAIN)).for_each(|((o, a), b)| {
                for ((o, a), b) in o.iter_mut().zip(a).zip(b) {
                    *o = a + b;
                }
            });
            out
        })
    })??;
    from_f32(out, a.shape(), a.dtype())
}

/// `a += b` in the storage of `a`, which nothing else may be using.
pub fn add_assign(a: &Tensor, b: &Tensor) -> Result<()> {
    struct AddAssign;
    impl candle_core::InplaceOp2 for AddAssign {
        fn name(&self) -> &'static str {
            "add-assign"
        }
        fn cpu_fwd(
            &self,
            a: &mut CpuStorage,
            a_layout: &candle_core::Layout,
            b: &CpuStorage,
            b_layout: &candle_core::Layout,
        ) -> candle_core::Result<()> {
            let (Some((a0, a1)), Some((b0, b1))) = (a_layout.contiguous_offsets(), b_layout.contiguous_offsets())
            else {
                candle_core::bail!("add-assign wants contiguous tensors")
            };
            match (a, b) {
                (CpuStorage::F32(a), CpuStorage::F32(b)) => {
                    a[a0..a1].par_chunks_mut(GRAIN).zip(b[b0..b1].par_chunks(GRAIN)).for_each(|(a, b)| {
                        for (a, b) in a.iter_mut().zip(b) {
                            *a += b;
                        }
                    });
                }
                (CpuStorage::BF16(a), CpuStorage::BF16(b)) => {
                    a[a0..a1].par_chunks_mut(GRAIN).zip(b[b0..b1].par_chunks(GRAIN)).for_each(|(a, b)| {
                        for (a, b) in a.iter_mut().zip(b) {
                            *a = bf16::from_f32(a.to_f32() + b.to_f32());
                        }
                    });
                }
                _ => candle_core::bail!("add-assign wants two f32 or two bf16 tensors"),
            }
            Ok(())
        }
    }
    Ok(a.inplace_op2(&b.contiguous()?, &AddAssign)?)
}
