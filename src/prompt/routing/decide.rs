//! Choosing adapters for a prompt.

use crate::error::{Error, Result, nearest};
use crate::prompt::routing::tag::{Tag, take_tags};
use crate::prompt::routing::words::{Words, normalise};
use crate::prompt::routing::{Route, Routes};
use serde::Serialize;
use std::fmt;

/// Routes, ready for prompts.
pub struct Router {
    routes: Routes,
    words: Words,
    /// For each word: the adapter, and what the word adds to its score, or `None` if it rules it out.
    meanings: Vec<(usize, Option<f64>)>,
}

/// What was decided for one prompt.
#[derive(Clone, Debug, Serialize)]
pub struct Decision {
    /// The prompt without its tags.
    pub prompt: String,
    /// Every adapter of the routes file, in its order.
    pub candidates: Vec<Candidate>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// An adapter, and what speaks for and against it.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Sum of the scores of the words found.
    pub score: f64,
    /// Words found that call for it.
    pub triggers: Vec<String>,
    /// Words found that rule it out.
    pub negative_triggers: Vec<String>,
    /// The outcome.
    pub verdict: Verdict,
}

/// Whether an adapter is taken, and why.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "is", content = "of")]
pub enum Verdict {
    /// The prompt names it.
    Named {
        /// Factor on what it adds.
        weight: f64,
    },
    /// Its words call for it.
    Taken {
        /// Factor on what it adds.
        weight: f64,
    },
    /// The prompt names it with weight 0.
    TurnedOff,
    /// Its score does not reach the threshold.
    BelowThreshold,
    /// A word rules it out.
    RuledOut,
    /// This one of its group came first.
    GroupTaken(String),
    /// As many as may be taken came first.
    Full,
    /// The adapters that the prompt names leave no weight for it.
    NoWeightLeft,
}

impl Verdict {
    /// The weight, if it is taken.
    pub fn weight(&self) -> Option<f64> {
        match self {
            Self::Named { weight } | Self::Taken { weight } => Some(*weight),
            _ => None,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named { weight } => write!(f, "weight {weight}: the prompt names it"),
            Self::Taken { weight } => write!(f, "weight {weight}"),
            Self::TurnedOff => f.write_str("off: the prompt names it with weight 0"),
            Self::BelowThreshold => f.write_str("no: below the threshold"),
            Self::RuledOut => f.write_str("no: ruled out"),
            Self::GroupTaken(by) => write!(f, "no: `{by}` of the same group comes first"),
            Self::Full => f.write_str("no: enough adapters come first"),
            Self::NoWeightLeft => f.write_str("no: the prompt's own adapters leave no weight"),
        }
    }
}

impl Router {
    /// A router for these routes.
    pub fn new(routes: Routes) -> Self {
        let mut texts = Vec::new();
        let mut meanings = Vec::new();
        for (i, route) in routes.adapters.iter().enumerate() {
            for trigger in &route.triggers {
                texts.push(trigger.text.as_str());
                meanings.push((i, Some(trigger.score)));
            }
            for text in &route.negative_triggers {
                texts.push(text);
                meanings.push((i, None));
            }
        }
        let words = Words::new(texts);
        Self { words, meanings, routes }
    }

    /// The adapters, in the order of [`Decision::candidates`].
    pub fn adapters(&self) -> &[Route] {
        &self.routes.adapters
    }

    /// Decides for a prompt. Errors (usage): a tag that names no adapter, or a bad weight.
    pub fn decide(&self, prompt: &str) -> Result<Decision> {
        let (prompt, tags) = take_tags(prompt)?;
        let mut candidates = self.score(&prompt);
        let mut notes = Vec::new();
        for tag in tags {
            let i = self.find(&tag)?;
            let weight = tag.weight.unwrap_or(self.routes.adapters[i].weight);
            candidates[i].verdict = if weight == 0.0 { Verdict::TurnedOff } else { Verdict::Named { weight } };
        }
        let named: Vec<usize> = taken(&candidates).map(|(i, _)| i).collect();
        let named_weight: f64 = taken(&candidates).map(|(_, weight)| weight.abs()).sum();
        if named.len() > self.routes.max_adapters {
            notes.push(format!("the prompt names {} adapters, more than {}", named.len(), self.routes.max_adapters));
        }
        if named_weight > self.routes.max_weight {
            notes.push(format!(
                "the weights that the prompt names add up to {}, more than {}",
                short(named_weight),
                self.routes.max_weight
            ));
        }
        self.choose(&mut candidates, named);
        notes.extend(self.limit_weights(&mut candidates, named_weight));
        Ok(Decision { prompt, candidates, notes })
    }

    /// What the words of the prompt say of each adapter; the verdict is a rejection until it is chosen.
    fn score(&self, prompt: &str) -> Vec<Candidate> {
        let mut candidates: Vec<Candidate> = self
            .routes
            .adapters
            .iter()
            .map(|route| Candidate {
                name: route.name(),
                score: 0.0,
                triggers: Vec::new(),
                negative_triggers: Vec::new(),
                verdict: Verdict::BelowThreshold,
            })
            .collect();
        for word in self.words.find(prompt) {
            let (adapter, score) = self.meanings[word];
            let candidate = &mut candidates[adapter];
            let text = self.words.word(word).to_string();
            match score {
                Some(score) => {
                    candidate.score += score;
                    candidate.triggers.push(text);
                }
                None => {
                    candidate.negative_triggers.push(text);
                    candidate.verdict = Verdict::RuledOut;
                }
            }
        }
        candidates
    }

    fn find(&self, tag: &Tag) -> Result<usize> {
        let names: Vec<String> = self.routes.adapters.iter().map(Route::name).collect();
        let wanted = normalise(&tag.name);
        names.iter().position(|name| normalise(name) == wanted).ok_or_else(|| {
            let error = Error::usage(format!("the prompt names an adapter `{}` that the routes do not have", tag.name));
            match nearest(&tag.name, names.iter().map(String::as_str)) {
                Some(near) => error.hint(format!("the nearest one is `{near}`")),
                None => error.detail(format!("known: {}", names.join(", "))),
            }
        })
    }

    /// Takes adapters whose score suffices, best first: by priority, score, place in the file.
    fn choose(&self, candidates: &mut [Candidate], mut chosen: Vec<usize>) {
        let routes = &self.routes.adapters;
        let suffices = |c: &Candidate| c.verdict == Verdict::BelowThreshold && c.score >= self.routes.threshold;
        let mut order: Vec<usize> = (0..candidates.len()).filter(|&i| suffices(&candidates[i])).collect();
        order.sort_by(|&a, &b| {
            let key = |i: usize| (routes[i].priority, candidates[i].score);
            key(b).partial_cmp(&key(a)).expect("priorities and scores are finite").then(a.cmp(&b))
        });
        for i in order {
            let rival =
                chosen.iter().find(|&&other| routes[i].group.is_some() && routes[other].group == routes[i].group);
            candidates[i].verdict = match rival {
                Some(&other) => Verdict::GroupTaken(candidates[other].name.clone()),
                None if chosen.len() >= self.routes.max_adapters => Verdict::Full,
                None => {
                    chosen.push(i);
                    Verdict::Taken { weight: routes[i].weight }
                }
            };
        }
    }

    /// Scales the taken weights down to what the named ones leave of `max_weight`. Says so.
    fn limit_weights(&self, candidates: &mut [Candidate], named_weight: f64) -> Option<String> {
        let amounts =
            candidates.iter().map(|c| if let Verdict::Taken { weight } = c.verdict { weight.abs() } else { 0.0 });
        let sum: f64 = amounts.sum();
        let left = (self.routes.max_weight - named_weight).max(0.0);
        // Weights such as 0.8 + 0.4 may add up to a little more than 1.2.
        if sum <= left + 1e-9 {
            return None;
        }
        for candidate in candidates {
            if let Verdict::Taken { weight } = candidate.verdict {
                let weight = (weight * left / sum * 1e6).round() / 1e6;
                candidate.verdict = if weight == 0.0 { Verdict::NoWeightLeft } else { Verdict::Taken { weight } };
            }
        }
        Some(format!("weights scaled down: they would add up to {}, and {} is left", short(sum), short(left)))
    }
}

impl Decision {
    /// Indices of the adapters that are taken, with their weights.
    pub fn taken(&self) -> impl Iterator<Item = (usize, f64)> + '_ {
        taken(&self.candidates)
    }

    /// Why, in lines for a person.
    pub fn explanation(&self) -> Vec<String> {
        let mut lines = vec![format!("prompt: {}", self.prompt)];
        let width = self.candidates.iter().map(|c| c.name.chars().count()).max().unwrap_or_default();
        for c in &self.candidates {
            let list = |label: &str, words: &[String]| match words {
                [] => String::new(),
                words => format!("; {label} {}", words.join(", ")),
            };
            let score = format!("score {}", short(c.score));
            let words = list("found", &c.triggers) + &list("ruled out by", &c.negative_triggers);
            lines.push(format!("  {:width$}  {} ({score}{words})", c.name, c.verdict));
        }
        lines.extend(self.notes.iter().map(|note| format!("  note: {note}")));
        lines
    }
}

fn taken(candidates: &[Candidate]) -> impl Iterator<Item = (usize, f64)> + '_ {
    candidates.iter().enumerate().filter_map(|(i, c)| c.verdict.weight().map(|weight| (i, weight)))
}

/// A number without the noise of binary fractions.
fn short(x: f64) -> f64 {
    (x * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::routing::tests::routes;

    const ROUTES: &str = "
adapters:
  - {file: anime.st, triggers: [动漫, 二次元, anime], negative_triggers: [照片, photo], group: style}
  - {file: ink.st, triggers: [水墨, ink wash], weight: 0.6, group: style, priority: 1}
  - {file: hands.st, triggers: [手, {text: hands, score: 0.5}], weight: 0.5}
  - {file: mecha.st, name: 机甲, triggers: [机甲, 机械], weight: 0.4}
  - {file: night.st, triggers: [夜, night], weight: -0.3}
";

    fn router() -> Router {
        Router::new(routes(ROUTES).unwrap())
    }

    fn taken(prompt: &str) -> Vec<(String, f64)> {
        let decision = router().decide(prompt).unwrap();
        decision.taken().map(|(i, weight)| (decision.candidates[i].name.clone(), weight)).collect()
    }

    fn verdict(prompt: &str, name: &str) -> Verdict {
        let decision = router().decide(prompt).unwrap();
        decision.candidates.into_iter().find(|c| c.name == name).unwrap().verdict
    }

    fn list(expected: &[(&str, f64)]) -> Vec<(String, f64)> {
        expected.iter().map(|(name, weight)| ((*name).to_string(), *weight)).collect()
    }

    #[test]
    fn words_call_for_adapters_and_rule_them_out() {
        assert_eq!(taken("一个二次元女孩"), list(&[("anime", 0.8)]));
        assert_eq!(taken("an ANIME girl"), list(&[("anime", 0.8)]));
        assert_eq!(taken("二次元女孩的照片"), []);
        assert_eq!(verdict("二次元女孩的照片", "anime"), Verdict::RuledOut);
        assert_eq!(taken("a red ball"), []);
        // A word counts once, and half a score is below the threshold.
        assert_eq!(verdict("hands, hands, hands", "hands"), Verdict::BelowThreshold);
        assert_eq!(taken("hands, 手"), list(&[("hands", 0.5)]));
    }

    #[test]
    fn priority_group_number_and_sum_are_limits() {
        assert_eq!(taken("水墨动漫二次元"), list(&[("ink", 0.6)]));
        assert_eq!(verdict("水墨动漫二次元", "anime"), Verdict::GroupTaken("ink".into()));
        // 0.6 + 0.5 + 0.4 is scaled to 1.2; the fourth is one too many.
        assert_eq!(taken("水墨，手，机甲，夜"), list(&[("ink", 0.48), ("hands", 0.4), ("机甲", 0.32)]));
        assert_eq!(verdict("水墨，手，机甲，夜", "night"), Verdict::Full);
        // The amount of a negative weight counts.
        assert_eq!(taken("动漫的夜"), list(&[("anime", 0.8), ("night", -0.3)]));
        assert_eq!(taken("anime night, 机甲"), list(&[("anime", 0.64), ("机甲", 0.32), ("night", -0.24)]));
    }

    #[test]
    fn what_the_prompt_names_wins() {
        // Against a negative trigger, against the group, with its own weight; and the rest is scaled.
        let decision = router().decide("水墨画的照片, <lora:anime:1.0>, 机械手").unwrap();
        assert_eq!(decision.prompt, "水墨画的照片, 机械手");
        assert_eq!(
            taken("水墨画的照片, <lora:anime:1.0>, 机械手"),
            list(&[("anime", 1.0), ("hands", 0.111111), ("机甲", 0.088889)])
        );
        assert_eq!(verdict("水墨画的照片, <lora:anime:1.0>, 机械手", "ink"), Verdict::GroupTaken("anime".into()));
        assert_eq!(verdict("<lora:anime:1.5> 手", "hands"), Verdict::NoWeightLeft);
        assert_eq!(taken("<lora:anime:1.5> 手"), list(&[("anime", 1.5)]));
        assert_eq!(verdict("动漫 <lora:ANIME:0>", "anime"), Verdict::TurnedOff);
        assert_eq!(taken("<lora:机甲>"), list(&[("机甲", 0.4)]));
        let error = router().decide("<lora:anima:1>").unwrap_err().to_string();
        assert!(error.contains("`anima`") && error.contains("nearest one is `anime`"), "{error}");
    }

    #[test]
    fn every_adapter_is_explained() {
        let lines = router().decide("水墨，手，机甲，夜, anime photo").unwrap().explanation().join("\n");
        for part in [
            "prompt: 水墨，手，机甲，夜, anime photo",
            "anime  no: ruled out (score 1; found anime; ruled out by photo)",
            "ink    weight 0.48 (score 1; found 水墨)",
            "night  no: enough adapters come first (score 1; found 夜)",
            "note: weights scaled down: they would add up to 1.5, and 1.2 is left",
        ] {
            assert!(lines.contains(part), "{part}\n{lines}");
        }
    }
}
