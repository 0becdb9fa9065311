//! `report.html`: one page about one run that needs nothing but itself. Curves, pictures, facts and the config.
//!
//! The page is made anew from the files of the run directory each time, so that it is whole after a resumption too.

mod chart;
mod curves;
mod pictures;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::io::write_atomic;
use crate::train::run_dir::RunDir;
use crate::train::stages::Course;
use chart::{Chart, Style};
use curves::Curves;
use std::fmt::Write as _;
use std::io::Write as _;

/// Writes the page of one run.
pub struct Page {
    dir: RunDir,
    config: Config,
    facts: Vec<(&'static str, String)>,
    course: Course,
}

impl Page {
    /// For the run in `dir`; `facts` are what is known of data set and network.
    pub fn new(config: &Config, dir: &RunDir, facts: Vec<(&'static str, String)>, course: &Course) -> Self {
        Self { dir: dir.clone(), config: config.clone(), facts, course: course.clone() }
    }

    /// Writes the page after `step` steps, atomically. Gives a note if that fails: a run does not end for its report.
    pub fn write(&self, step: u64) -> Option<String> {
        self.try_write(step).err().map(|e| format!("no report: {e}"))
    }

    fn try_write(&self, step: u64) -> Result<()> {
        let path = self.dir.metrics();
        let metrics = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        let page = self.html(step, &Curves::parse(&metrics));
        write_atomic(&self.dir.report(), |file| file.write_all(page.as_bytes()))
    }

    fn html(&self, step: u64, curves: &Curves) -> String {
        let name = self.dir.root().file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let name = escape(&name);
        let max_steps = self.config.training.max_steps;
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>{name}: step {step} of {max_steps}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
             <h1>{name}</h1>\n<p class=\"lead\">{} · step {step} of {max_steps}{}</p>\n",
            escape(&self.config.model.path),
            summary(curves),
        );
        page.push_str("<section class=\"charts\">\n");
        let stages: Vec<(f64, &str)> = self.course.named().map(|(name, s)| (s.steps.start as f64, name)).collect();
        self.charts(curves).iter().for_each(|chart| page.push_str(&chart.svg(max_steps as f64, &stages)));
        page.push_str("</section>\n");
        self.stages(step, &mut page);
        page.push_str(&pictures::section(&self.dir, &self.config.preview));
        page.push_str("<h2>Data and network</h2>\n<table>\n");
        for (what, value) in &self.facts {
            let _ = writeln!(page, "<tr><th>{what}</th><td>{}</td></tr>", escape(value));
        }
        page.push_str("</table>\n<h2>Config</h2>\n<pre>");
        page.push_str(&escape(&self.config.to_yaml()));
        page.push_str("</pre>\n</body>\n</html>\n");
        page
    }

    /// The stages, with a mark at the one that the run is in.
    fn stages(&self, step: u64, page: &mut String) {
        if self.course.named().next().is_none() {
            return;
        }
        page.push_str("<h2>Stages</h2>\n<table>\n");
        for (name, stage) in self.course.named() {
            let state = match step {
                _ if step >= stage.steps.end => "done",
                _ if step >= stage.steps.start => "running",
                _ => "to come",
            };
            let about = escape(&stage.description());
            let _ = writeln!(page, "<tr><th>{}</th><td>{about}</td><td>{state}</td></tr>", escape(name));
        }
        page.push_str("</table>\n");
    }

    fn charts(&self, curves: &Curves) -> Vec<Chart> {
        let mut charts = vec![
            Chart::new("loss", "Loss").with("each step", Style::Faint, curves.loss.clone()).with(
                "smoothed",
                Style::Line,
                curves::smoothed(&curves.loss),
            ),
            Chart::new("held-out", "Held-out loss").with("held-out loss", Style::Dots, curves.held_out.clone()),
            Chart::new("learning-rate", "Learning rate").with("learning rate", Style::Line, curves.lr.clone()),
            Chart::new("speed", "Seconds per step").with("each step", Style::Faint, curves.step_s.clone()).with(
                "smoothed",
                Style::Line,
                curves::smoothed(&curves.step_s),
            ),
        ];
        for (id, title, curve) in [("pose", "Pose term", &curves.pose), ("count", "Count term", &curves.count)] {
            if !curve.is_empty() {
                let chart = Chart::new(id, title).with("where it acted", Style::Faint, curve.clone());
                charts.push(chart.with("smoothed", Style::Line, curves::smoothed(curve)));
            }
        }
        charts
    }
}

/// The held-out loss so far, and the speed, in words.
fn summary(curves: &Curves) -> String {
    let mut text = String::new();
    if let (Some(first), Some(last)) = (curves.held_out.first(), curves.held_out.last()) {
        let _ = write!(text, " · held-out loss {:.4} → {:.4}", first.1, last.1);
    }
    if let (fired, samples @ 1..) = curves.fired {
        let _ = write!(text, " · pose term on {:.0} % of the samples", 100.0 * fired as f64 / samples as f64);
    }
    if let Some((_, seconds)) = curves::smoothed(curves.step_s.get(1..).unwrap_or_default()).last() {
        let _ = write!(text, " · {seconds:.2} s a step");
    }
    text
}

/// Text as it is written in HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667080; --line: #d5dae1; --paper: #ffffff; --panel: #f6f7f9;
  --curve: #1f6feb; --faint: #9ec1f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #98a2b0; --line: #39414c; --paper: #14171b;
  --panel: #1c2127; --curve: #6ea8ff; --faint: #34547f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1200px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 32px 0 8px; }
.lead { color: var(--soft); margin: 4px 0 20px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
figcaption { font-weight: 600; display: flex; gap: 16px; align-items: baseline; flex-wrap: wrap; }
.key { font-weight: 400; font-size: 13px; color: var(--soft); }
.key::before { content: ''; display: inline-block; width: 14px; height: 3px; margin: 0 5px 3px 0; background: var(--curve); }
.key.faint::before { background: var(--faint); }
svg { width: 100%; height: auto; display: block; margin-top: 6px; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); } .stage { stroke: var(--soft); stroke-dasharray: 3 3; } .line, .dots { fill: none; stroke: var(--curve); stroke-width: 2; stroke-linejoin: round; }
.faint { fill: none; stroke: var(--faint); stroke-width: 1; } circle { fill: var(--curve); }
.none { color: var(--soft); }
.strip { overflow-x: auto; margin: 4px 0 16px; }
.strip table { width: auto; } .strip td { border: 0; padding: 2px; text-align: center; font-size: 13px; color: var(--soft); }
.strip img { display: block; max-width: 192px; height: auto; border-radius: 4px; }
.prompt { margin: 12px 0 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: 4px 12px 4px 0; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; } th { font-weight: 400; color: var(--soft); width: 14em; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto;
  font-size: 13px; }
";
