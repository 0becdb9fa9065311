//! At which noise levels a loss on the decoded picture means something.
//!
//! What a network predicts from a noisy image is nearly clean only at low noise; a pose network sees nobody in the rest.
//! At the lowest levels the prediction is hardly used: its share in the picture is sigma itself.

/// A window over the noise levels with smooth flanks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gate {
    from: f64,
    to: f64,
    taper: f64,
}

impl Gate {
    /// Open between `from` and `to`; over `taper` on either side it rises from 0 and falls to 0.
    pub fn new(from: f64, to: f64, taper: f64) -> Self {
        Self { from, to, taper }
    }

    /// How far it is open at a noise level: 0 to 1.
    pub fn at(&self, sigma: f64) -> f64 {
        let outside = (self.from - sigma).max(sigma - self.to);
        if outside <= 0.0 {
            return 1.0;
        }
        if outside >= self.taper {
            return 0.0;
        }
        let t = 1.0 - outside / self.taper;
        t * t * (3.0 - 2.0 * t)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_open_in_the_window_and_shut_beyond_its_flanks_without_a_jump() {
        let gate = Gate::new(0.1, 0.5, 0.1);
        for (sigma, open) in [(0.1, 1.0), (0.3, 1.0), (0.5, 1.0), (0.6, 0.0), (0.9, 0.0), (0.0, 0.0), (0.05, 0.5)] {
            assert!((gate.at(sigma) - open).abs() < 1e-9, "{sigma}: {}", gate.at(sigma));
        }
        let jump = (0..1000).map(|i| (gate.at(f64::from(i + 1) / 1e3) - gate.at(f64::from(i) / 1e3)).abs());
        assert!(jump.fold(0.0, f64::max) < 0.016);
        let hard = Gate::new(0.2, 0.4, 0.0);
        assert_eq!([0.1999, 0.2, 0.4, 0.4001].map(|s| hard.at(s)), [0.0, 1.0, 1.0, 0.0]);
    }
}
