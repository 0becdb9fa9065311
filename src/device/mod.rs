//! The device that a verb computes on: chosen, opened and described.

pub mod memory;

use crate::config::DeviceChoice;
use crate::error::{Error, Result};
use candle_core::Device;

/// A device, and what a person should know of it.
pub struct Compute {
    /// The device.
    pub device: Device,
    /// Which GPU is used and how much of it is free, or why none is.
    pub notes: Vec<String>,
}

/// Opens the device of the choice. `auto` is the first GPU if this build can use one and there is one, else the CPU.
///
/// Errors (usage): a GPU is asked for by name and the build has no CUDA, or there is no such GPU.
pub fn open(choice: DeviceChoice) -> Result<Compute> {
    let cpu = |notes| Compute { device: Device::Cpu, notes };
    match choice {
        DeviceChoice::Cpu => Ok(cpu(Vec::new())),
        DeviceChoice::Auto if cfg!(feature = "cuda") => Ok(open_gpu(0).unwrap_or_else(|error| {
            let why = error.to_string().lines().collect::<Vec<_>>().join(";");
            cpu(vec![format!("no GPU is used ({why}): computing on the CPU")])
        })),
        DeviceChoice::Auto => Ok(cpu(Vec::new())),
        DeviceChoice::Cuda(ordinal) => open_gpu(ordinal),
    }
}

/// The error of a build that knows no GPUs.
pub fn no_cuda(choice: DeviceChoice) -> Error {
    Error::usage(format!("this build cannot compute on `device: {choice}`"))
        .detail("it was compiled without the feature `cuda`")
        .hint("build with `cargo build --release --features cuda`, or use `device: cpu` or `device: auto`")
}

#[cfg(not(feature = "cuda"))]
fn open_gpu(ordinal: usize) -> Result<Compute> {
    Err(no_cuda(DeviceChoice::Cuda(ordinal)))
}

#[cfg(feature = "cuda")]
fn open_gpu(ordinal: usize) -> Result<Compute> {
    let device = Device::new_cuda(ordinal).map_err(|e| {
        let text = e.to_string();
        Error::usage(format!("cannot use the GPU `cuda:{ordinal}`"))
            .detail(text.lines().next().unwrap_or_default().to_string())
            .hint("`nvidia-smi` lists the GPUs and the driver's version; `device: cpu` computes without")
    })?;
    let gpu = crate::kernels::cuda::Gpu::of(&device)?;
    gpu.keep_freed_memory()?;
    let mut notes = vec![format!("{}; it runs the transformer, the CPU text encoder and VAE", gpu.describe()?)];
    notes.extend(gpu.kernels_note());
    Ok(Compute { device, notes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_needs_no_words() {
        let compute = open(DeviceChoice::Cpu).unwrap();
        assert!(compute.device.is_cpu() && compute.notes.is_empty());
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_names_the_feature() {
        assert!(open(DeviceChoice::Auto).unwrap().device.is_cpu());
        let error = open(DeviceChoice::Cuda(1)).err().expect("there is no CUDA here");
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains("cuda:1") && text.contains("--features cuda"), "{text}");
    }
}
