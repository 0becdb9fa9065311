//! Captioned images on disk, aspect-ratio buckets, the order of training, and batches. Knows nothing of models.

pub mod image;
pub mod resample;
