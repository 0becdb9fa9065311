//! One decoder layer. T tokens of all prompts of a group, one after the other; D the model's width.

use super::TextEncoderConfig;
use crate::error::Result;
use crate::kernels::Value;
use crate::kernels::basic::add;
use crate::kernels::causal_attention::{HalfRope, causal_attention};
use crate::kernels::cpu::{self, GRAIN, uninit, view};
use crate::kernels::linear::{Linear, linear_group};
use crate::kernels::math::{Activation, vectorized};
use crate::kernels::norm::rms_norm;
use candle_core::Tensor;
use rayon::prelude::*;

/// `Qwen2_5_VLDecoderLayer`.
///
/// Source: <https://github.com/huggingface/transformers/blob/efa7189c5546a94e8c1194b2ccc6669e0f7ad65e/src/transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py>
pub(super) struct DecoderLayer {
    input_layernorm: Value,
    self_attn: SelfAttention,
    post_attention_layernorm: Value,
    mlp: Mlp,
    head_dim: usize,
    rms_norm_eps: f32,
}

struct SelfAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
}

struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl DecoderLayer {
    /// Takes the layer's tensors from `get`, which is asked by name and shape.
    pub fn load(config: &TextEncoderConfig, get: impl Fn(&str, &[usize]) -> Result<Tensor>) -> Result<Self> {
        let shapes = config.layer_tensors();
        let value = |name: &str| -> Result<Value> {
            let (_, shape) = shapes.iter().find(|(n, _)| *n == name).expect("a tensor of every layer");
            Ok(Value::constant(get(name, shape)?))
        };
        let linear = |name: &str, bias: bool| -> Result<Linear> {
            let bias = bias.then(|| value(&format!("{name}.bias"))).transpose()?;
            Ok(Linear { weight: value(&format!("{name}.weight"))?.into(), bias, lora: None })
        };
        Ok(Self {
            input_layernorm: value("input_layernorm.weight")?,
            self_attn: SelfAttention {
                q_proj: linear("self_attn.q_proj", true)?,
                k_proj: linear("self_attn.k_proj", true)?,
                v_proj: linear("self_attn.v_proj", true)?,
                o_proj: linear("self_attn.o_proj", false)?,
            },
            post_attention_layernorm: value("post_attention_layernorm.weight")?,
            mlp: Mlp {
                gate_proj: linear("mlp.gate_proj", false)?,
                up_proj: linear("mlp.up_proj", false)?,
                down_proj: linear("mlp.down_proj", false)?,
            },
            head_dim: config.head_dim,
            rms_norm_eps: config.rms_norm_eps as f32,
        })
    }

    /// (T, D) -> (T, D), T the sum of the prompts' `lengths`.
    pub fn forward(&self, x: &Tensor, lengths: &[usize], rope: &HalfRope) -> Result<Tensor> {
        let x = Value::constant(x.clone());
        let SelfAttention { q_proj, k_proj, v_proj, o_proj } = &self.self_attn;
        let normed = rms_norm(&x, &self.input_layernorm, self.rms_norm_eps)?;
        let qkv = linear_group(&normed, None, &[q_proj, k_proj, v_proj])?;
        let (q, k, v) = (qkv[0].tensor(), qkv[1].tensor(), qkv[2].tensor());
        let attended = causal_attention(q, k, v, lengths, self.head_dim, rope)?; // (T, heads * head_dim)
        let x = add(&x, &o_proj.forward(&Value::constant(attended))?)?;

        let normed = rms_norm(&x, &self.post_attention_layernorm, self.rms_norm_eps)?;
        let gate_up = linear_group(&normed, None, &[&self.mlp.gate_proj, &self.mlp.up_proj])?;
        let gated = swiglu(gate_up[0].tensor(), gate_up[1].tensor())?; // (T, intermediate)
        Ok(add(&x, &self.mlp.down_proj.forward(&Value::constant(gated))?)?.into_tensor())
    }
}

/// `silu(gate) * up`.
fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (g, u) = (view(gate)?, view(up)?);
    let mut out = uninit(g.len());
    out.par_chunks_mut(GRAIN).zip(g.par_chunks(GRAIN)).zip(u.par_chunks(GRAIN)).for_each(|((out, g), u)| {
        vectorized!(out.iter_mut().zip(g).zip(u).for_each(|((out, &g), &u)| *out = Activation::Silu.apply(g) * u));
    });
    cpu::from_f32(out, gate.shape(), gate.dtype())
}
