//! The file that a merge writes: windows of it, filled by the computing threads in any order, go to the disk from
//! threads that do nothing but wait for it.
//!
//! Where the system can, the disk reads the windows themselves (direct I/O): copying them into the page cache would cost
//! half as much time again as the arithmetic, one writer at a time, and push out what is cached, such as the base.

use crate::error::{Error, Result};
use parking_lot::Mutex;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

/// Bytes of a window: large enough that the disk is not asked too often, small enough for the caches.
pub const WINDOW_BYTES: usize = 2 << 20;
/// What offsets, lengths and addresses of direct I/O are multiples of; no disk in use asks for more.
const ALIGNMENT: usize = 4096;
/// Windows that are on their way to the disk together.
const WRITERS: usize = 4;

/// The memory of one window.
pub struct Window {
    bytes: Vec<u8>,
    start: usize,
}

impl Window {
    fn new() -> Self {
        let bytes = vec![0; WINDOW_BYTES + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Self { bytes, start }
    }

    /// Its first `len` bytes, at an aligned address.
    pub fn bytes_mut(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + len]
    }
}

/// Where filled windows go, and empty ones come from.
pub struct Windows<'a> {
    empty: Mutex<Receiver<Window>>,
    filled: Sender<(Window, usize, usize)>,
    failed: &'a AtomicBool,
}

impl Windows<'_> {
    /// An empty window; waits for the disk if it lags. `None` if writing has failed.
    pub fn take(&self) -> Option<Window> {
        let window = self.empty.lock().recv().ok();
        window.filter(|_| !self.failed.load(Ordering::Relaxed))
    }

    /// Hands in the first `len` bytes of a window, which belong at `offset`, a multiple of [`WINDOW_BYTES`].
    pub fn put(&self, window: Window, offset: usize, len: usize) {
        // The writers end only after this sender is gone.
        let _ = self.filled.send((window, offset, len));
    }
}

/// Creates `path`, which must not exist yet, lets `fill` make its `len` bytes in windows, and syncs it. `progress` hears
/// of bytes written, from any thread.
///
/// Errors: what `fill` gives; no room, or a disk that fails.
pub fn write_windows(
    path: &Path,
    len: usize,
    progress: &(dyn Fn(usize) + Sync),
    fill: impl FnOnce(&Windows) -> Result<()>,
) -> Result<()> {
    let out = Output::create(path, len)?;
    let failed = AtomicBool::new(false);
    let failure = Mutex::new(None);
    let (filled, to_write) = channel::<(Window, usize, usize)>();
    let (written, empty) = channel();
    for _ in 0..rayon::current_num_threads() + 2 * WRITERS {
        written.send(Window::new()).expect("the receiver is in this function");
    }
    let to_write = Mutex::new(to_write);
    std::thread::scope(|scope| {
        for _ in 0..WRITERS {
            let written = written.clone();
            scope.spawn(|| {
                let written = written;
                loop {
                    let next = to_write.lock().recv();
                    let Ok((mut window, offset, len)) = next else { return };
                    if !failed.load(Ordering::Relaxed) {
                        match out.write(&mut window, offset, len) {
                            Ok(()) => progress(len),
                            Err(error) => {
                                failure.lock().get_or_insert(error);
                                failed.store(true, Ordering::Relaxed);
                            }
                        }
                    }
                    // At the end nobody waits for empty windows any more; what is filled must still be written.
                    let _ = written.send(window);
                }
            });
        }
        // The writers end when this, the only sender, is dropped.
        fill(&Windows { empty: Mutex::new(empty), filled, failed: &failed })
    })?;
    match failure.into_inner() {
        Some(error) => Err(error),
        None => out.finish(len),
    }
}

/// The output file.
struct Output<'a> {
    file: File,
    path: &'a Path,
    direct: AtomicBool,
}

impl<'a> Output<'a> {
    /// The file at its full length, as far as the system can reserve it.
    fn create(path: &'a Path, len: usize) -> Result<Self> {
        let file = File::create_new(path).map_err(|e| Error::io("create", path, e))?;
        let out = Self { file, path, direct: AtomicBool::new(false) };
        #[cfg(target_os = "linux")]
        {
            use std::os::fd::AsRawFd;
            let fd = out.file.as_raw_fd();
            // SAFETY: a plain system call on an open descriptor.
            let reserved = unsafe { libc::fallocate(fd, 0, 0, len.next_multiple_of(ALIGNMENT) as i64) };
            let error = std::io::Error::last_os_error();
            if reserved != 0 && error.raw_os_error() == Some(libc::ENOSPC) {
                return Err(Error::io("reserve the room for", path, error));
            }
            // A file system that cannot reserve grows the file as it is written.
            out.direct.store(set_direct(fd, true), Ordering::Relaxed);
        }
        Ok(out)
    }

    fn write(&self, window: &mut Window, offset: usize, len: usize) -> Result<()> {
        // The last window is filled up with zeros, which `finish` cuts off.
        let padded = len.next_multiple_of(ALIGNMENT);
        window.bytes_mut(padded)[len..].fill(0);
        let bytes = window.bytes_mut(padded);
        let direct = self.direct.load(Ordering::Relaxed);
        let mut outcome = self.file.write_all_at(bytes, offset as u64);
        #[cfg(target_os = "linux")]
        if direct && outcome.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)) {
            // Some file systems refuse direct I/O only when it comes.
            use std::os::fd::AsRawFd;
            set_direct(self.file.as_raw_fd(), false);
            self.direct.store(false, Ordering::Relaxed);
            outcome = self.file.write_all_at(bytes, offset as u64);
        }
        outcome.map_err(|e| Error::io("write", self.path, e))?;
        if !direct {
            self.start_writeback(offset, padded);
        }
        Ok(())
    }

    /// Lets the disk begin on what lies in the page cache, so that the final sync finds little left to do.
    fn start_writeback(&self, offset: usize, len: usize) {
        #[cfg(target_os = "linux")]
        {
            use std::os::fd::AsRawFd;
            // SAFETY: a plain system call on an open descriptor. Its failure loses nothing: sync_all follows.
            unsafe {
                libc::sync_file_range(self.file.as_raw_fd(), offset as i64, len as i64, libc::SYNC_FILE_RANGE_WRITE)
            };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (offset, len);
    }

    fn finish(self, len: usize) -> Result<()> {
        let cut = self.file.set_len(len as u64);
        cut.and_then(|()| self.file.sync_all()).map_err(|e| Error::io("write", self.path, e))
    }
}

/// Turns direct I/O on or off; whether that could be done.
#[cfg(target_os = "linux")]
fn set_direct(fd: std::os::fd::RawFd, on: bool) -> bool {
    // SAFETY: plain system calls on an open descriptor.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        let wanted = if on { flags | libc::O_DIRECT } else { flags & !libc::O_DIRECT };
        flags >= 0 && libc::fcntl(fd, libc::F_SETFL, wanted) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The byte at `i` of the test's file: no two windows are alike.
    fn byte(i: usize) -> u8 {
        ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    fn write(path: &Path, len: usize) -> Result<()> {
        write_windows(path, len, &|_| (), |windows| {
            // Last window first: any order will do.
            for offset in (0..len).step_by(WINDOW_BYTES).collect::<Vec<_>>().into_iter().rev() {
                let mut window = windows.take().expect("writing goes on");
                let len = WINDOW_BYTES.min(len - offset);
                window.bytes_mut(len).iter_mut().enumerate().for_each(|(i, b)| *b = byte(offset + i));
                windows.put(window, offset, len);
            }
            Ok(())
        })
    }

    #[test]
    fn windows_of_any_length_make_the_file() {
        let dir = tempfile::tempdir().unwrap();
        // Memory-backed file systems may refuse direct I/O: then the fallback is what is tested.
        let mut folders = vec![dir.path().to_path_buf()];
        let shared = tempfile::tempdir_in("/dev/shm").ok();
        folders.extend(shared.iter().map(|d| d.path().to_path_buf()));
        for folder in folders {
            for len in [1, ALIGNMENT, WINDOW_BYTES - 1, WINDOW_BYTES, 20 * WINDOW_BYTES + 4097] {
                let path = folder.join(format!("{len}"));
                write(&path, len).unwrap();
                let got = std::fs::read(&path).unwrap();
                assert!(got.len() == len && got.iter().enumerate().all(|(i, b)| *b == byte(i)), "{len}");
                assert!(write(&path, len).unwrap_err().to_string().contains("create"), "nothing is overwritten");
            }
        }
    }

    #[test]
    fn a_failure_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let failed = write_windows(&path, 10, &|_| (), |_| Err(Error::run("no values")));
        assert!(failed.unwrap_err().to_string().contains("no values"));
        // A file that cannot be written to: every window comes back, and the first error is told.
        let out = File::open(&path).unwrap();
        let out = Output { file: out, path: &path, direct: AtomicBool::new(false) };
        assert!(out.write(&mut Window::new(), 0, 10).unwrap_err().to_string().contains("cannot write"));
    }
}
