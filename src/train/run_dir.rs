//! The run directory: what is in it, and whether a run may start, continue or is refused.
//!
//! An existing run is resumed or refused, never overwritten.

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// The paths of one run.
#[derive(Clone, Debug)]
pub struct RunDir {
    root: PathBuf,
}

/// What the directory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing, or no directory.
    Empty,
    /// Files of a run, but no checkpoint.
    Started,
    /// Whole checkpoints, newest last.
    Checkpoints(Vec<u64>),
}

impl RunDir {
    /// The run directory at `root`.
    pub fn new(root: &Path) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved config.
    pub fn config(&self) -> PathBuf {
        self.root.join("config.yaml")
    }

    /// The exported adapter.
    pub fn adapter(&self) -> PathBuf {
        self.root.join("adapter.safetensors")
    }

    /// One line a step.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// The images that `data.filter` left out, one line each.
    pub fn filtered(&self) -> PathBuf {
        self.root.join("filtered.jsonl")
    }

    /// The folder of preview pictures.
    pub fn samples(&self) -> PathBuf {
        self.root.join("samples")
    }

    /// The page about the run.
    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// The trained transformer of a full fine-tuning run.
    pub fn transformer(&self) -> PathBuf {
        self.root.join("transformer")
    }

    /// The folder of checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The checkpoint after `step` steps.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.checkpoints().join(format!("step-{step:06}"))
    }

    /// Creates the directory and its `checkpoints` folder.
    pub fn create(&self) -> Result<()> {
        std::fs::create_dir_all(self.checkpoints()).map_err(|e| Error::io("create", &self.checkpoints(), e))
    }

    /// Looks at what is there. Unfinished checkpoints have hidden names and are not seen.
    pub fn look(&self) -> Result<Found> {
        let mut names = list(&self.root)?;
        let mut steps: Vec<u64> = list(&self.checkpoints())?
            .iter()
            .filter_map(|n| n.strip_prefix("step-")?.parse().ok())
            .filter(|&step| self.checkpoint(step).is_dir())
            .collect();
        steps.sort_unstable();
        if !steps.is_empty() {
            return Ok(Found::Checkpoints(steps));
        }
        names.retain(|n| !n.starts_with('.') && (n != "checkpoints"));
        Ok(if names.is_empty() { Found::Empty } else { Found::Started })
    }

    /// Removes all but the newest `keep` checkpoints, and what an interrupted save left. `keep` 0 keeps all.
    pub fn prune(&self, keep: usize) -> Result<()> {
        let remove = |path: &Path| std::fs::remove_dir_all(path).map_err(|e| Error::io("remove", path, e));
        // Other hidden names are not ours: file managers leave some.
        let unfinished = |n: &&String| n.starts_with(".step-") && n.ends_with(".part");
        for name in list(&self.checkpoints())?.iter().filter(unfinished) {
            remove(&self.checkpoints().join(name))?;
        }
        if let (Found::Checkpoints(steps), true) = (self.look()?, keep > 0) {
            for &step in &steps[..steps.len().saturating_sub(keep)] {
                remove(&self.checkpoint(step))?;
            }
        }
        Ok(())
    }
}

fn list(folder: &Path) -> Result<Vec<String>> {
    match std::fs::read_dir(folder) {
        Ok(entries) => Ok(entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io("read the folder", folder, e).into_usage()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_whole_checkpoints_only_and_prunes_the_oldest() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(&dir.path().join("runs/a"));
        assert_eq!(run.look().unwrap(), Found::Empty);
        run.create().unwrap();
        assert_eq!(run.look().unwrap(), Found::Empty);
        std::fs::write(run.metrics(), "").unwrap();
        assert_eq!(run.look().unwrap(), Found::Started);
        for step in [5, 10, 1_000_000] {
            std::fs::create_dir(run.checkpoint(step)).unwrap();
        }
        std::fs::create_dir(run.checkpoints().join(".step-000015.part")).unwrap();
        std::fs::write(run.checkpoints().join(".DS_Store"), "").unwrap();
        assert_eq!(run.look().unwrap(), Found::Checkpoints(vec![5, 10, 1_000_000]));
        run.prune(2).unwrap();
        assert_eq!(run.look().unwrap(), Found::Checkpoints(vec![10, 1_000_000]));
        assert!(!run.checkpoints().join(".step-000015.part").exists());
        run.prune(0).unwrap();
        assert_eq!(run.look().unwrap(), Found::Checkpoints(vec![10, 1_000_000]));
    }
}
