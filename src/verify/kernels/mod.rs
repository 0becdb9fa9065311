//! The self-test of the ops on a device: every op of the training path as it runs there, against what it is composed of
//! in f32, values and gradients, and how long both take.
//!
//! On a GPU this tests the compiled kernels and the composed ops: on small tensors against the CPU, which shares nothing with
//! it, on large ones, to save time, against the GPU's own composed f32. On the CPU it tests the composed ops against the
//! CPU's kernels.

mod cases;
mod model;
mod optimizer;
mod swap;
mod table;

pub use table::{Row, Table};

use crate::error::Result;
use crate::kernels::route::composed_only;
use crate::kernels::{Value, backward};
use crate::rng::{Purpose, Stream};
use candle_core::{DType, Device, Tensor};
use std::time::Instant;

/// How large the tensors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// Ragged, a few tokens.
    Small,
    /// Those of one block of the published model at 1024 x 1024.
    Published,
}

/// What an input of an op is.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    /// In the compute type, with a gradient.
    Activation,
    /// In the compute type, without.
    Frozen,
    /// f32, with a gradient.
    Trained,
}

/// An op with inputs.
struct Case {
    name: String,
    inputs: Vec<(Tensor, Role)>,
    op: Op,
    /// Names of outputs and gradients, in order.
    names: Vec<&'static str>,
    /// Whether a compiled kernel must take part on a GPU that has kernels.
    has_kernel: bool,
}

type Op = Box<dyn Fn(&[Value]) -> Result<Vec<Value>>>;

/// Relative distance (in L2) from f32 that bf16 may have: two roundings of 2^-9 and their sums, with room for none of the
/// mistakes that were tried (a gradient without one of its terms, rows that are off by one).
const LIMIT: f64 = 0.012;

/// The same for f32 on a GPU against f32 on the CPU: sums in another order. Products in TF32 would be off by 1e-4 and more.
const F32_LIMIT: f64 = 1e-5;

/// Runs all cases on `device`; `started` is called with the name of each.
///
/// Errors: an op that fails. What is merely wrong is in the table.
pub fn run(device: &Device, sizes: Sizes, mut started: impl FnMut(&str)) -> Result<Table> {
    let mut rows = Vec::new();
    for case in cases::all(sizes)? {
        started(&case.name);
        rows.extend(case.check(device, sizes)?);
    }
    started("adamw");
    rows.extend(optimizer::check(device, sizes)?);
    started("model");
    rows.extend(model::check(device, sizes)?);
    started("swapped blocks");
    rows.extend(swap::check(device, sizes)?);
    Ok(Table { rows })
}

impl Case {
    fn check(&self, device: &Device, sizes: Sizes) -> Result<Vec<Row>> {
        // All start from the same bf16 values.
        let inputs_on = |device: &Device| -> Result<Vec<(Tensor, Role)>> {
            let rounded = |t: &Tensor| t.to_dtype(DType::BF16)?.to_dtype(DType::F32)?.to_device(device);
            self.inputs.iter().map(|(t, role)| Ok((rounded(t)?, *role))).collect()
        };
        let inputs = inputs_on(device)?;
        let composed = composed_only(|| self.outcome(&inputs, DType::F32))?;
        let before = launches();
        let found = self.outcome(&inputs, DType::BF16)?;
        let launched = launches() - before;
        let (kernel_s, composed_s) = match sizes {
            Sizes::Small => (None, None),
            Sizes::Published => {
                (Some(self.time(&inputs, device)?), Some(composed_only(|| self.time(&inputs, device))?))
            }
        };
        drop(inputs);
        let missing = self.has_kernel && launched == 0 && kernels_expected(device);
        let against_cpu = sizes == Sizes::Small && !device.is_cpu();
        let exact = if against_cpu { self.outcome(&inputs_on(&Device::Cpu)?, DType::F32)? } else { composed.clone() };
        let mut rows = Vec::new();
        for ((name, found), exact) in self.names.iter().zip(found).zip(&exact) {
            let first = rows.is_empty();
            rows.push(Row {
                note: if missing && first { "no kernel was launched".into() } else { String::new() },
                seconds: kernel_s.filter(|_| first),
                composed_seconds: composed_s.filter(|_| first),
                ..Row::new(self.name.clone(), name, distance(&found, exact)?, LIMIT)
            });
        }
        rows.iter_mut().for_each(|row| row.ok &= !missing);
        if against_cpu {
            for ((name, composed), exact) in self.names.iter().zip(composed).zip(&exact) {
                let op = format!("{}, composed in f32", self.name);
                rows.push(Row::new(op, name, distance(&composed, exact)?, F32_LIMIT));
            }
        }
        Ok(rows)
    }

    /// Outputs, then the gradients of the inputs that have one.
    fn outcome(&self, inputs: &[(Tensor, Role)], dtype: DType) -> Result<Vec<Tensor>> {
        let value = |(t, role): &(Tensor, Role)| -> Result<Value> {
            Ok(match role {
                Role::Activation => Value::leaf(t.to_dtype(dtype)?),
                Role::Frozen => Value::constant(t.to_dtype(dtype)?),
                Role::Trained => Value::leaf(t.clone()),
            })
        };
        let values: Vec<Value> = inputs.iter().map(value).collect::<Result<_>>()?;
        let outputs = (self.op)(&values)?;
        let mut all: Vec<Tensor> = outputs.iter().map(|v| v.tensor().clone()).collect();
        let seed = |(i, v): (usize, Value)| -> Result<(Value, Tensor)> {
            let seed = randn(900 + i as u64, v.dims(), 1.0)?.to_dtype(DType::BF16)?;
            let seed = seed.to_dtype(v.dtype())?.to_device(v.tensor().device())?;
            Ok((v, seed))
        };
        let seeds = outputs.into_iter().enumerate().map(seed).collect::<Result<_>>()?;
        let mut gradients = backward(seeds)?;
        let leaves = values.iter().filter(|v| v.needs_grad());
        all.extend(leaves.map(|leaf| gradients.take(leaf).expect("every input of a case has a gradient")));
        Ok(all)
    }

    /// Seconds of the forward and backward pass in bf16, the best of five.
    fn time(&self, inputs: &[(Tensor, Role)], device: &Device) -> Result<f64> {
        let mut best = f64::MAX;
        for _ in 0..5 {
            device.synchronize()?;
            let began = Instant::now();
            self.outcome(inputs, DType::BF16)?;
            device.synchronize()?;
            best = best.min(began.elapsed().as_secs_f64());
        }
        Ok(best)
    }
}

fn randn(item: u64, shape: &[usize], std: f64) -> Result<Tensor> {
    let values = Stream::new(17, 0, item, Purpose::Bench).normals(shape.iter().product(), std);
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// `|a - b| / |b|` in L2; infinite where a value is not finite, or where `b` is zero throughout, as the gradients of text that
/// is masked are, and `a` is not.
fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    let flat = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let (a, b) = (flat(a)?, flat(b)?);
    let square = |x: f64| x * x;
    let off: f64 = a.iter().zip(&b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let length: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    let distance = if off == 0.0 { 0.0 } else { off.sqrt() / length.sqrt() };
    Ok(if distance.is_finite() && a.len() == b.len() { distance } else { f64::INFINITY })
}

/// Kernels launched so far.
fn launches() -> u64 {
    #[cfg(feature = "cuda")]
    return crate::kernels::cuda::launches();
    #[cfg(not(feature = "cuda"))]
    0
}

/// Whether the device has compiled kernels.
fn kernels_expected(device: &Device) -> bool {
    #[cfg(feature = "cuda")]
    return device.is_cuda() && crate::kernels::cuda::Gpu::of(device).is_ok_and(|gpu| gpu.has_kernels());
    #[cfg(not(feature = "cuda"))]
    {
        debug_assert!(device.is_cpu());
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_cpu_composed_ops_and_kernels_agree() {
        let table = run(&Device::Cpu, Sizes::Small, |_| {}).unwrap();
        assert!(table.rows.len() > 30);
        assert!(table.ok(), "{table}");
    }

    #[test]
    fn a_wrong_gradient_and_a_value_that_is_not_finite_are_found() {
        let x = randn(0, &[400], 1.0).unwrap();
        let nudged = (&x * 1.02).unwrap();
        assert!(distance(&nudged, &x).unwrap() > LIMIT);
        assert!(distance(&(&x * f64::NAN).unwrap(), &x).unwrap() > LIMIT);
        let nothing = (&x * 0.0).unwrap();
        assert!(distance(&x, &nothing).unwrap() > LIMIT && distance(&nothing, &nothing).unwrap() == 0.0);
        assert!(distance(&x.to_dtype(DType::BF16).unwrap(), &x).unwrap() < LIMIT);
    }
}
