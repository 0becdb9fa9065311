//! Prompts in parts: quality, subject, style, details, anatomy, and what is not wanted where it works, in the negative
//! prompt.
//!
//! A text encoder reads 没有多余的手指 as fingers and extra: what is negated in a prompt is drawn more often, not less.
//! True guidance steers away from the *negative* prompt, so that is where unwanted things are named.

use crate::config::field::{At, Field, section};
use crate::config::tree;
use crate::error::{Error, Result};
use crate::prompt::variation;
use serde::Serialize;
use std::borrow::Cow;
use std::path::Path;

/// The positive suffix that the model card advises.
/// Source: README of <https://huggingface.co/Qwen/Qwen-Image>
const QUALITY: [&str; 2] = ["超清，4K，电影级构图", "Ultra HD, 4K, cinematic composition"];

const ANATOMY: [&str; 2] =
    ["身体比例正确，双手完整，每只手五根手指", "correct body proportions, complete hands, five fingers on each hand"];

/// The Chinese one is the negative prompt that the model card of the 2512 version advises.
/// Source: README of <https://huggingface.co/Qwen/Qwen-Image-2512>
const NEGATIVE: [&str; 2] = [
    "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。构图混乱。文字模糊，扭曲。",
    "low resolution, low quality, deformed limbs, deformed fingers, oversaturated, waxy, face without details, overly smooth, looks AI-made, chaotic composition, blurred or distorted text",
];

/// What a person must not have, for the negative prompt.
const EXTRA_LIMBS: [&str; 2] = ["多余的手指，多余的手臂，多余的腿", "extra fingers, extra arms, extra legs"];

/// The same as negations, as the original recipe wrote them into the prompt itself.
const NEGATIONS: [&str; 2] = [
    "没有多余的手指，没有多余的手臂，没有多余的腿，没有畸形",
    "no extra fingers, no extra arms, no extra legs, no deformities",
];

section! {
    /// A prompt in parts. In every part `{a|b|c}` stands for one of the alternatives.
    pub struct Parts {
        /// Who or what is shown.
        subject: String;
        /// The style, such as 赛博朋克.
        style: Option<String> = None;
        /// Details of the subject.
        detail: Vec<String> = Vec::new();
        /// Technical terms in English, which go behind the Chinese parts.
        english: Vec<String> = Vec::new();
        /// Words for quality; null means the ones that the model card advises, an empty text none.
        quality: Option<String> = None;
        /// Emphasis on anatomy; null means the usual one, an empty text none (for subjects without a body).
        anatomy: Option<String> = None;
        /// The negative prompt; null means the one that the model card advises, with extra limbs if there is an anatomy.
        negative: Option<String> = None;
        /// Write what is not wanted into the prompt as negations, as the original recipe did. It works less well.
        recipe_style: bool = false;
    }
}

/// A prompt and what goes with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Prompt {
    /// What to show.
    pub prompt: String,
    /// What not to show.
    pub negative_prompt: String,
}

impl Parts {
    /// Reads parts written as YAML, `{subject: 女孩, style: 赛博朋克}`. `name` is the file in errors.
    pub fn parse(text: &str, name: &Path) -> Result<Self> {
        let root = tree::parse(text, &format!("`{}` is not a prompt in parts", name.display()))?;
        let parts = Self::read(&root, &At::root(name))?;
        parts.check().map(|()| parts)
    }

    /// Errors (usage): an empty subject.
    pub fn check(&self) -> Result<()> {
        if self.subject.trim().is_empty() {
            return Err(Error::usage("the subject of the prompt is empty").hint("say who or what is shown"));
        }
        Ok(())
    }

    /// The prompt of these parts. Alternatives are chosen by `seed` and `index`, the number of the prompt in its batch.
    pub fn build(&self, seed: u64, index: u64) -> Prompt {
        let mut choose = variation::Chooser::new(seed, index);
        let mut written = |text: &str| choose.one(text.trim());
        // The model reads both languages; the fixed words are in that of the subject.
        let language = usize::from(!is_chinese(&self.subject));
        let usual = |own: &Option<String>, fixed: [&str; 2]| own.clone().unwrap_or_else(|| fixed[language].into());
        let anatomy = usual(&self.anatomy, ANATOMY);
        let mut parts = vec![usual(&self.quality, QUALITY), self.subject.clone()];
        parts.extend(self.style.as_deref().map(in_words));
        parts.extend(self.detail.iter().cloned());
        parts.push(anatomy.clone());
        if self.recipe_style {
            parts.push(NEGATIONS[language].into());
        }
        let parts: Vec<String> = parts.iter().map(|part| written(part)).filter(|part| !part.is_empty()).collect();
        let english: Vec<String> =
            self.english.iter().map(|part| written(part)).filter(|part| !part.is_empty()).collect();
        let prompt = [vec![parts.join(["，", ", "][language])], english].concat().join(", ");
        let negative_prompt = match &self.negative {
            Some(own) => written(own),
            None if self.recipe_style => " ".into(),
            None if anatomy.trim().is_empty() => NEGATIVE[language].into(),
            None => [NEGATIVE[language], EXTRA_LIMBS[language]].join(["", ", "][language]),
        };
        Prompt { prompt, negative_prompt }
    }
}

/// A prompt that may be in parts: text that is a mapping with a subject (`{subject: 女孩, style: 赛博朋克}`) is built, all
/// other text is taken as it is.
///
/// Errors (usage): a mapping with a subject that is not one of [`Parts`].
pub fn expand(text: &str) -> Result<(Cow<'_, str>, Option<String>)> {
    let body = text.trim();
    let is_in_parts = body.starts_with('{') && body.ends_with('}') && body.contains("subject:");
    if !is_in_parts {
        return Ok((text.into(), None));
    }
    let built = Parts::parse(body, Path::new(text))?.build(0, 0);
    Ok((built.prompt.into(), Some(built.negative_prompt)))
}

/// Builds those of `prompts` that are in parts. The negative prompt becomes `own` if there is one, else the one that the
/// parts ask for, else it stays.
///
/// Errors (usage): bad parts; parts that ask for different negative prompts.
pub fn expand_all(prompts: &mut [String], negative_prompt: &mut String, own: Option<&str>) -> Result<()> {
    let mut asked: Vec<String> = Vec::new();
    for prompt in prompts {
        let (text, negative) = expand(prompt)?;
        let text = text.into_owned();
        asked.extend(negative.filter(|negative| !asked.contains(negative)));
        *prompt = text;
    }
    match (own, asked.as_slice()) {
        (Some(own), _) => *negative_prompt = own.into(),
        (None, []) => {}
        (None, [one]) => negative_prompt.clone_from(one),
        (None, [one, two, ..]) => {
            return Err(Error::usage("the prompts in parts ask for different negative prompts")
                .detail(format!("`{one}`"))
                .detail(format!("`{two}`"))
                .hint("give all of them the same `negative`, or none"));
        }
    }
    Ok(())
}

/// 赛博朋克 is 赛博朋克风格, `cyberpunk` is `cyberpunk style`; what says so itself stays.
fn in_words(style: &str) -> String {
    let style = style.trim();
    let says_so = ["风格", "风", "画", "style", "art", "painting"].iter().any(|end| style.ends_with(end));
    match style {
        "" => String::new(),
        _ if says_so => style.into(),
        _ if is_chinese(style) => format!("{style}风格"),
        _ => format!("{style} style"),
    }
}

/// As the original decides: any character from U+4E00 to U+9FFF.
fn is_chinese(text: &str) -> bool {
    text.chars().any(|c| ('\u{4E00}'..='\u{9FFF}').contains(&c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> Parts {
        Parts::parse(text, Path::new("parts")).unwrap()
    }

    #[test]
    fn parts_come_in_the_order_of_the_recipe() {
        let built =
            parts("{subject: 女孩, style: 赛博朋克, detail: [蓝色长发, 机械左臂], english: [sharp focus, 85mm]}")
                .build(0, 0);
        assert_eq!(
            built.prompt,
            "超清，4K，电影级构图，女孩，赛博朋克风格，蓝色长发，机械左臂，身体比例正确，双手完整，每只手五根手指, sharp focus, 85mm"
        );
        assert!(
            built.negative_prompt.starts_with("低分辨率")
                && built.negative_prompt.ends_with("扭曲。多余的手指，多余的手臂，多余的腿")
        );
        let plain = parts("{subject: 一座山, style: 水墨画, quality: '', anatomy: ''}").build(0, 0);
        assert_eq!(plain.prompt, "一座山，水墨画");
        assert!(!plain.negative_prompt.contains("多余"));
        let english = parts("{subject: a girl, style: cyberpunk, negative: none}").build(0, 0);
        assert!(english.prompt.starts_with("Ultra HD, 4K, cinematic composition, a girl, cyberpunk style, correct"));
        assert_eq!(english.negative_prompt, "none");
    }

    #[test]
    fn negations_are_in_the_prompt_only_in_the_recipes_own_style() {
        let text = "subject: 女孩";
        let (own, recipe) = (parts(text), Parts { recipe_style: true, ..parts(text) });
        assert!(!own.build(0, 0).prompt.contains("没有"));
        let built = recipe.build(0, 0);
        assert!(built.prompt.ends_with("没有多余的手指，没有多余的手臂，没有多余的腿，没有畸形"));
        assert_eq!(built.negative_prompt, " ");
    }

    #[test]
    fn a_prompt_in_parts_is_told_from_a_plain_one() {
        for plain in ["a cat", "{red|blue} cat", "{a}", "the subject: a cat"] {
            assert_eq!(expand(plain).unwrap(), (plain.into(), None));
        }
        let (prompt, negative) = expand("{subject: 猫, anatomy: ''}").unwrap();
        assert_eq!(prompt, "超清，4K，电影级构图，猫");
        assert!(negative.unwrap().starts_with("低分辨率"));
        let mut prompts = ["a cat".to_string(), "{subject: 猫, negative: 狗}".into()];
        let mut negative = " ".to_string();
        expand_all(&mut prompts.clone(), &mut negative, None).unwrap();
        assert_eq!(negative, "狗");
        expand_all(&mut prompts.clone(), &mut negative, Some("鸟")).unwrap();
        assert_eq!(negative, "鸟");
        prompts[0] = "{subject: 猫}".into();
        assert!(expand_all(&mut prompts, &mut negative, None).unwrap_err().to_string().contains("different negative"));
        for (bad, why) in [
            ("{subject: 猫, styl: x}", "the nearest known key is `style`"),
            ("{subject: ''}", "the subject of the prompt is empty"),
            ("{subject: [猫}", "is not a prompt in parts"),
        ] {
            let error = expand(bad).unwrap_err();
            assert!(error.to_string().contains(why) && error.exit_code() == 2, "{bad}: {error}");
        }
    }
}
