//! Which images a stage of the training shows.

use crate::config::StageFilter;
use crate::data::dataset::Item;
use crate::error::{Error, Result};
use globset::{Glob, GlobSet, GlobSetBuilder};

/// A [`StageFilter`] that is ready to be asked.
pub struct Selection {
    /// None: any path.
    paths: Option<GlobSet>,
    /// In lower case; empty: any caption.
    captions: Vec<String>,
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
        })
    }

    /// Whether `item` is shown.
    pub fn takes(&self, item: &Item) -> bool {
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
            let filter = StageFilter { paths: strings(paths), captions: strings(captions) };
            Selection::new(&filter).unwrap().takes(item)
        };
        let hand = item("hands/a.png", "An open Hand, 手");
        assert!(takes(&[], &[], &hand));
        assert!(takes(&["feet/*", "hands/*"], &["hand"], &hand) && takes(&[], &["foot", "手"], &hand));
        assert!(!takes(&["hands/*"], &["foot"], &hand) && !takes(&["feet/*"], &["hand"], &hand));
        let bad = StageFilter { paths: strings(&["a["]), captions: Vec::new() };
        assert!(Selection::new(&bad).err().unwrap().to_string().contains("`a[`"));
    }
}
