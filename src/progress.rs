//! The look of progress bars. They show on standard error, and only where that is a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::Display;
use std::io::Write;

/// Writes a line to standard error. Unlike with `eprintln!` it is no panic if nobody can read it: a run whose terminal
/// has gone must still save.
pub fn say(line: impl Display) {
    // There is nobody left to tell.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A bar over `total` things: label, bar, count, rate, time left. Hidden when `quiet`.
pub fn bar(total: usize, label: &str, quiet: bool) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} [{wide_bar}] {human_pos}/{human_len}  {per_sec}  ETA {eta}")
        .expect("the template is well-formed")
        .progress_chars("=> ");
    let bar = ProgressBar::new(total as u64).with_prefix(label.to_string()).with_style(style);
    if quiet {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}
