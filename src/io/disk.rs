//! Free space, and sizes for people.

use std::path::Path;

/// Bytes that an unprivileged process may still write on the file system of `path`, or of its nearest ancestor that
/// exists. `None` where the system does not tell.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|p| p.exists())?;
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let name = if there.as_os_str().is_empty() { Path::new(".") } else { there };
        let name = std::ffi::CString::new(name.as_os_str().as_bytes()).ok()?;
        let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
        // SAFETY: `name` is a C string and `stat` has room for the answer, which is read only after success.
        let stat = unsafe {
            if libc::statvfs(name.as_ptr(), stat.as_mut_ptr()) != 0 {
                return None;
            }
            stat.assume_init()
        };
        // The fields have other widths on other systems.
        #[allow(clippy::unnecessary_cast)]
        Some((stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64))
    }
    #[cfg(not(unix))]
    {
        let _ = there;
        None
    }
}

/// A size as people write it: `12 bytes`, `1.5 MB`, `41 GB` (powers of ten).
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["bytes", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = usize::from(unit > 0 && value < 9.95);
    format!("{value:.decimals$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_into_the_right_unit() {
        let shown = [0, 999, 1500, 999_600, 40_860_000_000, u64::MAX].map(human);
        assert_eq!(shown, ["0 bytes", "999 bytes", "1.5 kB", "1.0 MB", "41 GB", "18 EB"]);
    }

    #[test]
    fn a_path_that_is_not_there_has_the_space_of_its_ancestor() {
        let dir = tempfile::tempdir().unwrap();
        let free = free_bytes(&dir.path().join("not/there/yet"));
        assert_eq!(free.is_some(), cfg!(unix));
        assert!(free.is_none_or(|f| f > 0));
    }
}
