//! The table of modules that a file's keys are matched against.

use crate::adapters::target::ModuleInfo;
use crate::error::nearest;
use std::collections::{BTreeMap, HashMap};

/// The linear layers of one network, by dotted name, with a way back from names whose dots became underscores.
#[derive(Clone, Debug, Default)]
pub struct ModuleTable {
    /// Weight shape (out_features, in_features) where it is known.
    shapes: BTreeMap<String, Option<(usize, usize)>>,
    /// Flattened name to dotted name. Turning each `_` into `.` would tear `to_q` and `add_k_proj` apart.
    dotted: HashMap<String, String>,
}

impl ModuleTable {
    /// The modules of a network whose widths are known.
    pub fn new(modules: &[ModuleInfo]) -> Self {
        Self::collect(modules.iter().map(|m| (m.name.clone(), Some((m.out_features, m.in_features)))))
    }

    /// The modules of an architecture whose widths are not known, or shall not be checked.
    pub fn names_only(modules: &[ModuleInfo]) -> Self {
        Self::collect(modules.iter().map(|m| (m.name.clone(), None)))
    }

    /// The modules of a checkpoint: every two-dimensional `<name>.weight`.
    pub fn of_tensors<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a [usize])>) -> Self {
        Self::collect(tensors.into_iter().filter_map(|(name, shape)| match *shape {
            [out, width] => Some((name.strip_suffix(".weight")?.to_string(), Some((out, width)))),
            _ => None,
        }))
    }

    fn collect(modules: impl Iterator<Item = (String, Option<(usize, usize)>)>) -> Self {
        let shapes: BTreeMap<_, _> = modules.collect();
        let dotted = shapes.keys().map(|n| (n.replace('.', "_"), n.clone())).collect();
        Self { shapes, dotted }
    }

    /// Whether there is a module of this dotted name.
    pub fn contains(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }

    /// The dotted name behind a flattened one.
    pub fn unflatten(&self, flat: &str) -> Option<&str> {
        self.dotted.get(flat).map(String::as_str)
    }

    /// (out_features, in_features), if the module is there and its widths are known.
    pub fn shape(&self, name: &str) -> Option<(usize, usize)> {
        *self.shapes.get(name)?
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shapes.keys().map(String::as_str)
    }

    /// The name nearest in spelling, dotted or flattened.
    pub fn nearest(&self, name: &str) -> Option<&str> {
        nearest(name, self.names())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flattened_names_come_back_whole() {
        let shape = [6usize, 4];
        let tensors = ["blocks.1.attn.to_out.0.weight", "blocks.1.attn.add_q_proj.weight", "blocks.11.x.weight"];
        let vector = [6usize];
        let norm = ("blocks.1.norm.weight", vector.as_slice());
        let table =
            ModuleTable::of_tensors(tensors.iter().map(|t| (*t, shape.as_slice())).chain(std::iter::once(norm)));
        assert_eq!(table.unflatten("blocks_1_attn_to_out_0"), Some("blocks.1.attn.to_out.0"));
        assert_eq!(table.unflatten("blocks_1_attn_add_q_proj"), Some("blocks.1.attn.add_q_proj"));
        assert_eq!(table.unflatten("blocks_1_norm"), None);
        assert_eq!(table.shape("blocks.11.x"), Some((6, 4)));
        assert_eq!(table.nearest("blocks.1.attn.ad_q_proj"), Some("blocks.1.attn.add_q_proj"));
    }
}
