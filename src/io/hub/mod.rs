//! Models from the Hugging Face hub, through hf-hub, in the cache that the Python tools share.
//!
//! hf-hub writes a blob beside its place and renames it, but it trusts what the server sends: the body of an error
//! page becomes the file, and a snapshot folder counts as there as soon as it exists. So every file fetched here is
//! held against the size that the hub lists and, where the hub gives one, against its SHA-256; a branch is recorded
//! in the cache only when every file wanted of its commit is whole; and [`Wanted::check_whole`] looks at the files
//! themselves before a cached folder is used.

mod errors;
mod progress;
mod transfer;
mod wanted;

pub use progress::{Observer, Transferred, progress_bar};
pub use wanted::{Part, Wanted};

use crate::error::{Error, Result, nearest};
use crate::io::{disk, write_atomic};
use errors::Context;
use hf_hub::repository::{RepoTreeEntry, RepoTypeModel};
use hf_hub::{HFClient, HFClientSync, HFRepositorySync};
use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the hub is when `HF_ENDPOINT` does not say.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// The branch that a repository id without a revision means.
const DEFAULT_REVISION: &str = "main";

/// A model repository: `owner/name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoId {
    owner: String,
    name: String,
}

impl RepoId {
    /// Reads `owner/name`; `None` if `text` has not that form. Each half is made of letters, digits, `-`, `_` and
    /// `.`, does not begin or end with `-` or `.`, and is at most 96 characters long, as the hub demands.
    pub fn parse(text: &str) -> Option<Self> {
        let (owner, name) = text.split_once('/')?;
        let half = |s: &str| {
            !s.is_empty()
                && s.len() <= 96
                && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && !s.starts_with(['-', '.'])
                && !s.ends_with(['-', '.'])
        };
        (half(owner) && half(name)).then(|| Self { owner: owner.into(), name: name.into() })
    }

    /// Its folder in the cache.
    fn cache_folder(&self) -> String {
        format!("models--{}--{}", self.owner, self.name)
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

/// How to reach the hub. What is `None` comes from the environment, as in the Python tools: `HF_ENDPOINT`,
/// `HF_HUB_CACHE` or `HF_HOME` or `XDG_CACHE_HOME`, `HF_TOKEN` or `HF_TOKEN_PATH` or the token that
/// `hf auth login` stored.
#[derive(Clone)]
pub struct HubOptions {
    /// Address of the hub or of a mirror.
    pub endpoint: Option<String>,
    /// The cache folder, which holds `models--owner--name`.
    pub cache_dir: Option<PathBuf>,
    /// Access token.
    pub token: Option<String>,
    /// Branch, tag or full commit hash. `None`: `main`.
    pub revision: Option<String>,
    /// Use what the cache holds and never the network.
    pub offline: bool,
    /// How often a file is tried before a cut connection ends the download.
    pub attempts: usize,
    /// First pause before a request is repeated; it doubles each time.
    pub retry_delay: Duration,
    /// A transfer that brings no byte for so long counts as cut.
    pub stall_timeout: Duration,
    /// Told of every byte that arrives; `None`: nobody.
    pub observer: Option<Observer>,
}

impl Default for HubOptions {
    fn default() -> Self {
        Self {
            endpoint: None,
            cache_dir: None,
            token: None,
            revision: None,
            offline: false,
            attempts: 5,
            retry_delay: Duration::from_millis(200),
            stall_timeout: Duration::from_secs(60),
            observer: None,
        }
    }
}

impl HubOptions {
    /// The defaults, offline if `HF_HUB_OFFLINE` says so (hf-hub itself does not read it).
    pub fn from_env() -> Self {
        let offline = std::env::var("HF_HUB_OFFLINE")
            .is_ok_and(|v| matches!(v.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"));
        Self { offline, ..Self::default() }
    }

    fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(DEFAULT_REVISION)
    }

    fn cache_dir(&self) -> PathBuf {
        self.cache_dir.clone().unwrap_or_else(hf_hub::resolve_cache_dir)
    }

    fn endpoint(&self) -> String {
        let set = self.endpoint.clone().or_else(|| std::env::var("HF_ENDPOINT").ok());
        set.filter(|e| !e.is_empty()).unwrap_or_else(|| DEFAULT_ENDPOINT.into()).trim_end_matches('/').to_string()
    }

    fn client(&self) -> hf_hub::HFResult<HFClientSync> {
        let agent = concat!("qwen-lora/", env!("CARGO_PKG_VERSION"));
        let http = reqwest::Client::builder()
            .user_agent(agent)
            .connect_timeout(Duration::from_secs(20))
            .read_timeout(self.stall_timeout)
            .build()?;
        let mut builder = HFClient::builder()
            .endpoint(self.endpoint())
            .cache_dir(self.cache_dir())
            .client(http)
            .user_agent(agent)
            .retry_max_attempts(self.attempts)
            .retry_base_delay(self.retry_delay);
        // hf-hub drops a token that is no valid header value without a word; a line end is the usual reason.
        let token = self.token.clone().or_else(|| match std::env::var("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            Ok(disabled) if !disabled.is_empty() => None,
            _ => std::env::var("HF_TOKEN").ok(),
        });
        if let Some(token) = token.map(|t| t.trim().to_string()).filter(|t| !t.is_empty()) {
            builder = builder.token(token);
        }
        builder.build_sync()
    }
}

/// Fetches the wanted files of `repo` into the cache, unless they are there, and returns the snapshot folder, which
/// has the repository's layout. `check` sees that folder once the small files are in it and before any weights are
/// fetched: its error ends the download.
///
/// A revision given as full commit hash whose files are all there needs no request. Ctrl+C may end the process at any
/// time: files that are not whole lie in the cache as `*.incomplete` and are fetched again.
///
/// Errors: unknown repository or revision, a wanted file that the repository lacks, no access, no network, a cut
/// connection, a full disk, offline and not in the cache; each with what to do.
pub fn fetch(
    repo: &RepoId,
    wanted: &Wanted,
    check: &dyn Fn(&Path) -> Result<()>,
    options: &HubOptions,
) -> Result<PathBuf> {
    let cached = cached_snapshot(repo, options).filter(|folder| wanted.check_whole(folder).is_ok());
    if let Some(folder) = cached.as_ref().filter(|_| options.offline || is_commit_hash(options.revision())) {
        check(folder)?;
        return Ok(folder.clone());
    }
    if options.offline {
        return Err(not_cached(repo, wanted, options));
    }
    let context = Context { repo, options, cached: cached.is_some() };
    let client = options.client().map_err(|e| context.explain("reach the hub", e))?;
    let hub = client.model(repo.owner.as_str(), repo.name.as_str());

    let commit = resolve_commit(&hub, &context)?;
    let listed = list_files(&hub, &commit, &context)?;
    let folder = options.cache_dir().join(repo.cache_folder()).join("snapshots").join(&commit);

    let small = wanted.select_small(listed.keys().map(String::as_str));
    check_listed(repo, wanted, &listed)?;
    transfer::fetch_files(&hub, &folder, &commit, &sized(&listed, &small), &context)?;
    check(&folder)?;

    let weights = wanted.select_weights(&folder, listed.keys().map(String::as_str))?;
    if let Some(missing) = weights.iter().find(|w| !listed.contains_key(*w)) {
        return Err(Error::usage(format!("`{repo}` has no `{missing}`"))
            .detail("its own index names that file")
            .hint("the repository is incomplete: try another `revision:` or another copy of the model"));
    }
    let files = sized(&listed, &weights);
    check_space(repo, &folder, &files, options)?;
    transfer::fetch_files(&hub, &folder, &commit, &files, &context)?;
    wanted.check_whole(&folder).map_err(|e| Error::run(format!("the download of `{repo}` is not whole")).detail(e))?;
    record_revision(repo, &commit, options)?;
    Ok(folder)
}

/// A wanted file with the size that the hub lists.
struct Listed {
    path: String,
    size: u64,
}

fn sized(listed: &BTreeMap<String, u64>, paths: &[String]) -> Vec<Listed> {
    paths.iter().filter_map(|p| Some(Listed { path: p.clone(), size: *listed.get(p)? })).collect()
}

fn resolve_commit(hub: &HFRepositorySync<RepoTypeModel>, context: &Context) -> Result<String> {
    let revision = context.options.revision();
    if is_commit_hash(revision) {
        return Ok(revision.into());
    }
    let info = hub.info().revision(revision).send().map_err(|e| context.explain("look up", e))?;
    // The hash becomes a folder name: anything else in its place must not.
    info.sha.filter(|s| is_commit_hash(s)).ok_or_else(|| context.not_a_hub("the repository's commit hash is missing"))
}

fn list_files(hub: &HFRepositorySync<RepoTypeModel>, commit: &str, context: &Context) -> Result<BTreeMap<String, u64>> {
    let entries = hub.list_tree().revision(commit).recursive(true).send().map_err(|e| context.explain("list", e))?;
    let files = entries.into_iter().filter_map(|entry| match entry {
        RepoTreeEntry::File { path, size, .. } => Some((path, size)),
        RepoTreeEntry::Directory { .. } => None,
    });
    // A path that leaves the snapshot folder is never asked for: the wanted files have one folder at most.
    Ok(files.filter(|(path, _)| !path.split('/').any(|p| p.is_empty() || p == "..")).collect())
}

fn check_listed(repo: &RepoId, wanted: &Wanted, listed: &BTreeMap<String, u64>) -> Result<()> {
    let Some(missing) = wanted.first_missing(listed.keys().map(String::as_str)) else { return Ok(()) };
    let mut top: Vec<&str> = listed.keys().map(|p| p.split('/').next().unwrap_or(p)).collect();
    top.dedup();
    let mut error = Error::usage(format!("`{repo}` has no `{missing}`"));
    if let Some(near) = nearest(&missing, listed.keys().map(String::as_str)) {
        error = error.detail(format!("the nearest name there is `{near}`"));
    }
    let shown: Vec<&str> = top.iter().take(12).copied().collect();
    let more = if top.len() > shown.len() { ", ..." } else { "" };
    if wanted.parts.is_empty() {
        return Err(error.expected(format!("a file `{missing}`"), format!("{}{more}", shown.join(", "))));
    }
    Err(error
        .expected("a model in the diffusers layout", format!("{}{more}", shown.join(", ")))
        .hint("`model:` wants a base model such as Qwen/Qwen-Image; a GGUF, ComfyUI or LoRA repository is not one"))
}

/// Refuses a download that cannot fit, before its first byte.
fn check_space(repo: &RepoId, folder: &Path, files: &[Listed], options: &HubOptions) -> Result<()> {
    let missing = files.iter().filter(|f| !transfer::has_size(&folder.join(&f.path), f.size));
    let needed = missing.fold(0u64, |sum, f| sum.saturating_add(f.size));
    let cache = options.cache_dir();
    match disk::free_bytes(&cache) {
        Some(free) if needed > free => Err(Error::run(format!("not enough disk space for `{repo}`"))
            .expected(
                format!("{} free in `{}`", disk::human(needed), cache.display()),
                format!("{} free", disk::human(free)),
            )
            .hint("free some space, or let HF_HOME (or HF_HUB_CACHE) name a folder on a larger disk")),
        _ => Ok(()),
    }
}

/// The snapshot folder that the cache holds for the wanted revision, whole or not.
fn cached_snapshot(repo: &RepoId, options: &HubOptions) -> Option<PathBuf> {
    let home = options.cache_dir().join(repo.cache_folder());
    let revision = options.revision();
    let commit = if is_commit_hash(revision) {
        revision.to_string()
    } else {
        std::fs::read_to_string(home.join("refs").join(revision)).ok()?.trim().to_string()
    };
    let folder = home.join("snapshots").join(commit);
    folder.is_dir().then_some(folder)
}

fn not_cached(repo: &RepoId, wanted: &Wanted, options: &HubOptions) -> Error {
    let cache = options.cache_dir();
    let error = Error::usage(format!("offline, and `{repo}` is not whole in the cache"));
    let found = match cached_snapshot(repo, options) {
        Some(folder) => wanted.check_whole(&folder).err().unwrap_or_default(),
        None => format!("nothing of revision `{}`", options.revision()),
    };
    error
        .expected(format!("every file in `{}`", cache.join(repo.cache_folder()).display()), found)
        .hint("run once without `offline: true` (and HF_HUB_OFFLINE), or let HF_HOME name the folder that has it")
}

/// Notes which commit a branch or tag stands for, as the Python tools do, once the commit's files are whole.
fn record_revision(repo: &RepoId, commit: &str, options: &HubOptions) -> Result<()> {
    let revision = options.revision();
    if is_commit_hash(revision) {
        return Ok(());
    }
    let path = options.cache_dir().join(repo.cache_folder()).join("refs").join(revision);
    let parent = path.parent().expect("a joined path has a parent");
    std::fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
    if std::fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
        return Ok(());
    }
    write_atomic(&path, |file| file.write_all(commit.as_bytes()))
}

fn is_commit_hash(revision: &str) -> bool {
    revision.len() == 40 && revision.chars().all(|c| c.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_id_is_two_names_and_nothing_that_could_be_a_path() {
        assert_eq!(RepoId::parse("Qwen/Qwen-Image").unwrap().cache_folder(), "models--Qwen--Qwen-Image");
        assert!(RepoId::parse("Qwen/Qwen-Image-2.1_x").is_some());
        for path in ["gpt2", "./model", "../model", "~/model", "a/b/c", "/model", "a/", "a/..", "a b/c", "", "/"] {
            assert_eq!(RepoId::parse(path), None, "{path}");
        }
    }
}
