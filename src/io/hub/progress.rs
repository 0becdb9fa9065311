//! What a download reports while it runs, and the bar that shows it.

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
    let bar = Mutex::new(None::<ProgressBar>);
    let label = label.to_string();
    Arc::new(move |state| {
        let mut bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = bar.get_or_insert_with(|| start_bar(&label, state));
        bar.set_length(state.total_bytes);
        bar.set_position(state.done_bytes);
        bar.set_message(format!("{}/{} files", state.num_files_done, state.num_files));
        if state.is_done() && !bar.is_finished() {
            bar.finish();
            if bar.is_hidden() {
                eprintln!("{label}: downloaded");
            }
        }
    })
}

fn start_bar(label: &str, state: &Transferred) -> ProgressBar {
    let template =
        "{prefix} [{wide_bar}] {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  ETA {eta}  {msg}";
    let style = ProgressStyle::with_template(template).expect("the template is a constant that parses");
    let bar = ProgressBar::new(state.total_bytes).with_style(style).with_prefix(label.to_string());
    bar.enable_steady_tick(Duration::from_millis(200));
    if bar.is_hidden() {
        let size = crate::io::disk::human(state.total_bytes);
        eprintln!("{label}: downloading {} files, {size}", state.num_files);
    }
    bar
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
