//! Elementwise functions written so that the compiler vectorises them, and row reductions with a fixed order.
//!
//! Use them inside `vectorized!`, which compiles an expression for the widest vector unit of the machine.

/// Runs an expression compiled for AVX-512, AVX2 or the baseline, whichever the machine has.
///
/// The expression is written out once for each: a closure that is called in one place only is always inlined into the
/// function that carries the target features, and so compiled with them.
macro_rules! vectorized {
    ($body:expr) => {
        match $crate::kernels::math::vector_level() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `vector_level` has seen these features on this machine.
            $crate::kernels::math::VectorLevel::Avx512 => unsafe { $crate::kernels::math::with_avx512(|| $body) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::kernels::math::VectorLevel::Avx2 => unsafe { $crate::kernels::math::with_avx2(|| $body) },
            $crate::kernels::math::VectorLevel::Baseline => $body,
        }
    };
}
pub(crate) use vectorized;

/// What the machine's vector unit can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorLevel {
    /// 512 bits.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 256 bits.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What every machine of the build's target has.
    Baseline,
}

/// Looks at the machine once.
#[inline]
pub fn vector_level() -> VectorLevel {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") && has!("avx2") && has!("fma") {
            return VectorLevel::Avx512;
        }
        if has!("avx2") && has!("fma") {
            return VectorLevel::Avx2;
        }
    }
    VectorLevel::Baseline
}

/// Calls `f`, inlined, with 512-bit vectors.
///
/// # Safety
/// The machine must have the features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub fn with_avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// Calls `f`, inlined, with 256-bit vectors.
///
/// # Safety
/// The machine must have the features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub fn with_avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// `e^x`, within 2 ulp for results in the normal range; inputs below -87.3 give 0, above 88.3 are clamped.
///
/// Cephes' method: `x = n ln 2 + r`, a polynomial in r, and n added to the exponent.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
    let clamped = x.clamp(-87.3, 88.3);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let poly = ((((1.987_569_1e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r + 1.666_666_5e-1)
        * r
        + 0.5;
    let mantissa = poly * r * r + r + 1.0;
    let exponent = (shifted.to_bits() << 23).wrapping_add(0x3f80_0000);
    let y = mantissa * f32::from_bits(exponent);
    if x < -87.3 { 0.0 } else { y }
}

/// The logistic function.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

const LANES: usize = 16;

/// Sum over `i` of `f(i)`, in sixteen interleaved partial sums added pairwise: vectorisable, and always in one order.
#[inline(always)]
pub fn sum_over(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    let mut i = 0;
    while i < whole {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
        i += LANES;
    }
    for (l, lane) in lanes.iter_mut().enumerate().take(n - whole) {
        *lane += f(whole + l);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of a row.
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    sum_over(x.len(), |i| x[i])
}

/// Dot product of two rows of one length.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let y = &y[..x.len()];
    sum_over(x.len(), |i| x[i] * y[i])
}

/// Largest element; negative infinity for an empty row.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    chunks.remainder().iter().chain(&lanes).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

/// A nonlinearity of the family's networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU in its tanh approximation, as `approximate="tanh"` in PyTorch.
    GeluTanh,
}

const GELU_C: f32 = 0.797_884_6; // sqrt(2 / pi)
const GELU_K: f32 = 0.044_715;

impl Activation {
    /// The function.
    #[inline(always)]
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Self::Silu => x * sigmoid(x),
            // (1 + tanh u) / 2 is sigmoid(2u): no cancellation for negative x.
            Self::GeluTanh => x * sigmoid(2.0 * GELU_C * (x + GELU_K * x * x * x)),
        }
    }

    /// Its derivative.
    #[inline(always)]
    pub fn derivative(self, x: f32) -> f32 {
        match self {
            Self::Silu => {
                let s = sigmoid(x);
                s + x * s * (1.0 - s)
            }
            Self::GeluTanh => {
                let s = sigmoid(2.0 * GELU_C * (x + GELU_K * x * x * x));
                s + x * s * (1.0 - s) * 2.0 * GELU_C * (1.0 + 3.0 * GELU_K * x * x)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let worst = (-870_000..880_000)
            .map(|i| {
                let x = i as f32 * 1e-4;
                let exact = f64::from(x).exp();
                ((f64::from(exp(x)) - exact) / exact).abs()
            })
            .fold(0.0, f64::max);
        assert!(worst < 2.4e-7, "{worst}");
        assert_eq!([exp(-1000.0), exp(f32::NEG_INFINITY), exp(0.0)], [0.0, 0.0, 1.0]);
        assert!(exp(1000.0).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn activations_equal_their_definitions_and_derivatives_their_differences() {
        for i in -800..800 {
            let x = f64::from(i) * 0.01;
            let gelu =
                |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            let silu = |x: f64| x / (1.0 + (-x).exp());
            for (a, f) in [(Activation::GeluTanh, &gelu as &dyn Fn(f64) -> f64), (Activation::Silu, &silu)] {
                let xf = x as f32;
                assert!((f64::from(a.apply(xf)) - f(x)).abs() < 1e-6, "{a:?} at {x}");
                let numeric = (f(x + 1e-5) - f(x - 1e-5)) / 2e-5;
                assert!((f64::from(a.derivative(xf)) - numeric).abs() < 2e-6, "{a:?}' at {x}");
            }
        }
    }

    #[test]
    fn reductions_cover_ragged_lengths() {
        for n in 0..70 {
            let x: Vec<f32> = (0..n).map(|i| i as f32 - 20.0).collect();
            assert_eq!(sum(&x), x.iter().sum::<f32>());
            assert_eq!(dot(&x, &x), x.iter().map(|v| v * v).sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
