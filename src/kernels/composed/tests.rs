//! What the ops' own tests against their twins do not reach: tiles of attention, and bf16.

use super::attention::in_tiles;
use crate::error::Result;
use crate::kernels::attention::{Stream, TextLengths, joint_attention};
use crate::kernels::linear::{Linear, Lora, linear_group};
use crate::kernels::math::Activation;
use crate::kernels::modulation::{TokenRows, gated_residual};
use crate::kernels::norm::{modulated_norm, rms_norm};
use crate::kernels::rope::{Rope, norm_rope};
use crate::kernels::route::composed_only;
use crate::kernels::tape::{Value, backward};
use crate::kernels::testing::{randn, relative_error, scattered};
use candle_core::{DType, Tensor};

/// Values and gradients, of leaves like `inputs`.
fn outcome(inputs: &[Tensor], op: impl Fn(&[Value]) -> Result<Vec<Value>>) -> Vec<Tensor> {
    let leaves: Vec<Value> = inputs.iter().map(|t| Value::leaf(scattered(t))).collect();
    let outputs = op(&leaves).unwrap();
    let mut all: Vec<Tensor> = outputs.iter().map(|v| v.tensor().clone()).collect();
    let seed = |(i, v): (usize, Value)| {
        let seed = randn(900 + i as u64, v.dims(), 1.0).to_dtype(v.dtype()).unwrap();
        (v, seed)
    };
    let mut grads = backward(outputs.into_iter().enumerate().map(seed).collect()).unwrap();
    all.extend(leaves.iter().enumerate().map(|(i, l)| grads.take(l).unwrap_or_else(|| panic!("input {i}"))));
    all
}

/// The composed op against the CPU kernel: values and every gradient, of the same shapes and types.
fn agree(tolerance: f64, inputs: &[Tensor], op: impl Fn(&[Value]) -> Result<Vec<Value>>) {
    let kernel = outcome(inputs, &op);
    let composed = composed_only(|| outcome(inputs, &op));
    assert_eq!(kernel.len(), composed.len());
    for (i, (a, b)) in composed.iter().zip(&kernel).enumerate() {
        assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()), "tensor {i}");
        let error = relative_error(a, b);
        assert!(error < tolerance, "tensor {i}: {error:e}");
    }
}

/// Two roundings to bf16 where the kernel has one: 2^-8 each, relative to the largest element.
const BF16: f64 = 0.01;

fn bf16(t: &Tensor) -> Tensor {
    t.to_dtype(DType::BF16).unwrap()
}

fn streams(v: &[Value]) -> (Stream<'_>, Stream<'_>) {
    (Stream { q: &v[0], k: &v[1], v: &v[2] }, Stream { q: &v[3], k: &v[4], v: &v[5] })
}

fn attention_inputs(batch: usize, text: usize, image: usize, width: usize) -> Vec<Tensor> {
    (0..6).map(|i| randn(i, &[batch, if i < 3 { text } else { image }, width], 1.0)).collect()
}

#[test]
fn attention_does_not_depend_on_its_tiles() {
    let inputs = attention_inputs(2, 5, 11, 24);
    for lengths in [[5, 3], [0, 1]] {
        let whole = outcome(&inputs, |v| {
            let (text, image) = streams(v);
            joint_attention(text, image, 3, &TextLengths::new(&lengths))
        });
        // One row of 3 heads; a ragged number of rows; more than there are.
        for scores in [1, 3 * 16 * 4, 1 << 20] {
            let tiled = outcome(&inputs, |v| {
                let (text, image) = streams(v);
                in_tiles(text, image, 3, &lengths, scores)
            });
            for (i, (a, b)) in tiled.iter().zip(&whole).enumerate() {
                let error = relative_error(a, b);
                assert!(error < 5e-6, "tensor {i} with tiles of {scores} scores, lengths {lengths:?}: {error:e}");
            }
        }
    }
}

#[test]
fn an_unused_text_output_gives_exactly_zero_query_gradients() {
    let leaves: Vec<Value> = attention_inputs(1, 4, 6, 8).into_iter().map(Value::leaf).collect();
    let (text, image) = streams(&leaves);
    let outputs = composed_only(|| joint_attention(text, image, 2, &TextLengths::new(&[4])).unwrap());
    let mut grads = backward(vec![(outputs[1].clone(), randn(9, &[1, 6, 8], 1.0))]).unwrap();
    let largest = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(largest(grads.take(&leaves[0]).unwrap()), 0.0);
    assert!(largest(grads.take(&leaves[1]).unwrap()) > 0.0);
}

#[test]
fn bf16_attention_agrees_with_the_kernel() {
    let inputs: Vec<Tensor> = attention_inputs(2, 7, 33, 2 * 128).iter().map(bf16).collect();
    agree(BF16, &inputs, |v| {
        let (text, image) = streams(v);
        joint_attention(text, image, 2, &TextLengths::new(&[7, 2]))
    });
}

#[test]
fn bf16_linears_agree_with_the_kernel() {
    let (k, n) = (48, 40);
    let mut inputs = vec![bf16(&randn(0, &[2, 9, k], 1.0))];
    for i in 1..=2 {
        inputs.extend([bf16(&randn(10 * i, &[n, k], 0.2)), bf16(&randn(10 * i + 1, &[n], 1.0))]);
        inputs.extend([randn(10 * i + 2, &[3, k], 0.3), randn(10 * i + 3, &[n, 3], 0.3)]);
    }
    for activation in [None, Some(Activation::Silu), Some(Activation::GeluTanh)] {
        agree(BF16, &inputs, |v| {
            let layer = |v: &[Value]| Linear {
                weight: v[0].clone().into(),
                bias: Some(v[1].clone()),
                lora: Some(Lora { a: v[2].clone(), b: v[3].clone(), scale: 0.75 }),
            };
            linear_group(&v[0], activation, &[&layer(&v[1..5]), &layer(&v[5..9])])
        });
    }
}

#[test]
fn bf16_norms_and_gates_agree_with_the_kernels() {
    let x = bf16(&randn(0, &[2, 5, 256], 1.5));
    for (rows, table_rows) in
        [(TokenRows::per_sample(2, 5), 2), (TokenRows::with_conditions(2, vec![false, false, true, false, true]), 4)]
    {
        let mods = bf16(&randn(1, &[table_rows, 6, 256], 0.5));
        let inputs = [x.clone(), mods.clone()];
        agree(BF16, &inputs, |v| Ok(vec![modulated_norm(&v[0], &v[1], 3, 1, &rows, 1e-6)?]));
        let inputs = [x.clone(), bf16(&randn(2, &[2, 5, 256], 1.0)), mods];
        agree(BF16, &inputs, |v| Ok(vec![gated_residual(&v[0], &v[1], &v[2], 2, &rows)?]));
    }
    let weight = bf16(&(randn(3, &[256], 0.2) + 1.0).unwrap());
    agree(BF16, &[x.clone(), weight], |v| Ok(vec![rms_norm(&v[0], &v[1], 1e-6)?]));
    let angles = randn(4, &[5 * 64], 2.0);
    let table = |t: Tensor| t.to_vec1::<f32>().unwrap();
    let rope = Rope::new(table(angles.cos().unwrap()), table(angles.sin().unwrap()), 64);
    let weight = bf16(&(randn(5, &[128], 0.2) + 1.0).unwrap());
    agree(BF16, &[x, weight], |v| Ok(vec![norm_rope(&v[0], &v[1], &rope, 1e-6)?]));
}
