//! Merging several adapters into one, module by module.
//!
//! With weights w and deltas D:
//! - `concat`: the sum of w D, exactly, the factors side by side: the ranks add up.
//! - `svd`: the same sum, brought to a chosen rank.
//! - `linear`: the weighted mean, the sum of w D over the sum of w.
//! - `ties` (arXiv 2306.01708): each D keeps its largest values; where signs disagree the heavier side is elected and
//!   the mean of its values is taken.
//! - `dare` (arXiv 2311.03099): each D keeps values at random and is scaled up to make up for the rest; then the sum.
//! - `magnitude_prune`: each D keeps its largest values; then the sum.

use crate::adapters::convert::{BaseWeight, EXACT_RANK, lost, of_dense};
use crate::adapters::delta::Delta;
use crate::adapters::linalg::Svd;
use crate::adapters::matrix::Matrix;
use crate::error::{Error, Result};
use crate::rng::{Purpose, Stream};

/// How deltas become one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Factors side by side.
    Concat,
    /// Weighted sum, to a rank.
    Svd,
    /// Weighted mean.
    Linear,
    /// Trim, elect signs, mean of the elected.
    Ties {
        /// Share of values that each delta keeps.
        density: f64,
        /// Elect by the number of values rather than by their sum.
        by_count: bool,
    },
    /// Drop at random, scale up, weighted sum.
    Dare {
        /// Share of values that each delta keeps.
        density: f64,
        /// Seed of what is dropped.
        seed: u64,
    },
    /// Trim, weighted sum.
    MagnitudePrune {
        /// Share of values that each delta keeps.
        density: f64,
    },
}

impl Method {
    /// Whether the result has full rank, so that it must be brought to a rank.
    pub fn is_dense(self) -> bool {
        matches!(self, Self::Ties { .. } | Self::Dare { .. } | Self::MagnitudePrune { .. })
    }
}

/// One adapter's change of a module.
pub struct Term {
    /// Its delta.
    pub delta: Delta,
    /// Its weight.
    pub weight: f64,
}

/// The merged LoRA of one module, scale 1.
#[derive(Debug)]
pub struct Combined {
    /// Up projection, (out, r).
    pub b: Matrix,
    /// Down projection, (r, in).
    pub a: Matrix,
    /// Share of the energy lost by bringing it to the rank.
    pub lost: f64,
}

/// Merges the changes of one module. `rank`: of the result, for every method but `concat`; `linear` without one keeps
/// the exact mean. `weight_sum` is the sum over all adapters, also those that do not change this module: a mean with
/// nothing is half.
///
/// Errors: `concat` of what has no exact low-rank form; a DoRA without the base; weights that add up to zero.
pub fn combine(
    name: &str,
    terms: Vec<Term>,
    method: Method,
    rank: Option<usize>,
    weight_sum: f64,
    base: Option<&BaseWeight>,
) -> Result<Combined> {
    let scale = match method {
        Method::Linear if weight_sum.abs() < 1e-12 => {
            return Err(Error::usage("the weights add up to 0: a weighted mean needs another sum")
                .hint("`--method concat` adds and subtracts without a mean"));
        }
        Method::Linear => 1.0 / weight_sum,
        _ => 1.0,
    };
    if method.is_dense() {
        let merged = dense(name, &terms, method, base)?;
        let rank = rank.expect("dense methods are given a rank");
        let (b, a, lost) = of_dense(&merged, rank, &mut Stream::named(0, name, Purpose::Adapters));
        return Ok(Combined { b, a, lost });
    }
    let exact: Option<Vec<(Matrix, Matrix)>> = terms
        .iter()
        .map(|t| {
            let (b, a) = t.delta.exact_factors(EXACT_RANK)?;
            Some((b.scaled(t.weight * scale), a))
        })
        .collect();
    let Some(factors) = exact else {
        let Some(rank) = rank else {
            return Err(Error::usage(format!(
                "`{name}` has an adapter that is no LoRA, which cannot be put side by side"
            ))
            .hint("`--method svd --rank R` merges every kind"));
        };
        let mut sum = sum_of(name, &terms, base)?;
        sum.data.iter_mut().for_each(|v| *v *= scale as f32);
        let (b, a, lost) = of_dense(&sum, rank, &mut Stream::named(0, name, Purpose::Adapters));
        return Ok(Combined { b, a, lost });
    };
    let (b, a): (Vec<Matrix>, Vec<Matrix>) = factors.into_iter().unzip();
    let (b, a) = (Matrix::beside(&b), Matrix::stacked(&a));
    match rank {
        Some(rank) if method != Method::Concat => {
            let mut svd = Svd::of_product(&b, &a);
            let total = svd.energy();
            svd.truncate(rank);
            let (b, a) = svd.factors(svd.s.len());
            Ok(Combined { b, a, lost: lost(svd.energy(), total) })
        }
        _ => Ok(Combined { b, a, lost: 0.0 }),
    }
}

/// A term's change, multiplied out, without its weight.
fn change_of(name: &str, term: &Term, base: Option<&BaseWeight>) -> Result<Matrix> {
    if term.delta.magnitude.is_none() {
        return Ok(term.delta.dense());
    }
    let weight = match base {
        None => None,
        Some(base) => base(name)?,
    };
    let weight = weight.ok_or_else(|| {
        Error::usage(format!("an adapter of `{name}` is a DoRA: what it changes depends on the base weight"))
            .hint("give the base model with `--base`")
    })?;
    Ok(term.delta.change_of(&weight))
}

fn sum_of(name: &str, terms: &[Term], base: Option<&BaseWeight>) -> Result<Matrix> {
    let mut sum: Option<Matrix> = None;
    for term in terms {
        let change = change_of(name, term, base)?;
        match &mut sum {
            None => sum = Some(change.scaled(term.weight)),
            Some(sum) => sum.add_scaled(&change, term.weight as f32),
        }
    }
    Ok(sum.expect("a module has a term"))
}

fn dense(name: &str, terms: &[Term], method: Method, base: Option<&BaseWeight>) -> Result<Matrix> {
    let mut changes = Vec::with_capacity(terms.len());
    for (i, term) in terms.iter().enumerate() {
        let mut change = change_of(name, term, base)?;
        match method {
            Method::Dare { density, seed } => {
                let mut random = Stream::named(seed, &format!("{i}/{name}"), Purpose::Adapters);
                let up = (1.0 / density) as f32;
                change.data.iter_mut().for_each(|v| *v = if random.uniform() < density { *v * up } else { 0.0 });
            }
            Method::Ties { density, .. } | Method::MagnitudePrune { density } => trim(&mut change.data, density),
            Method::Concat | Method::Svd | Method::Linear => unreachable!("not dense"),
        }
        let weight = term.weight as f32;
        change.data.iter_mut().for_each(|v| *v *= weight);
        changes.push(change);
    }
    let Method::Ties { by_count, .. } = method else {
        let mut sum = changes.swap_remove(0);
        changes.iter().for_each(|c| sum.add_scaled(c, 1.0));
        return Ok(sum);
    };
    let mut merged = Matrix::zeros(changes[0].rows, changes[0].cols);
    for (i, out) in merged.data.iter_mut().enumerate() {
        let values = || changes.iter().map(|c| c.data[i]);
        // A zero has no sign; it must not vote.
        let votes: f32 = values().map(|v| if by_count && v != 0.0 { v.signum() } else { v }).sum();
        let agrees = |v: &f32| *v != 0.0 && (*v > 0.0) == (votes >= 0.0);
        let (sum, count) = values().filter(agrees).fold((0f32, 0u32), |(s, n), v| (s + v, n + 1));
        *out = sum / count.max(1) as f32;
    }
    Ok(merged)
}

/// Sets all but the largest `density` share of values to zero.
fn trim(values: &mut [f32], density: f64) {
    let keep = ((values.len() as f64 * density).round() as usize).min(values.len());
    if keep == values.len() {
        return;
    }
    let threshold = if keep == 0 {
        f32::INFINITY
    } else {
        let mut magnitudes: Vec<f32> = values.iter().map(|v| v.abs()).collect();
        let at = values.len() - keep;
        *magnitudes.select_nth_unstable_by(at, f32::total_cmp).1
    };
    values.iter_mut().filter(|v| v.abs() < threshold).for_each(|v| *v = 0.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::delta::Factors;

    fn random(rows: usize, cols: usize, item: u64) -> Matrix {
        Matrix::new(rows, cols, Stream::new(8, 0, item, Purpose::Bench).normals(rows * cols, 1.0))
    }

    fn term(rank: usize, item: u64, weight: f64) -> Term {
        let factors = Factors::Lora { a: random(rank, 24, item), b: random(20, rank, item + 100) };
        Term { delta: Delta { factors, scale: 0.5, magnitude: None }, weight }
    }

    /// A change given value by value: full rank, so that methods on the values can be checked.
    fn given(values: &[f32], weight: f64) -> Term {
        let a = Matrix::new(1, values.len(), values.to_vec());
        let b = Matrix::new(1, 1, vec![1.0]);
        Term { delta: Delta { factors: Factors::Lora { a, b }, scale: 1.0, magnitude: None }, weight }
    }

    fn result(terms: Vec<Term>, method: Method, rank: Option<usize>) -> (Matrix, f64) {
        let sum = terms.iter().map(|t| t.weight).sum();
        let combined = combine("m", terms, method, rank, sum, None).unwrap();
        (combined.b.product(&combined.a), combined.lost)
    }

    fn assert_close(got: &Matrix, want: &[f32]) {
        for (i, (g, w)) in got.data.iter().zip(want).enumerate() {
            assert!((g - w).abs() < 1e-5 * (1.0 + w.abs()), "[{i}] {g} {w}");
        }
    }

    fn weighted_sum(terms: &[Term]) -> Matrix {
        sum_of("m", terms, None).unwrap()
    }

    #[test]
    fn concat_is_exact_with_mixed_ranks_and_signs() {
        let terms = vec![term(3, 1, 0.8), term(5, 2, -0.5)];
        let want = weighted_sum(&terms);
        let combined = combine("m", terms, Method::Concat, None, 0.3, None).unwrap();
        assert_eq!((combined.a.rows, combined.lost), (8, 0.0));
        assert_close(&combined.b.product(&combined.a), &want.data);
    }

    #[test]
    fn svd_is_the_best_of_its_rank_and_tells_what_is_lost() {
        let terms = || vec![term(3, 1, 1.0), term(3, 2, 1.0)];
        let want = weighted_sum(&terms());
        let (full, lost) = result(terms(), Method::Svd, Some(6));
        assert_close(&full, &want.data);
        assert!(lost < 1e-9);
        let (half, lost) = result(terms(), Method::Svd, Some(3));
        let mut rest = want.clone();
        rest.add_scaled(&half, -1.0);
        assert!((rest.energy() / want.energy() - lost).abs() < 1e-5 && lost > 0.01, "{lost}");
    }

    #[test]
    fn linear_is_the_weighted_mean() {
        let terms = || vec![term(2, 1, 3.0), term(2, 2, 1.0)];
        let want = weighted_sum(&terms()).scaled(0.25);
        assert_close(&result(terms(), Method::Linear, None).0, &want.data);
        let error = combine("m", vec![term(2, 1, 1.0), term(2, 2, -1.0)], Method::Linear, None, 0.0, None);
        assert!(error.unwrap_err().to_string().contains("add up to 0"));
    }

    #[test]
    fn ties_trims_elects_and_averages_the_elected() {
        let terms = || vec![given(&[4.0, -3.0, 0.1, 2.0], 1.0), given(&[2.0, 5.0, 3.0, -0.2], 1.0)];
        // Half of each: [4, -3, 0, 0] and [0, 5, 3, 0]. At the second value 5 outweighs -3.
        let ties = |by_count| Method::Ties { density: 0.5, by_count };
        assert_close(&result(terms(), ties(false), Some(1)).0, &[4.0, 5.0, 3.0, 0.0]);
        // All of each: means of agreeing values, the heavier sign where they disagree.
        let all = Method::Ties { density: 1.0, by_count: false };
        assert_close(&result(terms(), all, Some(1)).0, &[3.0, 5.0, 1.55, 2.0]);
        // One against two: by sum the one wins, by count the two.
        let terms = || vec![given(&[9.0], 1.0), given(&[-2.0], 1.0), given(&[-4.0], 1.0)];
        assert_close(&result(terms(), all, Some(1)).0, &[9.0]);
        assert_close(&result(terms(), Method::Ties { density: 1.0, by_count: true }, Some(1)).0, &[-3.0]);
        // A subtracted adapter votes with its sign turned.
        let terms = vec![given(&[1.0], 1.0), given(&[3.0], -1.0)];
        assert_close(&result(terms, all, Some(1)).0, &[-3.0]);
    }

    #[test]
    fn dare_keeps_the_expectation_and_follows_its_seed() {
        let ones = vec![1.0; 20_000];
        let dare = |seed| Method::Dare { density: 0.25, seed };
        let (kept, _) = result(vec![given(&ones, 2.0)], dare(1), Some(1));
        assert!(kept.data.iter().all(|v| v.abs() < 1e-3 || (*v - 8.0).abs() < 1e-3));
        let mean = kept.data.iter().map(|v| f64::from(*v)).sum::<f64>() / 20_000.0;
        // Five standard errors: 8 * sqrt(0.25 * 0.75 / 20000) = 0.024.
        assert!((mean - 2.0).abs() < 0.13, "{mean}");
        assert_eq!(kept.data, result(vec![given(&ones, 2.0)], dare(1), Some(1)).0.data);
        assert_ne!(kept.data, result(vec![given(&ones, 2.0)], dare(2), Some(1)).0.data);
    }

    #[test]
    fn magnitude_prune_keeps_the_largest_of_each() {
        let terms = vec![given(&[4.0, -3.0, 0.1, 2.0], 2.0), given(&[2.0, 5.0, 3.0, -0.2], 1.0)];
        let prune = Method::MagnitudePrune { density: 0.5 };
        assert_close(&result(terms, prune, Some(1)).0, &[8.0, -1.0, 3.0, 0.0]);
        let none = Method::MagnitudePrune { density: 0.0 };
        assert_close(&result(vec![given(&[4.0, -3.0], 1.0)], none, Some(1)).0, &[0.0, 0.0]);
    }

    #[test]
    fn other_kinds_need_a_rank() {
        let lokr = || {
            let factors = Factors::Lokr { w1: random(4, 4, 1), w2: random(5, 6, 2) };
            Term { delta: Delta { factors, scale: 1.0, magnitude: None }, weight: 1.0 }
        };
        let error = combine("m", vec![lokr()], Method::Concat, None, 1.0, None).unwrap_err().to_string();
        assert!(error.contains("no LoRA") && error.contains("svd"), "{error}");
        let want = weighted_sum(&[lokr(), term(2, 1, 0.5)]);
        let (got, lost) = result(vec![lokr(), term(2, 1, 0.5)], Method::Svd, Some(20));
        assert!(lost < 1e-6);
        assert_close(&got, &want.data);
    }
}
