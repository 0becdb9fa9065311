//! The result: measures down, what is compared across. As text, CSV and JSON.

use crate::error::{Error, Result};
use crate::eval::statistics::Measure;
use serde_json::{Value as Json, json};
use std::fmt::Write;

/// What a measure is and how to read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Name in files: `ssim_uniform7`.
    pub key: &'static str,
    /// Name for people, with the unit.
    pub title: &'static str,
    /// Which way is better, if one is.
    pub better: Better,
    /// Digits after the point.
    pub digits: usize,
}

/// Which way a measure is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Higher values.
    Higher,
    /// Lower values.
    Lower,
    /// Neither: it describes.
    Neither,
}

/// One cell of the table.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// A value.
    Value(Measure),
    /// What could not be measured, and why. Never shown as a number.
    NotMeasured(String),
    /// The measure makes no sense here, as the baseline against itself.
    Empty,
}

impl Cell {
    /// A value, or the reason why there is none.
    pub fn new(measure: Option<Measure>, otherwise: impl Into<String>) -> Self {
        measure.map_or_else(|| Self::NotMeasured(otherwise.into()), Self::Value)
    }
}

/// One measure of every column.
#[derive(Clone, Debug)]
pub struct Row {
    /// What is measured.
    pub metric: Metric,
    /// Part of the images that it is measured on, such as a group of prompts; empty for all.
    pub part: String,
    /// One for each column.
    pub cells: Vec<Cell>,
}

impl Row {
    /// Title with the part.
    pub fn title(&self) -> String {
        if self.part.is_empty() {
            return self.metric.title.to_string();
        }
        format!("{}: {}", self.metric.title, self.part)
    }
}

/// All measures.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// What is compared.
    pub columns: Vec<String>,
    /// The measures.
    pub rows: Vec<Row>,
    /// What a reader must know to understand the numbers.
    pub notes: Vec<String>,
}

impl Table {
    /// Adds a row, unless all of its cells are empty.
    pub fn push(&mut self, metric: Metric, part: &str, cells: Vec<Cell>) {
        assert_eq!(cells.len(), self.columns.len(), "one cell for each column");
        if cells.iter().any(|cell| *cell != Cell::Empty) {
            self.rows.push(Row { metric, part: part.into(), cells });
        }
    }

    /// Adds a note once.
    pub fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// The reasons of what was not measured, each once, with the titles that it holds for.
    pub fn not_measured(&self) -> Vec<(String, Vec<String>)> {
        let mut reasons: Vec<(String, Vec<String>)> = Vec::new();
        for row in &self.rows {
            for cell in &row.cells {
                let Cell::NotMeasured(why) = cell else { continue };
                let known = reasons.iter().position(|(reason, _)| reason == why);
                let at = known.unwrap_or_else(|| {
                    reasons.push((why.clone(), Vec::new()));
                    reasons.len() - 1
                });
                if !reasons[at].1.contains(&row.title()) {
                    reasons[at].1.push(row.title());
                }
            }
        }
        reasons
    }

    /// The table in aligned columns, then what was not measured, then the notes.
    pub fn to_text(&self) -> String {
        let mut lines: Vec<Vec<String>> = vec![[vec![String::new()], self.columns.clone()].concat()];
        for row in &self.rows {
            let arrow = match row.metric.better {
                Better::Higher => " ↑",
                Better::Lower => " ↓",
                Better::Neither => "",
            };
            let mut line = vec![format!("{}{arrow}", row.title())];
            line.extend(row.cells.iter().map(|cell| cell_text(cell, row.metric.digits)));
            lines.push(line);
        }
        let width = |i: usize| lines.iter().map(|l| display_width(&l[i])).max().unwrap_or(0);
        let widths: Vec<usize> = (0..=self.columns.len()).map(width).collect();
        let mut out = String::new();
        for line in &lines {
            let mut text = String::new();
            for (cell, width) in line.iter().zip(&widths) {
                let _ = write!(text, "{cell}{}", " ".repeat(width + 2 - display_width(cell)));
            }
            let _ = writeln!(out, "{}", text.trim_end());
        }
        let reasons = self.not_measured();
        if !reasons.is_empty() {
            out.push_str("\nnot measured:\n");
        }
        for (why, titles) in reasons {
            let _ = writeln!(out, "  {}: {why}", titles.join(", "));
        }
        for note in &self.notes {
            let _ = write!(out, "\nnote: {note}");
        }
        out.trim_end().to_string()
    }

    /// One line for each cell that is not empty.
    ///
    /// Errors: none that a user can cause.
    pub fn to_csv(&self) -> Result<Vec<u8>> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        let failed = |e: csv::Error| Error::run("cannot write the table as CSV").detail(e.to_string());
        let head = ["metric", "part", "column", "value", "low", "high", "n", "p_value", "not_measured"];
        writer.write_record(head).map_err(failed)?;
        for row in &self.rows {
            for (column, cell) in self.columns.iter().zip(&row.cells) {
                let fields = match cell {
                    Cell::Empty => continue,
                    Cell::NotMeasured(why) => [const { String::new() }; 5].into_iter().chain([why.clone()]).collect(),
                    Cell::Value(m) => {
                        let optional = |v: Option<f64>| v.map(|v| v.to_string()).unwrap_or_default();
                        let (low, high) = (m.interval.map(|i| i.0), m.interval.map(|i| i.1));
                        let n = m.n.to_string();
                        vec![m.value.to_string(), optional(low), optional(high), n, optional(m.p_value), String::new()]
                    }
                };
                let head = [row.metric.key, &row.part, column].map(String::from);
                writer.write_record(head.into_iter().chain(fields)).map_err(failed)?;
            }
        }
        writer.into_inner().map_err(|e| Error::run("cannot write the table as CSV").detail(e.to_string()))
    }

    /// Columns, rows and notes. A cell is an object with `value`, or with `not_measured`, or null.
    pub fn to_json(&self) -> Json {
        let cell = |cell: &Cell| match cell {
            Cell::Empty => Json::Null,
            Cell::NotMeasured(why) => json!({"not_measured": why}),
            Cell::Value(m) => json!({
                "value": m.value, "n": m.n, "low": m.interval.map(|i| i.0), "high": m.interval.map(|i| i.1),
                "p_value": m.p_value,
            }),
        };
        let row = |row: &Row| {
            json!({
                "metric": row.metric.key, "part": row.part, "title": row.title(),
                "cells": row.cells.iter().map(cell).collect::<Vec<_>>(),
            })
        };
        json!({"columns": self.columns, "rows": self.rows.iter().map(row).collect::<Vec<_>>(), "notes": self.notes})
    }
}

/// `29.58 ± 0.12` where the interval is symmetric, `0.12 [0.05, 0.36] of 20` where not, as of a rate.
pub fn cell_text(cell: &Cell, digits: usize) -> String {
    let m = match cell {
        Cell::Empty => return "-".into(),
        Cell::NotMeasured(_) => return "not measured".into(),
        Cell::Value(measure) => measure,
    };
    let mut text = format!("{:.digits$}", m.value);
    if let Some((low, high)) = m.interval {
        let symmetric = ((m.value - low) - (high - m.value)).abs() <= 1e-9 * (high - low);
        let _ = match symmetric {
            true => write!(text, " ± {:.digits$}", (high - low) / 2.0),
            false => write!(text, " [{low:.digits$}, {high:.digits$}] of {}", m.n),
        };
    }
    if let Some(p) = m.p_value {
        let _ = if p < 0.001 { write!(text, ", p < 0.001") } else { write!(text, ", p = {p:.3}") };
    }
    text
}

/// Cells of a terminal: Chinese letters take two.
fn display_width(text: &str) -> usize {
    text.chars().map(|c| if ('\u{2e80}'..'\u{fffe}').contains(&c) { 2 } else { 1 }).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRIC: Metric = Metric { key: "m", title: "measure", better: Better::Higher, digits: 2 };

    fn table() -> Table {
        let mut table = Table { columns: vec!["base".into(), "风格".into()], ..Table::default() };
        table.push(METRIC, "", vec![Cell::Empty, Cell::Empty]);
        let value = Measure { interval: Some((0.0, 1.0)), p_value: Some(0.5), ..Measure::of(0.25, 4) };
        table.push(METRIC, "part, one", vec![Cell::NotMeasured("no weights".into()), Cell::Value(value)]);
        table.push(METRIC, "", vec![Cell::new(None, "no weights"), Cell::new(Measure::mean(&[1.0, 2.0]), "")]);
        table
    }

    #[test]
    fn what_is_not_measured_is_never_a_number() {
        let table = table();
        let text = table.to_text();
        assert!(text.contains("measure: part, one ↑  not measured  0.25 [0.00, 1.00] of 4, p = 0.500"), "{text}");
        assert!(text.contains("1.50 ± 0.98"), "{text}");
        assert!(text.contains("\nnot measured:\n  measure: part, one, measure: no weights"), "{text}");
        let csv = String::from_utf8(table.to_csv().unwrap()).unwrap();
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(lines[1], "m,\"part, one\",base,,,,,,no weights");
        assert_eq!(lines[2], "m,\"part, one\",风格,0.25,0,1,4,0.5,");
        assert_eq!(lines.len(), 5, "empty rows and cells are left out");
        let json = table.to_json();
        assert_eq!(json["rows"][0]["cells"][0], json!({"not_measured": "no weights"}));
        assert_eq!(json["rows"][1]["cells"][1]["value"], 1.5);
    }
}
