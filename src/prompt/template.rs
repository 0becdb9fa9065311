//! The chat template around a caption.

use crate::error::{Error, Result};
use std::borrow::Cow;

/// A text with one `{}` where the caption goes. What stands before it is the same for every caption; the hidden
/// states of those tokens are dropped, those of the text behind the caption are kept.
///
/// Source: <https://github.com/huggingface/diffusers/blob/73ba2c74ae42f90ce07ad9f23fe39038d921c8e0/src/diffusers/pipelines/qwenimage/pipeline_qwenimage.py>
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Text before the caption.
    pub prefix: Cow<'static, str>,
    /// Text after the caption.
    pub suffix: Cow<'static, str>,
}

/// The template of text-to-image: 34 prefix tokens and 5 suffix tokens with the published tokenizer.
pub const TEXT_TO_IMAGE: Template = Template {
    prefix: Cow::Borrowed(
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, \
             spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    ),
    suffix: Cow::Borrowed("<|im_end|>\n<|im_start|>assistant\n"),
};

impl Template {
    /// The template written in `text`, with `{}` where the caption goes. Errors: not exactly one `{}`.
    pub fn parse(text: &str) -> Result<Self> {
        match text.split("{}").collect::<Vec<_>>()[..] {
            [prefix, suffix] => Ok(Self { prefix: prefix.to_string().into(), suffix: suffix.to_string().into() }),
            ref parts => Err(Error::usage(format!("bad prompt template {text:?}"))
                .expected("one {} where the caption goes", parts.len() - 1)),
        }
    }

    /// The caption inside the template.
    pub fn apply(&self, caption: &str) -> String {
        [&self.prefix, caption, &self.suffix].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_written_as_it_reads() {
        let template = Template::parse("<a>{}</a>").unwrap();
        assert_eq!(template.apply("{x}"), "<a>{x}</a>");
        for bad in ["none", "{} and {}"] {
            assert!(Template::parse(bad).unwrap_err().to_string().contains(bad));
        }
    }
}
