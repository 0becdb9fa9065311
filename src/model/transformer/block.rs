//! One double-stream block.
//!
//! Letters: B samples, S_img and S_txt tokens, D the model's width, R rows of the modulation tables.

use super::ahead::{Modulation, table};
use crate::error::Result;
use crate::kernels::Value;
use crate::kernels::attention::{Stream, TextLengths, joint_attention};
use crate::kernels::checkpoint::{Keep, segment};
use crate::kernels::linear::{Linear, linear_group};
use crate::kernels::math::Activation;
use crate::kernels::modulation::{TokenRows, gated_residual};
use crate::kernels::norm::modulated_norm;
use crate::kernels::rope::{Rope, norm_rope};
use std::rc::Rc;

/// Epsilon of every norm of the transformer.
pub(super) const EPS: f32 = 1e-6;

/// `QwenImageTransformerBlock`.
///
/// Source: <https://github.com/huggingface/diffusers/blob/v0.35.1/src/diffusers/models/transformers/transformer_qwenimage.py#L325>
pub struct Block {
    /// `img_mod.1` and `txt_mod.1`; none where their outputs are computed ahead.
    pub(super) modulation: Option<Modulation>,
    pub(super) attn: Attention,
    pub(super) img_mlp: FeedForward,
    pub(super) txt_mlp: FeedForward,
}

/// The projections and head norms of joint attention.
pub struct Attention {
    pub(super) to_q: Linear,
    pub(super) to_k: Linear,
    pub(super) to_v: Linear,
    pub(super) add_q_proj: Linear,
    pub(super) add_k_proj: Linear,
    pub(super) add_v_proj: Linear,
    pub(super) to_out: Linear,
    pub(super) to_add_out: Linear,
    pub(super) norm_q: Value,
    pub(super) norm_k: Value,
    pub(super) norm_added_q: Value,
    pub(super) norm_added_k: Value,
}

/// `net.0.proj`, GELU (tanh), `net.2`.
pub struct FeedForward {
    pub(super) proj: Linear,
    pub(super) out: Linear,
}

/// What all blocks of one forward pass share.
pub struct Context {
    pub(super) num_heads: usize,
    pub(super) rope_img: Rope,
    pub(super) rope_txt: Rope,
    pub(super) rows_img: TokenRows,
    pub(super) rows_txt: TokenRows,
    /// Valid text tokens of each sample.
    pub(super) text_lengths: TextLengths,
}

/// What the two halves of a block keep for the backward pass.
#[derive(Clone, Copy)]
pub(super) struct Keeps {
    pub block: Keep,
    pub mlp: Keep,
}

/// Entries of a modulation table: the first three belong to attention, the last three to the MLP.
const SHIFT: usize = 0;
const SCALE: usize = 1;
const GATE: usize = 2;
const MLP: usize = 3;

impl Block {
    /// `img` (B, S_img, D), `txt` (B, S_txt, D), `time_img` (R, D), `time_txt` (B, D) -> `img`, `txt`.
    ///
    /// A block without its modulation takes the tables (R, 6, D) and (B, 6, D) in place of the two time embeddings.
    /// With `drop_text` the text stream ends in this block's attention: nobody reads what the last block makes of it,
    /// and the text that is returned is the one that came in.
    pub(super) fn forward(
        self: &Rc<Self>,
        [img, txt, time_img, time_txt]: [&Value; 4],
        context: &Rc<Context>,
        keeps: Keeps,
        drop_text: bool,
    ) -> Result<[Value; 2]> {
        let (block, context) = (self.clone(), context.clone());
        let whole = move |v: &[Value]| block.halves(v, &context, keeps.mlp, drop_text);
        pair(segment(keeps.block, &[img, txt, time_img, time_txt], self.has_leaves(), whole)?)
    }

    fn halves(
        self: &Rc<Self>,
        v: &[Value],
        context: &Rc<Context>,
        keep_mlp: Keep,
        drop_text: bool,
    ) -> Result<Vec<Value>> {
        let [img, txt, time_img, time_txt] = v else { unreachable!("forward passes four values") };
        let (img_mods, txt_mods) = match &self.modulation {
            Some(linears) => (table(&linears.img_mod, time_img)?, table(&linears.txt_mod, time_txt)?),
            None => (time_img.clone(), time_txt.clone()),
        };

        let (block, ctx) = (self.clone(), context.clone());
        let attention = move |v: &[Value]| block.attention(v, &ctx, drop_text);
        let halfway = segment(Keep::Graph, &[img, txt, &img_mods, &txt_mods], self.has_leaves(), attention)?;
        let (block, ctx) = (self.clone(), context.clone());
        let mlp = move |v: &[Value]| block.mlp(v, &ctx, drop_text);
        segment(keep_mlp, &[&halfway[0], &halfway[1], &img_mods, &txt_mods], self.has_leaves(), mlp)
    }

    /// `img`, `txt`, and their modulation tables (R, 6, D) -> `img`, `txt` after attention.
    fn attention(&self, v: &[Value], ctx: &Context, drop_text: bool) -> Result<Vec<Value>> {
        let [img, txt, img_mods, txt_mods] = v else { unreachable!("halves passes four values") };
        let attn = &self.attn;
        let img_in = modulated_norm(img, img_mods, SHIFT, SCALE, &ctx.rows_img, EPS)?; // (B, S_img, D)
        let txt_in = modulated_norm(txt, txt_mods, SHIFT, SCALE, &ctx.rows_txt, EPS)?; // (B, S_txt, D)
        let img_qkv = linear_group(&img_in, None, &[&attn.to_q, &attn.to_k, &attn.to_v])?;
        let txt_qkv = linear_group(&txt_in, None, &[&attn.add_q_proj, &attn.add_k_proj, &attn.add_v_proj])?;
        let img_q = norm_rope(&img_qkv[0], &attn.norm_q, &ctx.rope_img, EPS)?;
        let img_k = norm_rope(&img_qkv[1], &attn.norm_k, &ctx.rope_img, EPS)?;
        let txt_q = norm_rope(&txt_qkv[0], &attn.norm_added_q, &ctx.rope_txt, EPS)?;
        let txt_k = norm_rope(&txt_qkv[1], &attn.norm_added_k, &ctx.rope_txt, EPS)?;
        let out = joint_attention(
            Stream { q: &txt_q, k: &txt_k, v: &txt_qkv[2] },
            Stream { q: &img_q, k: &img_k, v: &img_qkv[2] },
            ctx.num_heads,
            &ctx.text_lengths,
        )?;
        let img_out = attn.to_out.forward(&out[1])?;
        let img = gated_residual(img, &img_out, img_mods, GATE, &ctx.rows_img)?;
        if drop_text {
            return Ok(vec![img, txt.clone()]);
        }
        let txt_out = attn.to_add_out.forward(&out[0])?;
        let txt = gated_residual(txt, &txt_out, txt_mods, GATE, &ctx.rows_txt)?;
        Ok(vec![img, txt])
    }

    /// `img`, `txt`, and their modulation tables (R, 6, D) -> `img`, `txt` after the MLPs.
    fn mlp(&self, v: &[Value], ctx: &Context, drop_text: bool) -> Result<Vec<Value>> {
        let [img, txt, img_mods, txt_mods] = v else { unreachable!("halves passes four values") };
        let stream = |x: &Value, mods: &Value, rows: &TokenRows, mlp: &FeedForward| {
            let normed = modulated_norm(x, mods, MLP + SHIFT, MLP + SCALE, rows, EPS)?;
            gated_residual(x, &mlp.forward(&normed)?, mods, MLP + GATE, rows)
        };
        let img = stream(img, img_mods, &ctx.rows_img, &self.img_mlp)?;
        if drop_text {
            return Ok(vec![img, txt.clone()]);
        }
        let txt = stream(txt, txt_mods, &ctx.rows_txt, &self.txt_mlp)?;
        Ok(vec![img, txt])
    }

    fn has_leaves(&self) -> bool {
        let leaf = |l: &Linear| l.weight.needs_grad() || l.lora.is_some();
        self.linears().into_iter().any(|(_, l)| leaf(l))
    }

    /// The linears that are in memory.
    pub(super) fn linears(&self) -> Vec<(&'static str, &Linear)> {
        let a = &self.attn;
        let modulation = self.modulation.iter().flat_map(|m| [("img_mod.1", &m.img_mod), ("txt_mod.1", &m.txt_mod)]);
        let others = [
            ("attn.to_q", &a.to_q),
            ("attn.to_k", &a.to_k),
            ("attn.to_v", &a.to_v),
            ("attn.add_q_proj", &a.add_q_proj),
            ("attn.add_k_proj", &a.add_k_proj),
            ("attn.add_v_proj", &a.add_v_proj),
            ("attn.to_out.0", &a.to_out),
            ("attn.to_add_out", &a.to_add_out),
            ("img_mlp.net.0.proj", &self.img_mlp.proj),
            ("img_mlp.net.2", &self.img_mlp.out),
            ("txt_mlp.net.0.proj", &self.txt_mlp.proj),
            ("txt_mlp.net.2", &self.txt_mlp.out),
        ];
        modulation.chain(others).collect()
    }

    pub(super) fn linear_mut(&mut self, name: &str) -> Option<&mut Linear> {
        let a = &mut self.attn;
        Some(match name {
            "img_mod.1" => &mut self.modulation.as_mut()?.img_mod,
            "txt_mod.1" => &mut self.modulation.as_mut()?.txt_mod,
            "attn.to_q" => &mut a.to_q,
            "attn.to_k" => &mut a.to_k,
            "attn.to_v" => &mut a.to_v,
            "attn.add_q_proj" => &mut a.add_q_proj,
            "attn.add_k_proj" => &mut a.add_k_proj,
            "attn.add_v_proj" => &mut a.add_v_proj,
            "attn.to_out.0" => &mut a.to_out,
            "attn.to_add_out" => &mut a.to_add_out,
            "img_mlp.net.0.proj" => &mut self.img_mlp.proj,
            "img_mlp.net.2" => &mut self.img_mlp.out,
            "txt_mlp.net.0.proj" => &mut self.txt_mlp.proj,
            "txt_mlp.net.2" => &mut self.txt_mlp.out,
            _ => return None,
        })
    }
}

impl FeedForward {
    /// (B, S, D) -> (B, S, D).
    fn forward(&self, x: &Value) -> Result<Value> {
        let hidden = self.proj.forward(x)?; // (B, S, 4 D)
        self.out.forward_activated(&hidden, Activation::GeluTanh)
    }
}

fn pair(values: Vec<Value>) -> Result<[Value; 2]> {
    Ok(values.try_into().unwrap_or_else(|_| unreachable!("both halves return image and text")))
}
