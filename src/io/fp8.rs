//! The two 8-bit float formats of weight files, widened to f32.
//!
//! Source: the OCP 8-bit floating point specification, <https://arxiv.org/abs/2209.05433>.

/// E4M3 without infinities: 4 exponent bits with bias 7, largest value 448, NaN with all bits set.
pub fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 0xf), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// E5M2: 5 exponent bits with bias 15, infinities and NaNs as in IEEE 754; the upper half of an f16.
pub fn e5m2(bits: u8) -> f32 {
    half::f16::from_bits(u16::from(bits) << 8).to_f32()
}

/// All 256 values of a format, to decode by table.
pub fn table(decode: fn(u8) -> f32) -> [f32; 256] {
    std::array::from_fn(|bits| decode(bits as u8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_values_are_those_of_the_specification() {
        for (bits, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 0.875 * 2f32.powi(-6)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xb8, -1.0),
        ] {
            assert_eq!(e4m3(bits), value, "{bits:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        for (bits, value) in [(0x01, 2f32.powi(-16)), (0x3c, 1.0), (0x3d, 1.25), (0x7b, 57344.0), (0xbc, -1.0)] {
            assert_eq!(e5m2(bits), value, "{bits:#x}");
        }
        assert_eq!(e5m2(0x7c), f32::INFINITY);
        assert!(e5m2(0x7f).is_nan());
        assert_eq!(table(e4m3)[0x38], 1.0);
    }
}
