//! Runs of the real binary on small inputs: a folder of its own for each, and what became of it.
#![allow(dead_code)] // each test binary uses a part

use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longer than anything here takes, even on a busy machine; reached only by a run that hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// A run on eight small images that exercises all that a resumed run must get right: two resolutions, gradient
/// accumulation, dropped captions, held-out images, warmup. Keys may be overridden with `--set`.
pub const RECIPE: &str = "\
model: synthetic:tiny
seed: 7
training: {batch_size: 2, gradient_accumulation: 2, learning_rate: 2e-3, lr_scheduler: cosine_with_warmup,
  warmup_steps: 4, max_steps: 24}
lora: {rank: 4, alpha: 6}
data: {path: images, resolution: [48, 64], held_out: 2, caption_dropout: 0.3}
save: {every: 4, keep: 2}
evaluation: {every: 6, num_sigmas: 2}
";

/// The path of the run directory of [`RECIPE`] below the workplace.
pub const OUTPUT: &str = "runs/recipe";

/// A temporary folder in which the binary is run: `recipe.yaml`, `images/`, `runs/`.
pub struct Workplace {
    dir: TempDir,
}

impl Workplace {
    /// With the recipe and eight captioned drawings.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("recipe.yaml"), RECIPE).unwrap();
        let images = dir.path().join("images");
        std::fs::create_dir(&images).unwrap();
        let mut drawings = files(&package().join("examples/tiny-drawings"));
        drawings.retain(|name| name.extension().is_some_and(|e| e == "png" || e == "txt"));
        for name in drawings.iter().take(16) {
            std::fs::copy(package().join("examples/tiny-drawings").join(name), images.join(name)).unwrap();
        }
        Self { dir }
    }

    /// A path in the workplace.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// A path in the run directory.
    pub fn run(&self, relative: &str) -> PathBuf {
        self.path(OUTPUT).join(relative)
    }

    /// `qwen-lora ARGS` in the workplace, with a cache of synthetic models that all tests share.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qwen-lora"));
        self.set_up(&mut command).args(args);
        command
    }

    /// Gives `command` the surroundings of [`Self::command`].
    pub fn set_up<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .current_dir(self.dir.path())
            .env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("xdg"))
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
    }

    /// `qwen-lora train --config recipe.yaml ARGS`.
    pub fn trainer(&self, args: &[&str]) -> Command {
        self.command(&[&["train", "--config", "recipe.yaml"], args].concat())
    }

    /// Trains to the end of the process.
    pub fn train(&self, args: &[&str]) -> Output {
        self.trainer(args).output().unwrap()
    }

    /// Trains, which must succeed.
    pub fn train_ok(&self, args: &[&str]) -> Output {
        let output = self.train(args);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        output
    }

    /// Starts training in the background.
    pub fn spawn(&self, args: &[&str]) -> Running {
        Running(Some(self.trainer(args).spawn().unwrap()))
    }

    /// Steps in metrics.jsonl, held-out lines not counted.
    pub fn steps_logged(&self) -> usize {
        let text = std::fs::read_to_string(self.run("metrics.jsonl")).unwrap_or_default();
        text.lines().filter(|l| l.contains("\"loss\"")).count()
    }

    /// The metrics without the times.
    pub fn metrics(&self) -> Vec<Json> {
        let text = std::fs::read_to_string(self.run("metrics.jsonl")).unwrap();
        assert!(text.ends_with('\n'), "the last line is cut: {text:?}");
        let parse = |line: &str| {
            let mut line: Json = serde_json::from_str(line).unwrap();
            line.as_object_mut().unwrap().remove("step_s");
            line
        };
        text.lines().map(parse).collect()
    }

    /// The steps of the checkpoints, in order; everything else in their folder makes the test fail.
    pub fn checkpoints(&self) -> Vec<u64> {
        let Ok(entries) = std::fs::read_dir(self.run("checkpoints")) else { return Vec::new() };
        let step = |name: String| match name.strip_prefix("step-").and_then(|n| n.parse().ok()) {
            Some(step) => step,
            None => panic!("`{name}` was left among the checkpoints"),
        };
        let mut steps: Vec<u64> = entries.map(|e| step(e.unwrap().file_name().into_string().unwrap())).collect();
        steps.sort_unstable();
        steps
    }

    /// Every file of the run directory with its bytes.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        snapshot(&self.path(OUTPUT))
    }
}

/// A process that is ended with the test.
pub struct Running(Option<Child>);

impl Running {
    /// Waits until `condition` holds. False if the process ended before.
    pub fn wait_until(&mut self, condition: impl Fn() -> bool) -> bool {
        let began = Instant::now();
        while !condition() {
            if self.child().try_wait().unwrap().is_some() {
                return condition();
            }
            assert!(began.elapsed() < PATIENCE, "the process hangs");
            std::thread::sleep(Duration::from_micros(200));
        }
        true
    }

    /// Ends it as `kill -9` does.
    pub fn kill(mut self) {
        self.child().kill().unwrap();
        self.child().wait().unwrap();
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: i32) {
        let id = self.child().id() as libc::pid_t;
        // SAFETY: the child has not been waited for, so that the id is its own.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
    }

    /// Its end.
    pub fn output(mut self) -> Output {
        self.0.take().expect("it is taken once").wait_with_output().unwrap()
    }

    fn child(&mut self) -> &mut Child {
        self.0.as_mut().expect("it is there until its output is asked for")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The folder of this package.
pub fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Standard output as text.
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The one error on standard error, from `error: ` to the end, with this exit code; nothing on standard output.
pub fn the_error(output: &Output, code: i32) -> String {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in ["panicked", "stack backtrace", "RUST_BACKTRACE"] {
        assert!(!text.contains(word), "{text}");
    }
    let errors: Vec<usize> = text.lines().enumerate().filter(|(_, l)| l.starts_with("error: ")).map(|l| l.0).collect();
    assert_eq!(errors.len(), 1, "not one error: {text}");
    assert_eq!(stdout(output), "");
    text.lines().skip(errors[0]).collect::<Vec<_>>().join("\n")
}

/// Every part must be in the text.
pub fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

/// All files below a folder with their bytes.
pub fn snapshot(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for name in files(folder) {
        found.insert(name.clone(), std::fs::read(folder.join(&name)).unwrap());
    }
    found
}

/// The files below a folder, relative to it, sorted. Empty if there is no folder.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&next) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => found.push(path.strip_prefix(folder).unwrap().to_path_buf()),
            }
        }
    }
    found.sort();
    found
}

/// Copies a folder with everything in it.
pub fn copy(from: &Path, to: &Path) {
    for name in files(from) {
        let target = to.join(&name);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(from.join(name), target).unwrap();
    }
}
