//! Random weights under which activations keep about unit size from end to end.

use super::Precision;
use crate::rng::{Purpose, Stream};

/// How the tensors of one network are drawn.
///
/// A matrix or kernel is normal with standard deviation `gain / sqrt(inputs per output)`. Norm weights are near one and
/// biases near zero, but not at it, so that a loader that forgets one is found out.
#[derive(Clone, Copy, Debug)]
pub struct Law {
    /// Part of a name, and the gain of the tensors that have it; the last that fits counts, else 1.
    gains: &'static [(&'static str, f64)],
    norm_std: f64,
    bias_std: f64,
}

/// Modulation a little below unit size. `proj_out` is small beside the target (`noise - latents`, variance about 2),
/// so that the random prediction costs little and training begins near the loss of predicting nothing.
pub const TRANSFORMER: Law =
    Law { gains: &[("_mod.1", 0.7), ("norm_out.linear", 0.7), ("proj_out", 0.5)], norm_std: 0.15, bias_std: 0.1 };

/// A causal 3x3x3 kernel sees one frame in three, so the residual convolutions get `sqrt(3)`; the latents come out with
/// the size that `latents_std` divides away, the decoded pixels inside [-1, 1].
pub const VAE: Law = Law {
    gains: &[
        ("conv1", 1.7),
        ("conv2", 1.7),
        ("conv_in", 1.7),
        ("decoder.conv_out", 0.8),
        ("encoder.conv_out", 4.0),
        ("resample", 1.2),
    ],
    norm_std: 0.15,
    bias_std: 0.1,
};

/// Unit size throughout; the output head is never reached.
pub const TEXT_ENCODER: Law = Law { gains: &[("lm_head", 0.2)], norm_std: 0.15, bias_std: 0.1 };

/// The weights of the PyTorch side of the speed comparison.
pub const BENCH: Law = Law { gains: &[], norm_std: 0.02, bias_std: 0.02 };

/// The little-endian bytes of tensor `name` of network `part`.
pub fn bytes(seed: u64, part: &str, name: &str, shape: &[usize], law: &Law, precision: Precision) -> Vec<u8> {
    let len = shape.iter().product();
    let mut stream = Stream::named(seed, &format!("{part}.{name}"), Purpose::Synthetic);
    let gain = law.gains.iter().rev().find(|(needle, _)| name.contains(needle)).map_or(1.0, |(_, gain)| *gain);
    let is_norm = name.ends_with(".gamma") || (name.contains("norm") && !name.starts_with("norm_out."));
    // A lookup table has one input per output.
    let inputs: usize = if name.contains("embed_tokens") { 1 } else { shape[1..].iter().product() };
    let (mean, std) = match (is_norm, shape.len()) {
        (true, _) => (1.0, law.norm_std),
        (false, 1) => (0.0, law.bias_std * gain),
        (false, _) => (0.0, gain / (inputs as f64).sqrt()),
    };
    let mut out = Vec::with_capacity(len * precision.bytes());
    for _ in 0..len {
        let value = (mean + std * stream.normal()) as f32;
        match precision {
            Precision::F32 => out.extend(value.to_le_bytes()),
            Precision::Bf16 => out.extend(half::bf16::from_f32(value).to_le_bytes()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(name: &str, shape: &[usize], law: &Law) -> (f64, f64) {
        let bytes = bytes(3, "part", name, shape, law, Precision::F32);
        let values: Vec<f64> =
            bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect();
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        (mean, (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt())
    }

    #[test]
    fn each_kind_of_tensor_has_its_own_law() {
        // Five standard errors of 20,000 draws are 3.5% of the standard deviation.
        for (name, shape, law, expected_mean, expected_std) in [
            ("transformer_blocks.0.attn.to_q.weight", vec![100, 200], TRANSFORMER, 0.0, 200f64.powf(-0.5)),
            ("transformer_blocks.0.img_mod.1.weight", vec![100, 200], TRANSFORMER, 0.0, 0.7 * 200f64.powf(-0.5)),
            ("norm_out.linear.weight", vec![200, 100], TRANSFORMER, 0.0, 0.07),
            ("proj_out.bias", vec![20_000], TRANSFORMER, 0.0, 0.05),
            ("transformer_blocks.0.attn.norm_added_q.weight", vec![20_000], TRANSFORMER, 1.0, 0.15),
            ("encoder.down_blocks.0.norm1.gamma", vec![20_000, 1, 1, 1], VAE, 1.0, 0.15),
            ("encoder.conv_out.weight", vec![32, 25, 5, 5], VAE, 0.0, 0.16),
            ("model.embed_tokens.weight", vec![200, 100], TEXT_ENCODER, 0.0, 1.0),
            ("txt_norm.weight", vec![20_000], BENCH, 1.0, 0.02),
        ] {
            let (mean, std) = moments(name, &shape, &law);
            assert!((mean - expected_mean).abs() < 0.05 * expected_std, "{name}: mean {mean}");
            assert!((std / expected_std - 1.0).abs() < 0.035, "{name}: standard deviation {std}");
        }
    }

    #[test]
    fn seed_part_and_name_each_change_the_values_and_precision_only_rounds_them() {
        let draw = |seed, part, name| bytes(seed, part, name, &[4, 4], &BENCH, Precision::F32);
        let base = draw(1, "vae", "a.weight");
        assert_eq!(base, draw(1, "vae", "a.weight"));
        for other in [draw(2, "vae", "a.weight"), draw(1, "transformer", "a.weight"), draw(1, "vae", "b.weight")] {
            assert_ne!(base, other);
        }
        let rounded = bytes(1, "vae", "a.weight", &[4, 4], &BENCH, Precision::Bf16);
        for (wide, narrow) in base.chunks_exact(4).zip(rounded.chunks_exact(2)) {
            let wide = f32::from_le_bytes(wide.try_into().unwrap());
            assert_eq!(half::bf16::from_f32(wide).to_le_bytes(), narrow);
        }
    }
}
