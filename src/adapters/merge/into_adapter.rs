//! All modules of several adapters merged into one adapter.

use super::change::Weighted;
use super::combine::{Combined, Method, Term, combine};
use crate::adapters::convert::BaseWeight;
use crate::adapters::write::OutModule;
use crate::error::{Error, Result};
use rayon::prelude::*;
use safetensors::Dtype;
use std::collections::BTreeSet;

/// A merged module, and the share of its energy that the rank has cost.
pub struct MergedModule {
    /// As it will be written, in f32.
    pub module: OutModule,
    /// Share of the energy lost.
    pub lost: f64,
}

/// Deltas that are multiplied out take up to 200 MB each; so many modules at once, whatever the threads.
const DENSE_AT_ONCE: usize = 2;

/// Merges `adapters` module by module, in name order. `rank` is that of the result: `None` is the exact one for
/// `concat` and `linear`, and the largest rank of the adapters for the methods on dense deltas. `progress` is called
/// once for each module.
///
/// Errors: a text encoder's adapter (by name), `svd` without a rank, what [`combine`] gives.
pub fn merge_into_adapter(
    adapters: &[Weighted],
    method: Method,
    rank: Option<usize>,
    base: Option<&BaseWeight>,
    progress: &(dyn Fn() + Sync),
) -> Result<Vec<MergedModule>> {
    if let Some(text) = adapters.iter().find(|a| !a.adapter.text_encoder.is_empty()) {
        let (name, _) = text.adapter.text_encoder.iter().next().expect("not empty");
        return Err(Error::usage(format!(
            "`{}` also adapts the text encoder (`{name}`), which adapters written here do not hold",
            text.adapter.path().display()
        ))
        .hint("merge it into a pipeline folder, or leave that part out with `--allow-unmatched`"));
    }
    let largest = adapters.iter().flat_map(|a| a.adapter.entries()).filter_map(|e| e.rank).max();
    let rank = match (method, rank) {
        (Method::Svd, None) => {
            return Err(Error::usage("`--method svd` wants a rank").hint("`--rank 32`, for example"));
        }
        (_, None) if method.is_dense() => largest.or(Some(32)),
        (_, rank) => rank,
    };
    let weight_sum = adapters.iter().map(|a| a.weight).sum();
    let names: BTreeSet<&String> = adapters.iter().flat_map(|a| a.adapter.transformer.keys()).collect();
    let names: Vec<&String> = names.into_iter().collect();
    let merge_one = |name: &&String| -> Result<MergedModule> {
        let mut terms = Vec::new();
        for Weighted { adapter, weight } in adapters {
            if let Some(entry) = adapter.transformer.get(*name) {
                terms.push(Term { delta: adapter.delta(name, entry)?, weight: *weight });
            }
        }
        let Combined { b, a, lost } = combine(name, terms, method, rank, weight_sum, base)?;
        progress();
        Ok(MergedModule { module: OutModule::lora(name, b, a, 1.0, None, Dtype::F32), lost })
    };
    let low_rank = adapters
        .iter()
        .flat_map(|a| a.adapter.entries())
        .all(|e| e.kind == crate::adapters::read::Kind::Lora && !e.dora);
    if low_rank && !method.is_dense() {
        return names.par_iter().map(merge_one).collect();
    }
    let mut merged = Vec::with_capacity(names.len());
    for group in names.chunks(DENSE_AT_ONCE) {
        merged.extend(group.par_iter().map(merge_one).collect::<Result<Vec<_>>>()?);
    }
    Ok(merged)
}
