//! Segments: pieces of a network whose backward either keeps their graph or computes it again from their inputs.

use crate::error::Result;
use crate::kernels::tape::{Gradients, Value, backward, is_recording, no_grad, record_always};
use candle_core::Tensor;

/// What a segment holds on to between forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Everything its ops saved.
    Graph,
    /// Its inputs alone; the forward pass is run again for the backward pass.
    Inputs,
}

/// Runs `f` as one op. Gradients flow to `inputs` and to every leaf that `f` captures.
///
/// Both ways of keeping run the same ops in the same order and sum gradients in the same groups, so their gradients
/// are equal bit for bit. `f` must compute the same values each time it is called. `captures_leaves` says whether `f`
/// holds leaves; without any, and with constant inputs, nothing is kept.
pub fn segment(
    keep: Keep,
    inputs: &[&Value],
    captures_leaves: bool,
    f: impl Fn(&[Value]) -> Result<Vec<Value>> + 'static,
) -> Result<Vec<Value>> {
    if !is_recording() || (!captures_leaves && !inputs.iter().any(|v| v.needs_grad())) {
        return no_grad(|| f(&inputs.iter().map(|v| v.detach()).collect::<Vec<_>>()));
    }
    let needs: Vec<bool> = inputs.iter().map(|v| v.needs_grad()).collect();
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.tensor().clone()).collect();
    match keep {
        Keep::Graph => {
            let own_inputs = own_inputs(&tensors, &needs);
            let outputs = f(&own_inputs)?;
            if !outputs.iter().any(Value::needs_grad) {
                return Ok(outputs);
            }
            let tensors = outputs.iter().map(|v| v.tensor().clone()).collect();
            Ok(record_always(
                inputs,
                tensors,
                Box::new(move |grads, sink| run_backward(&own_inputs, outputs, grads, sink)),
            ))
        }
        Keep::Inputs => {
            let outputs = no_grad(|| f(&tensors.iter().cloned().map(Value::constant).collect::<Vec<_>>()))?;
            let outputs = outputs.into_iter().map(Value::into_tensor).collect();
            let backward = move |grads: Vec<Option<Tensor>>, sink: &mut Gradients| {
                let own_inputs = own_inputs(&tensors, &needs);
                drop(tensors);
                let outputs = f(&own_inputs)?;
                run_backward(&own_inputs, outputs, grads, sink)
            };
            Ok(record_always(inputs, outputs, Box::new(backward)))
        }
    }
}

fn own_inputs(tensors: &[Tensor], needs: &[bool]) -> Vec<Value> {
    let own = |(t, &needs): (&Tensor, &bool)| if needs { Value::leaf(t.clone()) } else { Value::constant(t.clone()) };
    tensors.iter().zip(needs).map(own).collect()
}

fn run_backward(
    inputs: &[Value],
    outputs: Vec<Value>,
    grads: Vec<Option<Tensor>>,
    sink: &mut Gradients,
) -> Result<Vec<Option<Tensor>>> {
    let seeds = outputs.into_iter().zip(grads).filter_map(|(v, g)| Some((v, g?))).collect();
    let mut inner = backward(seeds)?;
    let input_grads = inputs.iter().map(|v| inner.take(v)).collect();
    sink.merge(inner)?;
    Ok(input_grads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tape::record1;
    use candle_core::Device;

    fn mul(x: &Value, y: &Value) -> Value {
        let (a, b) = (x.tensor().clone(), y.tensor().clone());
        record1(&[x, y], (&a * &b).unwrap(), move |g| Ok(vec![Some((&g * &b)?), Some((&g * &a)?)]))
    }

    #[test]
    fn both_ways_give_equal_gradients_to_inputs_and_captured_leaves() {
        let run = |keep: Option<Keep>| {
            let vector = |v: [f32; 2]| Value::leaf(Tensor::new(&v, &Device::Cpu).unwrap());
            let (x, w) = (vector([2., 3.]), vector([5., 7.]));
            let captured = w.clone();
            let f = move |v: &[Value]| Ok(vec![mul(&mul(&v[0], &captured), &v[0]), mul(&v[0], &v[0])]);
            let outputs = match keep {
                Some(keep) => segment(keep, &[&x], true, f).unwrap(),
                None => f(std::slice::from_ref(&x)).unwrap(),
            };
            let y = mul(&outputs[0], &w); // the leaf is used outside as well
            let ones = Tensor::new(&[1f32, 10.], &Device::Cpu).unwrap();
            let mut grads = backward(vec![(y, ones.clone()), (outputs[1].clone(), ones)]).unwrap();
            [&x, &w].map(|v| grads.take(v).unwrap().to_vec1::<f32>().unwrap())
        };
        // y0 = x^2 w^2, y1 = x^2: dx = 2 x w^2 + 2 x, dw = 2 x^2 w.
        let expected = [vec![104., 3000.], vec![40., 1260.]];
        assert_eq!(run(None), expected);
        assert_eq!(run(Some(Keep::Graph)), expected);
        assert_eq!(run(Some(Keep::Inputs)), expected);
    }

    #[test]
    fn without_recording_nothing_is_kept() {
        let x = Value::leaf(Tensor::new(&[2f32], &Device::Cpu).unwrap());
        let y = no_grad(|| segment(Keep::Inputs, &[&x], false, |v| Ok(vec![mul(&v[0], &v[0])]))).unwrap();
        assert!(!y[0].needs_grad());
    }
}
