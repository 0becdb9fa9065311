//! The Qwen-Image transformer: a double-stream MMDiT whose image and text streams meet in joint attention.
//!
//! Letters: B samples, S_img and S_txt tokens, D the model's width, R rows of a modulation table (B, or 2 B where
//! condition images are modulated as at time 0).

mod ahead;
mod block;
mod config;
mod load;
mod origin;
mod positions;
mod precision;

pub use crate::config::Checkpointing;
pub use ahead::{Held, Modulation};
pub use block::{Block, Context};
pub use config::TransformerConfig;
pub use load::BaseWeights;
pub use origin::Placement;
pub use positions::{ImageShape, rotary_tables, time_features};
pub use precision::Precision;

use crate::error::{Error, Result};
use crate::kernels::Value;
use crate::kernels::attention::TextLengths;
use crate::kernels::basic::{add, embedding};
use crate::kernels::checkpoint::Keep;
use crate::kernels::linear::Linear;
use crate::kernels::math::Activation;
use crate::kernels::modulation::TokenRows;
use crate::kernels::norm::{modulated_norm, rms_norm};
use crate::kernels::rope::Rope;
use ahead::Ahead;
use block::{EPS, Keeps};
use candle_core::{DType, Device, Tensor};
use std::cell::RefCell;
use std::rc::Rc;

/// `QwenImageTransformer2DModel`.
///
/// Source: <https://github.com/huggingface/diffusers/blob/v0.35.1/src/diffusers/models/transformers/transformer_qwenimage.py#L417>
pub struct QwenImageTransformer {
    config: TransformerConfig,
    precision: Precision,
    placement: Placement,
    device: Device,
    img_in: Linear,
    txt_norm: Value,
    txt_in: Linear,
    time_text_embed: TimeTextEmbed,
    transformer_blocks: Vec<Rc<Block>>,
    norm_out: Linear,
    proj_out: Linear,
    /// Where the blocks have no modulation: its weights on the disk, and what was computed of them.
    ahead: Option<Ahead>,
    /// The rotary tables of the last forward pass: most passes have the shapes of the one before.
    last_rotary: RefCell<Option<Rotary>>,
}

/// Rotary tables and what they are for.
struct Rotary {
    image_shapes: Vec<ImageShape>,
    text_tokens: usize,
    /// Of the image tokens and of the text tokens.
    tables: (Rope, Rope),
}

struct TimeTextEmbed {
    linear_1: Linear,
    linear_2: Linear,
    addition_t_embedding: Option<Value>,
}

/// One batch for the transformer. All samples share image shapes.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Packed latents of all images, one after the other: (B, S_img, in_channels).
    pub hidden_states: &'a Tensor,
    /// Prompt features, padded on the right: (B, S_txt, joint_attention_dim).
    pub encoder_hidden_states: &'a Tensor,
    /// Valid text tokens of each sample, at most S_txt.
    pub text_lengths: &'a [usize],
    /// Noise levels sigma in [0, 1], one per sample.
    pub timesteps: &'a [f32],
    /// Frames, rows and columns of each image in latent patches. The first is the target; with `zero_cond_t` the
    /// others are condition images.
    pub image_shapes: &'a [ImageShape],
    /// The second condition of Qwen-Image-Layered, 0 or 1 per sample.
    pub additional_t_cond: Option<&'a [usize]>,
}

impl QwenImageTransformer {
    /// The model's dimensions.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// The device that holds the weights and computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The types of weights and activations.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Which weights are not on the device all the time.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// The velocity prediction `noise - latents` for every image token: (B, S_img, patch^2 * out_channels).
    ///
    /// Errors: shapes that do not fit together or the config.
    pub fn forward(&self, inputs: Inputs, checkpointing: Checkpointing) -> Result<Value> {
        self.forward_observed(inputs, checkpointing, true, &mut |_, _| {})
    }

    /// [`Self::forward`], showing intermediate tensors by name: `temb`, `rope_{img,txt}_{cos,sin}`,
    /// `block<N>_{img,txt}`, `norm_out`. With `drop_text` false the last block computes the text that nobody reads.
    pub fn forward_observed(
        &self,
        inputs: Inputs,
        checkpointing: Checkpointing,
        drop_text: bool,
        observe: &mut dyn FnMut(&str, &Tensor),
    ) -> Result<Value> {
        self.check(&inputs)?;
        let batch = inputs.timesteps.len();
        let compute = self.precision.compute;
        let cast = |t: &Tensor| -> Result<Value> { Ok(Value::constant(t.to_dtype(compute)?.to_device(&self.device)?)) };
        let mut img = self.img_in.forward(&cast(inputs.hidden_states)?)?; // (B, S_img, D)
        let txt = rms_norm(&cast(inputs.encoder_hidden_states)?, &self.txt_norm, EPS)?;
        let mut txt = self.txt_in.forward(&txt)?; // (B, S_txt, D)

        let temb = self.time_text_embed.forward(inputs.timesteps, inputs.additional_t_cond, compute, &self.device)?; // (B, D)
        let is_condition = condition_tokens(&self.config, inputs.image_shapes);
        let tables_txt = self.tables(inputs.timesteps, inputs.additional_t_cond)?;
        let (temb_img, tables_img, rows_img) = match is_condition {
            None => (temb.clone(), tables_txt.clone(), TokenRows::per_sample(batch, img.dims()[1])),
            Some(flags) => {
                let times: Vec<f32> = inputs.timesteps.iter().copied().chain(std::iter::repeat_n(0.0, batch)).collect();
                let conditions = inputs.additional_t_cond.map(|c| [c, c].concat());
                let both = self.time_text_embed.forward(&times, conditions.as_deref(), compute, &self.device)?;
                let tables = self.tables(&times, conditions.as_deref())?;
                (both, tables, TokenRows::with_conditions(batch, flags)) // (2 B, D)
            }
        };
        let (rope_img, rope_txt) = self.rotary(inputs.image_shapes, txt.dims()[1]);
        observe("temb", temb.tensor());
        for (name, rope) in [("img", &rope_img), ("txt", &rope_txt)] {
            for (part, table) in [("cos", &rope.cos), ("sin", &rope.sin)] {
                let table = Tensor::from_slice(table, (rope.len(), rope.half), &Device::Cpu)?;
                observe(&format!("rope_{name}_{part}"), &table);
            }
        }
        let context = Rc::new(Context {
            num_heads: self.config.num_attention_heads,
            rope_img,
            rope_txt,
            rows_img,
            rows_txt: TokenRows::per_sample(batch, txt.dims()[1]),
            text_lengths: TextLengths::new(inputs.text_lengths),
        });
        let keeps = match checkpointing {
            Checkpointing::None => Keeps { block: Keep::Graph, mlp: Keep::Graph },
            Checkpointing::Selective => Keeps { block: Keep::Graph, mlp: Keep::Inputs },
            Checkpointing::Full => Keeps { block: Keep::Inputs, mlp: Keep::Graph },
        };
        for (i, block) in self.transformer_blocks.iter().enumerate() {
            let is_last = i + 1 == self.transformer_blocks.len();
            let [time_img, time_txt] = match (&tables_img, &tables_txt) {
                (Some(img), Some(txt)) => [&img[i][0], &txt[i][1]],
                _ => [&temb_img, &temb],
            };
            [img, txt] = block.forward([&img, &txt, time_img, time_txt], &context, keeps, is_last && drop_text)?;
            observe(&format!("block{i}_img"), img.tensor());
            observe(&format!("block{i}_txt"), txt.tensor());
        }
        let mods = self.norm_out.forward_activated(&temb, Activation::Silu)?; // (B, 2 D): scale, shift
        let mods = mods.reshape((batch, 2, self.config.dim()))?;
        let rows = TokenRows::per_sample(batch, img.dims()[1]);
        let img = modulated_norm(&img, &mods, 1, 0, &rows, EPS)?;
        observe("norm_out", img.tensor());
        self.proj_out.forward(&img)
    }

    fn rotary(&self, image_shapes: &[ImageShape], text_tokens: usize) -> (Rope, Rope) {
        let mut last = self.last_rotary.borrow_mut();
        if let Some(last) = &*last
            && last.image_shapes == image_shapes
            && last.text_tokens == text_tokens
        {
            return last.tables.clone();
        }
        let tables = rotary_tables(&self.config, image_shapes, text_tokens);
        *last = Some(Rotary { image_shapes: image_shapes.to_vec(), text_tokens, tables: tables.clone() });
        tables
    }

    fn check(&self, inputs: &Inputs) -> Result<()> {
        let (batch, tokens, channels) = inputs.hidden_states.dims3()?;
        let (text_batch, text_tokens, width) = inputs.encoder_hidden_states.dims3()?;
        let in_images: usize = inputs.image_shapes.iter().map(|(f, h, w)| f * h * w).sum();
        let wrong = |what: &str, expected: String, found: String| {
            Err(Error::run(format!("the transformer's {what} do not fit")).expected(expected, found))
        };
        if channels != self.config.in_channels || tokens != in_images {
            let expected = format!("({in_images}, {})", self.config.in_channels);
            return wrong("latents", expected, format!("({tokens}, {channels})"));
        }
        if width != self.config.joint_attention_dim || text_batch != batch {
            let expected = format!("({batch}, {})", self.config.joint_attention_dim);
            return wrong("prompt features", expected, format!("({text_batch}, {width})"));
        }
        if inputs.timesteps.len() != batch {
            return wrong("noise levels", batch.to_string(), inputs.timesteps.len().to_string());
        }
        let lengths = inputs.text_lengths;
        if lengths.len() != batch || lengths.iter().any(|&l| l > text_tokens) {
            return wrong("text lengths", format!("{batch} of at most {text_tokens}"), format!("{lengths:?}"));
        }
        if inputs.additional_t_cond.is_some() != self.config.use_additional_t_cond {
            return wrong(
                "additional conditions",
                format!("given: {}", self.config.use_additional_t_cond),
                "the opposite".into(),
            );
        }
        Ok(())
    }
}

/// With `zero_cond_t` and more than one image: which image tokens belong to condition images.
fn condition_tokens(config: &TransformerConfig, images: &[ImageShape]) -> Option<Vec<bool>> {
    (config.zero_cond_t && images.len() > 1).then(|| {
        let tokens = |(i, &(f, h, w)): (usize, &ImageShape)| std::iter::repeat_n(i > 0, f * h * w);
        images.iter().enumerate().flat_map(tokens).collect()
    })
}

impl TimeTextEmbed {
    /// Noise levels -> (levels, D).
    fn forward(&self, timesteps: &[f32], conditions: Option<&[usize]>, dtype: DType, device: &Device) -> Result<Value> {
        let features = Tensor::from_vec(time_features(timesteps), (timesteps.len(), config::TIME_FEATURES), device)?;
        let hidden = self.linear_1.forward(&Value::constant(features.to_dtype(dtype)?))?;
        let temb = self.linear_2.forward_activated(&hidden, Activation::Silu)?;
        match (&self.addition_t_embedding, conditions) {
            (Some(table), Some(conditions)) => add(&temb, &embedding(table, conditions)?),
            _ => Ok(temb),
        }
    }
}
