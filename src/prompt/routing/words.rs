//! Finding words in prompts.

use aho_corasick::AhoCorasick;
use unicode_normalization::UnicodeNormalization;

/// NFKC (full-width letters become plain ones), lower case, single spaces, none at the ends.
pub fn normalise(text: &str) -> String {
    let folded: String = text.nfkc().flat_map(char::to_lowercase).nfkc().collect();
    folded.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Many words, looked for together.
pub struct Words {
    automaton: AhoCorasick,
    /// Normalised, in the order they were given.
    words: Vec<String>,
}

impl Words {
    /// `words` must not be empty strings after [`normalise`].
    pub fn new<'a>(words: impl IntoIterator<Item = &'a str>) -> Self {
        let words: Vec<String> = words.into_iter().map(normalise).collect();
        let automaton = AhoCorasick::new(&words).expect("a few words are far below the automaton's limits");
        Self { automaton, words }
    }

    /// Which words stand in `text`, as indices, in order. Where several overlap, the one that begins first counts, and of
    /// those that begin together the longest. Equal words are found together.
    pub fn find(&self, text: &str) -> Vec<usize> {
        let text = normalise(text);
        let mut matches: Vec<_> = self
            .automaton
            .find_overlapping_iter(&text)
            .filter(|m| stands_alone(&text, m.start(), m.end()))
            .map(|m| (m.start(), m.end(), m.pattern().as_usize()))
            .collect();
        matches.sort_by_key(|&(start, end, word)| (start, std::cmp::Reverse(end), word));
        let mut found = Vec::new();
        let mut taken = (0, 0);
        for (start, end, word) in matches {
            if start >= taken.1 {
                taken = (start, end);
            }
            if (start, end) == taken {
                found.push(word);
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// The normalised word.
    pub fn word(&self, index: usize) -> &str {
        &self.words[index]
    }
}

/// Whether no letter of a word in a script with spaces is cut off at either end: `cat` does not stand in `scatter`,
/// 猫 stands in 小猫咪, `cat` stands in 画cat图.
fn stands_alone(text: &str, start: usize, end: usize) -> bool {
    let inside = &text[start..end];
    let cuts = |a: Option<char>, b: Option<char>| a.is_some_and(is_spaced) && b.is_some_and(is_spaced);
    !cuts(text[..start].chars().next_back(), inside.chars().next())
        && !cuts(inside.chars().next_back(), text[end..].chars().next())
}

/// A letter or digit of a script that puts spaces between words.
fn is_spaced(c: char) -> bool {
    let unspaced = matches!(u32::from(c),
        0x0E00..=0x0EFF | 0x1000..=0x109F | 0x1780..=0x17FF // Thai, Lao, Burmese, Khmer
        | 0x2E80..=0x9FFF | 0xAC00..=0xD7FF | 0xF900..=0xFAFF // Chinese, kana; Hangul, whose particles follow unspaced
        | 0x20000..=0x3FFFF);
    (c.is_alphanumeric() || c == '_') && !unspaced
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(words: &[&str], text: &str) -> Vec<String> {
        let words = Words::new(words.iter().copied());
        words.find(text).into_iter().map(|i| words.word(i).to_string()).collect()
    }

    #[test]
    fn chinese_anywhere_and_latin_as_whole_words() {
        assert_eq!(find(&["猫", "cat"], "一只小猫咪"), ["猫"]);
        assert_eq!(find(&["猫", "cat"], "scatter concatenate cats"), [""; 0]);
        assert_eq!(find(&["cat"], "画Cat图"), ["cat"]);
        assert_eq!(find(&["cat"], "a CAT."), ["cat"]);
        assert_eq!(find(&["pixel art"], "Pixel  Art, ＰＩＸＥＬ　ＡＲＴ"), ["pixel art"]);
        assert_eq!(find(&["2d"], "a 2D game, not 32d"), ["2d"]);
        assert_eq!(find(&["café"], "CAFE\u{301} at night"), ["café"]);
    }

    #[test]
    fn the_longer_of_overlapping_words_counts() {
        assert_eq!(find(&["猫", "熊猫"], "一只熊猫"), ["熊猫"]);
        assert_eq!(find(&["猫", "熊猫"], "一只熊猫和一只猫"), ["猫", "熊猫"]);
        assert_eq!(find(&["动漫", "动漫风格"], "动漫风格的女孩"), ["动漫风格"]);
        // A longer word that does not stand alone does not hide the shorter one.
        assert_eq!(find(&["red cat", "red"], "red cats"), ["red"]);
        // Equal words (of two adapters) are both found.
        assert_eq!(find(&["猫", "猫"], "猫"), ["猫", "猫"]);
    }
}
