//! Routing: which adapters a prompt gets, and why.
//!
//! A routes file says for each adapter which words call for it. Words are matched after NFKC and lower-casing, Chinese
//! ones wherever they stand and Latin ones as whole words; where two words overlap the longer one counts, so that 熊猫
//! does not call for what 猫 calls for. `<lora:name:0.7>` in a prompt has the last word.

mod decide;
mod tag;
mod words;

pub use decide::{Candidate, Decision, Router, Verdict};

use crate::config::field::{At, Field, Range, section};
use crate::config::tree;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

section! {
    /// Which adapters a prompt gets.
    pub struct Routes {
        /// The adapters to choose from.
        adapters: Vec<Route>;
        /// Score from which an adapter is taken.
        threshold: f64 = 1.0, Range::above(0.0);
        /// Most adapters for one prompt.
        max_adapters: usize = 3, Range::at_least(1.0);
        /// Largest sum of the weights (of their amounts) for one prompt; if it is exceeded all are scaled down.
        max_weight: f64 = 1.2, Range::above(0.0);
    }
}

section! {
    /// One adapter.
    pub struct Route {
        /// The adapter's file, relative to the routes file.
        file: PathBuf;
        /// The name for `<lora:name>`; null means the file's name without its ending.
        name: Option<String> = None;
        /// Words that call for it, Chinese or English: text, or a map `{text, score}`.
        triggers: Vec<Trigger> = Vec::new();
        /// Words that rule it out.
        negative_triggers: Vec<String> = Vec::new();
        /// Factor on what the adapter adds.
        weight: f64 = 0.8, Range::between(-100.0, 100.0);
        /// Adapters of higher priority are chosen first, whatever their score.
        priority: f64 = 0.0, Range::between(-1e6, 1e6);
        /// Of the adapters of one group only the first one is chosen.
        group: Option<String> = None;
        /// Fingerprint of the base model, or its beginning (8 digits or more); null means the one that the adapter's
        /// metadata names.
        base: Option<String> = None;
    }
}

section! {
    /// A word that calls for an adapter.
    pub struct Trigger shorthand text {
        /// The word.
        text: String;
        /// What it adds to the score, however often it stands in the prompt.
        score: f64 = 1.0, Range::above(0.0);
    }
}

impl Routes {
    /// Reads a routes file. Paths of adapters become relative to where the program runs.
    ///
    /// Errors (usage): unreadable, not a strict YAML file of this form, no adapter, two of one name, an adapter that is
    /// not there, an empty trigger.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read the routes", path, e).into_usage())?;
        let mut routes = Self::parse(&text, path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for route in &mut routes.adapters {
            let file = folder.join(&route.file);
            if !file.exists() {
                return Err(Error::usage(format!("no adapter at `{}`", file.display())).detail(format!(
                    "`{}` names it for `{}`",
                    path.display(),
                    route.name()
                )));
            }
            route.file = file;
        }
        Ok(routes)
    }

    fn parse(text: &str, path: &Path) -> Result<Self> {
        let root = tree::parse(text, &format!("`{}` is not a valid routes file", path.display()))?;
        let routes = Self::read(&root, &At::root(path))?;
        let fault = |what: String| Err(Error::usage(format!("{what} in `{}`", path.display())));
        if routes.adapters.is_empty() {
            return fault("there is no adapter".into());
        }
        let mut seen = BTreeMap::new();
        for route in &routes.adapters {
            let name = route.name();
            if name.is_empty() || name.contains([':', '<', '>']) {
                return fault(format!("{name:?} cannot be the name of an adapter"));
            }
            if seen.insert(words::normalise(&name), ()).is_some() {
                return fault(format!("two adapters have the name `{name}`"));
            }
            let texts = route.triggers.iter().map(|t| &t.text).chain(&route.negative_triggers);
            if texts.into_iter().any(|text| words::normalise(text).is_empty()) {
                return fault(format!("`{name}` has an empty trigger"));
            }
        }
        Ok(routes)
    }
}

impl Route {
    /// The name for `<lora:name>`.
    pub fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.file.file_stem().unwrap_or_default().to_string_lossy().into())
    }

    /// Refuses a base model other than the one that this adapter was trained on. `recorded` is what the adapter's own
    /// metadata says; the routes file has the last word. Without either everything is accepted.
    ///
    /// Errors (usage): another fingerprint.
    pub fn check_base(&self, recorded: Option<&str>, found: &str) -> Result<()> {
        match self.base.as_deref().or(recorded) {
            Some(wanted) if !(wanted.len() >= 8 && found.starts_with(wanted)) => {
                Err(Error::usage(format!("`{}` was made for another base model", self.name()))
                    .expected(format!("the fingerprint {wanted}"), found)
                    .hint("choose the model with `--model`, or take the adapter out of the routes file"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn routes(text: &str) -> Result<Routes> {
        Routes::parse(text, Path::new("routes.yaml"))
    }

    #[test]
    fn a_routes_file_is_strict_and_its_faults_are_named() {
        let good = routes("adapters: [{file: a.safetensors, triggers: [猫, {text: cat, score: 0.5}]}]").unwrap();
        assert_eq!((good.max_adapters, good.max_weight, good.adapters[0].name()), (3, 1.2, "a".into()));
        assert_eq!(good.adapters[0].triggers[1].score, 0.5);
        for (text, why) in [
            ("adapters: []", "there is no adapter"),
            ("adapters: [{triggers: [猫]}]", "`adapters.0.file` is missing"),
            ("adapters: [{file: a.st, trigger: [猫]}]", "`adapters.0.triggers`"),
            ("adapters: [{file: a.st}, {file: b/a.st}]", "two adapters have the name `a`"),
            ("adapters: [{file: a.st, triggers: [' ']}]", "empty trigger"),
            ("adapters: [{file: a.st, name: 'x:y'}]", "cannot be the name"),
            ("adapters: [{file: a.st, weight: strong}]", "`adapters.0.weight`"),
        ] {
            let error = routes(text).unwrap_err();
            assert!(error.to_string().contains(why) && error.exit_code() == 2, "{text}: {error}");
        }
    }

    #[test]
    fn another_base_is_refused() {
        let found = "0123456789abcdef";
        let route =
            |base: Option<&str>| Route { base: base.map(String::from), file: "x.st".into(), ..Route::default() };
        assert!(route(None).check_base(None, found).is_ok());
        assert!(route(Some("01234567")).check_base(Some("ffff"), found).is_ok());
        let error = route(None).check_base(Some("ffffffffffffffff"), found).unwrap_err().to_string();
        assert!(error.contains("`x` was made for another base model") && error.contains(found), "{error}");
        assert!(route(Some("0123")).check_base(None, found).is_err(), "too short to tell");
    }
}
