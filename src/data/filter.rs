//! `data.filter`: images that are left out when the data set is indexed, each with its reason. No file is touched.

use crate::config::Filter;
use crate::data::dataset::Item;
use serde::Serialize;

/// An image that is left out: a line of `filtered.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LeftOut {
    /// Path below `data.path`, with `/` between folders.
    pub path: String,
    /// The key of `data.filter` that it does not meet; the first one if there are several.
    pub rule: &'static str,
    /// What was asked for.
    pub limit: usize,
    /// What the image has.
    pub found: usize,
    /// All of it in words.
    pub reason: String,
}

/// Whether `filter` leaves `item` out, and why.
pub fn left_out(filter: &Filter, item: &Item) -> Option<LeftOut> {
    let size = item.size;
    let shorter = size.height.min(size.width);
    let (width, height) = (size.width, size.height);
    let refuse = |rule, limit, found, reason| LeftOut { path: item.path.clone(), rule, limit, found, reason };
    (shorter < filter.min_size).then(|| {
        let reason = format!("it has {width}x{height} pixels; both sides must have {} or more", filter.min_size);
        refuse("min_size", filter.min_size, shorter, reason)
    })
}
