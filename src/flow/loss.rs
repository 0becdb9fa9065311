//! Loss weights of training samples. Both have mean 1, so that they move emphasis and not the learning rate.

use crate::config::LossWeighting;

/// Weight of a sample by its noise level.
#[derive(Clone, Copy, Debug)]
pub struct Weighting {
    weighting: LossWeighting,
    /// Mean of the unscaled bell over the noise levels that are drawn.
    bell_mean: f64,
}

impl Weighting {
    /// The weighting of the config, for noise levels whose quantile function is `quantile`.
    pub fn new(weighting: LossWeighting, quantile: impl Fn(f64) -> f64) -> Self {
        let bell_mean = match weighting {
            LossWeighting::None => 1.0,
            LossWeighting::Bell => {
                let n = 1000;
                (0..n).map(|i| bell(quantile((i as f64 + 0.5) / n as f64))).sum::<f64>() / n as f64
            }
        };
        Self { weighting, bell_mean }
    }

    /// The weight at noise level `sigma` in [0, 1].
    pub fn at(&self, sigma: f64) -> f64 {
        match self.weighting {
            LossWeighting::None => 1.0,
            // All noise levels at the very ends, where the bell is 0: none is preferred.
            LossWeighting::Bell if self.bell_mean <= 0.0 => 1.0,
            LossWeighting::Bell => bell(sigma) / self.bell_mean,
        }
    }
}

/// DiffSynth's bell, `exp(-2 (sigma - 1/2)^2)` less its value at both ends. There too its mean is brought to 1 over the
/// noise levels trained on, after their shift.
///
/// Source: <https://github.com/modelscope/DiffSynth-Studio/blob/038bad0100cfc096867bf00522025feff48dc050/diffsynth/diffusion/flow_match.py>,
/// `set_training_weight`.
fn bell(sigma: f64) -> f64 {
    (-2.0 * (sigma - 0.5).powi(2)).exp() - (-0.5f64).exp()
}

/// Weight of a sample by whether its caption was dropped.
#[derive(Clone, Copy, Debug)]
pub struct CaptionWeight {
    kept: f64,
    dropped: f64,
}

impl CaptionWeight {
    /// A sample with its caption weighs `weight` times one without, which happens with probability `dropout`.
    pub fn new(weight: f64, dropout: f64) -> Self {
        let expected = (1.0 - dropout) * weight + dropout;
        Self { kept: weight / expected, dropped: 1.0 / expected }
    }

    /// The weight of one sample.
    pub fn of(&self, caption_dropped: bool) -> f64 {
        if caption_dropped { self.dropped } else { self.kept }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean(draws: usize, weight: impl Fn(f64) -> f64) -> f64 {
        (0..draws).map(|i| weight((i as f64 + 0.5) / draws as f64)).sum::<f64>() / draws as f64
    }

    #[test]
    fn the_bell_has_mean_one_over_what_is_drawn_and_prefers_the_middle() {
        let shifted = |q: f64| 3.0 * q / (1.0 + 2.0 * q);
        let quantiles: [fn(f64) -> f64; 3] = [|q| q, shifted, |q| 0.9 + 0.1 * q];
        for quantile in quantiles {
            let weighting = Weighting::new(LossWeighting::Bell, quantile);
            let mean = mean(5000, |q| weighting.at(quantile(q)));
            assert!((mean - 1.0).abs() < 1e-4, "{mean}");
            assert!(weighting.at(0.5) > weighting.at(0.4) && weighting.at(0.4) > weighting.at(0.1));
            assert!((weighting.at(0.3) - weighting.at(0.7)).abs() < 1e-12);
            assert!(weighting.at(0.0).abs() < 1e-12 && weighting.at(1.0).abs() < 1e-12);
            assert_eq!(Weighting::new(LossWeighting::None, quantile).at(0.9), 1.0);
        }
        assert_eq!(Weighting::new(LossWeighting::Bell, |_| 0.0).at(0.0), 1.0, "not 0/0");
    }

    #[test]
    fn the_bell_over_uniform_levels_has_its_closed_form() {
        // The mean of exp(-2u^2) over [-1/2, 1/2] is sqrt(pi/2) erf(1/sqrt 2) = 0.855624.
        let peak = Weighting::new(LossWeighting::Bell, |q| q).at(0.5);
        let end = (-0.5f64).exp();
        assert!((peak - (1.0 - end) / (0.855_624_391_9 - end)).abs() < 1e-5, "{peak}");
    }

    #[test]
    fn caption_weights_keep_ratio_and_mean() {
        for (weight, dropout) in [(1.2, 0.05), (3.0, 0.5), (1.0, 0.0), (0.0, 0.5), (3.0, 1.0)] {
            let caption = CaptionWeight::new(weight, dropout);
            assert!(((1.0 - dropout) * caption.of(false) + dropout * caption.of(true) - 1.0).abs() < 1e-12);
            assert!((caption.of(false) - weight * caption.of(true)).abs() < 1e-12);
        }
        assert_eq!(CaptionWeight::new(1.2, 0.0).of(false), 1.0);
    }
}
