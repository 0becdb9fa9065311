//! Between f32 and the float types of weight files, on slices, on the calling thread.

use crate::io::fp8;
use crate::kernels::math::vectorized;
use half::f16;
use safetensors::Dtype;

/// Whether [`widen`] reads this type.
pub fn is_float(dtype: Dtype) -> bool {
    use Dtype::{BF16, F8_E4M3, F8_E5M2, F16, F32, F64};
    matches!(dtype, F32 | BF16 | F16 | F64 | F8_E4M3 | F8_E5M2)
}

/// Widens little-endian values of a float type ([`is_float`]) to f32. Panics on another type, or if `bytes` does not
/// hold as many values as `out`.
pub fn widen(bytes: &[u8], dtype: Dtype, out: &mut [f32]) {
    fn each<const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
        assert_eq!(bytes.len(), N * out.len(), "as many values as asked for");
        let (values, _) = bytes.as_chunks::<N>();
        vectorized!(out.iter_mut().zip(values).for_each(|(o, b)| *o = f(*b)));
    }
    match dtype {
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::BF16 => each(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
        Dtype::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        Dtype::F8_E4M3 => {
            let table = fp8::table(fp8::e4m3);
            each(bytes, out, |b: [u8; 1]| table[usize::from(b[0])]);
        }
        Dtype::F8_E5M2 => {
            let table = fp8::table(fp8::e5m2);
            each(bytes, out, |b: [u8; 1]| table[usize::from(b[0])]);
        }
        other => panic!("{other:?} is no float type: `is_float` tells"),
    }
}

/// Rounds f32 values to f32, bf16 or f16 (to nearest even) as little-endian bytes. Panics on another type, or if
/// `out` has not the room of as many values.
pub fn narrow(values: &[f32], dtype: Dtype, out: &mut [u8]) {
    fn each<const N: usize>(values: &[f32], out: &mut [u8], f: impl Fn(f32) -> [u8; N]) {
        assert_eq!(out.len(), N * values.len(), "room for every value");
        let (out, _) = out.as_chunks_mut::<N>();
        vectorized!(out.iter_mut().zip(values).for_each(|(o, v)| *o = f(*v)));
    }
    match dtype {
        Dtype::F32 => each(values, out, f32::to_le_bytes),
        Dtype::BF16 => each(values, out, |v| round_to_bf16(v).to_le_bytes()),
        Dtype::F16 => each(values, out, |v| f16::from_f32(v).to_le_bytes()),
        other => panic!("{other:?} is not written"),
    }
}

/// `bf16::from_f32` without a branch, so that the loop over it vectorises.
fn round_to_bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    let quiet_nan = (bits >> 16) as u16 | 0x40;
    if v.is_nan() { quiet_nan } else { rounded }
}

/// A new buffer of the widened values.
pub fn widened(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    use rayon::prelude::*;
    const GRAIN: usize = 1 << 16;
    let size = dtype.bitsize() / 8;
    let mut out = vec![0.0; bytes.len() / size];
    out.par_chunks_mut(GRAIN).zip(bytes.par_chunks(GRAIN * size)).for_each(|(o, b)| widen(b, dtype, o));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};
    use half::bf16;

    #[test]
    fn bf16_is_rounded_as_half_rounds_it() {
        let mut values = Stream::new(1, 0, 0, Purpose::Bench).normals(5000, 3.0);
        values.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 1e-40]);
        // Exactly half-way, to an even and to an odd neighbour.
        values.extend([f32::from_bits(0x3f80_8000), f32::from_bits(0x3f81_8000), f32::from_bits(0x7f7f_ffff)]);
        let mut bytes = vec![0; 2 * values.len()];
        narrow(&values, Dtype::BF16, &mut bytes);
        let got: Vec<u16> = bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
        let want: Vec<u16> = values.iter().map(|&v| bf16::from_f32(v).to_bits()).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn what_a_type_holds_comes_back() {
        let values = [0.0f32, 1.0, -1.5, 0.15625, 448.0, -0.001953125];
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            let mut bytes = vec![0; values.len() * dtype.bitsize() / 8];
            narrow(&values, dtype, &mut bytes);
            assert_eq!(widened(&bytes, dtype), values, "{dtype:?}");
        }
        let doubles: Vec<u8> = values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect();
        assert_eq!(widened(&doubles, Dtype::F64), values);
        assert_eq!(widened(&[0x38, 0xfe], Dtype::F8_E4M3), [1.0, -448.0]);
        assert_eq!(widened(&[0x3c, 0xfb], Dtype::F8_E5M2), [1.0, -57344.0]);
        assert!(is_float(Dtype::F8_E5M2) && !is_float(Dtype::U8));
    }
}
