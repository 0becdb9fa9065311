//! The tape: values, the ops that made them, and the backward sweep.
//!
//! There is no global state. A [`Value`] that needs a gradient keeps its maker alive; [`backward`] visits the makers
//! from the newest to the oldest and drops what each one saved as soon as it has run, so that the memory of a segment
//! shrinks while its gradients are computed.

use crate::error::{Error, Result};
use crate::kernels::tensors;
use candle_core::{DType, Shape, Tensor};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

/// A tensor together with the op that made it. Cloning is cheap.
#[derive(Clone)]
pub struct Value {
    tensor: Tensor,
    source: Option<Source>,
}

#[derive(Clone)]
struct Source {
    node: Rc<Node>,
    output: usize,
}

/// Gradients of an op's outputs in, gradients of its inputs out; `None` means zero. The sink takes the gradients of
/// leaves that the op holds inside and that are not among its inputs (see `checkpoint::segment`).
type BackwardFn = Box<dyn FnOnce(Vec<Option<Tensor>>, &mut Gradients) -> Result<Vec<Option<Tensor>>>>;

struct Node {
    /// Grows with creation: an op is always newer than its inputs.
    id: u64,
    num_outputs: usize,
    /// `None` for leaves, and for ops whose backward has run.
    recorded: RefCell<Option<Recorded>>,
}

struct Recorded {
    inputs: Vec<Option<Source>>,
    backward: BackwardFn,
}

thread_local! {
    static NEXT_ID: Cell<u64> = const { Cell::new(0) };
    static RECORDING: Cell<bool> = const { Cell::new(true) };
}

/// Runs `f` without recording: its values need no gradient, whatever leaves they are made of.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            RECORDING.with(|r| r.set(self.0));
        }
    }
    let _restore = Restore(RECORDING.with(|r| r.replace(false)));
    f()
}

/// Whether ops are being recorded on this thread.
pub fn is_recording() -> bool {
    RECORDING.with(Cell::get)
}

fn next_id() -> u64 {
    NEXT_ID.with(|c| c.replace(c.get() + 1))
}

impl Value {
    /// A value without gradient: a frozen weight, an input.
    pub fn constant(tensor: Tensor) -> Self {
        Self { tensor, source: None }
    }

    /// A value whose gradient [`backward`] returns: a parameter, or the input of a segment.
    pub fn leaf(tensor: Tensor) -> Self {
        let node = Node { id: next_id(), num_outputs: 1, recorded: RefCell::new(None) };
        Self { tensor, source: Some(Source { node: Rc::new(node), output: 0 }) }
    }

    /// The tensor.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The tensor, without the graph.
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }

    /// The same tensor as a constant.
    pub fn detach(&self) -> Self {
        Self::constant(self.tensor.clone())
    }

    /// Whether a gradient flows into this value.
    pub fn needs_grad(&self) -> bool {
        self.source.is_some()
    }

    /// Dimensions.
    pub fn dims(&self) -> &[usize] {
        self.tensor.dims()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    /// The same elements in another shape.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        let out = self.tensor.reshape(shape.into())?;
        let dims = self.tensor.shape().clone();
        Ok(record1(&[self], out, move |grad| Ok(vec![Some(grad.reshape(dims)?)])))
    }
}

/// Records an op with several outputs. `backward` gets one optional gradient per output (at least one is there) and
/// returns one optional gradient per input. When no input needs a gradient nothing is kept.
pub fn record(
    inputs: &[&Value],
    outputs: Vec<Tensor>,
    backward: impl FnOnce(Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> + 'static,
) -> Vec<Value> {
    if !is_recording() || !inputs.iter().any(|v| v.needs_grad()) {
        return outputs.into_iter().map(Value::constant).collect();
    }
    record_always(inputs, outputs, Box::new(|grads, _| backward(grads)))
}

/// Records an op even where no input needs a gradient, because it holds leaves inside.
pub(super) fn record_always(inputs: &[&Value], outputs: Vec<Tensor>, backward: BackwardFn) -> Vec<Value> {
    let node = Rc::new(Node {
        id: next_id(),
        num_outputs: outputs.len(),
        recorded: RefCell::new(Some(Recorded { inputs: inputs.iter().map(|v| v.source.clone()).collect(), backward })),
    });
    let source = |output| Some(Source { node: node.clone(), output });
    outputs.into_iter().enumerate().map(|(i, tensor)| Value { tensor, source: source(i) }).collect()
}

/// [`record`] for an op with one output.
pub fn record1(
    inputs: &[&Value],
    output: Tensor,
    backward: impl FnOnce(Tensor) -> Result<Vec<Option<Tensor>>> + 'static,
) -> Value {
    record(inputs, vec![output], |grads| {
        let grad = grads.into_iter().next().flatten().expect("backward runs only when the output has a gradient");
        backward(grad)
    })
    .remove(0)
}

/// Gradients of the leaves, by leaf.
#[derive(Default)]
pub struct Gradients(HashMap<u64, Tensor>);

impl Gradients {
    fn add(&mut self, leaf: u64, grad: Tensor) -> Result<()> {
        let sum = match self.0.remove(&leaf) {
            None => grad,
            Some(sum) => tensors::add(&sum, &grad)?,
        };
        self.0.insert(leaf, sum);
        Ok(())
    }

    /// Adds all of `other`'s gradients.
    pub(super) fn merge(&mut self, other: Gradients) -> Result<()> {
        // Each leaf is its own sum: the order of a hash map's entries cannot change a result.
        other.0.into_iter().try_for_each(|(leaf, grad)| self.add(leaf, grad))
    }

    /// Takes the gradient of a leaf; `None` if nothing flowed into it.
    pub fn take(&mut self, leaf: &Value) -> Option<Tensor> {
        self.0.remove(&leaf.source.as_ref()?.node.id)
    }
}

/// A gradient under accumulation. The first contribution may alias another tensor (an addition hands one tensor to
/// both of its inputs), so only a sum made here is added to in place.
enum Sum {
    Borrowed(Tensor),
    Owned(Tensor),
}

impl Sum {
    fn add(self, other: &Tensor) -> Result<Self> {
        Ok(Self::Owned(match self {
            Self::Borrowed(t) => tensors::add(&t, other)?,
            Self::Owned(t) => tensors::add_owned(t, other)?,
        }))
    }

    fn into_tensor(self) -> Tensor {
        match self {
            Self::Borrowed(t) | Self::Owned(t) => t,
        }
    }
}

/// Runs the graph backward from `seeds` (values and the gradients of the loss with respect to them) and returns the
/// gradients of all leaves reached. Consumes what the ops saved: a graph can be run backward once.
pub fn backward(seeds: Vec<(Value, Tensor)>) -> Result<Gradients> {
    // Newest last; gradients of one node's outputs accumulate here until every newer op has run.
    let mut pending: BTreeMap<u64, (Rc<Node>, Vec<Option<Sum>>)> = BTreeMap::new();
    let push =
        |pending: &mut BTreeMap<u64, (Rc<Node>, Vec<Option<Sum>>)>, source: Source, grad: Tensor| -> Result<()> {
            let (node, sums) = pending.entry(source.node.id).or_insert_with(|| {
                let sums = (0..source.node.num_outputs).map(|_| None).collect();
                (source.node.clone(), sums)
            });
            let _ = node;
            let slot = &mut sums[source.output];
            *slot = Some(match slot.take() {
                None => Sum::Borrowed(grad),
                Some(sum) => sum.add(&grad)?,
            });
            Ok(())
        };
    for (value, grad) in seeds {
        if value.dims() != grad.dims() {
            return Err(Error::run("the gradient does not fit its value")
                .expected(format!("shape {:?}", value.dims()), format!("{:?}", grad.dims())));
        }
        if let Some(source) = value.source {
            push(&mut pending, source, grad)?;
        }
    }
    let mut gradients = Gradients::default();
    while let Some((id, (node, sums))) = pending.pop_last() {
        let grads = sums.into_iter().map(|s| s.map(Sum::into_tensor));
        match node.recorded.take() {
            None => {
                grads.flatten().try_for_each(|g| gradients.add(id, g))?;
            }
            Some(Recorded { inputs, backward }) => {
                let input_grads = backward(grads.collect(), &mut gradients)?;
                debug_assert_eq!(input_grads.len(), inputs.len());
                for (source, grad) in inputs.into_iter().zip(input_grads) {
                    if let (Some(source), Some(grad)) = (source, grad) {
                        push(&mut pending, source, grad)?;
                    }
                }
            }
        }
    }
    Ok(gradients)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn scaled(x: &Value, by: f64) -> Value {
        let out = (x.tensor() * by).unwrap();
        record1(&[x], out, move |g| Ok(vec![Some((g * by)?)]))
    }

    fn sum(x: &Value, y: &Value) -> Value {
        let out = (x.tensor() + y.tensor()).unwrap();
        record1(&[x, y], out, |g| Ok(vec![Some(g.clone()), Some(g)]))
    }

    #[test]
    fn gradients_accumulate_over_every_path() {
        let x = Value::leaf(Tensor::new(&[1f32, 2.], &Device::Cpu).unwrap());
        // y = x + 2x + 3(x + 2x) + x = 13 x, through shared intermediates.
        let double = scaled(&x, 2.0);
        let three = sum(&x, &double);
        let y = sum(&sum(&three, &scaled(&three, 3.0)), &x);
        let seed = Tensor::new(&[1f32, 10.], &Device::Cpu).unwrap();
        let mut grads = backward(vec![(y, seed.clone())]).unwrap();
        assert_eq!(grads.take(&x).unwrap().to_vec1::<f32>().unwrap(), [13., 130.]);
        assert_eq!(seed.to_vec1::<f32>().unwrap(), [1., 10.], "the seed is not written to");
    }

    #[test]
    fn constants_record_nothing_and_a_long_chain_does_not_overflow_the_stack() {
        let constant = Value::constant(Tensor::new(&[1f32], &Device::Cpu).unwrap());
        assert!(!scaled(&constant, 2.0).needs_grad());
        let x = Value::leaf(Tensor::new(&[1f32], &Device::Cpu).unwrap());
        let mut y = x.clone();
        for _ in 0..50_000 {
            y = scaled(&y, 1.0);
        }
        let mut grads = backward(vec![(y, Tensor::new(&[3f32], &Device::Cpu).unwrap())]).unwrap();
        assert_eq!(grads.take(&x).unwrap().to_vec1::<f32>().unwrap(), [3.]);
    }
}
