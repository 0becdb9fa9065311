//! Noise levels of training samples.
//!
//! A uniform number goes through the inverse of the wanted distribution, so that one function serves drawing at random
//! and the fixed quantiles of the held-out loss.

use crate::config::{Flow, Shift, SigmaSampling};
use crate::flow::FlowMatchEuler;
use crate::rng::Stream;

/// The distribution of sigma, the share of noise in a sample.
#[derive(Clone, Debug)]
pub struct SigmaSampler {
    flow: Flow,
    scheduler: FlowMatchEuler,
}

impl SigmaSampler {
    /// The distribution that `flow` describes; `scheduler` knows the dynamic shift.
    pub fn new(flow: &Flow, scheduler: FlowMatchEuler) -> Self {
        Self { flow: flow.clone(), scheduler }
    }

    /// A noise level for an image of `image_seq_len` tokens.
    pub fn draw(&self, stream: &mut Stream, image_seq_len: usize) -> f64 {
        self.quantile(stream.uniform(), image_seq_len)
    }

    /// The noise level below which a share `q` in [0, 1] of all draws lies.
    pub fn quantile(&self, q: f64, image_seq_len: usize) -> f64 {
        let flow = &self.flow;
        let base = match flow.sampling {
            SigmaSampling::Uniform => q,
            SigmaSampling::LogitNormal => sigmoid(flow.logit_mean + flow.logit_std * probit(q)),
        };
        let shifted = match flow.shift {
            Shift::None => base,
            Shift::Dynamic => shift(base, self.scheduler.mu(image_seq_len).exp()),
            Shift::By(factor) => shift(base, factor),
        };
        flow.sigma_min + (flow.sigma_max - flow.sigma_min) * shifted
    }
}

/// Moves sigma towards noise: `s sigma / (1 + (s - 1) sigma)`.
fn shift(sigma: f64, factor: f64) -> f64 {
    factor * sigma / (1.0 + (factor - 1.0) * sigma)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The standard normal's quantile, by Acklam's rational approximation: relative error below 1.2e-9.
fn probit(q: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e+01,
        2.209460984245205e+02,
        -2.759285104469687e+02,
        1.383_577_518_672_69e2,
        -3.066479806614716e+01,
        2.506628277459239e+00,
    ];
    const B: [f64; 6] = [
        -5.447609879822406e+01,
        1.615858368580409e+02,
        -1.556989798598866e+02,
        6.680131188771972e+01,
        -1.328068155288572e+01,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-03,
        -3.223964580411365e-01,
        -2.400758277161838e+00,
        -2.549732539343734e+00,
        4.374664141464968e+00,
        2.938163982698783e+00,
    ];
    const D: [f64; 5] =
        [7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e+00, 3.754408661907416e+00, 1.0];
    let poly = |c: &[f64], x: f64| c.iter().fold(0.0, |sum, c| sum * x + c);
    let tail = |q: f64| {
        let x = (-2.0 * q.max(f64::MIN_POSITIVE).ln()).sqrt();
        poly(&C, x) / poly(&D, x)
    };
    const LOW: f64 = 0.02425;
    if q < LOW {
        tail(q)
    } else if q > 1.0 - LOW {
        -tail(1.0 - q)
    } else {
        let x = q - 0.5;
        x * poly(&A, x * x) / poly(&B, x * x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;

    fn scheduler() -> FlowMatchEuler {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/reference/case_a/pipe/scheduler/scheduler_config.json"
        );
        FlowMatchEuler::from_file(path.as_ref()).unwrap()
    }

    fn sampler(sampling: SigmaSampling, shift: Shift) -> SigmaSampler {
        SigmaSampler::new(&Flow { sampling, shift, ..Flow::default() }, scheduler())
    }

    #[test]
    fn probit_knows_the_tables() {
        for (q, z) in
            [(0.5, 0.0), (0.9, 1.281551566), (0.975, 1.959963985), (0.01, -2.326347874), (0.0001, -3.719016485)]
        {
            assert!((probit(q) - z).abs() < 1e-8, "{q}");
        }
    }

    #[test]
    fn the_share_of_low_noise_falls_with_the_shift() {
        // Published shares of sigma < 0.5 under logit-normal sampling: 50 %, 21.5 %, 13.6 % for shifts 1, 2.2 and 3.
        for (factor, share) in [(1.0, 0.5), (2.2, 0.215), (3.0, 0.136)] {
            let sampler = sampler(SigmaSampling::LogitNormal, Shift::By(factor));
            let n = 20_000;
            let low = (0..n).filter(|&i| sampler.draw(&mut Stream::new(1, i, 0, Purpose::Sigma), 1024) < 0.5).count();
            // Four standard errors of a share of 20,000 draws.
            assert!((low as f64 / n as f64 - share).abs() < 0.015, "{factor}: {low}");
            assert!((sampler.quantile(share, 1024) - 0.5).abs() < 2e-3);
        }
    }

    #[test]
    fn uniform_stays_uniform_and_the_dynamic_shift_is_the_schedulers() {
        assert_eq!(sampler(SigmaSampling::Uniform, Shift::None).quantile(0.3, 1024), 0.3);
        // 1024x1024 has 4096 tokens and a factor of 2.0008.
        let shifted = sampler(SigmaSampling::Uniform, Shift::Dynamic).quantile(0.5, 4096);
        assert!((shifted - 2.0008 / 3.0008).abs() < 1e-4, "{shifted}");
        let range = Flow {
            sampling: SigmaSampling::Uniform,
            shift: Shift::None,
            sigma_min: 0.2,
            sigma_max: 0.6,
            ..Flow::default()
        };
        let range = SigmaSampler::new(&range, scheduler());
        assert!((range.quantile(0.0, 16) - 0.2).abs() < 1e-12 && (range.quantile(1.0, 16) - 0.6).abs() < 1e-12);
    }
}
