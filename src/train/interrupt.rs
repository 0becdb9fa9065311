//! Ctrl+C: the first asks the run to save and stop after the step, the second ends the process at once.

use crate::error::{Error, Result};
use crate::progress::say;
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Installs the handler for SIGINT, SIGTERM and SIGHUP. Once per process.
pub fn install() -> Result<()> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        say("\nstopping after this step and saving; press Ctrl+C again to stop without saving");
    })
    .map_err(|e| Error::run("cannot listen for Ctrl+C").detail(e.to_string()))
}

/// Whether the user has asked to stop.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
