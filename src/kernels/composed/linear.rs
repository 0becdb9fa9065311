//! Linear layers with adapters; see `kernels::linear`.
//!
//! The base product runs in the activations' dtype. Adapters are f32 parameters that take part rounded to that dtype;
//! their gradients are summed in f32.

use crate::error::Result;
use crate::kernels::composed::product::{add_product, product, product_f32};
use crate::kernels::composed::{activate, times_derivative, wide};
use crate::kernels::linear::{Linear, inputs};
use crate::kernels::math::Activation;
use crate::kernels::tape::{Value, record};
use candle_core::Tensor;

/// [`linear_group`](crate::kernels::linear::linear_group) for an input that ends in the layers' width.
pub fn linear_group(x: &Value, activation: Option<Activation>, layers: &[&Linear]) -> Result<Vec<Value>> {
    let (m, _) = rows(x.tensor());
    let input = input(x.tensor(), activation)?;
    let mut outputs = Vec::with_capacity(layers.len());
    let mut lora_inputs = Vec::with_capacity(layers.len());
    for layer in layers {
        let (y, lora_input) = forward(&input, layer)?;
        let mut shape = x.dims().to_vec();
        *shape.last_mut().expect("an input has a width") = layer.weight.dims().0;
        debug_assert_eq!(y.dims()[0], m);
        outputs.push(y.reshape(shape)?);
        lora_inputs.push(lora_input);
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

/// Rows and columns of a tensor seen as one matrix.
fn rows(x: &Tensor) -> (usize, usize) {
    let k = *x.dims().last().expect("an input has a width");
    (x.elem_count() / k, k)
}

fn matrix(x: &Tensor) -> Result<Tensor> {
    Ok(x.reshape(rows(x))?.contiguous()?)
}

/// The layers' common input as a matrix in the dtype of `x`, after the activation.
fn input(x: &Tensor, activation: Option<Activation>) -> Result<Tensor> {
    match activation {
        None => matrix(x),
        Some(activation) => matrix(&activate(x, activation)?),
    }
}

/// `x W' + b + s (x A') B'`, and `x A'` for the backward pass.
fn forward(x: &Tensor, layer: &Linear) -> Result<(Tensor, Option<Tensor>)> {
    let dtype = x.dtype();
    let y = product(x, &layer.weight.dense(dtype)?.t()?)?;
    let bias = layer.bias.as_ref().map(|b| b.tensor().to_dtype(dtype)).transpose()?;
    let Some(lora) = &layer.lora else { return Ok((add_low_rank(y, bias, None)?, None)) };
    let lora_input = product(x, &lora.a.tensor().to_dtype(dtype)?.t()?)?; // (m, r)
    let b = lora.b.tensor().to_dtype(dtype)?;
    let y = add_low_rank(y, bias, Some(LowRank { t: &lora_input, b: &b, by_rank: false, scale: lora.scale }))?;
    Ok((y, Some(lora_input)))
}

/// A product of small rank: `scale * t b'` for t (m, r) and b (n, r), or `scale * t b` for b (r, n) if `by_rank`.
struct LowRank<'a> {
    t: &'a Tensor,
    b: &'a Tensor,
    by_rank: bool,
    scale: f64,
}

/// `y + bias + low_rank`; nothing else may be using the storage of `y`.
fn add_low_rank(mut y: Tensor, bias: Option<Tensor>, low_rank: Option<LowRank>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    {
        use crate::kernels::cuda::ops;
        let low_rank = low_rank.as_ref().map(|l| ops::LowRank { t: l.t, b: l.b, by_rank: l.by_rank, scale: l.scale });
        if (bias.is_some() || low_rank.is_some()) && ops::lora_add(&y, bias.as_ref(), low_rank)? {
            return Ok(y);
        }
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias)?;
    }
    match low_rank {
        None => Ok(y),
        Some(LowRank { t, b, by_rank: true, scale }) => add_product(y, t, b, scale),
        Some(LowRank { t, b, by_rank: false, scale }) => add_product(y, t, &b.t()?, scale),
    }
}

struct Saved {
    x: Tensor,
    x_needs_grad: bool,
    activation: Option<Activation>,
    layers: Vec<Linear>,
    lora_inputs: Vec<Option<Tensor>>,
}

impl Saved {
    /// Gradients in the order of the op's inputs: x, then weight, bias, A, B of each layer.
    fn backward(self, grads: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
        let dtype = self.x.dtype();
        let reads_input = |l: &Linear| l.weight.needs_grad() || l.lora.is_some();
        let input = match self.layers.iter().any(reads_input) {
            true => Some(input(&self.x, self.activation)?),
            false => None,
        };
        let input = || input.as_ref().expect("computed where a layer reads it");
        let mut dx: Option<Tensor> = None;
        let mut out = vec![None];
        for ((layer, grad), lora_input) in self.layers.iter().zip(grads).zip(&self.lora_inputs) {
            let Some(grad) = grad else {
                let [weight, bias] = [layer.weight.value().is_some(), layer.bias.is_some()].map(usize::from);
                let own = weight + bias + 2 * usize::from(layer.lora.is_some());
                out.extend(std::iter::repeat_n(None, own));
                continue;
            };
            let dy = matrix(&grad)?; // (m, n)
            drop(grad);
            if self.x_needs_grad {
                let weight = layer.weight.dense(dtype)?;
                dx = Some(match dx.take() {
                    None => product(&dy, &weight)?,
                    Some(dx) => add_product(dx, &dy, &weight, 1.0)?,
                });
            }
            if let Some(weight) = layer.weight.value() {
                out.push(weight.needs_grad().then(|| product_f32(&dy.t()?, input(), 1.0)).transpose()?);
            }
            if let Some(bias) = &layer.bias {
                out.push(bias.needs_grad().then(|| Ok::<_, crate::error::Error>(wide(&dy)?.sum(0)?)).transpose()?);
            }
            if let (Some(lora), Some(lora_input)) = (&layer.lora, lora_input) {
                let (a, b) = (lora.a.tensor().to_dtype(dtype)?, lora.b.tensor().to_dtype(dtype)?);
                let dt = product(&dy, &b)?; // (m, r), without the scale
                if let Some(sum) = dx.take() {
                    let low_rank = LowRank { t: &dt, b: &a, by_rank: true, scale: lora.scale };
                    dx = Some(add_low_rank(sum, None, Some(low_rank))?);
                }
                out.push(Some(product_f32(&dt.t()?, input(), lora.scale)?)); // (r, k)
                out.push(Some(product_f32(&dy.t()?, lora_input, lora.scale)?)); // (n, r)
            }
        }
        if let Some(dx) = dx {
            let dx = match self.activation {
                None => dx.reshape(self.x.shape())?,
                Some(activation) => times_derivative(dx.reshape(self.x.shape())?, &self.x, activation)?,
            };
            out[0] = Some(dx);
        }
        Ok(out)
    }
}
