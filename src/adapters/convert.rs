//! Converting adapters: the same change in the spelling and the form that another tool reads.

use crate::adapters::delta::{Delta, Factors, Magnitude};
use crate::adapters::linalg::Svd;
use crate::adapters::matrix::Matrix;
use crate::adapters::read::{AdapterFile, ModuleEntry, Part};
use crate::adapters::write::{Format, OutModule};
use crate::error::{Error, Result};
use crate::rng::{Purpose, Stream};

/// The weight (out, in) of a module of the base model, if the base is known and has it.
pub type BaseWeight<'a> = dyn Fn(&str) -> Result<Option<Matrix>> + Sync + 'a;

/// How adapters that a format does not hold become LoRAs.
#[derive(Clone, Copy)]
pub struct Convert<'a> {
    /// Who shall read the result.
    pub format: Format,
    /// Rank of LoRAs made from other kinds.
    pub rank: usize,
    /// Make LoRAs even where the format holds the other kinds.
    pub to_lora: bool,
    /// The base model, which DoRA's norms refer to.
    pub base: Option<&'a BaseWeight<'a>>,
}

/// What became of one module.
#[derive(Clone, Debug)]
pub struct Converted {
    /// As it will be written.
    pub module: OutModule,
    /// For a LoRA made from another kind: the share of the change's energy (sum of squares) that it has lost.
    pub lost: Option<f64>,
}

/// Converts one module of the transformer.
///
/// Errors: DoRA that must become a LoRA without a base; values that are not finite.
pub fn convert_module(adapter: &AdapterFile, name: &str, entry: &ModuleEntry, how: &Convert) -> Result<Converted> {
    let delta = adapter.delta(name, entry)?;
    let native = OutModule {
        name: name.into(),
        parts: parts_of(&delta, entry, adapter)?,
        scale: entry.scale,
        rank: entry.rank,
        alpha: entry.alpha,
        dtype: plain(entry.dtype),
    };
    if native.is_plain_lora() || how.format.holds(&native) && !how.to_lora {
        return Ok(Converted { module: native, lost: None });
    }
    let (b, a, lost) = low_rank(&delta, name, how.rank, how.base)?;
    let module = OutModule::lora(name, b, a, 1.0, None, plain(entry.dtype));
    Ok(Converted { module, lost: Some(lost) })
}

/// 8-bit floats are read, not written.
fn plain(dtype: safetensors::Dtype) -> safetensors::Dtype {
    use safetensors::Dtype::{BF16, F16, F32};
    match dtype {
        F32 | BF16 | F16 => dtype,
        safetensors::Dtype::F64 => F32,
        _ => BF16,
    }
}

type Parts = std::collections::BTreeMap<Part, (Vec<usize>, Vec<f32>)>;

/// The tensors of a module as they were stored.
fn parts_of(delta: &Delta, entry: &ModuleEntry, adapter: &AdapterFile) -> Result<Parts> {
    let mut parts = Parts::new();
    for (part, source) in &entry.keys {
        if *part == Part::Alpha {
            continue;
        }
        let shape = match (part, &delta.magnitude) {
            (Part::Magnitude, Some(Magnitude::Rows(values))) => vec![values.len(), 1],
            (Part::Magnitude, Some(Magnitude::Columns(values))) => vec![1, values.len()],
            _ => adapter.file().info(&source.key).expect("assembled from this file").1[..2].to_vec(),
        };
        parts.insert(*part, (shape, adapter.file().floats(&source.key)?));
    }
    Ok(parts)
}

/// The best LoRA of `rank` for a change, and the share of its energy that is lost.
pub fn low_rank(delta: &Delta, name: &str, rank: usize, base: Option<&BaseWeight>) -> Result<(Matrix, Matrix, f64)> {
    let mut random = Stream::named(0, name, Purpose::Adapters);
    if delta.magnitude.is_some() {
        let weight = match base {
            None => None,
            Some(base) => base(name)?,
        };
        let weight = weight.ok_or_else(|| {
            Error::usage(format!("the adapter of `{name}` is a DoRA: what it changes depends on the base weight"))
                .hint("give the base model it was trained on with `--base`")
        })?;
        return Ok(of_dense(&delta.change_of(&weight), rank, &mut random));
    }
    if let Factors::Lokr { w1, w2 } = &delta.factors {
        let (b, a, kept) = of_kronecker(w1, w2, rank, &mut random);
        let total = w1.energy() * w2.energy();
        return Ok((b.scaled(delta.scale), a, lost(kept, total)));
    }
    match delta.exact_factors(EXACT_RANK) {
        Some((b, a)) => {
            let mut svd = Svd::of_product(&b, &a);
            let total = svd.energy();
            svd.truncate(rank);
            let (b, a) = svd.factors(rank.min(svd.s.len()));
            Ok((b, a, lost(svd.energy(), total)))
        }
        None => Ok(of_dense(&delta.dense(), rank, &mut random)),
    }
}

/// Up to this many columns the exact route through the factors is cheaper than a pass over the dense change.
pub const EXACT_RANK: usize = 160;

/// The best LoRA of `rank` for a dense change, and the share of its energy that is lost.
pub fn of_dense(change: &Matrix, rank: usize, random: &mut Stream) -> (Matrix, Matrix, f64) {
    let svd = Svd::leading(change, rank, random);
    let (b, a) = svd.factors(svd.s.len());
    (b, a, lost(svd.energy(), change.energy()))
}

/// The share of `total` that is not in `kept`; 0 for nothing of nothing.
pub fn lost(kept: f64, total: f64) -> f64 {
    if total > 0.0 { (1.0 - kept / total).max(0.0) } else { 0.0 }
}

/// The leading `rank` singular triplets of a Kronecker product as LoRA factors, with their energy: its singular
/// values are the products of its factors', its singular vectors their Kronecker products.
fn of_kronecker(w1: &Matrix, w2: &Matrix, rank: usize, random: &mut Stream) -> (Matrix, Matrix, f64) {
    let (small, large) = (Svd::leading(w1, rank, random), Svd::leading(w2, rank, random));
    let mut pairs: Vec<(f64, usize, usize)> = Vec::new();
    for (i, s) in small.s.iter().enumerate() {
        pairs.extend(large.s.iter().enumerate().map(|(j, t)| (s * t, i, j)));
    }
    pairs.sort_by(|x, y| y.0.total_cmp(&x.0));
    pairs.truncate(rank);
    let side = |x: &crate::adapters::linalg::Columns, y: &crate::adapters::linalg::Columns| {
        let column = |&(s, i, j): &(f64, usize, usize)| -> Vec<f32> {
            let root = s.sqrt();
            x.cols[i].iter().flat_map(|p| y.cols[j].iter().map(move |q| (p * q * root) as f32)).collect()
        };
        Matrix::new(pairs.len(), x.rows * y.rows, pairs.iter().flat_map(column).collect())
    };
    let energy = pairs.iter().map(|(s, ..)| s * s).sum();
    (side(&small.u, &large.u).transposed(), side(&small.v, &large.v), energy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, cols: usize, item: u64) -> Matrix {
        Matrix::new(rows, cols, Stream::new(6, 0, item, Purpose::Bench).normals(rows * cols, 1.0))
    }

    fn check(delta: &Delta, rank: usize, base: Option<&Matrix>) -> f64 {
        let lookup = |_: &str| Ok(base.cloned());
        let (b, a, lost) = low_rank(delta, "m", rank, base.map(|_| &lookup as &BaseWeight)).unwrap();
        assert!(a.rows <= rank);
        let want = base.map_or_else(|| delta.dense(), |base| delta.change_of(base));
        let mut rest = want.clone();
        rest.add_scaled(&b.product(&a), -1.0);
        let truly_lost = rest.energy() / want.energy();
        assert!((lost - truly_lost).abs() < 1e-5, "{lost} {truly_lost}");
        // No approximation of this rank is better than the SVD's.
        let best = {
            let mut svd = Svd::leading(&want, want.rows.min(want.cols), &mut Stream::new(1, 0, 0, Purpose::Bench));
            svd.truncate(rank);
            1.0 - svd.energy() / want.energy()
        };
        assert!(lost < best + 1e-4, "{lost} {best}");
        lost
    }

    #[test]
    fn every_kind_becomes_the_best_lora_and_the_loss_is_told() {
        let loha = Factors::Loha { w1: (random(30, 2, 1), random(2, 40, 2)), w2: (random(30, 3, 3), random(3, 40, 4)) };
        let loha = Delta { factors: loha, scale: 0.5, magnitude: None };
        assert!(check(&loha, 6, None) < 1e-6);
        assert!(check(&loha, 3, None) > 0.05);
        let lokr = Factors::Lokr { w1: random(3, 4, 1), w2: random(10, 10, 2) };
        let lokr = Delta { factors: lokr, scale: -2.0, magnitude: None };
        assert!(check(&lokr, 30, None) < 1e-6);
        assert!(check(&lokr, 8, None) > 0.05);
        let dora = Delta {
            factors: Factors::Lora { a: random(2, 40, 5), b: random(30, 2, 6) },
            scale: 0.1,
            magnitude: Some(Magnitude::Rows((0..30).map(|i| 6.0 + 0.1 * i as f32).collect())),
        };
        let base = random(30, 40, 7);
        check(&dora, 5, Some(&base));
        let error = low_rank(&dora, "m", 5, None).unwrap_err().to_string();
        assert!(error.contains("`m` is a DoRA") && error.contains("--base"), "{error}");
    }
}
