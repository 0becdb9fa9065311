//! What a download reports while it runs, and the bar that shows it.

use crate::progress::tell;
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The state of a download. Files that were in the cache before are not counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transferred {
    /// Files to fetch.
    pub num_files: usize,
    /// Files fetched and checked.
    pub num_files_done: usize,
    /// Bytes to fetch.
    pub total_bytes: u64,
    /// Bytes fetched. Falls back when a file has to be fetched again.
    pub done_bytes: u64,
}

impl Transferred {
    /// Everything is there.
    pub fn is_done(&self) -> bool {
        self.num_files_done == self.num_files
    }
}

/// Called with each change; must not block.
pub type Observer = Arc<dyn Fn(&Transferred) + Send + Sync>;

/// A bar on standard error with bytes, speed and remaining time. It draws nothing where standard error is no
/// terminal; there a line tells of the start and of the end.
pub fn progress_bar(label: &str) -> Observer {
    let bars = Mutex::new(Bars { label: label.to_string(), current: None });
    Arc::new(move |state| bars.lock().unwrap_or_else(PoisonError::into_inner).show(state))
}

/// The bar of the phase under way: the small files of a model come first, then its weights.
struct Bars {
    label: String,
    current: Option<ProgressBar>,
}

impl Bars {
    fn show(&mut self, state: &Transferred) {
        let current = self.current.take().filter(|bar| !bar.is_finished());
        let bar = current.unwrap_or_else(|| self.start(state));
        bar.set_position(state.done_bytes);
        bar.set_message(format!("{}/{} files", state.num_files_done, state.num_files));
        if state.is_done() {
            bar.finish();
            if bar.is_hidden() {
                tell(format_args!("{}: downloaded", self.label));
            }
        }
        self.current = Some(bar);
    }

    fn start(&self, state: &Transferred) -> ProgressBar {
        let template =
            "{prefix} [{wide_bar}] {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  ETA {eta}  {msg}";
        let style = ProgressStyle::with_template(template).expect("the template is a constant that the tests parse");
        let bar = ProgressBar::new(state.total_bytes).with_style(style).with_prefix(self.label.clone());
        bar.enable_steady_tick(Duration::from_millis(200));
        if bar.is_hidden() {
            let size = crate::io::disk::human(state.total_bytes);
            tell(format_args!("{}: downloading {} files, {size}", self.label, state.num_files));
        }
        bar
    }
}

/// Adds up the files of one download and passes each change on.
pub(super) struct Tally {
    observer: Option<Observer>,
    state: Mutex<(Transferred, HashMap<String, u64>)>,
}

impl Tally {
    pub fn new(num_files: usize, total_bytes: u64, observer: Option<Observer>) -> Arc<Self> {
        let start = Transferred { num_files, total_bytes, ..Transferred::default() };
        let tally = Arc::new(Self { observer, state: Mutex::new((start, HashMap::new())) });
        tally.update(|_, _| ());
        tally
    }

    /// A file is whole.
    pub fn file_done(&self, path: &str, size: u64) {
        self.update(|state, files| {
            state.num_files_done += 1;
            files.insert(path.into(), size);
        });
    }

    /// What came of a file is thrown away.
    pub fn file_lost(&self, path: &str) {
        self.update(|_, files| {
            files.remove(path);
        });
    }

    fn update(&self, change: impl FnOnce(&mut Transferred, &mut HashMap<String, u64>)) {
        let mut guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (state, files) = &mut *guard;
        change(state, files);
        state.done_bytes = files.values().sum();
        if let Some(observer) = &self.observer {
            observer(state);
        }
    }
}

/// hf-hub's callback for one file.
pub(super) struct FileProgress {
    pub tally: Arc<Tally>,
    pub size: u64,
}

impl ProgressHandler for FileProgress {
    fn on_progress(&self, event: &ProgressEvent) {
        if let ProgressEvent::Download(DownloadEvent::Progress { files }) = event {
            self.tally.update(|_, known| {
                for file in files {
                    known.insert(file.filename.clone(), file.bytes_completed.min(self.size));
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_a_bar_of_its_own() {
        let mut bars = Bars { label: "Owner/Name".into(), current: None };
        let mut show = |num_files_done, total_bytes, done_bytes| {
            bars.show(&Transferred { num_files: 2, num_files_done, total_bytes, done_bytes });
            let bar = bars.current.as_ref().unwrap();
            (bar.length(), bar.position(), bar.message(), bar.is_finished())
        };
        assert_eq!(show(0, 10, 0), (Some(10), 0, "0/2 files".into(), false));
        assert_eq!(show(1, 10, 7), (Some(10), 7, "1/2 files".into(), false));
        // A file that has to be fetched again.
        assert_eq!(show(1, 10, 4), (Some(10), 4, "1/2 files".into(), false));
        assert_eq!(show(2, 10, 10), (Some(10), 10, "2/2 files".into(), true));
        assert_eq!(show(0, 5000, 0), (Some(5000), 0, "0/2 files".into(), false));
    }
}
