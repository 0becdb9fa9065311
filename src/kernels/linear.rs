//! Linear layers with adapters: `y = act(x) W' + b + s (act(x) A') B'` as one op.
//!
//! In LoRA mode W and b are constants: their gradients are neither computed nor held. Layers that read the same
//! input (q, k and v) run as one group, so that their gradients of x are summed inside the matrix products.

use crate::error::{Error, Result};
use crate::kernels::composed;
use crate::kernels::cpu::{self, column_sums, uninit, view};
use crate::kernels::math::Activation;
use crate::kernels::matmul::{Into, Mat, MatMut, gemm};
use crate::kernels::route::is_composed;
use crate::kernels::tape::{Value, record};
use crate::kernels::weight::Weight;
use candle_core::{DType, Tensor};
use std::rc::Rc;

/// A low-rank adapter on one linear.
#[derive(Clone)]
pub struct Lora {
    /// (rank, in), f32.
    pub a: Value,
    /// (out, rank), f32.
    pub b: Value,
    /// What the product `B A` is multiplied by: alpha / rank, or alpha / sqrt(rank).
    pub scale: f64,
}

/// A linear layer and its adapter, if it carries one.
#[derive(Clone)]
pub struct Linear {
    /// (out, in), as the base model is held.
    pub weight: Weight,
    /// (out,).
    pub bias: Option<Value>,
    /// The adapter.
    pub lora: Option<Lora>,
}

impl Linear {
    /// Applies the layer to `x` (.., in), giving (.., out) in the dtype of `x`.
    pub fn forward(&self, x: &Value) -> Result<Value> {
        Ok(linear_group(x, None, &[self])?.remove(0))
    }

    /// Applies the layer to `activation(x)`; the activated input is computed again for the backward pass, not kept.
    pub fn forward_activated(&self, x: &Value, activation: Activation) -> Result<Value> {
        Ok(linear_group(x, Some(activation), &[self])?.remove(0))
    }

    fn dims(&self) -> (usize, usize) {
        self.weight.dims()
    }
}

/// What gradients may flow to: the input, then of each layer weight, bias, A and B, as far as it has them.
pub(super) fn inputs<'a>(x: &'a Value, layers: &[&'a Linear]) -> Vec<&'a Value> {
    let mut inputs = vec![x];
    for layer in layers {
        inputs.extend(layer.weight.value());
        inputs.extend(layer.bias.as_ref());
        inputs.extend(layer.lora.as_ref().map(|l| &l.a));
        inputs.extend(layer.lora.as_ref().map(|l| &l.b));
    }
    inputs
}

/// Applies several layers to one input (.., in); one output (.., out_i) each.
///
/// Errors: `x` does not end in the layers' input width.
pub fn linear_group(x: &Value, activation: Option<Activation>, layers: &[&Linear]) -> Result<Vec<Value>> {
    let (_, k) = layers.first().expect("a group has layers").dims();
    if x.dims().last() != Some(&k) {
        return Err(Error::run("the input does not fit the linear layer")
            .expected(format!("last dimension {k}"), format!("shape {:?}", x.dims())));
    }
    if is_composed(x.tensor()) {
        return composed::linear::linear_group(x, activation, layers);
    }
    let m = x.tensor().elem_count() / k;
    let dtype = x.dtype();
    let input = Input::new(x.tensor(), activation)?;
    let lora_inputs: Rc<Vec<Option<Vec<f32>>>> = Rc::new(
        layers
            .iter()
            .map(|layer| layer.lora.as_ref().map(|lora| product_with_rows(&input, m, k, lora.a.tensor())).transpose())
            .collect::<Result<_>>()?,
    );
    let mut outputs = Vec::with_capacity(layers.len());
    for (layer, lora_input) in layers.iter().zip(lora_inputs.iter()) {
        let y = forward_one(&input, m, layer, lora_input.as_deref())?;
        let mut shape = x.dims().to_vec();
        *shape.last_mut().expect("checked above") = layer.dims().0;
        outputs.push(cpu::from_f32(y, shape, dtype)?);
    }
    drop(input);

    let saved = Saved {
        x: x.tensor().clone(),
        x_needs_grad: x.needs_grad(),
        activation,
        layers: layers.iter().map(|l| (*l).clone()).collect(),
        lora_inputs,
    };
    Ok(record(&inputs(x, layers), outputs, move |grads| saved.backward(grads)))
}

/// The layers' common input in f32, after the activation.
enum Input<'a> {
    Plain(cpu::View<'a>),
    Activated(Vec<f32>),
}

impl<'a> Input<'a> {
    fn new(x: &'a Tensor, activation: Option<Activation>) -> Result<Self> {
        let x = view(x)?;
        Ok(match activation {
            None => Self::Plain(x),
            Some(activation) => Self::Activated(cpu::activated(&x, activation)),
        })
    }
}

impl std::ops::Deref for Input<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Plain(v) => v,
            Self::Activated(v) => v,
        }
    }
}

/// `x rows'` for x (m, k) and rows (r, k).
fn product_with_rows(x: &[f32], m: usize, k: usize, rows: &Tensor) -> Result<Vec<f32>> {
    let r = rows.dims()[0];
    let mut out = uninit(m * r);
    gemm(MatMut::new(&mut out, m, r), Into::Overwrite, Mat::new(x, m, k), Mat::new(&view(rows)?, r, k).t(), 1.0);
    Ok(out)
}

fn forward_one(x: &[f32], m: usize, layer: &Linear, lora_input: Option<&[f32]>) -> Result<Vec<f32>> {
    let (n, k) = layer.dims();
    let mut y = uninit(m * n);
    let mode = match &layer.bias {
        None => Into::Overwrite,
        Some(bias) => {
            let bias = view(bias.tensor())?;
            cpu::par_rows(&mut y, n, |_, row| row.copy_from_slice(&bias));
            Into::Add
        }
    };
    layer.weight.for_each_panel(|rows, w| {
        let y = MatMut::strided(&mut y[rows.start..], m, rows.len(), n);
        gemm(y, mode, Mat::new(x, m, k), Mat::new(w, rows.len(), k).t(), 1.0);
    })?;
    if let (Some(lora), Some(t)) = (&layer.lora, lora_input) {
        let r = lora.b.dims()[1];
        let b = view(lora.b.tensor())?;
        gemm(MatMut::new(&mut y, m, n), Into::Add, Mat::new(t, m, r), Mat::new(&b, n, r).t(), lora.scale as f32);
    }
    Ok(y)
}

struct Saved {
    x: Tensor,
    x_needs_grad: bool,
    activation: Option<Activation>,
    layers: Vec<Linear>,
    lora_inputs: Rc<Vec<Option<Vec<f32>>>>,
}

impl Saved {
    /// Gradients in the order of the op's inputs: x, then weight, bias, A, B of each layer.
    fn backward(self, grads: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
        let (_, k) = self.layers[0].dims();
        let m = self.x.elem_count() / k;
        let input = Input::new(&self.x, self.activation)?;
        let mut dx = InputGrad { buffer: self.x_needs_grad.then(|| uninit(m * k)), written: false, m, k };
        let mut out = vec![None];
        for ((layer, grad), lora_input) in self.layers.iter().zip(grads).zip(self.lora_inputs.iter()) {
            let (n, _) = layer.dims();
            let Some(grad) = grad else {
                let [weight, bias] = [layer.weight.value().is_some(), layer.bias.is_some()].map(usize::from);
                let own = weight + bias + 2 * usize::from(layer.lora.is_some());
                out.extend(std::iter::repeat_n(None, own));
                continue;
            };
            let dy = view(&grad)?;
            if self.x_needs_grad {
                layer.weight.for_each_panel(|rows, w| {
                    dx.add(Mat::strided(&dy[rows.start..], m, rows.len(), n), Mat::new(w, rows.len(), k));
                })?;
            }
            if let Some(weight) = layer.weight.value() {
                let d_weight = weight.needs_grad().then(|| {
                    let mut dw = uninit(n * k);
                    let dw_view = MatMut::new(&mut dw, n, k);
                    gemm(dw_view, Into::Overwrite, Mat::new(&dy, m, n).t(), Mat::new(&input, m, k), 1.0);
                    cpu::from_f32(dw, (n, k), DType::F32)
                });
                out.push(d_weight.transpose()?);
            }
            if let Some(bias) = &layer.bias {
                let d_bias = bias.needs_grad().then(|| cpu::from_f32(column_sums(&dy, n), n, DType::F32));
                out.push(d_bias.transpose()?);
            }
            if let (Some(lora), Some(t)) = (&layer.lora, lora_input) {
                let (r, scale) = (lora.a.dims()[0], lora.scale as f32);
                let mut dt = uninit(m * r);
                let b = view(lora.b.tensor())?;
                gemm(MatMut::new(&mut dt, m, r), Into::Overwrite, Mat::new(&dy, m, n), Mat::new(&b, n, r), scale);
                dx.add(Mat::new(&dt, m, r), Mat::new(&view(lora.a.tensor())?, r, k));
                let mut da = uninit(r * k);
                gemm(MatMut::new(&mut da, r, k), Into::Overwrite, Mat::new(&dt, m, r).t(), Mat::new(&input, m, k), 1.0);
                let mut db = uninit(n * r);
                gemm(MatMut::new(&mut db, n, r), Into::Overwrite, Mat::new(&dy, m, n).t(), Mat::new(t, m, r), scale);
                out.push(Some(cpu::from_f32(da, (r, k), DType::F32)?));
                out.push(Some(cpu::from_f32(db, (n, r), DType::F32)?));
            }
        }
        drop(input);
        if let Some(mut dx) = dx.buffer.filter(|_| dx.written) {
            if let Some(activation) = self.activation {
                cpu::multiply_by_derivative(&mut dx, &view(&self.x)?, activation);
            }
            out[0] = Some(cpu::from_f32(dx, self.x.shape(), self.x.dtype())?);
        }
        Ok(out)
    }
}

/// The gradient of the group's input, summed over the layers by the products themselves.
struct InputGrad {
    buffer: Option<Vec<f32>>,
    written: bool,
    m: usize,
    k: usize,
}

impl InputGrad {
    /// Adds `dy w` for dy (m, n), w (n, k).
    fn add(&mut self, dy: Mat, w: Mat) {
        if let Some(dx) = &mut self.buffer {
            let mode = if self.written { Into::Add } else { Into::Overwrite };
            gemm(MatMut::new(dx, self.m, self.k), mode, dy, w, 1.0);
            self.written = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::int8::Int8Matrix;
    use crate::kernels::tape::backward;
    use crate::kernels::testing::{check_both, randn, relative_error};

    fn layer(v: &[Value], with_lora: bool) -> Linear {
        let lora = with_lora.then(|| Lora { a: v[2].clone(), b: v[3].clone(), scale: 0.75 });
        Linear { weight: v[0].clone().into(), bias: Some(v[1].clone()), lora }
    }

    /// `y = act(x) W' + b (+ s (act(x) A') B')` in plain ops.
    fn twin_layer(x: &Tensor, t: &[Tensor], with_lora: bool) -> candle_core::Result<Tensor> {
        let y = x.matmul(&t[0].t()?)?.broadcast_add(&t[1])?;
        if with_lora { y + (x.matmul(&t[2].t()?)?.matmul(&t[3].t()?)? * 0.75)? } else { Ok(y) }
    }

    #[test]
    fn a_group_with_and_without_adapters_equals_its_twin_in_every_gradient() {
        let (m, k, n) = (37, 24, 40);
        let mut inputs = vec![randn(0, &[m, k], 1.0)];
        for i in 1..=2 {
            inputs.extend([randn(10 * i, &[n, k], 0.2), randn(10 * i + 1, &[n], 1.0)]);
            inputs.extend([randn(10 * i + 2, &[3, k], 0.3), randn(10 * i + 3, &[n, 3], 0.3)]);
        }
        inputs.extend([randn(30, &[n, k], 0.2), randn(31, &[n], 1.0)]);
        check_both(
            &inputs,
            5e-6,
            |v| linear_group(&v[0], None, &[&layer(&v[1..5], true), &layer(&v[5..9], true), &layer(&v[9..], false)]),
            |t| {
                let x = &t[0];
                Ok(vec![twin_layer(x, &t[1..5], true)?, twin_layer(x, &t[5..9], true)?, twin_layer(x, &t[9..], false)?])
            },
        );
    }

    #[test]
    fn activations_are_part_of_the_op() {
        let inputs = [
            randn(0, &[9, 8], 1.5),
            randn(1, &[5, 8], 0.5),
            randn(2, &[5], 1.0),
            randn(3, &[2, 8], 0.5),
            randn(4, &[5, 2], 0.5),
        ];
        check_both(
            &inputs,
            5e-6,
            |v| Ok(vec![layer(&v[1..], true).forward_activated(&v[0], Activation::Silu)?]),
            |t| Ok(vec![twin_layer(&t[0].silu()?, &t[1..], true)?]),
        );
        check_both(
            &inputs,
            5e-6,
            |v| Ok(vec![layer(&v[1..], true).forward_activated(&v[0], Activation::GeluTanh)?]),
            |t| Ok(vec![twin_layer(&t[0].gelu()?, &t[1..], true)?]),
        );
    }

    /// `x`, then bias, A and B of each layer; their weights (n, k) are in int8.
    fn int8_group(v: &[Value], held: &[Int8Matrix], activation: Option<Activation>) -> Result<Vec<Value>> {
        let layer = |(v, held): (&[Value], &Int8Matrix)| {
            let lora = Some(Lora { a: v[1].clone(), b: v[2].clone(), scale: 0.75 });
            Linear { weight: Weight::Int8(held.clone()), bias: Some(v[0].clone()), lora }
        };
        let layers: Vec<Linear> = v[1..].chunks_exact(3).zip(held).map(layer).collect();
        linear_group(&v[0], activation, &layers.iter().collect::<Vec<_>>())
    }

    #[test]
    fn int8_weights_give_values_and_gradients_of_the_weights_that_they_stand_for() {
        let (m, k, n) = (37, 64, 40);
        let mut inputs = vec![randn(0, &[m, k], 1.0)];
        let mut held = Vec::new();
        for i in 1..=2 {
            inputs.extend([randn(10 * i, &[n], 1.0), randn(10 * i + 1, &[3, k], 0.3), randn(10 * i + 2, &[n, 3], 0.3)]);
            held.push(Int8Matrix::quantise("w", &randn(10 * i + 3, &[n, k], 0.2)).unwrap());
        }
        let weights: Vec<Tensor> =
            held.iter().map(|w| w.dequantise(DType::F32).unwrap().to_dtype(DType::F64).unwrap()).collect();
        let twin = |x: &Tensor, t: &[Tensor], w: &Tensor| twin_layer(x, &[std::slice::from_ref(w), t].concat(), true);
        check_both(
            &inputs,
            5e-6,
            |v| int8_group(v, &held, None),
            |t| Ok(vec![twin(&t[0], &t[1..4], &weights[0])?, twin(&t[0], &t[4..], &weights[1])?]),
        );
        check_both(
            &inputs[..4],
            5e-6,
            |v| int8_group(v, &held[..1], Some(Activation::GeluTanh)),
            |t| Ok(vec![twin(&t[0].gelu()?, &t[1..4], &weights[0])?]),
        );
    }

    #[test]
    fn int8_weights_of_several_panels_are_used_whole() {
        // 2^16 rows of 32 values are a panel.
        let (m, k, n) = (3, 32, (1 << 16) + 41);
        let held = Int8Matrix::quantise("w", &randn(0, &[n, k], 0.2)).unwrap();
        let run = |weight: Weight| {
            let x = Value::leaf(randn(1, &[m, k], 1.0));
            let y = Linear { weight, bias: None, lora: None }.forward(&x).unwrap();
            let value = y.tensor().clone();
            (value, backward(vec![(y, randn(2, &[m, n], 1.0))]).unwrap().take(&x).unwrap())
        };
        let (y, dx) = run(Weight::Int8(held.clone()));
        let (y_twin, dx_twin) = run(Value::constant(held.dequantise(DType::F32).unwrap()).into());
        assert!(relative_error(&y, &y_twin) < 1e-6 && relative_error(&dx, &dx_twin) < 5e-6);
    }

    #[test]
    fn frozen_weights_and_constant_inputs_get_no_gradient() {
        let constant = |i, shape: &[usize]| Value::constant(randn(i, shape, 1.0));
        let lora = Lora { a: Value::leaf(randn(3, &[2, 6], 1.0)), b: Value::leaf(randn(4, &[5, 2], 1.0)), scale: 2.0 };
        let weight = constant(0, &[5, 6]);
        let bias = Some(constant(1, &[5]));
        let layer = Linear { weight: weight.clone().into(), bias, lora: Some(lora.clone()) };
        let x = constant(2, &[3, 6]);
        let y = layer.forward(&x).unwrap();
        let seed = randn(5, &[3, 5], 1.0);
        let mut grads = backward(vec![(y, seed)]).unwrap();
        assert!(grads.take(&weight).is_none() && grads.take(&x).is_none());
        assert!(grads.take(&lora.a).is_some() && grads.take(&lora.b).is_some());
    }

    #[test]
    fn bf16_is_computed_in_f32_and_rounded_once() {
        let (x, w) = (
            randn(0, &[4, 32], 1.0).to_dtype(DType::BF16).unwrap(),
            randn(1, &[8, 32], 1.0).to_dtype(DType::BF16).unwrap(),
        );
        let layer = Linear { weight: Value::constant(w.clone()).into(), bias: None, lora: None };
        let y = layer.forward(&Value::constant(x.clone())).unwrap();
        let f32s = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
        let exact = f32s(&x).matmul(&f32s(&w).t().unwrap()).unwrap();
        let rounded = exact.to_dtype(DType::BF16).unwrap();
        assert_eq!(y.dtype(), DType::BF16);
        // Sums in another order may fall on the other side of a rounding boundary: one bf16 ulp.
        assert!(relative_error(y.tensor(), &rounded) < 1.0 / 256.0);
    }
}
