//! What a user sees of a run while it goes on: lines and progress bars on standard error, bars only where that is a
//! terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use std::fmt::Display;
use std::io::Write;

/// A line on standard error. Unlike `eprintln!` it does not panic when nobody listens any more
/// (`qwen-lora train ... 2>&1 | head`): the run goes on.
pub fn tell(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A bar over `total` things: label, bar, count, rate, time left. Hidden when `quiet`.
pub fn bar(total: usize, label: &str, quiet: bool) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} [{wide_bar}] {human_pos}/{human_len}  {rate}  ETA {eta}")
        .expect("the template is well-formed")
        .with_key("rate", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            // Writing into a string does not fail.
            let _ = write!(out, "{:.1}/s", state.per_sec());
        })
        .progress_chars("=> ");
    let bar = ProgressBar::new(total as u64).with_prefix(label.to_string()).with_style(style);
    if quiet {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}

/// A bar over `total` bytes: label, bar, bytes, rate, time left. Hidden when `quiet`.
pub fn bytes_bar(total: u64, label: &str, quiet: bool) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix} [{wide_bar}] {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  ETA {eta}",
    )
    .expect("the template is well-formed")
    .progress_chars("=> ");
    let bar = ProgressBar::new(total).with_prefix(label.to_string()).with_style(style);
    if quiet {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}
