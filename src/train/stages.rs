//! The course of a run: the stage that each step belongs to, and what that stage trains. A pure function of the
//! config, the images and the model, so that a resumed run finds itself in the right stage.

use crate::adapters::{ModuleInfo, select_modules};
use crate::config::{Config, TrainingMode};
use crate::data::{Plan, Sample};
use crate::error::{Error, Result};
use crate::model::transformer::TransformerConfig;
use crate::train::structured::TermWeights;
use crate::train::{setup, structured_setup};
use candle_core::Tensor;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Values each of which holds from a number on, until the next one takes over.
#[derive(Debug)]
pub struct Timeline<T>(Vec<(u64, T)>);

impl<T> Timeline<T> {
    /// `first` from the beginning on.
    pub fn new(first: T) -> Self {
        Self(vec![(0, first)])
    }

    /// `value` from `start` on, which lies behind the starts so far; at 0 it replaces the first value.
    pub fn then(&mut self, start: u64, value: T) {
        if start == 0 {
            self.0.clear();
        }
        debug_assert!(self.0.last().is_none_or(|(last, _)| *last < start));
        self.0.push((start, value));
    }

    /// What holds at `n`.
    pub fn at(&self, n: u64) -> &T {
        &self.0[self.0.partition_point(|(start, _)| *start <= n) - 1].1
    }

    /// All values, in order.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|(_, value)| value)
    }

    /// What holds last.
    pub fn last(&self) -> &T {
        &self.0.last().expect("a timeline begins with a value").1
    }
}

/// A stage as it is trained.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Its name; none if the run has no stages.
    pub name: Option<String>,
    /// Its steps, from 0.
    pub steps: Range<u64>,
    /// Factor on the learning rate.
    pub learning_rate: f64,
    /// Shares of the terms of the loss.
    pub terms: TermWeights,
    /// The modules that go on learning; none: everything that the run trains.
    modules: Option<BTreeSet<String>>,
    /// What is special about it, in words.
    facts: Vec<String>,
}

/// The stages of a run, at least one; together they cover all steps.
#[derive(Clone, Debug)]
pub struct Course(Vec<Stage>);

impl Course {
    /// The stages of the config for this model and these batches.
    ///
    /// Errors (usage): `target_modules` of a stage that name nothing that the run trains.
    pub fn new(config: &Config, transformer: &TransformerConfig, plans: &Timeline<Arc<Plan>>) -> Result<Self> {
        let max_steps = config.training.max_steps;
        let spans = config.stages.spans(max_steps)?;
        if spans.is_empty() {
            let steps = 0..max_steps as u64;
            let terms = structured_setup::term_weights(config);
            let whole = Stage { name: None, steps, learning_rate: 1.0, terms, modules: None, facts: Vec::new() };
            return Ok(Self(vec![whole]));
        }
        let all = transformer.modules();
        let adapted: Vec<ModuleInfo> = match config.training.mode {
            TrainingMode::Full => all.clone(),
            TrainingMode::Lora => {
                let names: BTreeSet<String> =
                    setup::targets(config, transformer)?.into_iter().map(|t| t.name).collect();
                all.iter().filter(|m| names.contains(&m.name)).cloned().collect()
            }
        };
        let stage = |(i, (steps, stage)): (usize, (Range<u64>, &crate::config::Stage))| -> Result<Stage> {
            let key = format!("stages.{i}.target_modules");
            let modules = match &stage.target_modules {
                None => None,
                Some(patterns) => {
                    let chosen = select_modules(&adapted, patterns, &key).map_err(|error| {
                        let known = select_modules(&all, patterns, &key).is_ok() && !patterns.is_empty();
                        let of_stage = error.detail(format!("in the stage `{}`", stage.name));
                        match known {
                            true => {
                                of_stage.hint("a stage trains a part of what `lora.target_modules` names: add it there")
                            }
                            false => of_stage,
                        }
                    })?;
                    Some(chosen.into_iter().map(str::to_string).collect::<BTreeSet<_>>())
                }
            };
            let plan = plans.at(steps.start * config.training.gradient_accumulation as u64);
            let images = plan.training().map(|s| s.item).collect::<BTreeSet<_>>().len();
            let mut facts = vec![format!("{images} image{}", if images == 1 { "" } else { "s" })];
            if let Some(resolution) = &stage.resolution {
                let sides: Vec<String> = resolution.sides().iter().map(usize::to_string).collect();
                facts.push(format!("resolution {}", sides.join(" and ")));
            }
            if let Some(modules) = &modules {
                facts.push(format!("{} of {} modules", modules.len(), adapted.len()));
            }
            if stage.learning_rate != 1.0 {
                facts.push(format!("learning rate x {}", stage.learning_rate));
            }
            let regions = &stage.regions;
            for (what, weight) in [("person", regions.person), ("limbs", regions.limbs), ("hands", regions.hands)] {
                if let Some(weight) = weight.filter(|weight| weight.get() != 1.0) {
                    facts.push(format!("{what} x {}", weight.get()));
                }
            }
            if let Some(sigma) = stage.sigma {
                let (min, max) = sigma.get();
                facts.push(format!("noise levels {min} to {max}"));
            }
            let terms = structured_setup::stage_weights(config, stage);
            if terms != structured_setup::term_weights(config) {
                // Products of two decimals are no round numbers.
                let [reconstruction, pose, count] =
                    [terms.reconstruction, terms.pose, terms.count].map(|share| (share * 1e4).round() / 1e4);
                facts.push(format!("loss {reconstruction} reconstruction + {pose} pose + {count} count"));
            }
            let (name, learning_rate) = (Some(stage.name.clone()), stage.learning_rate);
            Ok(Stage { name, steps, learning_rate, terms, modules, facts })
        };
        Ok(Self(spans.into_iter().enumerate().map(stage).collect::<Result<_>>()?))
    }

    /// The stage of a step, counted from 0; the last one for the end of the run.
    pub fn at(&self, step: u64) -> &Stage {
        self.0.iter().find(|s| s.steps.contains(&step)).unwrap_or(&self.0[self.0.len() - 1])
    }

    /// The stages that have names, in order.
    pub fn named(&self) -> impl Iterator<Item = (&str, &Stage)> {
        self.0.iter().filter_map(|stage| Some((stage.name.as_deref()?, stage)))
    }

    /// One line about each named stage.
    pub fn lines(&self) -> Vec<String> {
        self.named().map(|(_, stage)| stage.to_string()).collect()
    }
}

impl Stage {
    /// Takes the gradients of what does not learn in this stage away. `names` are those of the parameters.
    pub fn freeze(&self, names: &[String], mut gradients: Vec<Option<Tensor>>) -> Vec<Option<Tensor>> {
        if let Some(modules) = &self.modules {
            for (gradient, name) in gradients.iter_mut().zip(names) {
                if !modules.contains(module_of(name)) {
                    *gradient = None;
                }
            }
        }
        gradients
    }
}

/// The module of a parameter: of an adapter's matrix (`attn.to_q.lora_A.weight`) or of a weight (`attn.to_q.weight`).
fn module_of(parameter: &str) -> &str {
    let adapter = parameter.find(".lora_").map(|at| &parameter[..at]);
    adapter.or(parameter.rsplit_once('.').map(|(module, _)| module)).unwrap_or(parameter)
}

impl Stage {
    /// Its steps and what is special about it, in words.
    pub fn description(&self) -> String {
        let steps = format!("steps {} to {}", self.steps.start + 1, self.steps.end);
        std::iter::once(&steps).chain(&self.facts).map(String::as_str).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name.as_deref().unwrap_or("the run"), self.description())
    }
}

/// The plan of each stage, by batch: consecutive stages with the same samples share one, so that a stage that changes
/// nothing about the images does not change their order either.
///
/// `samples_of` gives the samples of a stage. Errors (usage): a stage without an image to train on.
pub fn plans(
    config: &Config,
    base: &Arc<Plan>,
    base_samples: &[Sample],
    samples_of: impl Fn(&crate::config::Stage) -> Result<Vec<Sample>>,
) -> Result<Timeline<Arc<Plan>>> {
    let mut plans = Timeline::new(base.clone());
    let mut current = base_samples.to_vec();
    for (steps, stage) in config.stages.spans(config.training.max_steps)? {
        let samples = samples_of(stage)?;
        if samples == current {
            continue;
        }
        let start = steps.start * config.training.gradient_accumulation as u64;
        let next = plans.last().followed_by(&samples, start).ok_or_else(|| {
            let chosen = samples.iter().map(|s| s.item).collect::<BTreeSet<_>>().len();
            let error = Error::usage(format!("the stage `{}` has no image to train on", stage.name));
            match chosen {
                0 => error.detail("its `filter` selects none of the images"),
                n => error.detail(format!("its `filter` selects {n}, all of them held out")),
            }
            .hint("widen its `filter`, or remove the stage")
        })?;
        plans.then(start, Arc::new(next));
        current = samples;
    }
    Ok(plans)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_gives_what_holds() {
        let mut line = Timeline::new('a');
        line.then(3, 'b');
        line.then(5, 'c');
        assert_eq!([0, 2, 3, 4, 5, 99].map(|n| *line.at(n)), ['a', 'a', 'b', 'b', 'c', 'c']);
        let mut replaced = Timeline::new('a');
        replaced.then(0, 'b');
        assert_eq!((*replaced.at(0), *replaced.last()), ('b', 'b'));
    }

    #[test]
    fn a_parameter_belongs_to_its_module() {
        assert_eq!(module_of("blocks.0.attn.to_out.0.lora_A.weight"), "blocks.0.attn.to_out.0");
        assert_eq!(module_of("blocks.0.attn.to_out.0.bias"), "blocks.0.attn.to_out.0");
    }
}
