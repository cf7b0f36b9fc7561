//! What can go wrong with a checkpoint's files, said so that the reader knows what to do.

use std::{fmt::Write as _, io, path::PathBuf};

use hf_hub::HFError;

use crate::model::fingerprint::FingerprintError;

/// Why a model's files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The name is neither a directory nor a hub id.
    #[error("{model:?} is neither a directory nor a hub id (org/name){}", if *.is_file { "; name the directory of this file" } else { "" })]
    NotAModel {
        /// The name.
        model: String,
        /// There is a file of that name.
        is_file: bool,
    },
    /// The revision can't be one.
    #[error("{revision:?} is no revision: name a branch, a tag or a commit")]
    Revision {
        /// The revision.
        revision: String,
    },
    /// There is no configuration, so no model.
    #[error("{} has no config.json, so it holds no model", .dir.display())]
    NoConfig {
        /// The directory, or the hub id.
        dir: PathBuf,
    },
    /// The weights are in PyTorch's own format only.
    #[error(
        "{model} has its weights only as pickled {file:?}, which could run any code when it is read; use a safetensors version of the model, or convert it: https://huggingface.co/spaces/safetensors/convert"
    )]
    OnlyPickled {
        /// The model.
        model: String,
        /// One of the files.
        file: String,
    },
    /// There are no weights that could be read.
    #[error("{model} has neither model.safetensors nor model.safetensors.index.json")]
    NoWeights {
        /// The model.
        model: String,
    },
    /// The index of the shards can't be used.
    #[error("{} is no index of weight files: {reason}", .path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A directory lacks a file that its index names.
    #[error("{} lacks {file}, which holds tensors that are needed here", .dir.display())]
    MissingFile {
        /// The directory.
        dir: PathBuf,
        /// The file.
        file: String,
    },
    /// The hub has no such model, or doesn't show it to this user.
    #[error("{endpoint} has no model {model}{}; if it is private, pass a token that may read it (--token or HF_TOKEN)", .revision.as_ref().map(|revision| format!(" with a revision {revision:?}")).unwrap_or_default())]
    NotFound {
        /// The hub.
        endpoint: String,
        /// The model.
        model: String,
        /// The revision that was asked for, where that may be what is missing.
        revision: Option<String>,
    },
    /// The hub wants to know who asks.
    #[error(
        "{model} is gated or private, and {endpoint} accepts no anonymous download and not the token in use, if any; ask for access on {endpoint}/{model} and pass your token (--token, HF_TOKEN, or `hf auth login`)"
    )]
    Unauthorized {
        /// The hub.
        endpoint: String,
        /// The model.
        model: String,
    },
    /// The hub knows who asks, and says no.
    #[error(
        "this account has no access to {model}: ask for it on {endpoint}/{model}, wait for the confirmation, and use a token of the account that was granted it"
    )]
    Forbidden {
        /// The hub.
        endpoint: String,
        /// The model.
        model: String,
    },
    /// The hub wants fewer requests.
    #[error("{endpoint} limits the rate of requests; try again {}", .retry_after_s.map_or("later".to_owned(), |seconds| format!("in {seconds} s")))]
    RateLimited {
        /// The hub.
        endpoint: String,
        /// When it said to come back.
        retry_after_s: Option<u64>,
    },
    /// Offline, and the cache lacks something.
    #[error("offline, and {} lacks {} of {model}; start once with a network, or without --offline and HF_HUB_OFFLINE", .cache.display(), .files.join(", "))]
    NotCached {
        /// The model.
        model: String,
        /// Where was looked.
        cache: PathBuf,
        /// The files that are missing.
        files: Vec<String>,
    },
    /// The hub can't be reached.
    #[error("cannot reach {endpoint}: {reason}; use a local directory, or --offline if the model is in the cache")]
    Unreachable {
        /// The hub.
        endpoint: String,
        /// What happened.
        reason: String,
    },
    /// No more bytes came.
    #[error("the download of {file} stopped: nothing came for {seconds} s; start again")]
    Stalled {
        /// The file.
        file: String,
        /// How long nothing came.
        seconds: u64,
    },
    /// A file is not what the hub's list says. It was removed.
    #[error("{file} of {model} was damaged and has been removed: {reason}; start again to download it anew")]
    Damaged {
        /// The file.
        file: String,
        /// The model.
        model: String,
        /// How it was noticed.
        reason: String,
    },
    /// The file system says no.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file's hash could not be taken.
    #[error(transparent)]
    Fingerprint(#[from] FingerprintError),
    /// Something else, in the words of the hub's client.
    #[error("the hub: {reason}")]
    Hub {
        /// What happened.
        reason: String,
    },
}

impl HubError {
    /// Whether the hub could not be talked to at all, so that a cache may help.
    pub(super) fn is_connection(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::RateLimited { .. })
    }
}

/// A refusing answer of the hub.
pub(super) struct Refusal<'a> {
    pub(super) status: u16,
    /// What its header `X-Error-Code` says.
    pub(super) code: Option<&'a str>,
    pub(super) retry_after_s: Option<u64>,
}

/// A refusal, in terms of what the user can do. `revision` is given where it may be what is missing.
pub(super) fn refused(refusal: &Refusal<'_>, model: &str, revision: Option<&str>, endpoint: &str) -> HubError {
    let (model, endpoint) = (model.to_owned(), endpoint.to_owned());
    match (refusal.status, refusal.code) {
        // The hub answers 401 for what it hides from this user, too.
        (401 | 404, Some("RepoNotFound")) => HubError::NotFound { endpoint, model, revision: None },
        (404, _) => HubError::NotFound { endpoint, model, revision: revision.map(str::to_owned) },
        (401, _) => HubError::Unauthorized { endpoint, model },
        (403, _) => HubError::Forbidden { endpoint, model },
        (429, _) => HubError::RateLimited { endpoint, retry_after_s: refusal.retry_after_s },
        (status @ 500..=599, _) => HubError::Unreachable { endpoint, reason: format!("it answers {status}") },
        (status, _) => HubError::Hub { reason: format!("{endpoint} answers {status} for {model}") },
    }
}

/// An error of the client library, in terms of what the user can do.
pub(super) fn from_hub(error: &HFError, model: &str, endpoint: &str) -> HubError {
    let (context, status, retry_after_s) = match error {
        HFError::AuthRequired { context } => (Some(context), 401, None),
        HFError::Forbidden { context } => (Some(context), 403, None),
        HFError::RepoNotFound { context, .. }
        | HFError::EntryNotFound { context, .. }
        | HFError::RevisionNotFound { context, .. } => (context.as_ref(), 404, None),
        HFError::RateLimited { retry_after, context } => (Some(context), 429, retry_after.map(|delay| delay.as_secs())),
        HFError::Http { context } => (Some(context), context.status.as_u16(), None),
        HFError::Request { .. } => {
            return HubError::Unreachable { endpoint: endpoint.to_owned(), reason: with_causes(error) };
        }
        _ => return HubError::Hub { reason: with_causes(error) },
    };
    let code = context.and_then(|context| context.error_code.as_deref());
    refused(&Refusal { status, code, retry_after_s }, model, None, endpoint)
}

/// The error and what is behind it: "connection refused" is in the innermost one.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        if !text.contains(&cause.to_string()) {
            // Writing to a text can't fail.
            let _ = write!(text, ": {cause}");
        }
        source = cause.source();
    }
    text
}
