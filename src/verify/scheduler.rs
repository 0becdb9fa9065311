//! `sched.*`: the noise levels of sampling at several sizes and numbers of steps, and the training table.

use super::{Case, Computed};
use crate::error::{Error, Result};
use crate::flow::FlowMatchEuler;

pub(super) fn run(case: &Case) -> Result<Vec<Computed>> {
    let scheduler = FlowMatchEuler::from_file(&case.model.join("scheduler/scheduler_config.json"))?;
    let mut computed = Vec::new();
    for name in case.golden.names().into_iter().filter(|n| n.starts_with("sched.")) {
        let sigmas = match name.split('.').collect::<Vec<_>>()[1..] {
            ["train", _] => scheduler.training_sigmas(),
            [size, steps, _] => {
                let (width, height, steps) = parse(size, steps).ok_or_else(|| {
                    Error::usage(format!("cannot replay `{name}`")).expected("sched.WIDTHxHEIGHT.STEPS.*", &name)
                })?;
                scheduler.inference_sigmas(steps, (width / 16) * (height / 16))
            }
            _ => continue,
        };
        // Sampling visits no timestep for the final 0.
        let num_timesteps = sigmas.len() - usize::from(!name.starts_with("sched.train."));
        computed.push(if name.ends_with("timesteps") {
            Computed::floats(name, sigmas[..num_timesteps].iter().map(|&s| scheduler.timestep(s)))?
        } else {
            Computed::floats(name, sigmas)?
        });
    }
    Ok(computed)
}

fn parse(size: &str, steps: &str) -> Option<(usize, usize, usize)> {
    let (width, height) = size.split_once('x')?;
    Some((width.parse().ok()?, height.parse().ok()?, steps.parse().ok().filter(|&n| n > 0)?))
}
