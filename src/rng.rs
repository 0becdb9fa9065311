//! Counter-based randomness: every draw is a function of (seed, step, item, purpose), never of history,
//! so that a resumed run draws what an uninterrupted one draws.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What a stream of numbers is for. Each purpose has its own stream; the discriminants are part of the file
/// format of reproducible runs and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Gaussian noise that is mixed into the latents.
    Noise = 1,
    /// The noise level of a training sample.
    Sigma = 2,
    /// Order of the samples in an epoch.
    Shuffle = 3,
    /// Whether a caption is dropped.
    CaptionDropout = 4,
    /// Initial values of the adapter.
    AdapterInit = 5,
    /// Noise and noise levels of the held-out loss.
    HeldOut = 6,
    /// Weights of synthetic models.
    Synthetic = 7,
    /// Initial latents of generated images.
    Sampling = 8,
    /// Which items are held out.
    Split = 9,
    /// Image augmentation.
    Augment = 10,
    /// Random projections and masks of adapter tools.
    Adapters = 11,
    /// Draws of benchmarks and tests.
    Bench = 12,
    /// Alternatives in prompts.
    Prompts = 13,
    /// The piece of a picture that the pose term looks at.
    Crop = 14,
    /// Scenes, words and places of the drawn world.
    World = 20,
}

/// A stream of random numbers for one (seed, step, item, purpose).
///
/// Uniforms come from ChaCha8 keyed by the four numbers; normals from Box-Muller on pairs of uniforms, in f64,
/// so that they are the same on every machine.
pub struct Stream {
    chacha: ChaCha8Rng,
    spare: Option<f64>,
}

impl Stream {
    /// The stream for `(seed, step, item, purpose)`.
    pub fn new(seed: u64, step: u64, item: u64, purpose: Purpose) -> Self {
        let mut key = [0u8; 32];
        for (chunk, word) in key.chunks_exact_mut(8).zip([seed, step, item, purpose as u64]) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        Self { chacha: ChaCha8Rng::from_seed(key), spare: None }
    }

    /// The stream for a named object, such as one weight tensor.
    pub fn named(seed: u64, name: &str, purpose: Purpose) -> Self {
        let hash = blake3::hash(name.as_bytes());
        let word = |i: usize| u64::from_le_bytes(hash.as_bytes()[8 * i..8 * i + 8].try_into().expect("8 bytes"));
        Self::new(seed, word(0), word(1), purpose)
    }

    /// Uniform in [0, 1), with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.chacha.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform integer in `0..n`. `n` must be positive.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "an empty range has no members");
        // 64 random bits against ranges far below 2^32: the bias is under 2^-32.
        ((u128::from(self.chacha.next_u64()) * n as u128) >> 64) as usize
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        if let Some(z) = self.spare.take() {
            return z;
        }
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform()).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }

    /// `n` normals of the given standard deviation, as f32.
    pub fn normals(&mut self, n: usize, std: f64) -> Vec<f32> {
        (0..n).map(|_| (self.normal() * std) as f32).collect()
    }

    /// A permutation of `0..n` (Fisher-Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_depends_on_every_coordinate_and_on_nothing_else() {
        let draw = |s, t, i, p| Stream::new(s, t, i, p).normals(3, 1.0);
        let base = draw(1, 2, 3, Purpose::Noise);
        assert_eq!(base, draw(1, 2, 3, Purpose::Noise));
        for other in [
            draw(9, 2, 3, Purpose::Noise),
            draw(1, 9, 3, Purpose::Noise),
            draw(1, 2, 9, Purpose::Noise),
            draw(1, 2, 3, Purpose::Sigma),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn normals_have_the_moments_of_a_normal() {
        let x = Stream::new(7, 0, 0, Purpose::Noise).normals(200_000, 2.0);
        let n = x.len() as f64;
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let var = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
        let kurtosis = x.iter().map(|&v| (f64::from(v) - mean).powi(4)).sum::<f64>() / n / var.powi(2);
        // Five standard errors each: 2/sqrt(n), var*sqrt(2/n), sqrt(24/n).
        assert!(mean.abs() < 5.0 * 2.0 / n.sqrt(), "{mean}");
        assert!((var - 4.0).abs() < 5.0 * 4.0 * (2.0 / n).sqrt(), "{var}");
        assert!((kurtosis - 3.0).abs() < 5.0 * (24.0 / n).sqrt(), "{kurtosis}");
    }

    #[test]
    fn a_permutation_holds_every_index_once() {
        let mut order = Stream::new(1, 0, 0, Purpose::Shuffle).permutation(100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
