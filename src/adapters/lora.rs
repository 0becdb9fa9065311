//! The adapter itself: two small matrices for each adapted module.

use crate::adapters::target::Target;
use crate::error::Result;
use crate::rng::{Purpose, Stream};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// How A is drawn. B starts at zero, so that an untrained adapter changes nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// Normal with standard deviation 1 / rank, PEFT's `init_lora_weights="gaussian"`.
    /// Source: `reset_lora_parameters` in
    /// <https://github.com/huggingface/peft/blob/b28a09c44695163806dc2d560ec2faa1ce2949c5/src/peft/tuners/lora/layer.py>
    #[default]
    Gaussian,
    /// Uniform within 1 / sqrt(in_features): Kaiming's bound with a = sqrt(5), PEFT's default.
    KaimingUniform,
}

/// The low-rank pair of one module: its weight moves by `scale * B A`.
#[derive(Clone, Debug)]
pub struct LoraModule {
    /// Down projection, (rank, in_features), f32.
    pub a: Tensor,
    /// Up projection, (out_features, rank), f32.
    pub b: Tensor,
    /// Alpha as configured.
    pub alpha: f64,
    /// The factor on B A: alpha / rank, or alpha / sqrt(rank) with rank-stabilised scaling.
    pub scale: f64,
}

impl LoraModule {
    /// The rank: rows of A.
    pub fn rank(&self) -> usize {
        self.a.dims()[0]
    }

    /// Width of the input.
    pub fn in_features(&self) -> usize {
        self.a.dims()[1]
    }

    /// Width of the output.
    pub fn out_features(&self) -> usize {
        self.b.dims()[0]
    }

    /// `scale * B A`, (out_features, in_features), f32: what merging adds to the weight.
    pub fn delta(&self) -> Result<Tensor> {
        Ok((self.b.matmul(&self.a)? * self.scale)?)
    }
}

/// A LoRA adapter: the pairs by module name.
#[derive(Clone, Debug, Default)]
pub struct LoraAdapter {
    /// The modules in name order.
    pub modules: BTreeMap<String, LoraModule>,
}

impl LoraAdapter {
    /// A fresh adapter for `targets` on `device`. A is a function of the seed and the module's name alone: adding a
    /// target changes no other.
    pub fn init(targets: &[Target], init: Init, seed: u64, device: &Device) -> Result<Self> {
        let fresh = |target: &Target| {
            let (rank, width) = (target.rank, target.in_features);
            let mut stream = Stream::named(seed, &target.name, Purpose::AdapterInit);
            let a = match init {
                Init::Gaussian => stream.normals(rank * width, 1.0 / rank as f64),
                Init::KaimingUniform => {
                    let bound = 1.0 / (width as f64).sqrt();
                    (0..rank * width).map(|_| ((2.0 * stream.uniform() - 1.0) * bound) as f32).collect()
                }
            };
            let module = LoraModule {
                a: Tensor::from_vec(a, (rank, width), device)?,
                b: Tensor::zeros((target.out_features, rank), DType::F32, device)?,
                alpha: target.alpha,
                scale: target.scale,
            };
            Ok((target.name.clone(), module))
        };
        Ok(Self { modules: targets.par_iter().map(fresh).collect::<Result<_>>()? })
    }

    /// Number of trainable numbers.
    pub fn num_params(&self) -> usize {
        self.modules.values().map(|m| m.a.elem_count() + m.b.elem_count()).sum()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Targets of differing width and rank, with alpha != rank.
    pub(crate) fn targets(ranks: &[usize]) -> Vec<Target> {
        let target = |(i, &rank): (usize, &usize)| Target {
            name: format!("blocks.{i}.to_q"),
            in_features: 64,
            out_features: 6 + i,
            rank,
            alpha: 3.0,
            scale: 3.0 / rank as f64,
        };
        ranks.iter().enumerate().map(target).collect()
    }

    /// An adapter whose B is not zero.
    pub(crate) fn trained(ranks: &[usize]) -> LoraAdapter {
        let mut adapter = LoraAdapter::init(&targets(ranks), Init::Gaussian, 7, &Device::Cpu).unwrap();
        for (name, module) in &mut adapter.modules {
            let (rows, rank) = module.b.dims2().unwrap();
            let b = Stream::named(8, name, Purpose::Bench).normals(rows * rank, 0.3);
            module.b = Tensor::from_vec(b, (rows, rank), &Device::Cpu).unwrap();
        }
        adapter
    }

    fn a_of(init: Init, seed: u64, ranks: &[usize]) -> Vec<f32> {
        let adapter = LoraAdapter::init(&targets(ranks), init, seed, &Device::Cpu).unwrap();
        adapter.modules["blocks.0.to_q"].a.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_depends_on_seed_and_name_only_and_b_is_zero() {
        assert_eq!(a_of(Init::Gaussian, 1, &[4]), a_of(Init::Gaussian, 1, &[4, 2]));
        assert_ne!(a_of(Init::Gaussian, 1, &[4]), a_of(Init::Gaussian, 2, &[4]));
        let adapter = LoraAdapter::init(&targets(&[4, 4]), Init::Gaussian, 1, &Device::Cpu).unwrap();
        let a: Vec<_> = adapter.modules.values().map(|m| m.a.to_vec2::<f32>().unwrap()).collect();
        assert_ne!(a[0], a[1]);
        for module in adapter.modules.values() {
            assert_eq!(module.b.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
        }
        assert_eq!(adapter.num_params(), 4 * 64 + 6 * 4 + 4 * 64 + 7 * 4);
    }

    #[test]
    fn both_initialisations_have_their_spread() {
        // 32 x 64 values: the sample deviation is within 5 standard errors (5 / sqrt(2 * 2048) = 8%).
        let std = |x: &[f32]| (x.iter().map(|v| f64::from(v * v)).sum::<f64>() / x.len() as f64).sqrt();
        let gaussian = a_of(Init::Gaussian, 1, &[32]);
        assert!((std(&gaussian) * 32.0 - 1.0).abs() < 0.08, "{}", std(&gaussian));
        let kaiming = a_of(Init::KaimingUniform, 1, &[32]);
        assert!(kaiming.iter().all(|v| v.abs() <= 0.125));
        assert!((std(&kaiming) / (0.125 / 3f64.sqrt()) - 1.0).abs() < 0.08, "{}", std(&kaiming));
    }

    #[test]
    fn delta_is_scaled_b_a() {
        let module = LoraModule {
            a: Tensor::new(&[[1f32, 2.0, 3.0]], &Device::Cpu).unwrap(),
            b: Tensor::new(&[[10f32], [-1.0]], &Device::Cpu).unwrap(),
            alpha: 0.5,
            scale: 0.5,
        };
        assert_eq!((module.rank(), module.in_features(), module.out_features()), (1, 3, 2));
        assert_eq!(module.delta().unwrap().to_vec2::<f32>().unwrap(), [[5.0, 10.0, 15.0], [-0.5, -1.0, -1.5]]);
    }
}
