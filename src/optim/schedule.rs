//! The learning rate as a pure function of the step.

use crate::config::{LrSchedule, Training};
use std::f64::consts::PI;

/// The learning rate of step `step`, counted from 0 to `max_steps - 1`.
///
/// Warm-up: step `i` of `w` has `(i + 1) / w` of the peak, so that the first step already learns and step `w - 1` is
/// at the peak. (The `transformers` schedulers give `i / w`, a first step with learning rate 0.) After it, with
/// `p = (step - w) / (max_steps - w)`: `linear` gives `1 - p` and the cosines give `(1 + cos(pi p)) / 2` of the peak, which
/// would be 0 at `max_steps`. `cosine` takes no warm-up.
pub fn learning_rate(training: &Training, step: usize) -> f64 {
    let warmup = match training.lr_scheduler {
        LrSchedule::Cosine => 0,
        LrSchedule::Constant | LrSchedule::Linear | LrSchedule::CosineWithWarmup => training.warmup_steps,
    };
    let peak = training.learning_rate;
    if step < warmup {
        return peak * (step + 1) as f64 / warmup as f64;
    }
    let span = training.max_steps.saturating_sub(warmup).max(1);
    let progress = ((step - warmup) as f64 / span as f64).min(1.0);
    peak * match training.lr_scheduler {
        LrSchedule::Constant => 1.0,
        LrSchedule::Linear => 1.0 - progress,
        LrSchedule::Cosine | LrSchedule::CosineWithWarmup => 0.5 * (1.0 + (PI * progress).cos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(lr_scheduler: LrSchedule, warmup_steps: usize, steps: &[usize]) -> Vec<f64> {
        let training =
            Training { learning_rate: 2.0, lr_scheduler, warmup_steps, max_steps: 12, ..Training::default() };
        steps.iter().map(|&step| (learning_rate(&training, step) * 1e12).round() / 1e12).collect()
    }

    #[test]
    fn the_boundaries_are_exact() {
        use LrSchedule::*;
        assert_eq!(rates(Constant, 0, &[0, 11, 12]), [2.0, 2.0, 2.0]);
        assert_eq!(rates(Constant, 4, &[0, 1, 3, 4, 11]), [0.5, 1.0, 2.0, 2.0, 2.0]);
        assert_eq!(rates(Linear, 0, &[0, 3, 6, 12, 99]), [2.0, 1.5, 1.0, 0.0, 0.0]);
        assert_eq!(rates(Linear, 4, &[0, 3, 4, 8, 11, 12]), [0.5, 2.0, 2.0, 1.0, 0.25, 0.0]);
        assert_eq!(rates(Cosine, 4, &[0, 4, 6, 8, 12]), [2.0, 1.5, 1.0, 0.5, 0.0], "no warm-up");
        let quarter = 1.0 + 0.5f64.sqrt();
        let quarter = (quarter * 1e12).round() / 1e12;
        assert_eq!(rates(CosineWithWarmup, 4, &[0, 3, 4, 6, 8, 12, 50]), [0.5, 2.0, 2.0, quarter, 1.0, 0.0, 0.0]);
        assert_eq!(rates(CosineWithWarmup, 12, &[0, 11, 12]), [0.166666666667, 2.0, 2.0], "all of it warm-up");
    }

    #[test]
    fn it_never_rises_after_the_warm_up() {
        for scheduler in [LrSchedule::Constant, LrSchedule::Linear, LrSchedule::Cosine, LrSchedule::CosineWithWarmup] {
            let all = rates(scheduler, 3, &(0..12).collect::<Vec<_>>());
            assert!(all[3..].windows(2).all(|w| w[1] <= w[0]), "{scheduler:?} {all:?}");
            assert!(all.iter().all(|r| *r > 0.0), "{scheduler:?}: every step of the run learns");
        }
    }
}
