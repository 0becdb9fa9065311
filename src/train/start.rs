//! Where a run stands: fresh, after a checkpoint, finished, or refused. Looks, and changes nothing.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::progress::tell;
use crate::train::checkpoint::{Checkpoint, State};
use crate::train::run_dir::{Found, RunDir};
use candle_core::Device;

/// Where a run begins.
pub enum Start {
    /// At step 0.
    Fresh,
    /// After a checkpoint.
    From(Box<Checkpoint>),
    /// It has reached its last step already.
    Finished(State),
}

impl Start {
    /// Looks into the run directory and decides, without changing anything there. What `config` leaves open is taken over from
    /// the config of the run.
    ///
    /// Errors (usage): an existing run without `resume`, another config, no whole checkpoint among those there.
    pub fn decide(dir: &RunDir, config: &mut Config, resume: bool) -> Result<Self> {
        let found = dir.look()?;
        if !resume && found != Found::Empty {
            return Err(occupied(dir, &found));
        }
        match found {
            Found::Empty => Ok(Self::Fresh),
            Found::Started => {
                if let Ok(text) = std::fs::read_to_string(dir.config()) {
                    refuse_differences(dir, config, &text)?;
                }
                Ok(Self::Fresh)
            }
            Found::Checkpoints(steps) => {
                let newest = *steps.last().expect("a list of checkpoints is not empty");
                let state = State::load(&dir.checkpoint(newest));
                if let Ok(state) = &state {
                    refuse_differences(dir, config, &state.config)?;
                    if state.step == state.max_steps {
                        return Ok(Self::Finished(state.clone()));
                    }
                }
                last_whole(dir, config, &steps)
            }
        }
    }

    /// Refuses to go on with other images, captions or base weights.
    pub fn check_inputs(&self, dir: &RunDir, dataset_hash: &str, base_fingerprint: &str) -> Result<()> {
        let state = match self {
            Self::Fresh => return Ok(()),
            Self::From(checkpoint) => &checkpoint.state,
            Self::Finished(state) => state,
        };
        for (what, changed, saved, now) in [
            ("dataset", "images or captions were added, removed or changed", &state.dataset_hash, dataset_hash),
            ("base model", "its config or weights are others", &state.base_fingerprint, base_fingerprint),
        ] {
            if saved != now {
                return Err(Error::usage(format!("the run in `{}` has another {what}", dir.root().display()))
                    .detail(changed)
                    .expected(format!("the fingerprint {}", short(saved)), short(now))
                    .hint("restore it to continue this run, or give a new run another `output`"));
            }
        }
        Ok(())
    }
}

/// Why nothing is started in a folder that is not empty.
fn occupied(dir: &RunDir, found: &Found) -> Error {
    let root = dir.root().display();
    let newest = match found {
        Found::Checkpoints(steps) => steps.last().and_then(|&step| State::load(&dir.checkpoint(step)).ok()),
        Found::Empty | Found::Started => None,
    };
    match newest {
        Some(state) if state.step == state.max_steps => {
            Error::usage(format!("there is a finished run in `{root}`")).hint("give this one another `output`")
        }
        Some(state) => Error::usage(format!("there is a run in `{root}`"))
            .detail(format!("its last checkpoint is at step {} of {}", state.step, state.max_steps))
            .hint("continue it with `--resume auto`, or give this one another `output`"),
        None if !matches!(found, Found::Checkpoints(_)) && !dir.config().exists() => {
            Error::usage(format!("the output folder `{root}` is not empty and holds no run"))
                .hint("give another `output`")
        }
        None => Error::usage(format!("there is a run in `{root}`"))
            .detail("it has no whole checkpoint")
            .hint("`--resume auto` starts it again, or give this one another `output`"),
    }
}

/// The beginning of a hash, enough to tell two apart.
fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

fn last_whole(dir: &RunDir, config: &mut Config, steps: &[u64]) -> Result<Start> {
    let mut damage = Vec::new();
    for &step in steps.iter().rev() {
        match Checkpoint::load(&dir.checkpoint(step), &Device::Cpu) {
            Ok(checkpoint) => {
                damage
                    .iter()
                    .for_each(|line| tell(format_args!("note: a newer checkpoint is damaged and not used: {line}")));
                refuse_differences(dir, config, &checkpoint.state.config)?;
                return Ok(Start::From(Box::new(checkpoint)));
            }
            // Its hint is about files that are given, not about ours.
            Err(error) => damage.extend(error.to_string().lines().next().map(str::to_string)),
        }
    }
    let error = Error::usage(format!("no checkpoint in `{}` is whole", dir.checkpoints().display()));
    let error = damage.into_iter().fold(error, Error::detail);
    Err(error.hint("put back a copy of one, or start a new run with another `output`"))
}

fn refuse_differences(dir: &RunDir, config: &mut Config, saved: &str) -> Result<()> {
    let saved = Config::parse(saved, &dir.config(), &[])?;
    config.take_over(&saved);
    let differences = config.differences(&saved);
    if differences.is_empty() {
        return Ok(());
    }
    let error = Error::usage(format!("the run in `{}` has another config", dir.root().display()));
    let error = differences.into_iter().fold(error, |e, line| e.detail(line));
    Err(error.hint("restore these values to continue it, or give a new run another `output`"))
}
