//! Computing what a store lacks, entry by entry, so that a stop at any moment loses at most one batch.

use crate::cache::key::Key;
use crate::cache::store::{Entry, Store};
use crate::error::Result;
use crate::progress;

/// How [`fill`] works and what it shows.
#[derive(Clone, Copy, Debug)]
pub struct FillOptions<'a> {
    /// What is cached, for the progress bar: `prompt embeddings`.
    pub label: &'a str,
    /// The most entries that are computed in one call.
    pub batch_size: usize,
    /// Shows no progress bar.
    pub quiet: bool,
}

/// What [`fill`] did.
#[derive(Debug, PartialEq, Eq)]
pub struct Filled {
    /// Entries that were computed now.
    pub computed: usize,
    /// Distinct entries that were whole already.
    pub reused: usize,
    /// One line for each damaged entry that was replaced.
    pub notices: Vec<String>,
}

/// Makes sure that `store` has a whole entry for each key.
///
/// First all entries are read and checked; then `compute` is called with the indices of some missing keys, and returns
/// one entry for each, in order; each entry is on disk before the next batch is computed. `compute` is never called
/// when nothing is missing, so it may load its network on the first call. Equal keys are computed once.
/// Errors: those of `compute` and of writing. The entries written until then stay, and the next call goes on from
/// there; to stop on request, return an error from `compute`.
pub fn fill(
    store: &Store,
    keys: &[Key],
    options: FillOptions,
    mut compute: impl FnMut(&[usize]) -> Result<Vec<Entry>>,
) -> Result<Filled> {
    let distinct = std::collections::HashSet::<&Key>::from_iter(keys).len();
    let bar = progress::bar(distinct, &format!("checking cached {}", options.label), options.quiet);
    let missing = store.missing(keys, || bar.inc(1));
    bar.finish_and_clear();

    let bar = progress::bar(missing.indices.len(), &format!("caching {}", options.label), options.quiet);
    for batch in missing.indices.chunks(options.batch_size.max(1)) {
        let entries = compute(batch)?;
        assert_eq!(entries.len(), batch.len(), "one entry for each key that was asked for");
        for (&i, entry) in batch.iter().zip(&entries) {
            store.put(&keys[i], entry)?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let computed = missing.indices.len();
    let notices = missing.damaged.into_iter().map(|line| format!("{line}; computed anew")).collect();
    Ok(Filled { computed, reused: distinct - computed, notices })
}
