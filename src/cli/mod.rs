//! The command line: one file per verb, no tensor code.

pub mod synth;
pub mod verify;
