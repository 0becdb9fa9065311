
pub mod dataset;
pub mod files;
pub mod image;
pub mod resample;

pub use dataset::{Dataset, Item};
pub use image::Size;
