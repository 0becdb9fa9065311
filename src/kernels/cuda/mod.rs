//! GPU kernels compiled ahead of time from `scripts/kernels/`: what there is, and how each one is launched.
//!
//! The list of kernels and what was tested where is in `docs/kernels.md`.

mod grid;
pub mod manifest;

#[cfg(feature = "cuda")]
#[path = "cubin/files.rs"]
mod files;

/// The bytes of a compiled kernel that the manifest names.
#[cfg(feature = "cuda")]
pub fn file(name: &str) -> Option<&'static [u8]> {
    files::FILES.iter().find(|(file, _)| *file == name).map(|(_, bytes)| *bytes)
}
