//! What the self-test found, as a table.

use serde::Serialize;
use std::fmt;

/// One output or gradient of one op.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The op and its shapes.
    pub op: String,
    /// Which output, or the gradient of which input.
    pub tensor: String,
    /// Relative distance from the f32 value.
    pub error: f64,
    /// What it may be.
    pub limit: f64,
    /// Whether it is within, and the op ran as it should.
    pub ok: bool,
    /// What else there is to say.
    pub note: String,
    /// Time of the op, forward and backward, in its first row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// The same, composed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub composed_seconds: Option<f64>,
}

impl Row {
    /// A row with nothing but an error and its limit.
    pub(super) fn new(op: String, tensor: &str, error: f64, limit: f64) -> Self {
        let ok = error <= limit;
        Self { op, tensor: tensor.into(), error, limit, ok, note: String::new(), seconds: None, composed_seconds: None }
    }
}

/// All rows.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// In the order of the ops.
    pub rows: Vec<Row>,
}

impl Table {
    /// Whether every row is within its limit.
    pub fn ok(&self) -> bool {
        self.rows.iter().all(|row| row.ok)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|r| r.op.len()).max().unwrap_or(0).max(2);
        writeln!(f, "{:width$}  {:10}  {:>9}  {:>9}  {:>11}", "op", "tensor", "error", "ms", "composed ms")?;
        let ms = |s: Option<f64>| s.map_or(String::new(), |s| format!("{:.3}", s * 1e3));
        for row in &self.rows {
            let verdict = if row.ok { "" } else { "  FAILED" };
            writeln!(
                f,
                "{:width$}  {:10}  {:>9.1e}  {:>9}  {:>11}{verdict}{}",
                row.op,
                row.tensor,
                row.error,
                ms(row.seconds),
                ms(row.composed_seconds),
                if row.note.is_empty() { String::new() } else { format!("  ({})", row.note) },
            )?;
        }
        let failed = self.rows.iter().filter(|r| !r.ok).count();
        match failed {
            0 => write!(f, "{} values, all within their limits", self.rows.len()),
            n => write!(f, "{n} of {} values FAILED", self.rows.len()),
        }
    }
}
