//! Which images a stage of the training shows.

use crate::config::StageFilter;
use crate::data::dataset::Item;
use crate::data::filter::Counts;
use crate::error::{Error, Result};
use globset::{Glob, GlobSet, GlobSetBuilder};

/// A [`StageFilter`] that is ready to be asked.
pub struct Selection {
    /// None: any path.
    paths: Option<GlobSet>,
    /// In lower case; empty: any caption.
    captions: Vec<String>,
    min_hands: usize,
    min_persons: usize,
}

impl Selection {
    /// Prepares `filter`. Errors (usage): a path that is not a glob.
    pub fn new(filter: &StageFilter) -> Result<Self> {
        let mut globs = GlobSetBuilder::new();
        for pattern in &filter.paths {
            let glob = Glob::new(pattern).map_err(|e| {
                Error::usage(format!("`{pattern}` in a stage's `filter.paths` is not a glob"))
                    .detail(e.kind().to_string())
                    .hint("such as `hands/*`, for paths below `data.path`")
            })?;
            globs.add(glob);
        }
        let globs = globs.build().map_err(|e| {
            Error::usage("the globs of a stage's `filter.paths` are too many or too long").detail(e.kind().to_string())
        })?;
        Ok(Self {
            paths: (!filter.paths.is_empty()).then_some(globs),
            captions: filter.captions.iter().map(|text| text.to_lowercase()).collect(),
            min_hands: filter.min_hands,
            min_persons: usize::from(filter.require_person),
        })
    }

    /// Whether the pose network must look at the images.
    pub fn asks_for_people(filter: &StageFilter) -> bool {
        filter.min_hands > 0 || filter.require_person
    }

    /// Whether `item` is shown, in which so much was counted.
    pub fn takes(&self, item: &Item, counts: Counts) -> bool {
        if counts.hands < self.min_hands || counts.persons < self.min_persons {
            return false;
        }
        let caption = item.caption.to_lowercase();
        self.paths.as_ref().is_none_or(|globs| globs.is_match(&item.path))
            && (self.captions.is_empty() || self.captions.iter().any(|text| caption.contains(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Size;

    #[test]
    fn every_rule_must_be_met_and_one_entry_of_each_is_enough() {
        let item = |path: &str, caption: &str| Item {
            path: path.into(),
            size: Size { height: 64, width: 64 },
            image_hash: blake3::hash(b""),
            caption: caption.into(),
            mask_beside: None,
            mask: None,
        };
        let strings = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let takes = |paths: &[&str], captions: &[&str], item: &Item| {
            let filter = StageFilter { paths: strings(paths), captions: strings(captions), ..StageFilter::default() };
            Selection::new(&filter).unwrap().takes(item, Counts::default())
        };
        let hand = item("hands/a.png", "An open Hand, 手");
        assert!(takes(&[], &[], &hand));
        assert!(takes(&["feet/*", "hands/*"], &["hand"], &hand) && takes(&[], &["foot", "手"], &hand));
        assert!(!takes(&["hands/*"], &["foot"], &hand) && !takes(&["feet/*"], &["hand"], &hand));
        let hands = StageFilter { min_hands: 2, require_person: true, ..StageFilter::default() };
        let takes = |persons, hands_found| {
            Selection::new(&hands).unwrap().takes(&hand, Counts { persons, hands: hands_found, legs: 0 })
        };
        assert!(takes(1, 2) && !takes(1, 1) && !takes(0, 2));
        let bad = StageFilter { paths: strings(&["a["]), ..StageFilter::default() };
        assert!(Selection::new(&bad).err().unwrap().to_string().contains("`a[`"));
    }
}
