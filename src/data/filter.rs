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

/// What was counted in an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Persons.
    pub persons: usize,
    /// Hands, of persons or alone.
    pub hands: usize,
    /// Legs.
    pub legs: usize,
}

/// Whether the rules about people leave anything out.
pub fn asks_for_people(filter: &Filter) -> bool {
    filter.max_hands.is_some() || filter.max_legs.is_some() || filter.require_person
}

/// Why `item` is left out for its size, if it is.
pub fn by_size(filter: &Filter, item: &Item) -> Option<LeftOut> {
    let (width, height) = (item.size.width, item.size.height);
    let limit = filter.min_size;
    (width.min(height) < limit).then(|| LeftOut {
        path: item.path.clone(),
        rule: "min_size",
        limit,
        found: width.min(height),
        reason: format!("it has {width}x{height} pixels; both sides must have {limit} or more"),
    })
}

/// Why `item` is left out for the people in it, if it is.
pub fn by_people(filter: &Filter, item: &Item, counts: Counts) -> Option<LeftOut> {
    let refuse = |rule, limit, found, reason| Some(LeftOut { path: item.path.clone(), rule, limit, found, reason });
    if filter.require_person && counts.persons == 0 {
        return refuse("require_person", 1, 0, "no person was found in it".into());
    }
    for (rule, what, limit, found) in
        [("max_hands", "hands", filter.max_hands, counts.hands), ("max_legs", "legs", filter.max_legs, counts.legs)]
    {
        if let Some(limit) = limit.filter(|&limit| found > limit) {
            return refuse(rule, limit, found, format!("{found} {what} were found in it; {limit} are allowed"));
        }
    }
    None
}
