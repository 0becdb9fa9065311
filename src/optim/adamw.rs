//! AdamW: Adam with decoupled weight decay, in the order of operations of PyTorch's single-tensor implementation, so
//! that a run can be compared with it number by number.
//!
//! Source: <https://github.com/pytorch/pytorch/blob/v2.9.1/torch/optim/adam.py>, `_single_tensor_adam`.

use crate::config::Training;
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::multi_tensor::{AdamwItem, adamw};
use crate::kernels::{cpu, tensors};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// A trained tensor.
pub struct Parameter {
    /// Unique name; names its state in checkpoints.
    pub name: String,
    /// The weights, in f32.
    pub tensor: Tensor,
}

/// What AdamW is told once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl From<&Training> for AdamWOptions {
    fn from(training: &Training) -> Self {
        let (beta1, beta2) = training.betas.get();
        Self { beta1, beta2, eps: training.eps, weight_decay: training.weight_decay }
    }
}

/// The optimizer and its state: two moments in f32 and a step count for every parameter that has had a gradient.
pub struct AdamW {
    options: AdamWOptions,
    state: BTreeMap<String, Moments>,
}

struct Moments {
    /// Steps that this parameter has had a gradient in.
    step: u64,
    averages: Averages,
}

/// The decaying averages of a parameter's gradient and of its square.
enum Averages {
    Host {
        exp_avg: Vec<f32>,
        exp_avg_sq: Vec<f32>,
    },
    /// As tensors beside the parameter.
    Device {
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
    },
}

impl Averages {
    fn zeros(param: &Tensor) -> Result<Self> {
        Ok(match tensors::is_composed(param) {
            true => Self::Device { exp_avg: param.zeros_like()?, exp_avg_sq: param.zeros_like()? },
            false => {
                let zeros = vec![0.0; param.elem_count()];
                Self::Host { exp_avg: zeros.clone(), exp_avg_sq: zeros }
            }
        })
    }

    /// From saved tensors of the parameter's shape.
    fn of(param: &Tensor, exp_avg: &Tensor, exp_avg_sq: &Tensor) -> Result<Self> {
        Ok(match tensors::is_composed(param) {
            true => {
                let own = |t: &Tensor| t.to_dtype(DType::F32)?.to_device(param.device())?.contiguous()?.copy();
                Self::Device { exp_avg: own(exp_avg)?, exp_avg_sq: own(exp_avg_sq)? }
            }
            false => Self::Host { exp_avg: cpu::view(exp_avg)?.to_vec(), exp_avg_sq: cpu::view(exp_avg_sq)?.to_vec() },
        })
    }

    fn to_tensors(&self, dims: &[usize]) -> Result<[Tensor; 2]> {
        Ok(match self {
            Self::Host { exp_avg, exp_avg_sq } => {
                let tensor = |x: &[f32]| Tensor::from_slice(x, dims, &Device::Cpu);
                [tensor(exp_avg)?, tensor(exp_avg_sq)?]
            }
            Self::Device { exp_avg, exp_avg_sq } => [exp_avg.clone(), exp_avg_sq.clone()],
        })
    }
}

impl AdamW {
    /// An optimizer without state.
    pub fn new(options: AdamWOptions) -> Self {
        Self { options, state: BTreeMap::new() }
    }

    /// One update, written into the storage of every parameter that has a gradient.
    ///
    /// `grads` holds one entry per parameter, of its shape. A parameter without gradient is left entirely alone: no
    /// decay, and its step count does not move. A gradient of zeros still decays.
    ///
    /// Errors: another number or shape of gradients; a tensor that is not f32.
    pub fn step(&mut self, params: &[Parameter], grads: &[Option<Tensor>], lr: f64) -> Result<()> {
        if params.len() != grads.len() {
            return Err(Error::run("the optimizer wants one gradient per parameter")
                .expected(format!("{} gradients", params.len()), grads.len()));
        }
        let mut on_device = Vec::new();
        for (param, grad) in params.iter().zip(grads) {
            let Some(grad) = grad else { continue };
            if param.tensor.dtype() != DType::F32 || grad.dims() != param.tensor.dims() {
                return Err(Error::run(format!("the gradient does not fit `{}`", param.name)).expected(
                    format!("f32 weights and a gradient of shape {:?}", param.tensor.dims()),
                    format!("{} weights and shape {:?}", param.tensor.dtype().as_str(), grad.dims()),
                ));
            }
            if !self.state.contains_key(&param.name) {
                let averages = Averages::zeros(&param.tensor)?;
                self.state.insert(param.name.clone(), Moments { step: 0, averages });
            }
            let moments = self.state.get_mut(&param.name).expect("inserted above");
            moments.step += 1;
            let update = Update::new(&self.options, lr, moments.step);
            match &mut moments.averages {
                Averages::Host { exp_avg, exp_avg_sq } => {
                    let (p, g) = (cpu::view(&param.tensor)?, cpu::view(grad)?);
                    let updated = update.apply(&p, &g, exp_avg, exp_avg_sq);
                    drop((p, g));
                    cpu::assign(&param.tensor, updated)?;
                }
                Averages::Device { exp_avg, exp_avg_sq } => {
                    let grad = grad.to_dtype(DType::F32)?.contiguous()?;
                    let (exp_avg, exp_avg_sq) = (exp_avg.clone(), exp_avg_sq.clone());
                    on_device.push(DeviceUpdate { update, weights: param.tensor.clone(), grad, exp_avg, exp_avg_sq });
                }
            }
        }
        DeviceUpdate::apply_all(&on_device)
    }

    /// The state by name, in the order of `params`: `<name>.exp_avg` and `<name>.exp_avg_sq` of the parameter's shape,
    /// `<name>.step` of shape (1,) in i64. A parameter that never had a gradient has none.
    pub fn state_tensors(&self, params: &[Parameter]) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::new();
        for param in params {
            let Some(moments) = self.state.get(&param.name) else { continue };
            let dims = param.tensor.dims();
            let mut push = |suffix: &str, tensor| tensors.push((format!("{}.{suffix}", param.name), tensor));
            let [exp_avg, exp_avg_sq] = moments.averages.to_tensors(dims)?;
            push("exp_avg", exp_avg);
            push("exp_avg_sq", exp_avg_sq);
            push("step", Tensor::new(&[moments.step as i64], &Device::Cpu)?);
        }
        Ok(tensors)
    }

    /// Replaces the state by what [`AdamW::state_tensors`] gave for the same parameters.
    ///
    /// Errors: a tensor for an unknown parameter, of another shape, or a parameter with a part of its state only.
    pub fn load_state(&mut self, params: &[Parameter], tensors: Vec<(String, Tensor)>) -> Result<()> {
        let mut tensors: BTreeMap<String, Tensor> = tensors.into_iter().collect();
        let mut state = BTreeMap::new();
        for param in params {
            let mut take = |suffix: &str| tensors.remove(&format!("{}.{suffix}", param.name));
            let (exp_avg, exp_avg_sq, step) = match (take("exp_avg"), take("exp_avg_sq"), take("step")) {
                (None, None, None) => continue,
                (Some(m), Some(v), Some(step)) => (m, v, step),
                _ => {
                    return Err(Error::run(format!("the optimizer state of `{}` is incomplete", param.name))
                        .detail("expected `exp_avg`, `exp_avg_sq` and `step`"));
                }
            };
            for moment in [&exp_avg, &exp_avg_sq] {
                if moment.dims() != param.tensor.dims() {
                    return Err(Error::run(format!("the optimizer state does not fit `{}`", param.name))
                        .expected(format!("shape {:?}", param.tensor.dims()), format!("{:?}", moment.dims())));
                }
            }
            let step = match step.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?[..] {
                [step] if step > 0 => step as u64,
                _ => {
                    return Err(Error::run(format!("the step count of `{}` is not one positive number", param.name)));
                }
            };
            let averages = Averages::of(&param.tensor, &exp_avg, &exp_avg_sq)?;
            state.insert(param.name.clone(), Moments { step, averages });
        }
        if let Some(name) = tensors.keys().next() {
            return Err(Error::run(format!("the optimizer state holds `{name}`, which is not trained here"))
                .hint("the checkpoint belongs to another `lora.target_modules`"));
        }
        self.state = state;
        Ok(())
    }
}

/// The numbers of one update, with the bias corrections in f64 and every per-element operation in f32.
struct Update {
    shrink: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    bias_correction2_sqrt: f32,
    eps: f32,
    neg_step_size: f32,
}

impl Update {
    fn new(options: &AdamWOptions, lr: f64, step: u64) -> Self {
        let AdamWOptions { beta1, beta2, eps, weight_decay } = *options;
        let bias_correction1 = 1.0 - beta1.powf(step as f64);
        let bias_correction2 = 1.0 - beta2.powf(step as f64);
        Self {
            shrink: (1.0 - lr * weight_decay) as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            bias_correction2_sqrt: bias_correction2.sqrt() as f32,
            eps: eps as f32,
            neg_step_size: -(lr / bias_correction1) as f32,
        }
    }

    /// The fields, in order, as the GPU's kernel takes them.
    #[cfg(feature = "cuda")]
    fn numbers(&self) -> [f32; 7] {
        [
            self.shrink,
            self.one_minus_beta1,
            self.beta2,
            self.one_minus_beta2,
            self.bias_correction2_sqrt,
            self.eps,
            self.neg_step_size,
        ]
    }

    /// The new weights; updates the moments. Every element is on its own, so the result does not depend on threads.
    fn apply(&self, weights: &[f32], grad: &[f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32]) -> Vec<f32> {
        let mut out = cpu::uninit(weights.len());
        out.par_chunks_mut(cpu::GRAIN)
            .zip(weights.par_chunks(cpu::GRAIN))
            .zip(grad.par_chunks(cpu::GRAIN))
            .zip(exp_avg.par_chunks_mut(cpu::GRAIN).zip(exp_avg_sq.par_chunks_mut(cpu::GRAIN)))
            .for_each(|(((out, p), g), (m, v))| {
                for ((((out, &p), &g), m), v) in out.iter_mut().zip(p).zip(g).zip(m).zip(v) {
                    // PyTorch's lerp: this form below a weight of 0.5, the mirrored one above.
                    *m = if self.one_minus_beta1 < 0.5 {
                        *m + self.one_minus_beta1 * (g - *m)
                    } else {
                        g - (g - *m) * (1.0 - self.one_minus_beta1)
                    };
                    *v = *v * self.beta2 + self.one_minus_beta2 * g * g;
                    let denom = v.sqrt() / self.bias_correction2_sqrt + self.eps;
                    *out = p * self.shrink + self.neg_step_size * *m / denom;
                }
            });
        out
    }
}

/// An update of tensors on a device, in their storage.
struct DeviceUpdate {
    update: Update,
    weights: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl DeviceUpdate {
    fn apply_all(all: &[Self]) -> Result<()> {
        #[cfg(feature = "cuda")]
        if all.iter().all(|u| u.weights.device().is_cuda()) && adamw(&all.iter().map(Self::item).collect::<Vec<_>>())? {
            return Ok(());
        }
        all.iter().try_for_each(Self::apply)
    }

    #[cfg(feature = "cuda")]
    fn item(&self) -> AdamwItem<'_> {
        AdamwItem {
            weights: &self.weights,
            grad: &self.grad,
            exp_avg: &self.exp_avg,
            exp_avg_sq: &self.exp_avg_sq,
            numbers: self.update.numbers(),
        }
    }

    /// [`Update::apply`] composed of tensor operations: each is rounded as there, so that the results agree to the last
    /// bits.
    fn apply(&self) -> Result<()> {
        let Self { update, weights, grad, exp_avg, exp_avg_sq } = self;
        let one_minus_beta1 = f64::from(update.one_minus_beta1);
        let m = match update.one_minus_beta1 < 0.5 {
            true => (exp_avg + ((grad - exp_avg)? * one_minus_beta1)?)?,
            false => (grad - ((grad - exp_avg)? * (1.0 - one_minus_beta1))?)?,
        };
        let squares = ((grad * f64::from(update.one_minus_beta2))? * grad)?;
        let v = ((exp_avg_sq * f64::from(update.beta2))? + squares)?;
        let denom = ((v.sqrt()? / f64::from(update.bias_correction2_sqrt))? + f64::from(update.eps))?;
        let step = ((&m * f64::from(update.neg_step_size))? / denom)?;
        let updated = ((weights * f64::from(update.shrink))? + step)?;
        for (tensor, value) in [(exp_avg, m), (exp_avg_sq, v), (weights, updated)] {
            tensors::assign(tensor, &value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::safetensors::MappedFile;
    use crate::kernels::route::composed_only;
    use crate::rng::{Purpose, Stream};

    const OPTIONS: AdamWOptions = AdamWOptions { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    const LR: f64 = 1e-3;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn params() -> Vec<Parameter> {
        let values = |i| Stream::new(1, 0, i, Purpose::Bench).normals(5, 0.5);
        (0..3).map(|i| Parameter { name: format!("p{i}"), tensor: tensor(&values(i)) }).collect()
    }

    /// Gradients of step `t`: of p0 always, of p1 none in odd steps, of p2 all zero from step 3 on.
    fn grads(t: u64) -> Vec<Option<Tensor>> {
        let normals = |i| Stream::new(2, t, i, Purpose::Bench).normals(5, 0.1);
        let p1 = t.is_multiple_of(2).then(|| tensor(&normals(1)));
        let p2 = if t >= 3 { vec![0.0; 5] } else { normals(2) };
        vec![Some(tensor(&normals(0))), p1, Some(tensor(&p2))]
    }

    fn values(params: &[Parameter]) -> Vec<Vec<f32>> {
        params.iter().map(|p| p.tensor.to_vec1().unwrap()).collect()
    }

    /// The textbook form in f64, one scalar at a time.
    fn reference(num_steps: u64, options: AdamWOptions) -> Vec<Vec<f64>> {
        let mut all: Vec<Vec<f64>> =
            values(&params()).iter().map(|p| p.iter().map(|&x| f64::from(x)).collect()).collect();
        for (i, param) in all.iter_mut().enumerate() {
            for (j, p) in param.iter_mut().enumerate() {
                let (mut m, mut v, mut count) = (0.0, 0.0, 0);
                for t in 0..num_steps {
                    let Some(grad) = &grads(t)[i] else { continue };
                    let g = f64::from(grad.to_vec1::<f32>().unwrap()[j]);
                    count += 1;
                    m = options.beta1 * m + (1.0 - options.beta1) * g;
                    v = options.beta2 * v + (1.0 - options.beta2) * g * g;
                    let m_hat = m / (1.0 - options.beta1.powi(count));
                    let v_hat: f64 = v / (1.0 - options.beta2.powi(count));
                    *p = *p * (1.0 - LR * options.weight_decay) - LR * m_hat / (v_hat.sqrt() + options.eps);
                }
            }
        }
        all
    }

    #[test]
    fn ten_steps_match_the_formula_with_missing_and_zero_gradients() {
        let mirrored = AdamWOptions { beta1: 0.3, weight_decay: 0.1, eps: 1e-3, ..OPTIONS };
        for options in [OPTIONS, mirrored] {
            let (params, mut optimizer) = (params(), AdamW::new(options));
            for t in 0..10 {
                optimizer.step(&params, &grads(t), LR).unwrap();
            }
            for (ours, exact) in values(&params).iter().flatten().zip(reference(10, options).iter().flatten()) {
                // Weights up to 1.5 in f32, ten roundings each way.
                assert!((f64::from(*ours) - exact).abs() < 1e-6, "{ours} {exact}");
            }
        }
    }

    #[test]
    fn clipping_and_the_first_step_match_torch_on_a_recorded_adapter() {
        // tests/fixtures/README.md, case_a: weights, gradients before clipping, weights after one step of torch's AdamW.
        let case = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/reference/case_a/golden.safetensors");
        let file = MappedFile::open(case.as_ref()).unwrap();
        let read = |name: &str| file.tensor(name, DType::F32, &Device::Cpu).unwrap();
        let names: Vec<String> =
            file.names().iter().filter_map(|n| Some(n.strip_prefix("lora.init.")?.to_string())).collect();
        let grad = |name: &String| {
            let name = format!("lora.grad.{name}");
            file.names().contains(&name).then(|| read(&name))
        };
        let mut grads: Vec<_> = names.iter().map(grad).collect();
        let params: Vec<_> =
            names.iter().map(|n| Parameter { name: n.clone(), tensor: read(&format!("lora.init.{n}")) }).collect();
        assert_eq!((params.len(), grads.iter().filter(|g| g.is_none()).count()), (48, 6));

        let norm = crate::optim::clip_grad_norm(&mut grads, 1.0).unwrap();
        assert!((norm - f64::from(read("lora.grad_norms").to_vec1::<f32>().unwrap()[0])).abs() < 1e-6, "{norm}");
        AdamW::new(OPTIONS).step(&params, &grads, LR).unwrap();
        for param in &params {
            let ours = param.tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let torch = read(&format!("lora.after1.{}", param.name)).flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let worst = ours.iter().zip(&torch).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            // The step is 1e-3; weights are below 2, where f32 resolves 1e-7.
            assert!(worst <= 1.2e-7, "{}: {worst}", param.name);
        }
    }

    #[test]
    fn no_gradient_leaves_alone_and_a_zero_gradient_decays() {
        let params = params();
        let before = values(&params);
        let zero = tensor(&[0.0; 5]);
        let mut optimizer = AdamW::new(OPTIONS);
        optimizer.step(&params, &[None, Some(zero), None], LR).unwrap();
        let after = values(&params);
        assert_eq!((&before[0], &before[2]), (&after[0], &after[2]));
        let shrink = (1.0 - LR * OPTIONS.weight_decay) as f32;
        assert_eq!(after[1], before[1].iter().map(|x| x * shrink).collect::<Vec<_>>());
        let names: Vec<_> = optimizer.state_tensors(&params).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["p1.exp_avg", "p1.exp_avg_sq", "p1.step"]);
    }

    #[test]
    fn saved_and_loaded_in_the_middle_it_goes_on_bit_for_bit() {
        let (straight, mut optimizer) = (params(), AdamW::new(OPTIONS));
        let mut resumed = None;
        for t in 0..8 {
            if t == 3 {
                let state = optimizer.state_tensors(&straight).unwrap();
                let copies =
                    straight.iter().map(|p| Parameter { name: p.name.clone(), tensor: p.tensor.copy().unwrap() });
                resumed = Some((copies.collect::<Vec<_>>(), state));
            }
            optimizer.step(&straight, &grads(t), LR).unwrap();
        }
        let (resumed, state) = resumed.unwrap();
        let mut optimizer = AdamW::new(OPTIONS);
        optimizer.load_state(&resumed, state).unwrap();
        for t in 3..8 {
            optimizer.step(&resumed, &grads(t), LR).unwrap();
        }
        assert_eq!(values(&straight), values(&resumed));
    }

    #[test]
    fn on_a_device_the_weights_and_the_state_are_the_same() {
        let (here, there) = (params(), params());
        let (mut on_host, mut on_device) = (AdamW::new(OPTIONS), AdamW::new(OPTIONS));
        let close = |a: &Tensor, b: &Tensor| {
            let [a, b] = [a, b].map(|t| t.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap());
            a.iter().zip(&b).for_each(|(a, b)| assert!((a - b).abs() <= 3e-7 * a.abs().max(1e-6), "{a} {b}"));
        };
        composed_only(|| {
            for t in 0..4 {
                on_device.step(&there, &grads(t), LR).unwrap();
                if t == 1 {
                    let state = on_device.state_tensors(&there).unwrap();
                    on_device = AdamW::new(OPTIONS);
                    on_device.load_state(&there, state).unwrap();
                }
            }
        });
        (0..4).for_each(|t| on_host.step(&here, &grads(t), LR).unwrap());
        here.iter().zip(&there).for_each(|(a, b)| close(&a.tensor, &b.tensor));
        let (a, b) = (on_host.state_tensors(&here).unwrap(), on_device.state_tensors(&there).unwrap());
        assert_eq!(a.len(), b.len());
        a.iter().zip(&b).for_each(|(a, b)| close(&a.1, &b.1));
    }

    #[test]
    fn the_number_of_threads_does_not_matter() {
        let run = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let normals = |i| tensor(&Stream::new(3, 0, i, Purpose::Bench).normals(100_001, 1.0));
                let params = vec![Parameter { name: "p".into(), tensor: normals(0) }];
                let mut optimizer = AdamW::new(OPTIONS);
                for t in 1..4 {
                    optimizer.step(&params, &[Some(normals(t))], LR).unwrap();
                }
                values(&params)
            })
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn a_state_that_does_not_fit_is_refused() {
        let (params, mut optimizer) = (params(), AdamW::new(OPTIONS));
        optimizer.step(&params, &grads(0), LR).unwrap();
        let state = || optimizer.state_tensors(&params).unwrap();
        let refused = |state| AdamW::new(OPTIONS).load_state(&params, state).unwrap_err().to_string();
        assert!(refused(state()[1..].to_vec()).contains("state of `p0` is incomplete"));
        let mut renamed = state();
        renamed[0].0 = "q.exp_avg".into();
        assert!(refused(renamed).contains("`p0` is incomplete"));
        let mut more = state();
        more.push(("q.exp_avg".into(), tensor(&[1.0])));
        assert!(refused(more).contains("`q.exp_avg`, which is not trained"));
        let mut shape = state();
        shape[0].1 = tensor(&[1.0]);
        assert!(refused(shape).contains("expected shape [5], found [1]"));
    }

    #[test]
    fn a_gradient_of_another_shape_is_refused() {
        let params = params();
        let error = AdamW::new(OPTIONS).step(&params, &[Some(tensor(&[1.0])), None, None], LR).unwrap_err();
        assert!(error.to_string().contains("does not fit `p0`"), "{error}");
        assert!(AdamW::new(OPTIONS).step(&params, &[None], LR).is_err());
    }
}
