//! Fetching a list of files, a few at a time, each tried again when its connection is cut, and each checked.

use super::Listed;
use super::errors::Context;
use super::progress::{FileProgress, Tally};
use crate::error::{Error, Result};
use crate::io::disk;
use hf_hub::HFRepositorySync;
use hf_hub::progress::Progress;
use hf_hub::repository::RepoTypeModel;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Files fetched at once. A cut connection costs one file, so more would bring little; xet-backed files are fetched
/// in parallel pieces anyway.
const NUM_WORKERS: usize = 4;

/// Brings `files` of `commit` into the snapshot `folder`. Those already there with the listed size are left alone.
///
/// Errors: that of the first file that failed for good; the files under way then are finished first, so that the
/// next run need not fetch them again.
pub(super) fn fetch_files(
    hub: &HFRepositorySync<RepoTypeModel>,
    folder: &Path,
    commit: &str,
    files: &[Listed],
    context: &Context,
) -> Result<()> {
    let missing: Vec<&Listed> = files.iter().filter(|f| !has_size(&folder.join(&f.path), f.size)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let total = missing.iter().fold(0u64, |sum, f| sum.saturating_add(f.size));
    let tally = Tally::new(missing.len(), total, context.options.observer.clone());
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None::<Error>);
    std::thread::scope(|scope| {
        for _ in 0..NUM_WORKERS.min(missing.len()) {
            scope.spawn(|| {
                while let Some(file) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = fetch_file(hub, folder, commit, file, &tally, context) {
                        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        next.store(missing.len(), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn fetch_file(
    hub: &HFRepositorySync<RepoTypeModel>,
    folder: &Path,
    commit: &str,
    file: &Listed,
    tally: &Arc<Tally>,
    context: &Context,
) -> Result<()> {
    let place = folder.join(&file.path);
    // Something of another size at its place is left from a download that nobody checked. Files of equal content share
    // a blob: another worker may have brought it by now.
    let mut anew = place.exists() && !has_size(&place, file.size);
    let mut attempt = 1;
    loop {
        if anew {
            discard(&place)?;
        }
        let progress = Progress::new(FileProgress { tally: tally.clone(), size: file.size });
        let request = hub.download_file().filename(file.path.as_str()).revision(commit).progress(progress);
        let sent = request.force_download(anew).send();
        let failure = match sent {
            Ok(_) => match check_file(&place, file) {
                Ok(()) => {
                    tally.file_done(&file.path, file.size);
                    return Ok(());
                }
                Err(why) => {
                    discard(&place)?;
                    context.bad_content(&file.path, &why)
                }
            },
            Err(e) if errors_for_good(&e) => return Err(context.explain(&format!("download `{}` of", file.path), e)),
            Err(e) => context.explain(&format!("download `{}` of", file.path), e),
        };
        tally.file_lost(&file.path);
        if attempt >= context.options.attempts.max(1) {
            return Err(failure);
        }
        std::thread::sleep(context.options.retry_delay * (1 << (attempt - 1).min(8)));
        attempt += 1;
        anew = true;
    }
}

/// Whether trying again cannot help. hf-hub has itself repeated the requests that failed to begin.
fn errors_for_good(error: &hf_hub::HFError) -> bool {
    use hf_hub::HFError::{MalformedResponse, Request, Xet};
    match error {
        Request { source, .. } => source.is_connect(),
        Xet { .. } => false,
        MalformedResponse { .. } => false,
        _ => true,
    }
}

pub(super) fn has_size(path: &Path, size: u64) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == size)
}

/// Removes a file of the snapshot and the blob that it links to, if they are there.
fn discard(place: &Path) -> Result<()> {
    let remove = |path: &Path| match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    };
    if let Ok(blob) = std::fs::canonicalize(place) {
        remove(&blob)?;
    }
    remove(place)
}

/// Holds a fetched file against the listed size and, for files in large-file storage, against their SHA-256, which
/// is the name of the blob in the cache. Errors: what is wrong, in words.
fn check_file(place: &Path, file: &Listed) -> std::result::Result<(), String> {
    let length = std::fs::metadata(place).map_err(|e| e.to_string())?.len();
    if length != file.size {
        let expected = disk::human(file.size);
        return Err(format!("expected {expected} ({} bytes), received {length} bytes{}", file.size, quote(place)));
    }
    let Ok(blob) = std::fs::canonicalize(place) else { return Ok(()) };
    let name = blob.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if name.len() != 64 || !name.chars().all(|c| c.is_ascii_hexdigit()) {
        return Ok(());
    }
    let found = sha256(&blob).map_err(|e| e.to_string())?;
    if found.eq_ignore_ascii_case(name) { Ok(()) } else { Err(format!("expected SHA-256 {name}, received {found}")) }
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect());
        }
        hasher.update(&buffer[..n]);
    }
}

/// The beginning of a short text that came in place of the file: an error page says why.
fn quote(path: &Path) -> String {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|f| f.take(200).read_to_end(&mut head));
    let text = String::from_utf8_lossy(&head);
    let text = text.trim();
    if read.is_err() || text.is_empty() || text.chars().any(|c| c.is_control() && !c.is_whitespace()) {
        return String::new();
    }
    format!(" that begin with `{}`", text.split_whitespace().collect::<Vec<_>>().join(" "))
}
