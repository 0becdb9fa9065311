//! `FlowMatchEulerDiscreteScheduler`: which noise levels sampling visits, and the Euler step between two of them.
//!
//! `sigma` is the noise fraction in [0, 1]; the timestep is `num_train_timesteps * sigma`; `mu` is the shift that an
//! image's size asks for.
//! Source: <https://github.com/huggingface/diffusers/blob/82065c31ab8e39e4421859ea57cfd313c524dbb4/src/diffusers/schedulers/scheduling_flow_match_euler_discrete.py>

use crate::error::Result;
use crate::io::JsonObject;
use candle_core::Tensor;
use std::path::Path;

/// How `mu` bends the noise levels under dynamic shifting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeShift {
    /// `e^mu / (e^mu + 1/sigma - 1)`
    Exponential,
    /// `mu / (mu + 1/sigma - 1)`
    Linear,
}

/// The noise schedule in `scheduler/scheduler_config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowMatchEuler {
    /// Timesteps per unit of sigma: 1000.
    pub num_train_timesteps: usize,
    /// Fixed shift, `shift * sigma / (1 + (shift - 1) * sigma)`; unused under dynamic shifting.
    pub shift: f64,
    /// Whether the shift depends on the image's size, through [`mu`](Self::mu).
    pub use_dynamic_shifting: bool,
    /// `mu` at `base_image_seq_len` tokens.
    pub base_shift: f64,
    /// `mu` at `max_image_seq_len` tokens.
    pub max_shift: f64,
    /// Image tokens at which `mu` is `base_shift`.
    pub base_image_seq_len: usize,
    /// Image tokens at which `mu` is `max_shift`.
    pub max_image_seq_len: usize,
    /// Where the last noise level is stretched to, if anywhere.
    pub shift_terminal: Option<f64>,
    /// The form of the dynamic shift.
    pub time_shift_type: TimeShift,
}

impl FlowMatchEuler {
    /// Reads `scheduler/scheduler_config.json`; an absent key has the default of the original class.
    ///
    /// Errors: another scheduler class, a value of the wrong type, an option that is not implemented.
    pub fn from_file(path: &Path) -> Result<Self> {
        let json = JsonObject::open(path)?;
        let class: String = json.get_or("_class_name", CLASS.into())?;
        if class != CLASS {
            return Err(json.bad_value("_class_name", CLASS, class));
        }
        let unimplemented =
            ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling"];
        for key in unimplemented {
            if json.get_or(key, false)? {
                return Err(json.bad_value(key, "false", "true, which is not implemented"));
            }
        }
        let time_shift_type = match json.get_or("time_shift_type", "exponential".to_string())?.as_str() {
            "exponential" => TimeShift::Exponential,
            "linear" => TimeShift::Linear,
            other => return Err(json.bad_value("time_shift_type", "exponential or linear", other)),
        };
        let scheduler = Self {
            num_train_timesteps: json.get_or("num_train_timesteps", 1000)?,
            shift: json.get_or("shift", 1.0)?,
            use_dynamic_shifting: json.get_or("use_dynamic_shifting", false)?,
            base_shift: json.get_or("base_shift", 0.5)?,
            max_shift: json.get_or("max_shift", 1.15)?,
            base_image_seq_len: json.get_or("base_image_seq_len", 256)?,
            max_image_seq_len: json.get_or("max_image_seq_len", 4096)?,
            // The original treats 0 as absent.
            shift_terminal: json.optional("shift_terminal")?.filter(|&t| t != 0.0),
            time_shift_type,
        };
        if scheduler.num_train_timesteps == 0 {
            return Err(json.bad_value("num_train_timesteps", "at least 1", 0));
        }
        if scheduler.base_image_seq_len >= scheduler.max_image_seq_len {
            let expected = format!("more than base_image_seq_len {}", scheduler.base_image_seq_len);
            return Err(json.bad_value("max_image_seq_len", expected, scheduler.max_image_seq_len));
        }
        match scheduler.shift_terminal {
            Some(terminal) if !(0.0..1.0).contains(&terminal) => {
                Err(json.bad_value("shift_terminal", "a sigma in [0, 1)", terminal))
            }
            _ if scheduler.shift <= 0.0 => Err(json.bad_value("shift", "a positive number", scheduler.shift)),
            _ => Ok(scheduler),
        }
    }

    /// The shift for an image of `image_seq_len` tokens (2x2 latents each): linear through the two given points, and
    /// not clamped beyond them.
    pub fn mu(&self, image_seq_len: usize) -> f64 {
        let slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len) as f64;
        image_seq_len as f64 * slope + (self.base_shift - slope * self.base_image_seq_len as f64)
    }

    /// Bends one noise level by `mu`, in the form that the config asks for.
    pub fn time_shift(&self, mu: f64, sigma: f64) -> f64 {
        let strength = self.time_shift_strength(mu);
        strength / (strength + (1.0 / sigma - 1.0))
    }

    fn time_shift_strength(&self, mu: f64) -> f64 {
        match self.time_shift_type {
            TimeShift::Exponential => mu.exp(),
            TimeShift::Linear => mu,
        }
    }

    /// The noise levels of a sampling run of `num_steps` steps over an image of `image_seq_len` tokens: `num_steps`
    /// falling values and a final 0.
    ///
    /// Evenly spaced from 1 to `1/num_steps`, shifted, then stretched so that the last one is `shift_terminal`. In
    /// f32, operation by operation as the original. A single step starts from 1, where the original divides 0 by 0.
    pub fn inference_sigmas(&self, num_steps: usize, image_seq_len: usize) -> Vec<f32> {
        let last = 1.0 / num_steps as f64;
        let spacing = (last - 1.0) / (num_steps.max(2) - 1) as f64;
        let mut sigmas: Vec<f32> = (0..num_steps).map(|i| (1.0 + spacing * i as f64) as f32).collect();
        if self.use_dynamic_shifting {
            let strength = self.time_shift_strength(self.mu(image_seq_len)) as f32;
            sigmas.iter_mut().for_each(|s| *s = strength / (strength + (1.0 / *s - 1.0)));
        } else {
            let shift = self.shift as f32;
            sigmas.iter_mut().for_each(|s| *s = shift * *s / (1.0 + (shift - 1.0) * *s));
        }
        if let (Some(terminal), Some(&last)) = (self.shift_terminal, sigmas.last())
            && last < 1.0
        {
            let stretch = (1.0 - last) / (1.0 - terminal) as f32;
            sigmas.iter_mut().for_each(|s| *s = 1.0 - (1.0 - *s) / stretch);
        }
        sigmas.push(0.0);
        sigmas
    }

    /// The table of noise levels that training by timestep index draws from: `num_train_timesteps` values from 1 to
    /// `1/num_train_timesteps`, with the fixed shift unless shifting is dynamic.
    pub fn training_sigmas(&self) -> Vec<f32> {
        let count = self.num_train_timesteps;
        let shift = self.shift as f32;
        let table = (1..=count).rev().map(|t| t as f32 / count as f32);
        if self.use_dynamic_shifting {
            table.collect()
        } else {
            table.map(|s| shift * s / (1.0 + (shift - 1.0) * s)).collect()
        }
    }

    /// The timestep of a noise level. The transformer is given the timestep divided by 1000.
    pub fn timestep(&self, sigma: f32) -> f32 {
        sigma * self.num_train_timesteps as f32
    }
}

/// One Euler step along the predicted velocity `noise - clean`: `sample + (next_sigma - sigma) * velocity`, in f32.
///
/// Shapes: `sample` and `velocity` alike, any; f32.
pub fn euler_step(sample: &Tensor, velocity: &Tensor, sigma: f32, next_sigma: f32) -> Result<Tensor> {
    let step = velocity.affine(f64::from(next_sigma - sigma), 0.0)?;
    Ok((sample + step)?)
}

const CLASS: &str = "FlowMatchEulerDiscreteScheduler";

#[cfg(test)]
mod tests {
    use super::*;

    /// `scheduler/scheduler_config.json` of the published model.
    const PUBLISHED: &str = r#"{"_class_name":"FlowMatchEulerDiscreteScheduler","base_image_seq_len":256,
        "base_shift":0.5,"invert_sigmas":false,"max_image_seq_len":8192,"max_shift":0.9,"num_train_timesteps":1000,
        "shift":1.0,"shift_terminal":0.02,"stochastic_sampling":false,"time_shift_type":"exponential",
        "use_beta_sigmas":false,"use_dynamic_shifting":true,"use_exponential_sigmas":false,"use_karras_sigmas":false}"#;

    fn parse(text: &str) -> Result<FlowMatchEuler> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scheduler_config.json");
        std::fs::write(&path, text).unwrap();
        FlowMatchEuler::from_file(&path)
    }

    #[test]
    fn mu_is_that_of_the_published_model() {
        let scheduler = parse(PUBLISHED).unwrap();
        // (512/16)^2, (1328/16)^2 tokens; values recorded from diffusers 0.42.1.
        assert!((scheduler.mu(1024) - 0.5387096774193548).abs() < 1e-12);
        assert!((scheduler.mu(6889) - 0.8343245967741936).abs() < 1e-12);
        // shift of 1024 x 1024: e^mu = 2.0008.
        let shifted = scheduler.time_shift(scheduler.mu(4096), 0.5);
        assert!((shifted - 2.0008 / 3.0008).abs() < 1e-5, "{shifted}");
    }

    #[test]
    fn sampling_starts_at_one_and_ends_at_the_terminal_then_zero() {
        let scheduler = parse(PUBLISHED).unwrap();
        let sigmas = scheduler.inference_sigmas(20, 4096);
        assert_eq!((sigmas.len(), sigmas[0], sigmas[20]), (21, 1.0, 0.0));
        assert!((sigmas[19] - 0.02).abs() < 1e-6);
        assert!(sigmas.windows(2).all(|w| w[0] > w[1]));
        assert_eq!(scheduler.inference_sigmas(1, 4096), [1.0, 0.0]);
    }

    #[test]
    fn the_fixed_shift_counts_only_without_dynamic_shifting() {
        let fixed = PUBLISHED.replace("\"shift\":1.0", "\"shift\":3.0");
        assert_eq!(parse(&fixed).unwrap().training_sigmas()[499], 0.501);
        let fixed = fixed.replace("_shifting\":true", "_shifting\":false").replace("0.02", "null");
        let fixed = parse(&fixed).unwrap();
        let table = fixed.training_sigmas();
        assert_eq!((table.len(), table[0]), (1000, 1.0));
        assert!((table[500] - 0.75).abs() < 1e-7, "3 * 0.5 / (1 + 2 * 0.5)");
        assert!((fixed.inference_sigmas(2, 99)[1] - 0.75).abs() < 1e-7);
        let linear = parse(&PUBLISHED.replace("exponential\",", "linear\",")).unwrap();
        assert!((linear.time_shift(2.0, 0.5) - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        for (from, to, word) in [
            ("use_karras_sigmas\":false", "use_karras_sigmas\":true", "`use_karras_sigmas`"),
            ("stochastic_sampling\":false", "stochastic_sampling\":true", "`stochastic_sampling`"),
            ("exponential\",", "cubic\",", "expected exponential or linear, found cubic"),
            ("FlowMatchEulerDiscreteScheduler", "DDIMScheduler", "found DDIMScheduler"),
            ("\"shift\":1.0", "\"shift\":\"big\"", "`shift`"),
        ] {
            let error = parse(&PUBLISHED.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn an_exact_velocity_is_integrated_exactly() {
        let cpu = &candle_core::Device::Cpu;
        let clean = Tensor::new(&[1f32, -2.0, 0.5], cpu).unwrap();
        let noise = Tensor::new(&[0.25f32, 3.0, -1.0], cpu).unwrap();
        let velocity = (&noise - &clean).unwrap();
        let sigmas = parse(PUBLISHED).unwrap().inference_sigmas(4, 16);
        let end = sigmas.windows(2).fold(noise, |x, s| euler_step(&x, &velocity, s[0], s[1]).unwrap());
        for (a, b) in end.to_vec1::<f32>().unwrap().iter().zip(clean.to_vec1::<f32>().unwrap()) {
            assert!((a - b).abs() < 1e-6);
        }
    }
}
