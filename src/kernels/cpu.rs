//! Access to CPU tensors as `f32` slices, and the parallel loops that the kernels share.
//!
//! Every CPU kernel computes in f32. A bf16 tensor is widened on the way in and rounded on the way out.

use crate::error::{Error, Result};
use crate::kernels::math::{Activation, vectorized};
use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor};
use half::bf16;
use parking_lot::RwLockReadGuard;
use rayon::prelude::*;
use std::ops::{Deref, Range};
use std::sync::Mutex;

/// Elements per task of an elementwise loop: large enough to hide rayon's overhead, small enough to share.
pub const GRAIN: usize = 16 * 1024;

/// The elements of a float tensor, row-major, in f32: borrowed if the tensor is contiguous f32 on the CPU, else
/// converted. Dereferences to `[f32]`.
pub enum View<'a> {
    /// The tensor's own storage, locked for reading.
    Borrowed(RwLockReadGuard<'a, Storage>, Range<usize>),
    /// A converted copy.
    Owned(Vec<f32>),
}

impl Deref for View<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Borrowed(guard, range) => match &**guard {
                Storage::Cpu(CpuStorage::F32(v)) => &v[range.clone()],
                _ => unreachable!("view() borrows f32 storage only"),
            },
            Self::Owned(v) => v,
        }
    }
}

/// Views a float tensor of any strides as f32.
pub fn view(tensor: &Tensor) -> Result<View<'_>> {
    if !tensor.device().is_cpu() {
        return Err(Error::run("this op has no kernel for the device of its input").hint("use `device: cpu`"));
    }
    let (guard, layout) = tensor.storage_and_layout();
    match (layout.contiguous_offsets(), &*guard) {
        (Some((start, end)), Storage::Cpu(CpuStorage::F32(_))) => Ok(View::Borrowed(guard, start..end)),
        (Some((start, end)), Storage::Cpu(CpuStorage::BF16(v))) => Ok(View::Owned(widen(&v[start..end]))),
        (None, Storage::Cpu(CpuStorage::F32(_) | CpuStorage::BF16(_))) => {
            Ok(View::Owned(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?))
        }
        _ => Err(Error::run(format!("a CPU kernel wants f32 or bf16, got {}", tensor.dtype().as_str()))),
    }
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
pub fn widen(x: &[bf16]) -> Vec<f32> {
    let mut out = uninit(x.len());
    out.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(o, x)| {
        for (o, x) in o.iter_mut().zip(x) {
            *o = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    });
    out
}

/// Rounds f32 to bf16 (to nearest even), in parallel.
pub fn narrow(x: &[f32]) -> Vec<bf16> {
    x.par_iter().with_min_len(GRAIN).map(|&v| bf16::from_f32(v)).collect()
}

/// `a + b` for tensors of one shape.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (x, y) = (view(a)?, view(b)?);
    let mut out = uninit(x.len());
    out.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).zip(y.par_chunks(GRAIN)).for_each(|((o, x), y)| {
        vectorized!(o.iter_mut().zip(x).zip(y).for_each(|((o, x), y)| *o = x + y));
    });
    from_f32(out, a.shape(), a.dtype())
}

/// A new buffer holding `x * factor`, in parallel.
pub fn scaled(x: &[f32], factor: f32) -> Vec<f32> {
    let mut out = uninit(x.len());
    out.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(o, x)| {
        vectorized!(o.iter_mut().zip(x).for_each(|(o, &x)| *o = x * factor));
    });
    out
}

/// A new buffer holding the activation of every element, in parallel.
pub fn activated(x: &[f32], activation: Activation) -> Vec<f32> {
    let mut out = uninit(x.len());
    out.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(o, x)| match activation {
        Activation::Silu => vectorized!(o.iter_mut().zip(x).for_each(|(o, &x)| *o = Activation::Silu.apply(x))),
        Activation::GeluTanh => vectorized!(o.iter_mut().zip(x).for_each(|(o, &x)| *o = Activation::GeluTanh.apply(x))),
    });
    out
}

/// Multiplies `dx` by the activation's derivative at `x`, in parallel.
pub fn multiply_by_derivative(dx: &mut [f32], x: &[f32], activation: Activation) {
    dx.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(d, x)| match activation {
        Activation::Silu => vectorized!(d.iter_mut().zip(x).for_each(|(d, &x)| *d *= Activation::Silu.derivative(x))),
        Activation::GeluTanh => {
            vectorized!(d.iter_mut().zip(x).for_each(|(d, &x)| *d *= Activation::GeluTanh.derivative(x)))
        }
    });
}

/// Sums of the columns of a row-major matrix with rows of `width`, each from the first row to the last.
pub fn column_sums(x: &[f32], width: usize) -> Vec<f32> {
    let mut out = vec![0f32; width];
    const COLUMNS: usize = 64;
    out.par_chunks_mut(COLUMNS).enumerate().for_each(|(i, sums)| {
        for row in x.chunks_exact(width) {
            sums.iter_mut().zip(&row[i * COLUMNS..]).for_each(|(s, v)| *s += v);
        }
    });
    out
}

/// Replaces the contents of a contiguous f32 tensor that owns its whole storage; every clone of it sees the new values.
pub fn assign(tensor: &Tensor, values: Vec<f32>) -> Result<()> {
    struct Assign(Mutex<Vec<f32>>);
    impl candle_core::InplaceOp1 for Assign {
        fn name(&self) -> &'static str {
            "assign"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &candle_core::Layout) -> candle_core::Result<()> {
            let values = std::mem::take(&mut *self.0.lock().unwrap_or_else(|e| e.into_inner()));
            match storage {
                CpuStorage::F32(v) if layout.contiguous_offsets() == Some((0, v.len())) && v.len() == values.len() => {
                    *v = values;
                    Ok(())
                }
                _ => candle_core::bail!("assign wants a whole f32 storage and as many values"),
            }
        }
    }
    Ok(tensor.inplace_op1(&Assign(Mutex::new(values)))?)
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
