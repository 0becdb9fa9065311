//! The evaluation as one HTML page that needs nothing but itself: table, curves over checkpoints, pictures.

use crate::error::Result;
use crate::eval::measure::{Comparison, Evaluation};
use crate::eval::metrics::*;
use crate::eval::pictures::{Part, Picture};
use crate::eval::table::{Better, Cell, Metric, Row, cell_text};
use crate::io::png;
use crate::report::chart::{Chart, Style};
use crate::report::pictures::shrunk;
use crate::report::{STYLE, escape};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::fmt::Write;

/// Thumbnails have at most this side, and a page at most this many rows of them.
const MAX_SIDE: u32 = 256;
const MAX_ROWS: usize = 40;

const OWN_STYLE: &str = "
.wide { overflow-x: auto; } .measures th, .measures td { white-space: nowrap; padding-right: 24px; }
.measures thead th { font-weight: 600; color: var(--ink); }
.measures td { font-variant-numeric: tabular-nums; } .measures td.best { font-weight: 600; }
.strip img { max-width: 256px; } .strip td { vertical-align: top; min-width: 140px; max-width: 264px; text-align: left; }
ul { padding-left: 20px; } li { overflow-wrap: anywhere; }
";

/// The page. `steps` are the steps of the columns where these are checkpoints of a run.
///
/// Errors: a picture that cannot be read.
pub fn page(title: &str, comparison: &Comparison, evaluation: &Evaluation, steps: &[(usize, u64)]) -> Result<String> {
    let title = escape(title);
    let sets = comparison.sets.iter().map(|s| format!("{} ({})", escape(&s.name), s.pictures.len()));
    // Writing to a String cannot fail.
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>{STYLE}{OWN_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p class=\"lead\">{}</p>\n",
        sets.collect::<Vec<_>>().join(" · "),
    );
    table(&mut out, evaluation);
    reasons(&mut out, evaluation);
    if steps.len() > 1 {
        charts(&mut out, comparison, evaluation, steps);
    }
    pictures(&mut out, comparison, evaluation)?;
    out.push_str("</body>\n</html>\n");
    Ok(out)
}

fn table(out: &mut String, evaluation: &Evaluation) {
    out.push_str("<h2>Measures</h2>\n<div class=\"wide\"><table class=\"measures\"><thead><tr><th></th>");
    for column in &evaluation.table.columns {
        let _ = write!(out, "<th>{}</th>", escape(column));
    }
    out.push_str("</tr></thead><tbody>\n");
    for row in &evaluation.table.rows {
        let arrow = match row.metric.better {
            Better::Higher => " ↑",
            Better::Lower => " ↓",
            Better::Neither => "",
        };
        let _ = write!(out, "<tr><th>{}{arrow}</th>", escape(&row.title()));
        let best = best(row);
        for (i, cell) in row.cells.iter().enumerate() {
            let class = match cell {
                Cell::Value(_) if best == Some(i) => " class=\"best\"",
                Cell::Value(_) => "",
                _ => " class=\"none\"",
            };
            let hint = match cell {
                Cell::Value(m) => format!("n = {}", m.n),
                Cell::NotMeasured(why) => why.clone(),
                Cell::Empty => String::new(),
            };
            let _ = write!(out, "<td{class} title=\"{}\">{}</td>", escape(&hint), cell_text(cell, row.metric.digits));
        }
        out.push_str("</tr>\n");
    }
    out.push_str(
        "</tbody></table></div>\n<p class=\"none\">± and [ ] are 95% intervals; ↑ and ↓ say which way is better.</p>\n",
    );
}

/// The best of several values, where one way is better.
fn best(row: &Row) -> Option<usize> {
    let sign = match row.metric.better {
        Better::Higher => 1.0,
        Better::Lower => -1.0,
        Better::Neither => return None,
    };
    let values: Vec<(usize, f64)> = row
        .cells
        .iter()
        .enumerate()
        .filter_map(|(i, cell)| match cell {
            Cell::Value(m) => Some((i, sign * m.value)),
            _ => None,
        })
        .collect();
    (values.len() > 1).then(|| values.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i))?
}

fn reasons(out: &mut String, evaluation: &Evaluation) {
    let reasons = evaluation.table.not_measured();
    if reasons.is_empty() && evaluation.table.notes.is_empty() {
        return;
    }
    out.push_str("<ul>\n");
    for (why, titles) in reasons {
        let _ =
            writeln!(out, "<li class=\"none\">Not measured: {} ({})</li>", escape(&titles.join(", ")), escape(&why));
    }
    for note in &evaluation.table.notes {
        let _ = writeln!(out, "<li>{}</li>", escape(note));
    }
    out.push_str("</ul>\n");
}

/// Measures over the steps of a run, with the base model as a level line.
fn charts(out: &mut String, comparison: &Comparison, evaluation: &Evaluation, steps: &[(usize, u64)]) {
    out.push_str("<h2>Over the run</h2>\n<section class=\"charts\">\n");
    let last = steps.iter().map(|s| s.1).max().unwrap_or(1) as f64;
    let shown = [FID, KID, CLIP_SCORE, CHINESE_CLIP_SCORE, LPIPS, DRIFT, BLEED, DIVERSITY, SHARPNESS, ANATOMY];
    for (number, row) in evaluation.table.rows.iter().enumerate() {
        let own_part = row.part.is_empty() || [FID, KID, BLEED].contains(&row.metric);
        if !shown.contains(&row.metric) || !own_part {
            continue;
        }
        let value = |i: usize| match &row.cells[i] {
            Cell::Value(m) => Some(m.value),
            _ => None,
        };
        let points: Vec<(f64, f64)> = steps.iter().filter_map(|&(i, step)| Some((step as f64, value(i)?))).collect();
        if points.is_empty() {
            continue;
        }
        let mut chart = Chart::new(&format!("chart-{number}"), &row.title());
        if let Some(base) = value(comparison.baseline) {
            chart = chart.with("base", Style::Faint, vec![(0.0, base), (last, base)]);
        }
        out.push_str(&chart.with("adapter", Style::Dots, points).svg(last, &[]));
    }
    out.push_str("</section>\n");
}

/// A row for each picture of the baseline that has partners, else one for each name.
fn pictures(out: &mut String, comparison: &Comparison, evaluation: &Evaluation) -> Result<()> {
    let mut keys: Vec<&Picture> = Vec::new();
    let order = [comparison.baseline].into_iter().chain(0..comparison.sets.len());
    for picture in order.flat_map(|i| &comparison.sets[i].pictures) {
        if !keys.iter().any(|k| k.key == picture.key) {
            keys.push(picture);
        }
    }
    let _ = writeln!(out, "<h2>Pictures</h2>");
    for first in spread(keys.len(), MAX_ROWS).into_iter().map(|i| keys[i]) {
        let prompt = first.prompt.as_deref().unwrap_or("");
        let part = first.part.map(Part::name).unwrap_or("");
        let _ = writeln!(
            out,
            "<p class=\"prompt\">{} <span class=\"none\">{} {part}</span></p>\n<div class=\"strip\"><table><tr>",
            escape(prompt),
            escape(&first.key)
        );
        for (set, values) in comparison.sets.iter().zip(&evaluation.pictures) {
            let Some(at) = set.pictures.iter().position(|p| p.key == first.key) else {
                let _ = writeln!(out, "<td>{}<br>no such picture</td>", escape(&set.name));
                continue;
            };
            let shown = [(CLIP_SCORE, "CLIP"), (CHINESE_CLIP_SCORE, "CLIP"), (SSIM_GAUSSIAN, "SSIM"), (LPIPS, "LPIPS")];
            let number =
                |(m, short): (Metric, &str)| Some(format!("<br>{short} {:.*}", m.digits, values[at].get(m.key)?));
            let caption: String = shown.into_iter().filter_map(number).collect();
            let name = escape(&set.name);
            let data = STANDARD.encode(png::encode(&shrunk(set.pictures[at].load()?, MAX_SIDE), &[])?);
            let _ = writeln!(out, "<td><img alt=\"{name}\" src=\"data:image/png;base64,{data}\">{name}{caption}</td>");
        }
        out.push_str("</tr></table></div>\n");
    }
    if keys.len() > MAX_ROWS {
        let _ = writeln!(out, "<p class=\"none\">{MAX_ROWS} of {} rows are shown.</p>", keys.len());
    }
    Ok(())
}

/// At most `max` of `0..n`, evenly spread, with the first and the last.
fn spread(n: usize, max: usize) -> Vec<usize> {
    if n <= max { (0..n).collect() } else { (0..max).map(|i| i * (n - 1) / (max - 1)).collect() }
}
