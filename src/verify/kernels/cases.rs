//! The ops that are tested, with their inputs.
//!
//! Letters: S_img image and S_txt text tokens, D width, H heads.

use super::Role::{Activation, Frozen, Trained};
use super::{Case, Sizes, randn};
use crate::error::Result;
use crate::kernels::Value;
use crate::kernels::attention::{Stream, TextLengths, joint_attention};
use crate::kernels::int8::Int8Matrix;
use crate::kernels::linear::{Linear, Lora, linear_group};
use crate::kernels::math::Activation as Nonlinearity;
use crate::kernels::modulation::{TokenRows, gated_residual};
use crate::kernels::norm::{modulated_norm, rms_norm};
use crate::kernels::rope::{Rope, norm_rope};
use crate::kernels::weight::Weight;
use candle_core::Tensor;

/// All cases of one size.
pub(super) fn all(sizes: Sizes) -> Result<Vec<Case>> {
    let mut all = match sizes {
        Sizes::Small => vec![
            attention(2, 13, 37, 3, 64, &[13, 5])?,
            attention(2, 7, 130, 2, 128, &[4, 7])?,
            attention(1, 5, 65, 1, 128, &[0])?,
            heads(2, 19, 3, 64)?,
            heads(2, 19, 3, 128)?,
        ],
        Sizes::Published => vec![attention(1, 512, 4096, 24, 128, &[500])?, heads(1, 4096, 24, 128)?],
    };
    let (batch, tokens, width) = match sizes {
        Sizes::Small => (2, 19, 208),
        Sizes::Published => (1, 4096, 3072),
    };
    for conditioned in [false, true] {
        all.push(norm(batch, tokens, width, conditioned)?);
        all.push(gate(batch, tokens, width, conditioned)?);
    }
    let shapes: &[(usize, usize, usize)] = match sizes {
        Sizes::Small => &[(38, 208, 320), (77, 320, 208)],
        Sizes::Published => &[(4096, 3072, 3072), (4096, 3072, 12288), (4096, 12288, 3072)],
    };
    for &(m, k, n) in shapes {
        let activation = (k > n).then_some(Nonlinearity::GeluTanh);
        all.push(linear(m, k, n, if k == n { 3 } else { 1 }, activation, Held::Float)?);
    }
    all.push(linear(2, width, 6 * width, 1, Some(Nonlinearity::Silu), Held::Float)?);
    all.push(match sizes {
        Sizes::Small => linear(77, 320, 208, 2, None, Held::Int8)?,
        Sizes::Published => linear(4096, 3072, 3072, 3, None, Held::Int8)?,
    });
    all.push(text_norm(if sizes == Sizes::Small { 304 } else { 3584 })?);
    Ok(all)
}

fn attention(batch: usize, text: usize, image: usize, heads: usize, head: usize, lengths: &[usize]) -> Result<Case> {
    let input =
        |i: usize| Ok((randn(i as u64, &[batch, if i < 3 { text } else { image }, heads * head], 1.0)?, Activation));
    let lengths = TextLengths::new(lengths);
    Ok(Case {
        name: format!("attention {batch}x({text}+{image})x{heads}x{head}"),
        inputs: (0..6).map(input).collect::<Result<_>>()?,
        op: Box::new(move |v| {
            let (text, image) = (Stream { q: &v[0], k: &v[1], v: &v[2] }, Stream { q: &v[3], k: &v[4], v: &v[5] });
            joint_attention(text, image, heads, &lengths)
        }),
        names: vec!["text", "image", "d text q", "d text k", "d text v", "d image q", "d image k", "d image v"],
        has_kernel: true,
    })
}

fn heads(batch: usize, tokens: usize, heads: usize, head: usize) -> Result<Case> {
    let angles = randn(3, &[tokens * head / 2], 3.0)?;
    let rope = Rope::new(angles.cos()?.to_vec1()?, angles.sin()?.to_vec1()?, head / 2);
    Ok(Case {
        name: format!("norm + rotation {batch}x{tokens}x{heads}x{head}"),
        inputs: vec![(randn(0, &[batch, tokens, heads * head], 1.5)?, Activation), (weight(1, head)?, Frozen)],
        op: Box::new(move |v| Ok(vec![norm_rope(&v[0], &v[1], &rope, 1e-6)?])),
        names: vec!["y", "dx"],
        has_kernel: true,
    })
}

fn weight(item: u64, n: usize) -> Result<Tensor> {
    Ok((randn(item, &[n], 0.2)? + 1.0)?)
}

/// Rows of a modulation table; with conditions every third token is one.
fn rows(batch: usize, tokens: usize, conditioned: bool) -> (TokenRows, usize) {
    match conditioned {
        false => (TokenRows::per_sample(batch, tokens), batch),
        true => (TokenRows::with_conditions(batch, (0..tokens).map(|i| i % 3 == 0).collect()), 2 * batch),
    }
}

fn norm(batch: usize, tokens: usize, width: usize, conditioned: bool) -> Result<Case> {
    let (rows, table_rows) = rows(batch, tokens, conditioned);
    Ok(Case {
        name: format!("modulated norm {batch}x{tokens}x{width}{}", if conditioned { ", two rows" } else { "" }),
        inputs: vec![
            ((randn(0, &[batch, tokens, width], 1.5)? + 0.3)?, Activation),
            (randn(1, &[table_rows, 6, width], 0.5)?, Activation),
        ],
        op: Box::new(move |v| Ok(vec![modulated_norm(&v[0], &v[1], 3, 4, &rows, 1e-6)?])),
        names: vec!["y", "dx", "d table"],
        has_kernel: true,
    })
}

fn gate(batch: usize, tokens: usize, width: usize, conditioned: bool) -> Result<Case> {
    let (rows, table_rows) = rows(batch, tokens, conditioned);
    Ok(Case {
        name: format!("gated residual {batch}x{tokens}x{width}{}", if conditioned { ", two rows" } else { "" }),
        inputs: vec![
            (randn(0, &[batch, tokens, width], 1.0)?, Activation),
            (randn(1, &[batch, tokens, width], 1.0)?, Activation),
            (randn(2, &[table_rows, 6, width], 0.5)?, Activation),
        ],
        op: Box::new(move |v| Ok(vec![gated_residual(&v[0], &v[1], &v[2], 5, &rows)?])),
        names: vec!["y", "dx", "dy", "d table"],
        has_kernel: true,
    })
}

/// How frozen weights are held.
#[derive(Clone, Copy, PartialEq)]
enum Held {
    /// In the compute type.
    Float,
    /// Quantised where they are, and back.
    Int8,
}

/// A group of `layers` frozen linears with adapters of rank 16 and 8 in turn.
fn linear(m: usize, k: usize, n: usize, layers: usize, activation: Option<Nonlinearity>, held: Held) -> Result<Case> {
    let mut inputs = vec![(randn(0, &[m, k], 1.0)?, Activation)];
    for i in 0..layers {
        let (item, rank) = (10 * i as u64, if i % 2 == 0 { 16 } else { 8 });
        inputs.extend([
            (randn(item + 1, &[n, k], 1.0 / (k as f64).sqrt())?, Frozen),
            (randn(item + 2, &[n], 1.0)?, Frozen),
            (randn(item + 3, &[rank, k], 1.0 / (k as f64).sqrt())?, Trained),
            (randn(item + 4, &[n, rank], 0.5)?, Trained),
        ]);
    }
    let names = [["y0", "y1", "y2"], ["dA0", "dA1", "dA2"], ["dB0", "dB1", "dB2"]];
    let mut all = names[0][..layers].to_vec();
    all.push("dx");
    all.extend((0..layers).flat_map(|i| [names[1][i], names[2][i]]));
    let what = match activation {
        Some(Nonlinearity::GeluTanh) => "GELU + ",
        Some(Nonlinearity::Silu) => "SiLU + ",
        None => "",
    };
    let in_int8 = if held == Held::Int8 { " in int8" } else { "" };
    Ok(Case {
        name: format!("{what}{layers} linear{in_int8} + LoRA {m}x{k}x{n}"),
        inputs,
        op: Box::new(move |v| {
            let layer = |v: &[Value]| -> Result<Linear> {
                Ok(Linear {
                    weight: match held {
                        Held::Float => v[0].clone().into(),
                        Held::Int8 => Weight::Int8(Int8Matrix::quantise("weight", v[0].tensor())?),
                    },
                    bias: Some(v[1].clone()),
                    lora: Some(Lora { a: v[2].clone(), b: v[3].clone(), scale: 0.5 }),
                })
            };
            let layers: Vec<Linear> = v[1..].chunks_exact(4).map(layer).collect::<Result<_>>()?;
            linear_group(&v[0], activation, &layers.iter().collect::<Vec<_>>())
        }),
        names: all,
        has_kernel: true,
    })
}

fn text_norm(width: usize) -> Result<Case> {
    Ok(Case {
        name: format!("RMS norm 1x77x{width}"),
        inputs: vec![(randn(0, &[1, 77, width], 2.0)?, Activation), (weight(1, width)?, Frozen)],
        op: Box::new(|v| Ok(vec![rms_norm(&v[0], &v[1], 1e-6)?])),
        names: vec!["y", "dx"],
        // It runs once a step.
        has_kernel: false,
    })
}
