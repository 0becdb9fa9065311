//! The look of progress bars. They show on standard error, and only where that is a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

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
