//! RMS norm of every head followed by rotary position embedding: what queries and keys go through, as one op.

use crate::error::Result;
use crate::kernels::composed;
use crate::kernels::cpu::{self, par_rows, uninit, view};
use crate::kernels::math::{dot, vectorized};
use crate::kernels::norm::{rms_norm_backward, rms_norm_weight_grad};
use crate::kernels::route::is_composed;
use crate::kernels::tape::{Value, record1};
use candle_core::{Device, Tensor};
use std::sync::{Arc, OnceLock};

/// Rotation angles of a sequence: cosines and sines, each (S, head / 2) row-major.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Cosines.
    pub cos: Arc<[f32]>,
    /// Sines.
    pub sin: Arc<[f32]>,
    /// Rotated pairs in a head.
    pub half: usize,
    /// The tables as tensors on the device that first asked for them.
    on_device: Arc<OnceLock<[Tensor; 2]>>,
}

impl Rope {
    /// Tables of cosines and sines, each (S, `half`) row-major.
    pub fn new(cos: Vec<f32>, sin: Vec<f32>, half: usize) -> Self {
        Self { cos: cos.into(), sin: sin.into(), half, on_device: Arc::default() }
    }

    /// Cosines and sines as tensors (1, S, 1, `half`) on `device`.
    pub(super) fn tables(&self, device: &Device) -> Result<[Tensor; 2]> {
        if let Some(tables) = self.on_device.get().filter(|t| t[0].device().same_device(device)) {
            return Ok(tables.clone());
        }
        let table = |x: &[f32]| Tensor::from_slice(x, (1, self.len(), 1, self.half), device);
        let tables = [table(&self.cos)?, table(&self.sin)?];
        // A second device, or a race, only costs the upload again.
        let _ = self.on_device.set(tables.clone());
        Ok(tables)
    }

    fn row(&self, token: usize) -> (&[f32], &[f32]) {
        (&self.cos[token * self.half..][..self.half], &self.sin[token * self.half..][..self.half])
    }

    /// Tokens that the tables cover.
    pub fn len(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Whether the tables cover no token.
    pub fn is_empty(&self) -> bool {
        self.cos.is_empty()
    }
}

/// RMS-normalises each head of `x` with `weight` and rotates adjacent pairs (2i, 2i + 1) by the token's angles.
///
/// Shapes: `x` (B, S, H * head), `weight` (head,), `rope` for S tokens. Output as `x`.
pub fn norm_rope(x: &Value, weight: &Value, rope: &Rope, eps: f32) -> Result<Value> {
    let (_, tokens, width) = x.tensor().dims3()?;
    let head = weight.dims()[0];
    debug_assert_eq!((rope.half * 2, rope.len()), (head, tokens));
    if is_composed(x.tensor()) {
        return composed::rope::norm_rope(x, weight, rope, eps);
    }
    let (xs, w) = (view(x.tensor())?, view(weight.tensor())?);
    let mut out = uninit(xs.len());
    par_rows(&mut out, width, |i, out| {
        let x = &xs[i * width..(i + 1) * width];
        let (cos, sin) = rope.row(i % tokens);
        vectorized!({
            for (x, out) in x.chunks_exact(head).zip(out.chunks_exact_mut(head)) {
                let inv_rms = 1.0 / (dot(x, x) / head as f32 + eps).sqrt();
                for (j, (&c, &s)) in cos.iter().zip(sin).enumerate() {
                    let (a, b) = (x[2 * j] * inv_rms * w[2 * j], x[2 * j + 1] * inv_rms * w[2 * j + 1]);
                    out[2 * j] = a * c - b * s;
                    out[2 * j + 1] = a * s + b * c;
                }
            }
        });
    });
    let y = cpu::from_f32(out, x.tensor().shape(), x.dtype())?;
    drop((xs, w));

    let (x_tensor, w_tensor, rope) = (x.tensor().clone(), weight.tensor().clone(), rope.clone());
    let (x_needs, w_needs) = (x.needs_grad(), weight.needs_grad());
    Ok(record1(&[x, weight], y, move |grad| {
        let (xs, w, dy) = (view(&x_tensor)?, view(&w_tensor)?, view(&grad)?);
        let unrotate = |i: usize, dy: &[f32], out: &mut [f32]| {
            let (cos, sin) = rope.row(i % tokens);
            for (dy, out) in dy.chunks_exact(head).zip(out.chunks_exact_mut(head)) {
                for (j, (&c, &s)) in cos.iter().zip(sin).enumerate() {
                    out[2 * j] = dy[2 * j] * c + dy[2 * j + 1] * s;
                    out[2 * j + 1] = dy[2 * j + 1] * c - dy[2 * j] * s;
                }
            }
        };
        let dx = x_needs.then(|| {
            let mut dx = uninit(xs.len());
            par_rows(&mut dx, width, |i, dx| {
                let (x, dy) = (&xs[i * width..(i + 1) * width], &dy[i * width..(i + 1) * width]);
                let mut unrotated = vec![0f32; width];
                vectorized!({
                    unrotate(i, dy, &mut unrotated);
                    for h in (0..width).step_by(head) {
                        let range = h..h + head;
                        rms_norm_backward(&x[range.clone()], &w, &unrotated[range.clone()], eps, &mut dx[range]);
                    }
                });
            });
            cpu::from_f32(dx, x_tensor.shape(), x_tensor.dtype())
        });
        let dw = w_needs.then(|| {
            let mut unrotated = uninit(dy.len());
            par_rows(&mut unrotated, width, |i, out| unrotate(i, &dy[i * width..(i + 1) * width], out));
            rms_norm_weight_grad(&xs, &unrotated, head, eps, w_tensor.dtype())
        });
        Ok(vec![dx.transpose()?, dw.transpose()?])
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{check_both, randn};
    use candle_core::DType;

    #[test]
    fn norm_rope_equals_its_twin() {
        let (batch, tokens, heads, head) = (2, 5, 3, 8);
        let angles = randn(9, &[tokens, head / 2], 2.0);
        let table = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let rope = Rope::new(table(angles.cos().unwrap()), table(angles.sin().unwrap()), head / 2);
        check_both(
            &[randn(0, &[batch, tokens, heads * head], 1.5), randn(1, &[head], 1.0)],
            5e-6,
            |v| Ok(vec![norm_rope(&v[0], &v[1], &rope, 1e-6)?]),
            |t| {
                let x = t[0].reshape((batch, tokens, heads, head))?;
                let inv = (x.sqr()?.mean_keepdim(3)? + 1e-6)?.sqrt()?.recip()?;
                let x = x.broadcast_mul(&inv)?.broadcast_mul(&t[1])?.reshape((batch, tokens, heads, head / 2, 2))?;
                let (a, b) = (x.narrow(4, 0, 1)?, x.narrow(4, 1, 1)?);
                // The angles' f32 cosines, as the op has them.
                let part = |t: &Tensor| t.to_dtype(DType::F64)?.reshape((1, tokens, 1, head / 2, 1));
                let (cos, sin) = (part(&angles.cos()?)?, part(&angles.sin()?)?);
                let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
                let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
                Ok(vec![Tensor::cat(&[first, second], 4)?.reshape((batch, tokens, heads * head))?])
            },
        );
    }
}
