//! What can go wrong with a checkpoint's files, said so that the reader knows what to do.

use std::{
    fmt::{self, Write as _},
    io,
    path::PathBuf,
    time::Duration,
};

use crate::model::fingerprint::FingerprintError;

/// Why a model's files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The name is neither a directory nor a hub id.
    #[error("{model:?} is neither a directory nor a hub id (org/name){}", if *.is_file { ", and no GGUF file; name the directory of this file" } else { "" })]
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
    #[error(
        "{model} has neither model.safetensors nor model.safetensors.index.json nor shards such as \
         model-00001-of-00002.safetensors"
    )]
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
    /// A download broke off, and the next attempts did, too.
    #[error(
        "the download of {file} broke off after {} of {}: {reason}; start again, and it goes on from there",
        Bytes(*.done_bytes), Bytes(*.total_bytes)
    )]
    Interrupted {
        /// The file.
        file: String,
        /// What has come, bytes.
        done_bytes: u64,
        /// What should have come, bytes.
        total_bytes: u64,
        /// What happened.
        reason: String,
    },
    /// There is no room for what would have to be downloaded. Nothing was removed.
    #[error(
        "{} of {model} have to be downloaded to {}, and {room}; {} can be freed, as the rest is in use or was not downloaded \
         by Helion: make room (helion model list, helion model rm), raise --max-disk-space, choose fewer blocks, or name another --cache-dir",
        Bytes(*.needed_bytes), .cache.display(), Bytes(*.freeable_bytes)
    )]
    NoSpace {
        /// The model.
        model: String,
        /// The cache.
        cache: PathBuf,
        /// What is still to be downloaded, bytes.
        needed_bytes: u64,
        /// What there is room for.
        room: Room,
        /// What could be removed, bytes: files that Helion downloaded and nobody uses.
        freeable_bytes: u64,
    },
    /// The disk became full on the way.
    #[error(
        "the disk is full, or a quota is reached: {}: {source}; what is complete stays usable, and the download goes on from \
         here when there is room (helion model list and helion model rm show and remove models, --cache-dir names another disk)",
        .path.display()
    )]
    DiskFull {
        /// The file that couldn't grow.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A weight file's header can't be used.
    #[error("{file} of {model} is not a safetensors file: {reason}")]
    Header {
        /// The file.
        file: String,
        /// The model.
        model: String,
        /// What is wrong.
        reason: String,
    },
    /// A file that should be removed is in use.
    #[error("{model} is in use by another helion process ({file}): stop that first")]
    InUse {
        /// The model.
        model: String,
        /// One of the files.
        file: String,
    },
    /// There is nothing to remove.
    #[error("{} holds no {model}{}; helion model list shows what there is", .cache.display(), .revision.as_ref().map(|revision| format!(" at revision {revision:?}")).unwrap_or_default())]
    NothingCached {
        /// The model.
        model: String,
        /// The cache.
        cache: PathBuf,
        /// The revision that was asked for.
        revision: Option<String>,
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

/// What there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// The disk has so much that may be used, bytes.
    Disk(u64),
    /// The user's limit leaves so much, bytes.
    Limit(u64),
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Disk(bytes) => write!(f, "the disk has {} to spare", Bytes(bytes)),
            Self::Limit(bytes) => write!(f, "--max-disk-space leaves {}", Bytes(bytes)),
        }
    }
}

/// A number of bytes, for people.
#[derive(Debug, Clone, Copy)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        match units.into_iter().find(|(_, size)| self.0 >= *size) {
            Some((unit, size)) => write!(f, "{:.1} {unit}", self.0 as f64 / size as f64),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// What the file system said about a path: a full disk has an error of its own.
pub(super) fn io_error(path: impl Into<PathBuf>, source: io::Error) -> HubError {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let path = path.into();
    match source.kind() {
        StorageFull | QuotaExceeded | FileTooLarge => HubError::DiskFull { path, source },
        _ => HubError::Io { path, source },
    }
}

/// A refusing answer of the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// What its header `X-Error-Code` says.
    pub(super) code: Option<String>,
    /// How long it asks to wait.
    pub(super) retry_after: Option<Duration>,
}

/// A refusal, in terms of what the user can do. `revision` is given where it may be what is missing.
pub(super) fn refused(refusal: &Refusal, model: &str, revision: Option<&str>, endpoint: &str) -> HubError {
    let (model, endpoint) = (model.to_owned(), endpoint.to_owned());
    match (refusal.status, refusal.code.as_deref()) {
        // The hub answers 401 for what it hides from this user, too.
        (401 | 404, Some("RepoNotFound")) => HubError::NotFound { endpoint, model, revision: None },
        (404, _) => HubError::NotFound { endpoint, model, revision: revision.map(str::to_owned) },
        (401, _) => HubError::Unauthorized { endpoint, model },
        (403, _) => HubError::Forbidden { endpoint, model },
        (429, _) => HubError::RateLimited { endpoint, retry_after_s: refusal.retry_after.map(|pause| pause.as_secs()) },
        (status @ 500..=599, _) => {
            HubError::Unreachable { endpoint, reason: format!("it answers {status}, several times in a row") }
        }
        (status, _) => HubError::Hub { reason: format!("{endpoint} answers {status} for {model}") },
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        let text = |bytes| Bytes(bytes).to_string();
        assert_eq!([text(0), text(1_023), text(1_024), text(5 << 29)], ["0 bytes", "1023 bytes", "1.0 KiB", "2.5 GiB"]);
    }

    #[test]
    fn a_full_disk_is_told_apart() {
        let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded, io::ErrorKind::FileTooLarge];
        for kind in kinds {
            let error = io_error("/cache/blob", kind.into());
            assert!(matches!(error, HubError::DiskFull { .. }) && error.to_string().contains("full"), "{error}");
        }
        assert!(matches!(io_error("/x", io::ErrorKind::PermissionDenied.into()), HubError::Io { .. }));
    }
}
