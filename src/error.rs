//! The one error type: what failed, where, what was found, what was expected, and what to do about it.
//!
//! ```text
//! error: cannot load `transformer_blocks.7.attn.to_q.weight` from `qwen_image.safetensors`
//!   expected shape (3072, 3072), found (3072, 64)
//! hint: this looks like a LoRA file; `model:` wants a base model
//! ```

use std::fmt;
use std::path::Path;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure it is; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Wrong command line, config file, dataset or model folder: nothing was started. Exit code 2.
    Usage,
    /// The run itself failed: I/O, network, a non-finite loss. Exit code 1.
    Run,
    /// The user stopped the run and its state was saved. Exit code 130.
    Interrupted,
}

/// An error that a person can act on. Built with [`Error::usage`] or [`Error::run`] and the chained setters.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    what: String,
    details: Vec<String>,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, what: what.into(), details: Vec::new(), hint: None, source: None }))
    }

    /// Wrong usage, config or input: exit code 2.
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(Kind::Usage, what)
    }

    /// A failure while running: exit code 1.
    pub fn run(what: impl Into<String>) -> Self {
        Self::new(Kind::Run, what)
    }

    /// The user stopped the run after its state was saved: exit code 130.
    pub fn interrupted(what: impl Into<String>) -> Self {
        Self::new(Kind::Interrupted, what)
    }

    /// A failed file operation on `path`.
    pub fn io(doing: &str, path: &Path, source: std::io::Error) -> Self {
        let hint = match source.kind() {
            std::io::ErrorKind::StorageFull => {
                Some("the disk is full: free some space and run again with `--resume auto`")
            }
            std::io::ErrorKind::QuotaExceeded => {
                Some("your disk quota is used up: free some space and run again with `--resume auto`")
            }
            std::io::ErrorKind::FileTooLarge => {
                Some("the file system, or a limit of this shell (`ulimit -f`), does not allow a file of this size")
            }
            std::io::ErrorKind::PermissionDenied => Some("check the permissions of this path"),
            _ => None,
        };
        let mut error = Self::run(format!("cannot {doing} `{}`", path.display())).detail(source.to_string());
        if let Some(hint) = hint {
            error = error.hint(hint);
        }
        error.source(source)
    }

    /// Adds a line of detail, shown indented under the first line.
    pub fn detail(mut self, line: impl Into<String>) -> Self {
        self.0.details.push(line.into());
        self
    }

    /// Adds the line `expected ..., found ...`.
    pub fn expected(self, expected: impl fmt::Display, found: impl fmt::Display) -> Self {
        self.detail(format!("expected {expected}, found {found}"))
    }

    /// Sets the line that says what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Keeps the underlying error, for `source()`.
    pub fn source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.source = Some(Box::new(source));
        self
    }

    /// Makes this a usage error (exit code 2), for a shared helper called on user input.
    pub fn into_usage(mut self) -> Self {
        self.0.kind = Kind::Usage;
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The process exit code that this error asks for.
    pub fn exit_code(&self) -> u8 {
        match self.0.kind {
            Kind::Usage => 2,
            Kind::Run => 1,
            Kind::Interrupted => 130,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.what)?;
        for line in &self.0.details {
            for line in line.lines() {
                write!(f, "\n  {line}")?;
            }
        }
        if let Some(hint) = &self.0.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e.as_ref() as _)
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        // Candle appends a backtrace to its message where RUST_BACKTRACE is set: `source()` keeps it.
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        let failed = match first.contains("CUDA_ERROR_OUT_OF_MEMORY") {
            true => Self::run("the GPU has not enough free memory")
                .hint(
                    "`training.memory: auto` trains in the first way that fits (checkpointing, int8 weights, blocks in host \
                     memory); a smaller batch or resolution, or a lower rank, takes less",
                ),
            false => Self::run("tensor operation failed"),
        };
        failed.detail(first).source(error)
    }
}

/// The candidate nearest to `name` in spelling, if one is near enough to be what was meant.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (strsim::jaro_winkler(name, c), c))
        .filter(|(score, _)| *score > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, c)| c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_what_where_expected_found_hint() {
        let error = Error::usage("cannot load `a.weight` from `x.safetensors`")
            .expected("shape (2, 2)", "(2, 1)")
            .hint("wants a base model");
        assert_eq!(
            error.to_string(),
            "cannot load `a.weight` from `x.safetensors`\n  expected shape (2, 2), found (2, 1)\nhint: wants a base model"
        );
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn a_full_gpu_is_named() {
        let full = candle_core::Error::Msg("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")".into());
        let text = Error::from(full).to_string();
        assert!(text.starts_with("the GPU has not enough free memory\n") && text.contains("checkpointing"), "{text}");
        assert!(Error::from(candle_core::Error::Msg("x".into())).to_string().starts_with("tensor operation failed"));
    }

    #[test]
    fn nearest_finds_typos_only() {
        let known = ["learning_rate", "max_steps", "batch_size"];
        assert_eq!(nearest("learning_rte", known), Some("learning_rate"));
        assert_eq!(nearest("zzz", known), None);
    }
}
