//! How much memory a device has free, and the most that this process has held of it.

use crate::error::{Error, Result};
use candle_core::Device;

/// Free memory of the device in bytes: of a GPU, or of the machine.
///
/// Errors: the system does not tell.
pub fn free(device: &Device) -> Result<u64> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return Ok(crate::kernels::cuda::Gpu::of(device)?.memory()?.0 as u64);
    }
    debug_assert!(device.is_cpu());
    of_machine().ok_or_else(|| {
        Error::usage("the system does not tell how much memory is free")
            .hint("say how much a run may take: `--set training.memory=16GB`")
    })
}

/// What the machine can give without swapping, and a container is allowed.
#[cfg(target_os = "linux")]
fn of_machine() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let available = kilobytes(&meminfo, "MemAvailable:")?;
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // The limit and the use of the container, by version 2 and 1 of cgroups. No limit is a word in one and a huge number
    // in the other.
    let allowed = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ]
    .into_iter()
    .filter_map(|(limit, used)| Some(number(limit)?.saturating_sub(number(used)?)));
    Some(allowed.fold(available, u64::min))
}

/// All there is: other systems have no figure that means the same.
#[cfg(not(target_os = "linux"))]
fn of_machine() -> Option<u64> {
    // SAFETY: sysconf has no preconditions.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    Some(u64::try_from(pages).ok()? * u64::try_from(size).ok()?)
}

/// The bytes of a line `name   123 kB`.
#[cfg(target_os = "linux")]
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// The most memory that was held at once since the watch began.
pub struct Peak {
    #[cfg(feature = "cuda")]
    gpu: Option<crate::kernels::cuda::Gpu>,
}

impl Peak {
    /// Begins to watch tensors on a GPU, or the process on the CPU.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
    pub fn watch(device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let gpu = crate::kernels::cuda::Gpu::of(device)?;
            gpu.reset_peak()?;
            return Ok(Self { gpu: Some(gpu) });
        }
        forget_peak();
        Ok(Self {
            #[cfg(feature = "cuda")]
            gpu: None,
        })
    }

    /// The bytes; `None` where the system does not tell.
    pub fn bytes(&self) -> Result<Option<u64>> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            return Ok(Some(gpu.peak_bytes()?));
        }
        Ok(resident_peak())
    }
}

/// Lets the kernel begin a new peak of resident memory. Where it refuses, the peak remains that of the whole process.
#[cfg(target_os = "linux")]
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

#[cfg(target_os = "linux")]
fn resident_peak() -> Option<u64> {
    kilobytes(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

#[cfg(not(target_os = "linux"))]
fn forget_peak() {}

/// Only the peak of the whole process is known, in which filling the caches counts as well.
#[cfg(not(target_os = "linux"))]
fn resident_peak() -> Option<u64> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_free_memory_and_a_peak_is_seen_after_it_is_gone() {
        assert!(free(&Device::Cpu).unwrap() > 1 << 20);
        assert_eq!(kilobytes("MemTotal:  9 kB\nMemAvailable:   123 kB\n", "MemAvailable:"), Some(123 * 1024));
        let peak = Peak::watch(&Device::Cpu).unwrap();
        let before = peak.bytes().unwrap().unwrap();
        let held = std::hint::black_box(vec![1u8; 64 << 20]);
        drop(held);
        assert!(peak.bytes().unwrap().unwrap() >= before + (48 << 20));
    }
}
