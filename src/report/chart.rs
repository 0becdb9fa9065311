//! A line chart as inline SVG.

use super::curves::thinned;
use super::escape;
use std::fmt::Write;

/// How a series is drawn.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Style {
    /// Thin and pale, behind the others; may leave the chart where it is wild.
    Faint,
    /// A line.
    Line,
    /// A line with a dot at each point.
    Dots,
}

/// Points (step, value) under one name.
struct Series {
    name: &'static str,
    style: Style,
    points: Vec<(f64, f64)>,
}

/// A chart over the steps of the run.
pub(super) struct Chart {
    id: &'static str,
    title: &'static str,
    series: Vec<Series>,
}

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 26.0;

/// More points than this do not show at the chart's width.
const MAX_POINTS: usize = 1000;

impl Chart {
    /// An empty chart; `id` names its element.
    pub fn new(id: &'static str, title: &'static str) -> Self {
        Self { id, title, series: Vec::new() }
    }

    /// Adds a series of (step, value).
    pub fn with(mut self, name: &'static str, style: Style, points: Vec<(f64, f64)>) -> Self {
        self.series.push(Series { name, style, points });
        self
    }

    /// The chart as a `figure`, its x axis from 0 to `max_step`, with a dashed line where each of the `stages` begins.
    pub fn svg(&self, max_step: f64, stages: &[(f64, &str)]) -> String {
        let mut out = format!("<figure id=\"{}\">\n<figcaption>{}", self.id, escape(self.title));
        if self.series.len() > 1 {
            for Series { name, style, .. } in &self.series {
                let class = if *style == Style::Faint { "key faint" } else { "key" };
                let _ = write!(out, "<span class=\"{class}\">{name}</span>");
            }
        }
        out.push_str("</figcaption>\n");
        let Some((low, high)) = self.range() else {
            out.push_str("<p class=\"none\">nothing was measured</p>\n</figure>\n");
            return out;
        };
        let ticks = ticks(low, high, 5);
        let (low, high) = (low.min(ticks[0]), high.max(ticks[ticks.len() - 1]));
        let x = |step: f64| LEFT + step / max_step.max(1.0) * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);
        let _ = writeln!(
            out,
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{0}\">\n\
             <clipPath id=\"{1}-clip\"><rect x=\"{LEFT}\" y=\"{2}\" width=\"{3}\" height=\"{4}\"/></clipPath>",
            escape(self.title),
            self.id,
            TOP - 4.0,
            WIDTH - LEFT - RIGHT + 4.0,
            HEIGHT - TOP - BOTTOM + 8.0,
        );
        let step = if ticks.len() > 1 { ticks[1] - ticks[0] } else { 1.0 };
        let end = WIDTH - RIGHT;
        for &tick in &ticks {
            let (height, left, base, label) = (y(tick), LEFT - 6.0, y(tick) + 4.0, number(tick, step));
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{end}\" y1=\"{height:.1}\" y2=\"{height:.1}\"/>\
                 <text x=\"{left}\" y=\"{base:.1}\" text-anchor=\"end\">{label}</text>"
            );
        }
        for tick in self::ticks(0.0, max_step, 6).into_iter().filter(|&t| (0.0..=max_step).contains(&t)) {
            // A label at the very end would be cut off.
            let anchor = if x(tick) > WIDTH - RIGHT - 20.0 { "end" } else { "middle" };
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
                x(tick),
                HEIGHT - 8.0,
                tick.round()
            );
        }
        for &(start, name) in stages {
            let (at, bottom, label) = (x(start), HEIGHT - BOTTOM, x(start) + 4.0);
            let _ = writeln!(
                out,
                "<line class=\"stage\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/>\
                 <text x=\"{label:.1}\" y=\"{}\">{}</text>",
                TOP + 10.0,
                escape(name)
            );
        }
        for Series { name, style, points } in &self.series {
            let class = match style {
                Style::Faint => "faint",
                Style::Line => "line",
                Style::Dots => "dots",
            };
            let points = thinned(points, MAX_POINTS);
            let mut path = String::new();
            for (i, &(step, value)) in points.iter().enumerate() {
                let _ = write!(path, "{}{:.1} {:.1}", if i == 0 { "M" } else { "L" }, x(step), y(value));
            }
            let _ = writeln!(
                out,
                "<path class=\"{class}\" clip-path=\"url(#{}-clip)\" d=\"{path}\"><title>{name}</title></path>",
                self.id
            );
            // Many dots are a worm.
            if *style == Style::Dots && points.len() <= 60 {
                for &(step, value) in &points {
                    let _ = writeln!(
                        out,
                        "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>step {step}: {value:.5}</title></circle>",
                        x(step),
                        y(value)
                    );
                }
            }
        }
        out.push_str("</svg>\n</figure>\n");
        out
    }

    /// Lowest and highest value to show: of pale series, which jump about, without the wildest 2% at either end.
    fn range(&self) -> Option<(f64, f64)> {
        let mut shown: Vec<f64> = Vec::new();
        for Series { style, points, .. } in &self.series {
            let mut values: Vec<f64> = points.iter().map(|p| p.1).collect();
            values.sort_by(f64::total_cmp);
            let cut = if *style == Style::Faint { values.len() / 50 } else { 0 };
            shown.extend(&values[cut..values.len() - cut]);
        }
        let low = shown.iter().copied().min_by(f64::total_cmp)?;
        let high = shown.iter().copied().max_by(f64::total_cmp)?;
        // A flat line lies in the middle.
        let pad = if high > low { 0.0 } else { (low.abs() * 0.1).max(1e-12) };
        Some((low - pad, high + pad))
    }
}

/// Round numbers that cover the range, about `count` of them.
fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let raw = ((high - low) / count as f64).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|&s| s >= raw * 0.999).unwrap_or(raw);
    let (first, last) = ((low / step).floor(), (high / step).ceil());
    (0..=(last - first) as usize).map(|i| (first + i as f64) * step).collect()
}

/// A tick's label: as many digits as the distance between ticks needs, in powers of ten where those get long.
fn number(value: f64, step: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    if decimals > 4 || value.abs() >= 1e6 {
        let text = format!("{value:.1e}");
        return text.replace(".0e", "e");
    }
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks(0.0, 120.0, 6), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0, 120.0]);
        let fine = ticks(0.113, 0.158, 5);
        assert!(fine[0] <= 0.113 && *fine.last().unwrap() >= 0.158 && fine.len() <= 8);
        assert_eq!(fine.iter().map(|&t| number(t, 0.01)).collect::<Vec<_>>()[0], "0.11");
        assert_eq!(number(2e-6, 1e-6), "2e-6");
    }

    #[test]
    fn an_empty_chart_says_so_and_one_point_is_drawn() {
        let chart = || Chart::new("loss", "Loss");
        assert!(chart().with("a", Style::Line, Vec::new()).svg(10.0, &[]).contains("nothing was measured"));
        let svg = chart().with("a", Style::Dots, vec![(5.0, 1.0)]).svg(10.0, &[]);
        assert!(svg.contains("<circle") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let svg = chart().with("a", Style::Dots, vec![(5.0, 1.0)]).svg(10.0, &[(0.0, "one"), (5.0, "t<o")]);
        assert!(svg.matches("class=\"stage\"").count() == 2 && svg.contains(">t&lt;o</text>"), "{svg}");
    }
}
