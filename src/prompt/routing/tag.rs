//! `<lora:name:0.7>` in a prompt.

use crate::error::{Error, Result};
use regex::Regex;
use std::sync::LazyLock;

/// Half-width and full-width brackets and colons, as Chinese input methods write them.
static TAG: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?i)[<＜]\s*lora\s*[:：]\s*([^:：<>＜＞]+?)\s*(?:[:：]\s*([^<>＜＞]*?)\s*)?[>＞]")
        .expect("a fixed pattern")
});

/// What a removed tag leaves behind: doubled commas, doubled spaces, commas at the ends.
static DOUBLED: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\s*([,，])(?:\s*[,，])+").expect("a fixed pattern"));
static SPACES: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"[ \t]{2,}").expect("a fixed pattern"));

/// An adapter that a prompt asks for by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Tag {
    /// As it is written.
    pub name: String,
    /// The weight, if there is one.
    pub weight: Option<f64>,
}

/// The prompt without its tags, and the tags. Errors (usage): a weight that is not a number from -100 to 100.
pub fn take_tags(prompt: &str) -> Result<(String, Vec<Tag>)> {
    let mut tags = Vec::new();
    for found in TAG.captures_iter(prompt) {
        let weight = found.get(2).map(|text| match text.as_str().parse::<f64>() {
            Ok(weight) if (-100.0..=100.0).contains(&weight) => Ok(weight),
            _ => Err(Error::usage(format!("wrong weight in `{}`", &found[0]))
                .expected("a number from -100 to 100, as in <lora:name:0.7>", format!("`{}`", text.as_str()))),
        });
        tags.push(Tag { name: found[1].to_string(), weight: weight.transpose()? });
    }
    if tags.is_empty() {
        return Ok((prompt.to_string(), tags));
    }
    let rest = TAG.replace_all(prompt, "");
    let rest = DOUBLED.replace_all(&rest, "$1");
    let rest = SPACES.replace_all(&rest, " ");
    Ok((rest.trim_matches(|c: char| c.is_whitespace() || ",，".contains(c)).to_string(), tags))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_read_and_leave_no_trace() {
        let take = |prompt: &str| take_tags(prompt).unwrap();
        let tag = |name: &str, weight| Tag { name: name.into(), weight };
        assert_eq!(take("a cat, <lora:ink:0.7>, sitting"), ("a cat, sitting".into(), vec![tag("ink", Some(0.7))]));
        assert_eq!(
            take("<lora:ink> a  cat <LORA:水 墨:-1>"),
            ("a cat".into(), vec![tag("ink", None), tag("水 墨", Some(-1.0))])
        );
        assert_eq!(take("女孩，＜lora：水墨：0.5＞，站着"), ("女孩，站着".into(), vec![tag("水墨", Some(0.5))]));
        assert_eq!(take("3 < 4,  b > a"), ("3 < 4,  b > a".into(), vec![]));
        for bad in ["<lora:ink:strong>", "<lora:ink:>", "<lora:ink:1e9>", "<lora:ink:nan>"] {
            assert!(take_tags(bad).unwrap_err().to_string().contains("wrong weight"), "{bad}");
        }
    }
}
