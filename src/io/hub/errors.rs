//! What a failed hub request means for the user.

use super::{HubOptions, RepoId};
use crate::error::Error;
use hf_hub::HFError;
use std::error::Error as _;

/// What the explanation of a failure needs to know.
pub(super) struct Context<'a> {
    pub repo: &'a RepoId,
    pub options: &'a HubOptions,
    /// Everything wanted lies in the cache.
    pub cached: bool,
}

const HINT_TOKEN: &str = "check the spelling; if the model is private or gated, set HF_TOKEN to a token that may read it \
                          (a wrong or expired HF_TOKEN gives this error too)";
const HINT_AGAIN: &str = "run again: files that are whole in the cache are not fetched again";

impl Context<'_> {
    /// An error for the failure `e` of `doing` something with the repository.
    pub fn explain(&self, doing: &str, e: HFError) -> Error {
        let (repo, revision) = (self.repo, self.options.revision());
        let failed = || Error::run(format!("cannot {doing} `{repo}`"));
        let http = http_answer(&e);
        let status = http.as_ref().map(|h| h.status);
        let code = http.as_ref().map(|h| h.code.as_str()).unwrap_or_default();
        let unknown_revision = code == "RevisionNotFound"
            || (code.is_empty() && matches!(&e, HFError::RevisionNotFound { .. }) && self.options.revision.is_some());
        let error = match (&e, status) {
            _ if unknown_revision => Error::usage(format!("`{repo}` has no revision `{revision}`"))
                .hint("`revision:` wants a branch, a tag or a full commit hash of the repository"),
            (HFError::EntryNotFound { path, .. }, _) => Error::usage(format!("`{repo}` has no `{path}`"))
                .detail(format!("in revision `{revision}`"))
                .hint("the repository is incomplete: try another `revision:` or another copy of the model"),
            // The hub answers 401 for repositories that do not exist to those who have not shown a valid token.
            (_, Some(404)) => Error::usage(format!("the hub knows no model `{repo}`")).hint(HINT_TOKEN),
            (_, Some(401)) if code == "RepoNotFound" => {
                Error::usage(format!("the hub knows no model `{repo}`, or it is private")).hint(HINT_TOKEN)
            }
            (_, Some(401)) => Error::usage(format!("the hub refuses access to `{repo}` (401)")).hint(HINT_TOKEN),
            (_, Some(403)) => Error::usage(format!("the hub refuses access to `{repo}` (403)")).hint(
                "accept the model's terms on its page with the account of your HF_TOKEN, and let the token read \
                 gated repositories",
            ),
            (_, Some(429)) => failed()
                .detail("the hub limits the rate of requests (429)")
                .hint("wait a few minutes and run again; requests with an HF_TOKEN have a higher limit"),
            (_, Some(status)) => failed().detail(format!("the hub answers {status}")).hint(self.network_hint()),
            (HFError::Request { source, .. }, _) if source.is_builder() => failed()
                .detail("the HTTPS client cannot be set up")
                .hint("install the system's CA certificates (often the package ca-certificates)"),
            (HFError::Request { source, .. }, _) if source.is_connect() => {
                failed().detail(format!("no connection to {}", self.options.endpoint())).hint(self.network_hint())
            }
            (HFError::Request { source, .. }, _) if source.is_timeout() => {
                failed().detail("the connection stalled").hint(HINT_AGAIN)
            }
            (HFError::Request { source, .. }, _) if is_json_error(source) => {
                return self.not_a_hub(&root_cause(source));
            }
            (HFError::Request { .. } | HFError::Xet { .. }, _) => {
                failed().detail("the connection was cut").hint(HINT_AGAIN)
            }
            (HFError::Io(_), _) => return self.io_error(doing, e),
            (HFError::CacheLockTimeout { path }, _) => failed()
                .detail(format!("another process holds `{}`", path.display()))
                .hint("wait until the other download has ended and run again"),
            (HFError::Url(_), _) => Error::usage("the hub's address is not a URL")
                .expected("something like https://huggingface.co", format!("`{}`", self.options.endpoint()))
                .hint("check HF_ENDPOINT"),
            (HFError::MalformedResponse { .. } | HFError::Json(_), _) => return self.not_a_hub(&e.to_string()),
            _ => failed(),
        };
        match &http {
            Some(HttpAnswer { message: Some(message), .. }) => error.detail(message),
            Some(_) => error,
            None => error.detail(root_cause(&e)),
        }
        .source(e)
    }

    /// The server answers, but not as a hub does.
    pub fn not_a_hub(&self, what: &str) -> Error {
        Error::run(format!("{} does not answer as a model hub", self.options.endpoint()))
            .detail(what)
            .hint("check HF_ENDPOINT, and whether a proxy or a login page stands between")
    }

    /// A file arrived that is not the one listed.
    pub fn bad_content(&self, path: &str, why: &str) -> Error {
        Error::run(format!("cannot download `{path}` of `{}`", self.repo))
            .detail(why)
            .detail("what came was thrown away")
            .hint("run again; if it stays, try another HF_ENDPOINT, or see whether the model's terms must be accepted")
    }

    fn io_error(&self, doing: &str, e: HFError) -> Error {
        let HFError::Io(io) = &e else { unreachable!("called for I/O errors only") };
        let cache = self.options.cache_dir();
        let hint = match io.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                "the disk is full: free some space, or let HF_HOME (or HF_HUB_CACHE) name a folder on a larger disk"
            }
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                "let HF_HOME (or HF_HUB_CACHE) name a folder that you may write to"
            }
            _ => HINT_AGAIN,
        };
        Error::run(format!("cannot {doing} `{}`", self.repo))
            .detail(format!("writing to `{}`: {io}", cache.display()))
            .hint(hint)
            .source(e)
    }

    fn network_hint(&self) -> &'static str {
        if self.cached {
            "the whole model is in the cache: `offline: true` uses it without the network"
        } else {
            "check the network (and HTTPS_PROXY, if you use one); where the hub cannot be reached, name a mirror: \
             HF_ENDPOINT=https://hf-mirror.com"
        }
    }
}

/// What the server said, of an error that is an HTTP answer.
struct HttpAnswer {
    status: u16,
    /// `X-Error-Code`: `RepoNotFound`, `GatedRepo`, ...; empty if not given.
    code: String,
    message: Option<String>,
}

fn http_answer(e: &HFError) -> Option<HttpAnswer> {
    let context = match e {
        HFError::Http { context }
        | HFError::AuthRequired { context }
        | HFError::Forbidden { context }
        | HFError::Conflict { context }
        | HFError::RateLimited { context, .. } => context,
        HFError::RepoNotFound { context, .. }
        | HFError::RevisionNotFound { context, .. }
        | HFError::EntryNotFound { context, .. } => context.as_ref()?,
        _ => return None,
    };
    Some(HttpAnswer {
        status: context.status.as_u16(),
        code: context.error_code.clone().unwrap_or_default(),
        message: context.server_message.clone().filter(|m| !m.is_empty()),
    })
}

fn is_json_error(e: &reqwest::Error) -> bool {
    let mut source = e.source();
    while let Some(inner) = source {
        if inner.is::<serde_json::Error>() {
            return true;
        }
        source = inner.source();
    }
    false
}

fn root_cause(e: &dyn std::error::Error) -> String {
    let mut cause = e;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explain(e: HFError, cached: bool) -> String {
        let repo = RepoId::parse("Qwen/Qwen-Image").unwrap();
        Context { repo: &repo, options: &HubOptions::default(), cached }.explain("download `a` of", e).to_string()
    }

    #[test]
    fn a_full_disk_says_so_and_where_to_go() {
        let full = || HFError::Io(std::io::Error::from(std::io::ErrorKind::StorageFull));
        let text = explain(full(), false);
        assert!(
            text.contains("cannot download `a` of `Qwen/Qwen-Image`") && text.contains("hub`: no storage"),
            "{text}"
        );
        assert!(text.contains("hint: the disk is full") && text.contains("HF_HOME"), "{text}");
    }

    #[test]
    fn a_lock_that_another_process_holds_is_named() {
        let text = explain(HFError::CacheLockTimeout { path: "x.lock".into() }, false);
        assert!(text.contains("x.lock") && text.contains("another process"), "{text}");
    }
}
