//! How an op is proved: against a plain twin of basic candle ops in f64, differentiated by candle's autograd, and
//! that gradient in turn against finite differences.

use crate::error::Result;
use crate::kernels::route::composed_only;
use crate::kernels::tape::{Value, backward};
use crate::rng::{Purpose, Stream};
use candle_core::{DType, Device, Tensor, Var};

/// A reproducible normal tensor.
pub fn randn(item: u64, shape: &[usize], std: f64) -> Tensor {
    let values = Stream::new(3, 0, item, Purpose::Bench).normals(shape.iter().product(), std);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// `|a - b|` at its largest, over `|b|` at its largest.
pub fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    let flat = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (a, b) = (flat(a), flat(b));
    assert_eq!(a.len(), b.len());
    let top = b.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    a.iter().zip(&b).fold(0f64, |m, (x, y)| m.max((x - y).abs())) / top
}

/// The same values in storage with an offset and, for matrices and above, swapped strides.
pub fn scattered(t: &Tensor) -> Tensor {
    let last = t.rank() - 1;
    let swapped = if t.rank() > 1 { t.transpose(last - 1, last).unwrap() } else { t.clone() };
    let padded = Tensor::cat(&[&swapped, &swapped], 0).unwrap();
    let view = padded.narrow(0, swapped.dims()[0], swapped.dims()[0]).unwrap();
    if t.rank() > 1 { view.transpose(last - 1, last).unwrap() } else { view }
}

/// Checks values and gradients of `op` against `twin`, for contiguous and for scattered inputs, in f32.
///
/// `tolerance` is relative to the largest element of each tensor. f32 rounding of a sum of n unit terms is about
/// 6e-8 sqrt(n): 5e-6 leaves room for the sums of these tests and none for a wrong term.
pub fn check(
    inputs: &[Tensor],
    tolerance: f64,
    op: impl Fn(&[Value]) -> Result<Vec<Value>>,
    twin: impl Fn(&[Tensor]) -> candle_core::Result<Vec<Tensor>>,
) {
    let f64s: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(&t.to_dtype(DType::F64).unwrap()).unwrap()).collect();
    let tensors: Vec<Tensor> = f64s.iter().map(|v| v.as_tensor().clone()).collect();
    let expected = twin(&tensors).unwrap();
    let seeds: Vec<Tensor> = expected.iter().enumerate().map(|(i, t)| randn(900 + i as u64, t.dims(), 1.0)).collect();
    let loss = |outputs: &[Tensor]| {
        let terms = outputs.iter().zip(&seeds).map(|(y, s)| (y * s.to_dtype(DType::F64)?)?.sum_all());
        terms.reduce(|a, b| a? + b?).unwrap().unwrap()
    };
    let reference = loss(&expected).backward().unwrap();
    for scatter in [false, true] {
        let leaf = |t: &Tensor| Value::leaf(if scatter { scattered(t) } else { t.clone() });
        let leaves: Vec<Value> = inputs.iter().map(leaf).collect();
        let outputs = op(&leaves).unwrap();
        assert_eq!(outputs.len(), expected.len());
        for (i, (y, e)) in outputs.iter().zip(&expected).enumerate() {
            assert_eq!(y.dims(), e.dims());
            let error = relative_error(y.tensor(), e);
            assert!(error < tolerance, "output {i}, scattered {scatter}: {error:e}");
        }
        let seeded = outputs.into_iter().zip(&seeds).map(|(y, s)| (y, if scatter { scattered(s) } else { s.clone() }));
        let mut grads = backward(seeded.collect()).unwrap();
        for (i, (leaf, var)) in leaves.iter().zip(&f64s).enumerate() {
            let grad = grads.take(leaf).unwrap_or_else(|| panic!("input {i} has no gradient"));
            assert_eq!(grad.dims(), leaf.dims());
            let error = relative_error(&grad, reference.get(var).expect("the twin uses every input"));
            assert!(error < tolerance, "gradient of input {i}, scattered {scatter}: {error:e}");
        }
    }
    finite_differences(&tensors, &f64s, &reference, |t| loss(&twin(t).unwrap()).to_scalar::<f64>().unwrap());
}

/// [`check`] for an op's CPU kernel, and for what it is composed of on other devices.
pub fn check_both(
    inputs: &[Tensor],
    tolerance: f64,
    op: impl Fn(&[Value]) -> Result<Vec<Value>>,
    twin: impl Fn(&[Tensor]) -> candle_core::Result<Vec<Tensor>>,
) {
    check(inputs, tolerance, &op, &twin);
    composed_only(|| check(inputs, tolerance, &op, &twin));
}

/// The twin's own gradient against central differences, at a few coordinates of every input.
fn finite_differences(
    tensors: &[Tensor],
    vars: &[Var],
    reference: &candle_core::backprop::GradStore,
    loss: impl Fn(&[Tensor]) -> f64,
) {
    let mut rng = Stream::new(5, 0, 0, Purpose::Bench);
    for (i, t) in tensors.iter().enumerate() {
        let values = t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let grad = reference.get(&vars[i]).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let top = grad.iter().fold(1e-12f64, |m, g| m.max(g.abs()));
        for _ in 0..4 {
            let at = rng.below(values.len());
            let moved = |by: f64| {
                let mut v = values.clone();
                v[at] += by;
                let mut all = tensors.to_vec();
                all[i] = Tensor::from_vec(v, t.dims(), &Device::Cpu).unwrap();
                loss(&all)
            };
            let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((numeric - grad[at]).abs() < 1e-5 * top, "input {i} at {at}: {numeric} {}", grad[at]);
        }
    }
}
