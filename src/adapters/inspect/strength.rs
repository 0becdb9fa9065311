//! How strongly an adapter changes each module.

use crate::adapters::convert::BaseWeight;
use crate::adapters::delta::{Delta, Factors};
use crate::adapters::matrix::Matrix;
use crate::adapters::read::{AdapterFile, ModuleEntry};
use crate::error::Result;
use crate::kernels::matmul::{Into, MatMut, gemm_one_thread};
use rayon::prelude::*;
use serde::Serialize;

/// How strongly one module is changed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Strength {
    /// Its dotted name.
    pub module: String,
    /// The number of its block, if its name has one.
    pub block: Option<usize>,
    /// Its name within the block, or its whole name.
    pub part: String,
    /// Frobenius norm of the change, scale included. Not finite if the adapter is not.
    pub norm: f64,
    /// The norm over that of the base weight, if the base is known.
    pub relative: Option<f64>,
}

/// Splits a module's name at the first number: block and part, `transformer_blocks.3.attn.to_out.0` into 3 and
/// `attn.to_out.0`.
pub fn block_of(module: &str) -> (Option<usize>, &str) {
    let mut start = 0;
    for segment in module.split('.') {
        let end = start + segment.len();
        if let (Ok(block), Some(part)) = (segment.parse(), module.get(end + 1..)) {
            return (Some(block), part);
        }
        start = end + 1;
    }
    (None, module)
}

/// The strengths of all modules of the transformer, in name order. With a base, DoRA's norms are taken into account;
/// without one the low-rank part alone.
pub fn strengths(adapter: &AdapterFile, base: Option<&BaseWeight>) -> Result<Vec<Strength>> {
    let one = |(name, entry): (&String, &ModuleEntry)| -> Result<Strength> {
        let delta = adapter.delta_unchecked(entry)?;
        let weight = match base {
            None => None,
            Some(base) => base(name)?,
        };
        let norm = match (&delta.magnitude, &weight) {
            (Some(_), Some(weight)) => delta.change_of(weight).energy().sqrt(),
            _ => norm(&delta),
        };
        let (block, part) = block_of(name);
        let relative = weight.map(|w| norm / w.energy().sqrt());
        Ok(Strength { module: name.clone(), block, part: part.into(), norm, relative })
    };
    if base.is_some() {
        // One weight of the base at a time.
        return adapter.transformer.iter().map(one).collect();
    }
    let modules: Vec<_> = adapter.transformer.iter().collect();
    modules.into_par_iter().map(one).collect()
}

/// The Frobenius norm of a change without its magnitude, from the factors where that is cheaper.
fn norm(delta: &Delta) -> f64 {
    let energy = match &delta.factors {
        // |B A|^2 is the sum over both Gram matrices, elementwise multiplied.
        Factors::Lora { a, b } => {
            let (a, b) = (gram(a.rows, a.view(), a.view().t()), gram(b.cols, b.view().t(), b.view()));
            a.data.iter().zip(&b.data).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
        }
        Factors::Lokr { w1, w2 } => w1.energy() * w2.energy(),
        Factors::Loha { .. } => return delta.dense().energy().sqrt(),
    };
    // Rounding can leave a tiny negative sum for a change of nothing; NaN stays NaN.
    if energy < 0.0 { 0.0 } else { energy.sqrt() * delta.scale.abs() }
}

fn gram(rank: usize, left: crate::kernels::matmul::Mat, right: crate::kernels::matmul::Mat) -> Matrix {
    let mut out = Matrix::zeros(rank, rank);
    gemm_one_thread(MatMut::new(&mut out.data, rank, rank), Into::Overwrite, left, right, 1.0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    #[test]
    fn names_fall_into_block_and_part() {
        assert_eq!(block_of("transformer_blocks.31.attn.to_out.0"), (Some(31), "attn.to_out.0"));
        assert_eq!(block_of("norm_out.linear"), (None, "norm_out.linear"));
        assert_eq!(block_of("img_mlp.net.2"), (None, "img_mlp.net.2"));
    }

    #[test]
    fn norms_from_factors_are_those_of_the_change() {
        let random = |rows, cols, item| {
            Matrix::new(rows, cols, Stream::new(4, 0, item, Purpose::Bench).normals(rows * cols, 1.0))
        };
        let lora = Factors::Lora { a: random(3, 40, 1), b: random(30, 3, 2) };
        let lokr = Factors::Lokr { w1: random(3, 4, 1), w2: random(10, 10, 2) };
        let loha = Factors::Loha { w1: (random(30, 2, 1), random(2, 40, 2)), w2: (random(30, 2, 3), random(2, 40, 4)) };
        for factors in [lora, lokr, loha] {
            let delta = Delta { factors, scale: -0.7, magnitude: None };
            let want = delta.dense().energy().sqrt();
            assert!((norm(&delta) / want - 1.0).abs() < 1e-5, "{} {want}", norm(&delta));
        }
        let zero = Delta {
            factors: Factors::Lora { a: random(3, 40, 1), b: Matrix::zeros(30, 3) },
            scale: 1.0,
            magnitude: None,
        };
        assert_eq!(norm(&zero), 0.0);
        let nan = Delta {
            factors: Factors::Lokr { w1: Matrix::new(1, 1, vec![f32::NAN]), w2: random(2, 2, 1) },
            scale: 1.0,
            magnitude: None,
        };
        assert!(norm(&nan).is_nan());
    }
}
