//! Loss weights of training samples. Both have mean 1, so that they move emphasis and not the learning rate.

use crate::config::LossWeighting;

/// Weight of a sample by its noise level.
#[derive(Clone, Copy, Debug)]
pub struct Weighting {
    weighting: LossWeighting,
    /// Mean of the unscaled bell over [0, 1].
    bell_mean: f64,
}

impl Weighting {
    /// The weighting of the config.
    pub fn new(weighting: LossWeighting) -> Self {
        let n = 1000;
        let bell_mean = (0..n).map(|i| bell((i as f64 + 0.5) / n as f64)).sum::<f64>() / n as f64;
        Self { weighting, bell_mean }
    }

    /// The weight at noise level `sigma` in [0, 1].
    pub fn at(&self, sigma: f64) -> f64 {
        match self.weighting {
            LossWeighting::None => 1.0,
            LossWeighting::Bell => bell(sigma) / self.bell_mean,
        }
    }
}

/// DiffSynth's bell, `exp(-2 (sigma - 1/2)^2)` less its value at both ends.
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

    #[test]
    fn weights_have_mean_one() {
        let weighting = Weighting::new(LossWeighting::Bell);
        let mean = (0..5000).map(|i| weighting.at((f64::from(i) + 0.5) / 5000.0)).sum::<f64>() / 5000.0;
        assert!((mean - 1.0).abs() < 1e-5, "{mean}");
        assert!(weighting.at(0.5) > 1.5 && weighting.at(0.0).abs() < 1e-12);
        assert_eq!(Weighting::new(LossWeighting::None).at(0.9), 1.0);
        for (weight, dropout) in [(1.2, 0.05), (3.0, 0.5), (1.0, 0.0)] {
            let caption = CaptionWeight::new(weight, dropout);
            assert!(((1.0 - dropout) * caption.of(false) + dropout * caption.of(true) - 1.0).abs() < 1e-12);
            assert!((caption.of(false) / caption.of(true) - weight).abs() < 1e-12);
        }
    }
}
