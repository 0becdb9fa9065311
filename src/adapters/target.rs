//! Which linears of a network an adapter attaches to.

/// One linear that can carry an adapter, as a network describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleInfo {
    /// Dotted name in the checkpoint, such as `transformer_blocks.0.attn.to_q`.
    pub name: String,
    /// Columns of its weight.
    pub in_features: usize,
    /// Rows of its weight.
    pub out_features: usize,
    /// The group names that select it, such as `qkv`, `qkv.visual`, `visual`.
    pub groups: Vec<&'static str>,
}
