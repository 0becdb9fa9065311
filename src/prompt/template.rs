//! The chat template around a caption.

/// A text with one `{}` where the caption goes. What stands before it is the same for every caption; the hidden
/// states of those tokens are dropped, those of the text behind the caption are kept.
///
/// Source: <https://github.com/huggingface/diffusers/blob/73ba2c74ae42f90ce07ad9f23fe39038d921c8e0/src/diffusers/pipelines/qwenimage/pipeline_qwenimage.py>
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Template {
    /// Text before the caption.
    pub prefix: &'static str,
    /// Text after the caption.
    pub suffix: &'static str,
}

/// The template of text-to-image: 34 prefix tokens and 5 suffix tokens with the published tokenizer.
pub const TEXT_TO_IMAGE: Template = Template {
    prefix: "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, \
             spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    suffix: "<|im_end|>\n<|im_start|>assistant\n",
};

impl Template {
    /// The caption inside the template.
    pub fn apply(&self, caption: &str) -> String {
        [self.prefix, caption, self.suffix].concat()
    }
}
