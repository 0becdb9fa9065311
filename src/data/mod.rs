//! Captioned images on disk, aspect-ratio buckets, the order of training, and batches. Knows nothing of models.

pub mod batch;
pub mod bucket;
pub mod dataset;
pub mod files;
pub mod filter;
pub mod image;
pub mod loader;
pub mod mask;
pub mod place;
pub mod plan;
pub mod resample;
pub mod select;

pub use batch::{Batch, Example, collate};
pub use bucket::{Bucket, Buckets};
pub use dataset::{Dataset, Item, Mask};
pub use filter::{Counts, LeftOut};
pub use image::Size;
pub use loader::Loader;
pub use place::Sample;
pub use plan::{Plan, PlanSettings, PlannedBatch, PlannedItem};
pub use select::Selection;
