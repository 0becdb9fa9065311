//! GPU kernels compiled ahead of time from `scripts/kernels/`: what there is, and how each one is launched.
//!
//! The list of kernels and what was tested where is in `docs/kernels.md`.

#[cfg(feature = "cuda")]
pub(super) mod attention;
#[cfg(feature = "cuda")]
pub(super) mod blas;
#[cfg(feature = "cuda")]
mod gpu;
mod grid;
#[cfg(feature = "cuda")]
mod launch;
pub mod manifest;
#[cfg(feature = "cuda")]
pub mod multi_tensor;
#[cfg(feature = "cuda")]
pub(super) mod ops;
#[cfg(feature = "cuda")]
pub(super) mod swap;
#[cfg(test)]
mod twins;

#[cfg(feature = "cuda")]
pub use gpu::Gpu;
#[cfg(feature = "cuda")]
pub use launch::launches;

#[cfg(feature = "cuda")]
#[path = "cubin/files.rs"]
mod files;

/// The bytes of a compiled kernel that the manifest names.
#[cfg(feature = "cuda")]
pub fn file(name: &str) -> Option<&'static [u8]> {
    files::FILES.iter().find(|(file, _)| *file == name).map(|(_, bytes)| *bytes)
}
