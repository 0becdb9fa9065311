//! The curves of a run, read back from `metrics.jsonl`.

use serde_json::Value as Json;

/// Points (step, value) of each curve, in the order of the file.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Curves {
    pub loss: Vec<(f64, f64)>,
    pub lr: Vec<(f64, f64)>,
    pub step_s: Vec<(f64, f64)>,
    pub held_out: Vec<(f64, f64)>,
    /// The terms of the structured loss where it acted.
    pub pose: Vec<(f64, f64)>,
    pub count: Vec<(f64, f64)>,
    /// Samples that the structured loss acted on, and samples in all, over the steps of a run that has one.
    pub fired: (u64, u64),
}

impl Curves {
    /// Reads the lines; what is no line of ours is left out.
    pub fn parse(metrics: &str) -> Self {
        let mut curves = Self::default();
        for line in metrics.lines() {
            let Ok(line) = serde_json::from_str::<Json>(line) else { continue };
            let Some(step) = line["step"].as_f64() else { continue };
            for (key, curve) in [
                ("loss", &mut curves.loss),
                ("lr", &mut curves.lr),
                ("step_s", &mut curves.step_s),
                ("held_out_loss", &mut curves.held_out),
            ] {
                curve.extend(line[key].as_f64().filter(|v| v.is_finite()).map(|value| (step, value)));
            }
            let structured = &line["structured"];
            for (key, curve) in [("pose", &mut curves.pose), ("count", &mut curves.count)] {
                curve.extend(structured[key].as_f64().filter(|v| v.is_finite()).map(|value| (step, value)));
            }
            if let (Some(fired), Some(samples)) = (structured["fired"].as_u64(), line["samples"].as_u64()) {
                curves.fired.0 += fired;
                curves.fired.1 += samples;
            }
        }
        curves
    }
}

/// An exponential mean over about a twentieth of the points, without the pull towards the first value.
pub(super) fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 20.0).clamp(2.0, 500.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    points
        .iter()
        .map(|&(step, value)| {
            sum = keep * sum + value;
            weight = keep * weight + 1.0;
            (step, sum / weight)
        })
        .collect()
}

/// At most about `max` points that look the same at that width: the lowest and the highest of each stretch.
pub(super) fn thinned(points: &[(f64, f64)], max: usize) -> Vec<(f64, f64)> {
    if points.len() <= max {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(max / 2);
    let ends = |chunk: &[(f64, f64)]| {
        let index = |best: fn(f64, f64) -> bool| {
            (1..chunk.len()).fold(0, |at, i| if best(chunk[i].1, chunk[at].1) { i } else { at })
        };
        let (low, high) = (index(|a, b| a < b), index(|a, b| a > b));
        [chunk[low.min(high)], chunk[low.max(high)]]
    };
    points.chunks(stretch).flat_map(ends).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_curves_and_strangers_are_left_out() {
        let curves = Curves::parse(
            "{\"step\":0,\"held_out_loss\":0.5}\n{\"step\":1,\"loss\":2.0,\"lr\":0.1,\"step_s\":3.0}\nnonsense\n{\"a\":1}",
        );
        assert_eq!(curves.loss, [(1.0, 2.0)]);
        assert_eq!(curves.held_out, [(0.0, 0.5)]);
        assert_eq!((curves.lr.len(), curves.step_s.len()), (1, 1));
    }

    #[test]
    fn smoothing_follows_and_thinning_keeps_the_spikes() {
        let flat: Vec<(f64, f64)> = (0..10_000).map(|i| (i as f64, if i == 5000 { 9.0 } else { 1.0 })).collect();
        let thin = thinned(&flat, 800);
        assert!(thin.len() <= 802 && thin.contains(&(5000.0, 9.0)));
        assert!(thin.windows(2).all(|w| w[0].0 <= w[1].0));
        let smooth = smoothed(&flat);
        assert_eq!(smooth[0].1, 1.0);
        assert!(smooth.iter().all(|p| p.1 < 1.1));
        // A step is followed within a fifth of the run.
        let step: Vec<(f64, f64)> = (0..1000).map(|i| (i as f64, f64::from(u8::from(i >= 500)))).collect();
        assert!(smoothed(&step)[700].1 > 0.95);
    }
}
