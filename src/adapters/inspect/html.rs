//! An inspection as one HTML page without any outside resource: a heat map of blocks and parts, tools, findings.

use super::text::list;
use super::{Inspection, Level, Strength, Verdict};
use crate::io::disk::human;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #667; --line: #d8dbe0; --paper: #fff; --heat: 214, 69, 27; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3af; --line: #3a3f46; --paper: #17191c; --heat: 255, 138, 76; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p, li { max-width: 60rem; } .soft { color: var(--soft); }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }
th { font-weight: 600; color: var(--soft); } tbody tr + tr td { border-top: 1px solid var(--line); }
.tools td:not(:last-child) { white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.ok { color: #1a7f37; } .bad { color: #c62828; } .mid { color: #9a6700; }
@media (prefers-color-scheme: dark) { .ok { color: #57c878; } .bad { color: #ff7b72; } .mid { color: #e3b341; } }
.scroll { overflow-x: auto; } .map { border-spacing: 2px; border-collapse: separate; }
.map th { font-weight: 400; font-size: .8rem; padding: 0 .3rem 0 0; white-space: nowrap; }
.map thead th { text-align: center; padding: 0; }
.map td { width: 1.15rem; min-width: .7rem; height: 1.15rem; padding: 0; border: 0 !important; border-radius: 2px; }
.none { background: repeating-linear-gradient(45deg, transparent 0 3px, var(--line) 3px 4px); }
.nan { background: #000; outline: 2px solid #c62828; }
.scale { display: inline-block; width: 12rem; height: .8rem; border-radius: 2px; vertical-align: middle;
  background: linear-gradient(90deg, rgba(var(--heat), .06), rgb(var(--heat))); }
";

/// The page.
pub fn page(inspection: &Inspection) -> String {
    let mut out = String::new();
    let i = inspection;
    let name = i.file.rsplit('/').next().unwrap_or(&i.file);
    let title = escape(name);
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{title}</title>\n<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    );
    let kinds = list(i.kinds.iter().map(|(kind, n)| format!("{n} × {kind}")));
    let facts = [
        ("Spelling", i.spelling.clone()),
        ("Modules", kinds),
        ("Parameters", format!("{} in {}, {}", i.params, list(&i.dtypes), human(i.bytes))),
        ("Alpha from", list(&i.alpha_from)),
    ];
    out.push_str("<table><tbody>\n");
    let trained = i.trained_on.iter().map(|(k, v)| (k.as_str(), v.clone()));
    for (key, value) in facts.into_iter().chain(trained) {
        let _ = writeln!(out, "<tr><th>{}</th><td>{}</td></tr>", escape(key), escape(&value));
    }
    out.push_str("</tbody></table>\n");
    findings(&mut out, i);
    if !i.kinds.is_empty() {
        heat_map(&mut out, &i.strength);
        tools(&mut out, i);
        groups(&mut out, i);
    }
    out.push_str("</body></html>\n");
    out
}

fn findings(out: &mut String, i: &Inspection) {
    out.push_str("<h2>Findings</h2>\n");
    if i.lints.is_empty() {
        out.push_str("<p class=\"ok\">Nothing to complain about.</p>\n");
        return;
    }
    out.push_str("<ul>\n");
    for (lint, left_out) in i.shown_lints() {
        let (class, word) = match lint.level {
            Level::Error => ("bad", "error"),
            Level::Warning => ("mid", "warning"),
        };
        let _ = writeln!(
            out,
            "<li><b class=\"{class}\">{word}</b> {} <span class=\"soft\">[{}]</span></li>",
            escape(&lint.text),
            lint.code
        );
        if left_out > 0 {
            let _ = writeln!(out, "<li class=\"soft\">and {left_out} more of this kind</li>");
        }
    }
    out.push_str("</ul>\n");
}

fn tools(out: &mut String, i: &Inspection) {
    out.push_str(
        "<h2>Who loads it</h2>\n<table class=\"tools\"><thead><tr><th>tool</th><th>verdict</th><th>strength</th><th></th></tr></thead><tbody>\n",
    );
    for p in &i.tools {
        let class = match p.verdict {
            Verdict::Loads if p.is_right() => "ok",
            Verdict::Fails | Verdict::Nothing => "bad",
            _ => "mid",
        };
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td class=\"{class}\">{}</td><td>{}</td><td class=\"soft\">{}</td></tr>",
            p.tool,
            p.verdict.text(),
            p.strength_text(),
            escape(&p.note)
        );
    }
    out.push_str("</tbody></table>\n");
}

fn groups(out: &mut String, i: &Inspection) {
    out.push_str("<h2>Ranks</h2>\n<table><thead><tr><th>group</th><th class=\"n\">modules</th><th class=\"n\">rank</th><th class=\"n\">alpha</th><th class=\"n\">scale</th></tr></thead><tbody>\n");
    for g in &i.groups {
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            escape(&g.name),
            g.modules,
            list(&g.ranks),
            list(&g.alphas),
            list(&g.scales)
        );
    }
    out.push_str("</tbody></table>\n");
}

/// Rows are parts of a block, columns are blocks; modules outside the blocks have a row of their own.
fn heat_map(out: &mut String, strengths: &[Strength]) {
    if strengths.is_empty() {
        return;
    }
    let relative = strengths.iter().all(|s| s.relative.is_some());
    let value = |s: &Strength| s.relative.unwrap_or(s.norm);
    let most = strengths.iter().map(value).filter(|v| v.is_finite()).fold(0.0, f64::max);
    let blocks: BTreeSet<usize> = strengths.iter().filter_map(|s| s.block).collect();
    let last = blocks.last().copied().unwrap_or(0);
    let mut rows: BTreeMap<(bool, &str), BTreeMap<usize, &Strength>> = BTreeMap::new();
    for s in strengths {
        rows.entry((s.block.is_none(), &s.part)).or_default().insert(s.block.unwrap_or(0), s);
    }
    let what = if relative { "norm of the change over the norm of the base weight" } else { "norm of the change" };
    let _ = writeln!(
        out,
        "<h2>Where it acts</h2>\n<p class=\"soft\">Each square is one module: {what}. 0 <span class=\"scale\"></span> {most:.4}. \
         Hatched: not adapted. Point at a square for its value.</p>\n<div class=\"scroll\"><table class=\"map\"><thead><tr><th></th>"
    );
    for block in 0..=last {
        let label = if block % 5 == 0 || block == last { block.to_string() } else { String::new() };
        let _ = write!(out, "<th>{label}</th>");
    }
    out.push_str("</tr></thead><tbody>\n");
    for ((outside, part), cells) in &rows {
        let _ = write!(out, "<tr><th>{}</th>", escape(part));
        let columns = if *outside { 0..=0 } else { 0..=last };
        for block in columns {
            match cells.get(&block) {
                None => {
                    let _ =
                        write!(out, "<td class=\"none\" title=\"block {block} {}: not adapted\"></td>", escape(part));
                }
                Some(s) if !value(s).is_finite() => {
                    let _ = write!(out, "<td class=\"nan\" title=\"{}: NaN or infinite\"></td>", escape(&s.module));
                }
                Some(s) => {
                    let share = if most > 0.0 { value(s) / most } else { 0.0 };
                    let alpha = 0.06 + 0.94 * share;
                    let _ = write!(
                        out,
                        "<td style=\"background:rgba(var(--heat),{alpha:.3})\" title=\"{}: {:.5}\"></td>",
                        escape(&s.module),
                        value(s)
                    );
                }
            }
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
