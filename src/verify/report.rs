//! The outcome of a verification, as a table and as JSON.

use super::Row;
use crate::error::Error;
use serde_json::{Value, json};
use std::fmt;

/// What was compared, skipped and failed.
#[derive(Default)]
pub struct Report {
    /// Compared tensors, stage by stage.
    pub rows: Vec<Row>,
    /// Stages of which the case recorded nothing.
    pub skipped: Vec<&'static str>,
    /// Stages that could not run.
    pub failed: Vec<(&'static str, Error)>,
}

impl Report {
    /// Whether something was compared and everything is within its limits.
    pub fn ok(&self) -> bool {
        !self.rows.is_empty() && self.failed.is_empty() && self.rows.iter().all(|r| r.ok)
    }

    /// One line: how many values are within limits.
    pub fn summary(&self) -> String {
        let good = self.rows.iter().filter(|r| r.ok).count();
        let mut line = format!("{good} of {} values within limits", self.rows.len());
        if !self.failed.is_empty() {
            let names: Vec<&str> = self.failed.iter().map(|(stage, _)| *stage).collect();
            line += &format!("; could not run: {}", names.join(", "));
        }
        line
    }

    /// The report for programs. A number that is not finite is null.
    pub fn to_json(&self) -> Value {
        let rows = self.rows.iter().map(|r| {
            json!({"stage": r.stage, "name": r.name, "max_abs": r.max_abs, "relative": r.relative, "limit": r.limit,
                   "ok": r.ok, "note": r.note})
        });
        let failed = self.failed.iter().map(|(stage, error)| json!({"stage": stage, "error": error.to_string()}));
        json!({"ok": self.ok(), "summary": self.summary(), "values": rows.collect::<Vec<_>>(),
               "skipped": self.skipped, "failed": failed.collect::<Vec<_>>()})
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|r| r.name.len()).max().unwrap_or(0).max("tensor".len());
        if !self.rows.is_empty() {
            let (stage, tensor) = ("stage", "tensor");
            writeln!(f, "      {stage:<11} {tensor:<width$} {:>8} {:>8} {:>8}", "max abs", "relative", "limit")?;
        }
        for row in &self.rows {
            let verdict = if row.ok { "ok" } else { "OFF" };
            let number = |v: f64| if v.is_nan() { "-".into() } else { format!("{v:.1e}") };
            write!(f, "{verdict:<5} {:<11} {:<width$}", row.stage, row.name)?;
            write!(f, " {:>8} {:>8} {:>8}", number(row.max_abs), number(row.relative), number(row.limit))?;
            writeln!(f, "{}{}", if row.note.is_empty() { "" } else { "  " }, row.note)?;
        }
        for (stage, error) in &self.failed {
            writeln!(f, "FAILED {stage}: {error}")?;
        }
        if !self.skipped.is_empty() {
            writeln!(f, "skipped, not in this case: {}", self.skipped.join(", "))?;
        }
        write!(f, "{}", self.summary())
    }
}
