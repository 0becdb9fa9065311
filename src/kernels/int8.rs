//! Frozen matrices as int8 in blocks of 32 along a row, with an f16 scale each: GGUF's Q8_0 with the scales kept apart, as
//! the GPU kernels take them (`scripts/kernels/int8.py`). 8.5 bits a value.
//!
//! As ggml does it, bit for bit: `d = max |w| / 127`, `q = round(w / d)` with halves away from zero, and d rounded to f16
//! afterwards. A value is off by half a step, d / 2, at most, and by what the rounding of d adds: 1 / 2048 of the value.
//! Weights that were Q8_0 before come out as they were.
//! Source: <https://github.com/ggml-org/ggml/blob/v0.9.4/src/ggml-quants.c#L196>

use crate::error::{Error, Result};
use crate::kernels::cpu::{GRAIN, uninit, view};
use crate::kernels::math::vectorized;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

/// Values that share a scale.
pub const BLOCK: usize = 32;

/// Values that are widened at once on the CPU: 8 MiB in f32.
pub const PANEL: usize = 1 << 21;

/// Values that each thread quantises at once.
const STRIP: usize = 1 << 18;

/// A frozen matrix (N, K) in int8, on any device. Cloning is cheap.
#[derive(Clone)]
pub struct Int8Matrix {
    /// (N, K): the bytes of signed values, for which candle has no type.
    quants: Tensor,
    /// (N, K / 32), f16; the last block of a row may be shorter than the others.
    scales: Tensor,
}

impl Int8Matrix {
    /// Quantises the matrix (N, K) whose values `read` gives, some rows at a time: it is called with the index of the first
    /// value, from several threads. In memory are the result and a strip of f32 for each thread.
    ///
    /// Errors (usage), which call the matrix `name`: a value that is not finite, or too large for an f16 scale (above 8.3
    /// million); those of `read`.
    pub fn from_rows(
        name: &str,
        (n, k): (usize, usize),
        read: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
    ) -> Result<Self> {
        let blocks = k.div_ceil(BLOCK);
        let (mut quants, mut scales) = (vec![0u8; n * k], vec![f16::ZERO; n * blocks]);
        let rows = (STRIP / k.max(1)).max(1);
        let strips = quants.par_chunks_mut((rows * k).max(1)).zip(scales.par_chunks_mut((rows * blocks).max(1)));
        strips.enumerate().try_for_each_init(Vec::new, |strip, (i, (quants, scales))| -> Result<()> {
            strip.resize(quants.len(), 0.0);
            read(i * rows * k, strip)?;
            let all = strip.chunks_exact(k).zip(quants.chunks_exact_mut(k)).zip(scales.chunks_exact_mut(blocks));
            for (row, ((w, q), scales)) in all.enumerate() {
                quantise(w, q, scales).map_err(|off| {
                    Error::usage(format!("cannot hold `{name}` in int8"))
                        .expected("finite weights below 8.3 million", format!("{off} in row {}", i * rows + row))
                        .hint("the weights are damaged: fetch them again")
                })?;
            }
            Ok(())
        })?;
        Ok(Self {
            quants: Tensor::from_vec(quants, (n, k), &Device::Cpu)?,
            scales: Tensor::from_vec(scales, (n, blocks), &Device::Cpu)?,
        })
    }

    /// Quantises a float tensor (N, K), where it is.
    ///
    /// Errors: those of [`Self::from_rows`]; on a GPU by its kernel, values are not looked at.
    pub fn quantise(name: &str, weight: &Tensor) -> Result<Self> {
        let (n, k) = weight.dims2()?;
        #[cfg(feature = "cuda")]
        if weight.device().is_cuda()
            && let Some((quants, scales)) = crate::kernels::cuda::ops::int8_quantise(weight)?
        {
            return Ok(Self { quants, scales });
        }
        let on_cpu = weight.to_device(&Device::Cpu)?;
        // Locked by this thread alone: the lock's guard does not cross threads, the slice does.
        let values = view(&on_cpu)?;
        let values: &[f32] = &values;
        let read = |first: usize, out: &mut [f32]| {
            out.copy_from_slice(&values[first..first + out.len()]);
            Ok(())
        };
        Self::from_rows(name, (n, k), read)?.to_device(weight.device())
    }

    /// A matrix of zeros.
    pub(super) fn zeros((n, k): (usize, usize), device: &Device) -> Result<Self> {
        let scales = Tensor::zeros((n, k.div_ceil(BLOCK)), DType::F16, device)?;
        Ok(Self { quants: Tensor::zeros((n, k), DType::U8, device)?, scales })
    }

    /// Values and scales: everything that it is made of.
    pub(super) fn parts(&self) -> [&Tensor; 2] {
        [&self.quants, &self.scales]
    }

    /// The same matrix on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { quants: self.quants.to_device(device)?, scales: self.scales.to_device(device)? })
    }

    /// (N, K).
    pub fn dims(&self) -> (usize, usize) {
        (self.quants.dims()[0], self.quants.dims()[1])
    }

    /// Bytes of a matrix (N, K) in int8, scales included.
    pub fn bytes_of((n, k): (usize, usize)) -> usize {
        n * (k + k.div_ceil(BLOCK) * size_of::<f16>())
    }

    /// The matrix as floats of `dtype`, on its device.
    pub fn dequantise(&self, dtype: DType) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if dtype == DType::BF16
            && self.quants.device().is_cuda()
            && let Some(weight) = crate::kernels::cuda::ops::int8_dequantise(&self.quants, &self.scales)?
        {
            return Ok(weight);
        }
        let panels = self.panels().map(|rows| self.composed(rows)?.to_dtype(dtype)).collect::<Result<Vec<_>, _>>()?;
        Ok(Tensor::cat(&panels, 0)?)
    }

    /// Some rows in f32, composed of candle's operations.
    fn composed(&self, rows: Range<usize>) -> candle_core::Result<Tensor> {
        let ((_, k), n) = (self.dims(), rows.len());
        let bytes = self.quants.narrow(0, rows.start, n)?.to_dtype(DType::F32)?;
        let wrapped = (bytes.ge(128f32)?.to_dtype(DType::F32)? * 256.0)?;
        let scales = self.scales.narrow(0, rows.start, n)?.to_dtype(DType::F32)?;
        let blocks = k.div_ceil(BLOCK);
        let of_values = scales.unsqueeze(2)?.broadcast_as((n, blocks, BLOCK))?.reshape((n, blocks * BLOCK))?;
        (bytes - wrapped)? * of_values.narrow(1, 0, k)?
    }

    /// Rows in ranges of at most [`PANEL`] values: whole rows, and whole tiles of a matrix product.
    fn panels(&self) -> impl Iterator<Item = Range<usize>> {
        let (n, k) = self.dims();
        let rows = (PANEL / k.max(1) / 16 * 16).max(16);
        (0..n).step_by(rows).map(move |first| first..(first + rows).min(n))
    }

    /// Calls `f` with ranges of rows and their values in f32, from the first to the last; on the CPU. One buffer of at most
    /// 8 MiB (of 16 rows, if that is more) serves all.
    pub fn for_each_panel(&self, mut f: impl FnMut(Range<usize>, &[f32])) -> Result<()> {
        let (_, k) = self.dims();
        let blocks = k.div_ceil(BLOCK);
        let (quants, scales) = (self.quants.storage_and_layout().0, self.scales.storage_and_layout().0);
        let (Storage::Cpu(CpuStorage::U8(quants)), Storage::Cpu(CpuStorage::F16(scales))) = (&*quants, &*scales) else {
            return Err(Error::run("int8 weights are not on the CPU").hint("use `device: cpu`"));
        };
        let mut panel = Vec::new();
        for rows in self.panels() {
            let values = rows.start * k..rows.end * k;
            if panel.is_empty() {
                panel = uninit(values.len());
            }
            panel.truncate(values.len());
            let quants = &quants[values];
            let scales = &scales[rows.start * blocks..rows.end * blocks];
            let all =
                panel.par_chunks_exact_mut(k).zip(quants.par_chunks_exact(k)).zip(scales.par_chunks_exact(blocks));
            all.with_min_len((GRAIN / k).max(1)).for_each(|((w, q), scales)| dequantise(q, scales, w));
            f(rows, &panel);
        }
        Ok(())
    }
}

/// Values and scales of a row. The error is a weight that has none.
fn quantise(weights: &[f32], quants: &mut [u8], scales: &mut [f16]) -> std::result::Result<(), f32> {
    for ((w, q), scale) in weights.chunks(BLOCK).zip(quants.chunks_mut(BLOCK)).zip(scales) {
        // Bits of magnitudes are in the order of the magnitudes, and those of infinity and NaN are above all others.
        let magnitude = |w: &f32| w.to_bits() & !(1 << 31);
        let mut largest = 0;
        vectorized!(w.iter().for_each(|w| largest = magnitude(w).max(largest)));
        let step = f32::from_bits(largest) / 127.0;
        *scale = f16::from_f32(step);
        if !scale.is_finite() {
            return Err(w.iter().copied().find(|w| magnitude(w) == largest).expect("the largest is one of them"));
        }
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        vectorized!(q.iter_mut().zip(w).for_each(|(q, w)| {
            let scaled = w * inverse;
            let whole = scaled as i32;
            let rest = scaled - whole as f32;
            let away = i32::from(rest >= 0.5) - i32::from(rest <= -0.5);
            *q = (whole + away) as u8;
        }));
    }
    Ok(())
}

/// The weights of a row.
fn dequantise(quants: &[u8], scales: &[f16], weights: &mut [f32]) {
    #[inline(always)]
    fn block(quants: &[u8], scale: f16, weights: &mut [f32]) {
        let scale = scale.to_f32();
        weights.iter_mut().zip(quants).for_each(|(w, q)| *w = f32::from(*q as i8) * scale);
    }
    let (weights, w_rest) = weights.as_chunks_mut::<BLOCK>();
    let (quants, q_rest) = quants.as_chunks::<BLOCK>();
    vectorized!(weights.iter_mut().zip(quants).zip(scales).for_each(|((w, q), scale)| block(q, *scale, w)));
    if !w_rest.is_empty() {
        block(q_rest, scales[quants.len()], w_rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::randn;
    use candle_core::quantized::{GgmlDType, QTensor};

    fn flat(t: &Tensor) -> Vec<f32> {
        t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Blocks of every kind: of zeros, halves that are rounded away from zero, tiny and huge values, random ones.
    fn weights() -> Vec<f32> {
        let mut w = flat(&randn(0, &[40, 96], 0.03));
        w[..32].fill(0.0);
        w[32..64].fill(0.5);
        w[32..36].copy_from_slice(&[127.0, 2.5, -2.5, -0.5]);
        w[64..96].iter_mut().enumerate().for_each(|(i, w)| *w = 1e-7 * (i as f32 - 12.0));
        w[96..128].iter_mut().enumerate().for_each(|(i, w)| *w = 3e5 * (i as f32 - 20.0));
        w
    }

    #[test]
    fn values_are_off_by_half_a_step_at_most_and_as_ggml_has_them() {
        let w = weights();
        let tensor = Tensor::from_slice(&w, (40, 96), &Device::Cpu).unwrap();
        let held = Int8Matrix::quantise("w", &tensor).unwrap();
        assert_eq!((held.dims(), Int8Matrix::bytes_of((40, 96))), ((40, 96), 40 * 96 + 2 * 120));
        let back = flat(&held.dequantise(DType::F32).unwrap());
        assert_eq!(back[..32], [0.0; 32]);
        assert_eq!(back[32..37], [127.0, 3.0, -3.0, -1.0, 1.0]);
        for (block, (w, back)) in w.chunks_exact(32).zip(back.chunks_exact(32)).enumerate() {
            let step = w.iter().fold(0f32, |m, w| m.max(w.abs())) / 127.0;
            for (w, back) in w.iter().zip(back) {
                // f16 rounds the scale by 2^-11 of it, or, where it is tiny, by 2^-25.
                let rounding = (w.abs() / 2048.0).max(127.0 * 2f32.powi(-25));
                assert!((w - back).abs() <= 0.5001 * step + rounding, "block {block}: {w} {back}");
            }
        }
        let ggml = QTensor::quantize(&tensor, GgmlDType::Q8_0).unwrap();
        assert_eq!(back, flat(&ggml.dequantize(&Device::Cpu).unwrap()));
        let bytes = ggml.data().unwrap();
        let values = flat(&held.quants);
        let theirs = bytes.chunks_exact(34).flat_map(|b| &b[2..]).map(|q| f32::from(*q));
        assert!(values.iter().copied().eq(theirs));
        // What was quantised once stays.
        let again = Int8Matrix::quantise("w", &held.dequantise(DType::F32).unwrap()).unwrap();
        assert_eq!(flat(&again.dequantise(DType::F32).unwrap()), back);
        // As the CPU's kernels see them.
        held.for_each_panel(|rows, panel| assert!(rows == (0..40) && panel == back)).unwrap();
        let bf16 = held.dequantise(DType::BF16).unwrap();
        assert_eq!(flat(&bf16), flat(&tensor_of(&back).to_dtype(DType::BF16).unwrap()));
    }

    fn tensor_of(w: &[f32]) -> Tensor {
        Tensor::from_slice(w, (40, 96), &Device::Cpu).unwrap()
    }

    #[test]
    fn panels_cover_every_row_once_in_a_buffer_of_bounded_size() {
        // Two whole panels and a part; a row of its own kind in each place.
        let (n, k) = (2 * 16 + 3, PANEL / 16);
        let value = |i: usize| (i / k) as f32 - 7.0 + (i % 5) as f32 / 4.0;
        let read = |first: usize, out: &mut [f32]| {
            out.iter_mut().enumerate().for_each(|(i, w)| *w = value(first + i));
            Ok(())
        };
        let held = Int8Matrix::from_rows("w", (n, k), read).unwrap();
        let mut next = 0;
        held.for_each_panel(|rows, panel| {
            assert_eq!((rows.start, panel.len()), (next, rows.len() * k));
            assert!(panel.len() <= PANEL);
            next = rows.end;
            let first = rows.start * k;
            let step = |i: usize| (value(first + i).abs() + 1.0) / 127.0;
            assert!(panel.iter().enumerate().all(|(i, w)| (w - value(first + i)).abs() <= 0.51 * step(i) + 0.02));
        })
        .unwrap();
        assert_eq!(next, n);
    }

    #[test]
    fn the_last_block_of_a_row_may_be_short() {
        let w = randn(0, &[5, 48], 1.0);
        // Rows of whole blocks with zeros behind.
        let padded = w.pad_with_zeros(1, 0, 16).unwrap();
        let [held, padded] = [&w, &padded].map(|w| Int8Matrix::quantise("w", w).unwrap());
        let expected = flat(&padded.dequantise(DType::F32).unwrap().narrow(1, 0, 48).unwrap());
        assert_eq!(flat(&held.dequantise(DType::F32).unwrap()), expected);
        held.for_each_panel(|rows, panel| assert!(rows == (0..5) && panel == expected)).unwrap();
    }

    #[test]
    fn damaged_weights_are_refused_by_name() {
        for (bad, says) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf"), (9e6, "9000000")] {
            let mut w = weights();
            w[3 * 96 + 40] = bad;
            let error = Int8Matrix::quantise("blocks.0.w", &tensor_of(&w)).err().expect("refused");
            let text = error.to_string();
            assert!(text.contains("`blocks.0.w`") && text.contains(&format!("found {says} in row 3")), "{text}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
