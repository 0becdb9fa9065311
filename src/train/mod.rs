//! Training: what is trained, one step, the run.

pub mod ahead;
pub mod batches;
pub mod bench;
pub mod checkpoint;
pub mod held_out;
pub mod interrupt;
pub mod memory;
pub mod metrics;
pub mod outcome;
pub mod people;
pub mod prepare;
pub mod preview;
pub mod progress;
pub mod record;
pub mod regions;
pub mod run;
pub mod run_dir;
pub mod save;
pub mod setup;
pub mod stages;
pub mod start;
pub mod step;
pub mod structured;
pub mod structured_setup;
pub mod trainable;
