//! `{a|b|c}` in a text: one of the alternatives, chosen by a seed.

use crate::rng::{Purpose, Stream};

/// Chooses alternatives, one after the other.
pub struct Chooser {
    stream: Stream,
}

impl Chooser {
    /// The choices for prompt number `index` of a batch.
    pub fn new(seed: u64, index: u64) -> Self {
        Self { stream: Stream::new(seed, 0, index, Purpose::Prompts) }
    }

    /// `text` with one alternative in place of each `{a|b|c}`, the innermost first. Braces without a `|` stay.
    pub fn one(&mut self, text: &str) -> String {
        let mut text = text.to_string();
        // Where the search goes on: braces before it hold no alternatives.
        let mut from = 0;
        while let Some(close) = text[from..].find('}').map(|i| from + i) {
            let open = text[..close].rfind('{').filter(|&open| text[open..close].contains('|'));
            match open {
                Some(open) => {
                    let choices: Vec<&str> = text[open + 1..close].split('|').collect();
                    let choice = choices[self.stream.below(choices.len())].to_string();
                    text.replace_range(open..=close, &choice);
                    from = open + choice.len();
                }
                None => from = close + 1,
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_alternative_is_chosen_by_some_index_and_the_same_again() {
        let text = "{蓝色|红色|银色}长发, {a {big|small} cat|no cat}, {plain}, }{";
        let all: BTreeSet<String> = (0..200).map(|i| Chooser::new(3, i).one(text)).collect();
        assert_eq!(all.len(), 9);
        assert!(all.contains("银色长发, a small cat, {plain}, }{"), "{all:?}");
        assert_eq!(Chooser::new(3, 7).one(text), Chooser::new(3, 7).one(text));
        let seeds: BTreeSet<String> = (0..50).map(|seed| Chooser::new(seed, 0).one(text)).collect();
        assert!(seeds.len() > 3);
    }
}
