//! What the CPU ops compute, recorded for the tests of the GPU kernels: `scripts/kernels/test_cpu_twins.py` wants the same
//! numbers of every kernel in Triton's interpreter.
//!
//! `QWEN_LORA_RECORD=1 cargo test --lib kernels::cuda::twins` writes the file anew.

use crate::error::Result;
use crate::io::safetensors::{MappedFile, RawTensor, write};
use crate::kernels::attention::{Stream, TextLengths, joint_attention};
use crate::kernels::linear::{Linear, Lora};
use crate::kernels::math::Activation;
use crate::kernels::modulation::{TokenRows, gated_residual};
use crate::kernels::norm::modulated_norm;
use crate::kernels::rope::{Rope, norm_rope};
use crate::kernels::testing::{randn, relative_error};
use crate::kernels::{Value, backward};
use crate::optim::{AdamW, AdamWOptions, Parameter, clip_grad_norm};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/kernels/cpu.safetensors");

type Tensors = BTreeMap<String, Tensor>;

/// Inputs as `NAME.x`, outputs as `NAME.out.0`, their gradients as `NAME.grad.0`, gradients of inputs as `NAME.d.x`.
fn op(
    tensors: &mut Tensors,
    name: &str,
    inputs: &[(&str, Tensor)],
    op: impl Fn(&[Value]) -> Result<Vec<Value>>,
) -> Result<()> {
    let leaves: Vec<Value> = inputs.iter().map(|(_, t)| Value::leaf(t.clone())).collect();
    let outputs = op(&leaves)?;
    let mut note = |key: String, tensor: &Tensor| tensors.insert(format!("{name}.{key}"), tensor.clone());
    let mut seeds = Vec::new();
    for (i, output) in outputs.into_iter().enumerate() {
        let seed = randn(900 + i as u64, output.dims(), 1.0);
        note(format!("out.{i}"), output.tensor());
        note(format!("grad.{i}"), &seed);
        seeds.push((output, seed));
    }
    let mut grads = backward(seeds)?;
    for ((input, tensor), leaf) in inputs.iter().zip(&leaves) {
        note(input.to_string(), tensor);
        note(format!("d.{input}"), &grads.take(leaf).expect("every input here has a gradient"));
    }
    Ok(())
}

fn compute() -> Result<Tensors> {
    let mut tensors = Tensors::new();
    let stream = |first: u64, tokens: usize| {
        ["q", "k", "v"].into_iter().zip(first..).map(move |(n, i)| (n, randn(i, &[2, tokens, 64], 1.0)))
    };
    let names = ["text_q", "text_k", "text_v", "image_q", "image_k", "image_v"];
    let inputs: Vec<_> = names.into_iter().zip(stream(0, 7).chain(stream(3, 20)).map(|(_, t)| t)).collect();
    op(&mut tensors, "attention", &inputs, |v| {
        let (text, image) = (Stream { q: &v[0], k: &v[1], v: &v[2] }, Stream { q: &v[3], k: &v[4], v: &v[5] });
        joint_attention(text, image, 1, &TextLengths::new(&[7, 3]))
    })?;

    // The last two of each sample's five tokens are condition tokens.
    let rows = TokenRows::with_conditions(2, vec![false, false, false, true, true]);
    let x = ("x", randn(10, &[2, 5, 48], 1.5));
    let mods = ("mods", randn(11, &[4, 3, 48], 0.5));
    op(&mut tensors, "modulated_norm", &[x.clone(), mods.clone()], |v| {
        Ok(vec![modulated_norm(&v[0], &v[1], 2, 0, &rows, 1e-6)?])
    })?;
    op(&mut tensors, "gated_residual", &[x, ("y", randn(12, &[2, 5, 48], 1.0)), mods], |v| {
        Ok(vec![gated_residual(&v[0], &v[1], &v[2], 1, &rows)?])
    })?;

    let angles = randn(13, &[3, 32], 2.0);
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let rope = Rope::new(cos.flatten_all()?.to_vec1()?, sin.flatten_all()?.to_vec1()?, 32);
    let inputs = [("x", randn(14, &[2, 3, 128], 1.5)), ("weight", randn(15, &[64], 1.0))];
    op(&mut tensors, "norm_rope", &inputs, |v| Ok(vec![norm_rope(&v[0], &v[1], &rope, 1e-6)?]))?;
    tensors.extend([("norm_rope.cos".into(), cos), ("norm_rope.sin".into(), sin)]);

    let inputs = [
        ("x", randn(20, &[5, 32], 1.5)),
        ("weight", randn(21, &[16, 32], 0.2)),
        ("bias", randn(22, &[16], 1.0)),
        ("a", randn(23, &[3, 32], 0.3)),
        ("b", randn(24, &[16, 3], 0.3)),
    ];
    op(&mut tensors, "linear", &inputs, |v| {
        let lora = Some(Lora { a: v[3].clone(), b: v[4].clone(), scale: 0.75 });
        let layer = Linear { weight: v[1].clone().into(), bias: Some(v[2].clone()), lora };
        Ok(vec![layer.forward_activated(&v[0], Activation::GeluTanh)?])
    })?;

    optimizer(&mut tensors)?;

    // Values that bf16 has: the kernel reads bf16.
    let w = randn(40, &[4, 96], 0.03).to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
    let blocks = QTensor::quantize(&w, GgmlDType::Q8_0)?.data()?.into_owned();
    let scales = blocks.chunks_exact(34).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32());
    let quantised = blocks.chunks_exact(34).flat_map(|b| b[2..].iter().map(|&q| f32::from(q as i8)));
    tensors.insert("int8.q".into(), Tensor::from_iter(quantised, &Device::Cpu)?.reshape((4, 96))?);
    tensors.insert("int8.scales".into(), Tensor::from_iter(scales, &Device::Cpu)?.reshape((4, 3))?);
    tensors.insert("int8.w".into(), w);
    Ok(tensors)
}

/// Two steps of clipping and AdamW on two tensors: `adamw.STEP.TENSOR.grad`, then what the step left.
fn optimizer(tensors: &mut Tensors) -> Result<()> {
    let shapes = [("0", vec![5, 3]), ("1", vec![7])];
    let weights = shapes
        .iter()
        .enumerate()
        .map(|(i, (name, shape))| Parameter { name: (*name).into(), tensor: randn(30 + i as u64, shape, 0.5) });
    let params: Vec<Parameter> = weights.collect();
    let mut note = |key: String, tensor: &Tensor| tensors.insert(format!("adamw.{key}"), tensor.copy().unwrap());
    for param in &params {
        note(format!("start.{}", param.name), &param.tensor);
    }
    let mut optimizer = AdamW::new(AdamWOptions { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 });
    for step in 0..2u64 {
        let grads = shapes.iter().zip(0..).map(|((_, shape), i)| Some(randn(50 + 10 * step + i, shape, 1.0)));
        let mut grads: Vec<Option<Tensor>> = grads.collect();
        for (param, grad) in params.iter().zip(grads.iter().flatten()) {
            note(format!("{step}.{}.grad", param.name), grad);
        }
        let norm = clip_grad_norm(&mut grads, 1.0)?;
        note(format!("{step}.norm"), &Tensor::new(&[norm as f32], &Device::Cpu)?);
        optimizer.step(&params, &grads, 1e-3)?;
        for param in &params {
            note(format!("{step}.{}.weights", param.name), &param.tensor);
        }
        for (name, tensor) in optimizer.state_tensors(&params)? {
            note(format!("{step}.{name}"), &tensor.to_dtype(DType::F32)?);
        }
    }
    Ok(())
}

#[test]
fn the_recorded_outputs_are_those_of_the_cpu_ops() {
    let tensors = compute().unwrap();
    let path = Path::new(FILE);
    if std::env::var_os("QWEN_LORA_RECORD").is_some() {
        let raw = tensors.iter().map(|(name, tensor)| RawTensor::from_tensor(name, tensor).unwrap());
        write(path, raw.collect(), &BTreeMap::new()).unwrap();
    }
    let file = MappedFile::open(path).unwrap();
    assert_eq!(file.names().len(), tensors.len());
    for (name, tensor) in &tensors {
        let recorded = file.tensor(name, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(recorded.dims(), tensor.dims(), "{name}");
        // Vector units of another width add in another order.
        let error = relative_error(tensor, &recorded);
        assert!(error < 2e-6, "{name}: {error:e}");
    }
}
