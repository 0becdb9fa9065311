//! What a handful of images can say: means with their uncertainty, rates with theirs, and paired comparisons.

/// The normal quantile of a two-sided 95% interval.
const Z: f64 = 1.959963984540054;

/// A mean of `n` values, or a rate among `n` cases, with its 95% interval where one can be given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measure {
    /// The value.
    pub value: f64,
    /// How many values or cases stand behind it.
    pub n: usize,
    /// Lower and upper end of the 95% interval.
    pub interval: Option<(f64, f64)>,
    /// Two-sided p-value of a paired test against the baseline.
    pub p_value: Option<f64>,
}

impl Measure {
    /// A single number for which no interval is known.
    pub fn of(value: f64, n: usize) -> Self {
        Self { value, n, interval: None, p_value: None }
    }

    /// The mean of `values` with its interval by the normal approximation, which wants independent values and is too
    /// narrow for fewer than about twenty; `None` without values.
    pub fn mean(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let half = Z * (variance / n).sqrt();
        let interval = (values.len() > 1).then_some((mean - half, mean + half));
        (!values.is_empty()).then_some(Self { interval, ..Self::of(mean, values.len()) })
    }

    /// The share `hits / n` with its Wilson score interval; `None` for `n` = 0.
    pub fn rate(hits: usize, n: usize) -> Option<Self> {
        (n > 0).then(|| Self { interval: Some(wilson(hits, n)), ..Self::of(hits as f64 / n as f64, n) })
    }

    /// The same with a p-value.
    pub fn tested(self, p_value: f64) -> Self {
        Self { p_value: Some(p_value), ..self }
    }
}

/// The Wilson score interval (95%) of a share of `hits` among `n` > 0 cases. Unlike the normal approximation it stays
/// within [0, 1] and holds for few cases and rare events.
pub fn wilson(hits: usize, n: usize) -> (f64, f64) {
    let (n, share) = (n as f64, hits as f64 / n as f64);
    let z2 = Z * Z;
    let centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

/// The exact two-sided McNemar test on pairs: of those where the two differ, `only_first` are events of the first and
/// `only_second` of the second. The chance, if both were equally likely, of a split at least as uneven.
///
/// It is the sign test too: wins against losses.
pub fn mcnemar(only_first: usize, only_second: usize) -> f64 {
    let n = only_first + only_second;
    let fewer = only_first.min(only_second);
    // Sum of C(n, k) / 2^n in logarithms: n may be in the thousands.
    let mut ln_term = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = ln_term.exp();
    for k in 0..fewer {
        ln_term += ((n - k) as f64 / (k + 1) as f64).ln();
        tail += ln_term.exp();
    }
    (2.0 * tail).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_has_an_interval_from_two_values_on() {
        assert_eq!(Measure::mean(&[]), None);
        assert_eq!(Measure::mean(&[3.0]), Some(Measure::of(3.0, 1)));
        let measure = Measure::mean(&[1.0, 2.0, 3.0, 4.0]).unwrap();
        let (low, high) = measure.interval.unwrap();
        assert_eq!(measure.value, 2.5);
        assert!((high - 2.5 - Z * (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
        assert!((high + low - 5.0).abs() < 1e-12);
        assert_eq!(Measure::rate(0, 0), None);
    }
}
