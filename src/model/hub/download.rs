//! One file from the hub into the cache, from where an earlier attempt stopped.
//!
//! Bytes of different versions are never joined: the file that grows is named by the hash of what it is to become, the
//! address names the commit, and the whole is hashed before it gets its name. Where what an earlier attempt left turns out
//! wrong (another tool may have written it, or the system lost its last pages), it is fetched anew, once. A server that
//! doesn't do ranges makes it start anew, too. Small files, which have no SHA-256 on the hub, always do.

use std::{fs, fs::File, io};

use reqwest::{Response, StatusCode};

use super::{
    HubError, HubOptions, Stage, Transfer,
    access::{Access, Ask, chunk, first_byte},
    cache::RepositoryCache,
    error::io_error,
    listing,
    partial::Partial,
    retry::{Failure, Retry},
    usage,
};
use crate::model::fingerprint::FileHashes;

/// Bytes that are collected before they are written: a write of its own thread for every packet would cost more than the
/// packet, and no more than this is lost when the process is killed.
const WRITE_BYTES: usize = 1 << 20;

/// A file to be downloaded.
pub(super) struct Download<'a> {
    pub(super) access: &'a Access,
    pub(super) cache: &'a RepositoryCache,
    pub(super) commit: &'a str,
    pub(super) file: &'a listing::File,
    pub(super) options: &'a HubOptions,
}

/// How a file came to be where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was downloaded, and its size and hash are right.
    Downloaded,
    /// Somebody else had put it there.
    Found,
}

impl Download<'_> {
    /// Downloads the file, or waits for the process that does so already.
    pub(super) async fn run(&self) -> Result<Outcome, HubError> {
        let blob = self.file.blob(self.commit);
        let (path, blobs) = (self.cache.blob(&blob), self.cache.blobs());
        let lock = self.lock(&blob).await?;
        let outcome = if path.is_file() {
            Outcome::Found
        } else {
            fs::create_dir_all(&blobs).map_err(|source| io_error(&blobs, source))?;
            if listing::is_weights(&self.file.name) {
                usage::mark_fetched(self.cache, &blob).map_err(|source| io_error(&path, source))?;
            }
            let partial = self.whole(&blob, lock).await?;
            let (to, sha256) = (path.clone(), partial.sha256());
            let hashes = self.options.hash_cache.clone();
            let finishing = tokio::task::spawn_blocking(move || {
                partial.complete(&to)?;
                if let Some(state) = hashes {
                    FileHashes::at(state).keep(&to, sha256);
                }
                Ok(())
            });
            finishing
                .await
                .unwrap_or_else(|died| Err(io::Error::other(died)))
                .map_err(|source| io_error(&path, source))?;
            Outcome::Downloaded
        };
        let linked = self.cache.link(self.commit, &self.file.name, &blob);
        linked.map_err(|source| io_error(self.cache.snapshot(self.commit).join(&self.file.name), source))?;
        Ok(outcome)
    }

    /// Keeps other processes from downloading the same content; they wait, and find it done. Given back when it is
    /// dropped, or when the process dies.
    async fn lock(&self, blob: &str) -> Result<File, HubError> {
        let path = self.cache.download_lock(blob);
        let made = fs::create_dir_all(self.cache.locks()).and_then(|()| File::create(&path));
        let file = made.map_err(|source| io_error(&path, source))?;
        usage::lock(&path, || file.try_lock()).await?;
        Ok(file)
    }

    /// The whole content, checked.
    async fn whole(&self, blob: &str, lock: File) -> Result<Partial, HubError> {
        let mut partial = self.open(blob, lock).await?;
        loop {
            partial = self.fill(partial).await?;
            let Some(reason) = self.fault(&partial) else { return Ok(partial) };
            if !partial.is_inherited() {
                let path = partial.path().to_owned();
                partial.discard().map_err(|source| io_error(path, source))?;
                return Err(self.damaged(reason));
            }
            tracing::warn!(file = self.file.name, reason, "what an earlier download left is wrong: starting anew");
            partial = on_disk(partial, Partial::restart).await?;
        }
    }

    /// What an earlier attempt left, where it is of use.
    async fn open(&self, blob: &str, lock: File) -> Result<Partial, HubError> {
        let path = self.cache.incomplete(blob);
        let (name, total_bytes, options) = (self.file.name.clone(), self.total_bytes(), self.options.clone());
        let opening = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || {
                let report = |done_bytes| {
                    options.report(&Transfer { file: &name, stage: Stage::Hashing, done_bytes, total_bytes });
                };
                Partial::open(&path, lock, &report)
            })
        };
        let opened = opening.await.unwrap_or_else(|died| Err(io::Error::other(died)));
        let partial = opened.map_err(|source| io_error(path, source))?;
        let of_use = self.file.sha256().is_some() && self.file.size.is_some_and(|size| partial.length() <= size);
        if of_use || partial.length() == 0 { Ok(partial) } else { on_disk(partial, Partial::restart).await }
    }

    /// Fetches what is missing, with as many attempts as make sense.
    async fn fill(&self, mut partial: Partial) -> Result<Partial, HubError> {
        let url = self.access.file_url(self.cache.model(), self.commit, &self.file.name);
        let mut retry = Retry::default();
        // Without ranges every attempt starts anew: only one that comes further than all before is progress.
        let mut reached = partial.length();
        while self.file.size.is_none_or(|size| partial.length() < size) {
            let before = partial.length();
            let ask = Ask { model: self.cache.model(), revision: None, url: &url, from: before, to: None };
            let got = self.access.get(&ask, &mut retry).await;
            let mut response = got.map_err(|error| self.interrupted(error, before))?;
            if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
                // The server's file is shorter than the list says: for whoever checks the size.
                return Ok(partial);
            }
            match first_byte(&response, before) {
                Some(first) if first == before => {}
                Some(_) => partial = on_disk(partial, Partial::restart).await?,
                None => return Err(self.damaged("the server sends another part than was asked for".to_owned())),
            }
            let start = partial.length();
            let failure;
            (partial, failure) = self.drain(partial, &mut response).await?;
            if partial.length() > reached {
                reached = partial.length();
                retry.progressed();
            }
            let failure = match (failure, self.file.size) {
                (Some(failure), _) => failure,
                (None, Some(size)) if partial.length() < size && !is_whole(&response, partial.length() - start) => {
                    Failure::Connection("the connection was closed early".to_owned())
                }
                (None, _) => break,
            };
            let paused = self.access.pause(&ask, &failure, &mut retry).await;
            paused.map_err(|error| self.interrupted(error, partial.length()))?;
        }
        Ok(partial)
    }

    /// Takes what the server sends, until it has sent all or breaks off.
    async fn drain(
        &self,
        mut partial: Partial,
        response: &mut Response,
    ) -> Result<(Partial, Option<Failure>), HubError> {
        let mut buffer = Vec::with_capacity(WRITE_BYTES);
        loop {
            let piece = chunk(response).await;
            if let Ok(Some(piece)) = &piece {
                buffer.extend_from_slice(piece);
                let length = partial.length() + buffer.len() as u64;
                if self.file.size.is_some_and(|size| length > size) {
                    let path = partial.path().to_owned();
                    partial.discard().map_err(|source| io_error(path, source))?;
                    return Err(
                        self.damaged(format!("the server sends more than the {} bytes it has", self.total_bytes()))
                    );
                }
            }
            let goes_on = matches!(piece, Ok(Some(_)));
            if !goes_on || buffer.len() >= WRITE_BYTES {
                let full = std::mem::replace(&mut buffer, Vec::with_capacity(WRITE_BYTES));
                partial = on_disk(partial, move |partial| partial.append(&full)).await?;
            }
            let done_bytes = partial.length() + buffer.len() as u64;
            let (file, total_bytes) = (&self.file.name, self.total_bytes().max(done_bytes));
            self.options.report(&Transfer { file, stage: Stage::Downloading, done_bytes, total_bytes });
            match piece {
                Ok(Some(_)) => {}
                Ok(None) => return Ok((partial, None)),
                Err(failure) => return Ok((partial, Some(failure))),
            }
        }
    }

    /// What is wrong with a content that should be whole.
    fn fault(&self, partial: &Partial) -> Option<String> {
        let size = partial.length();
        match (self.file.size, self.file.sha256()) {
            (Some(expected), _) if size != expected => Some(format!("it has {size} bytes instead of {expected}")),
            (_, Some(expected)) if partial.sha256() != expected => {
                Some("its SHA-256 is not the one of the hub's file list".to_owned())
            }
            _ => None,
        }
    }

    fn total_bytes(&self) -> u64 {
        self.file.size.unwrap_or(0)
    }

    fn damaged(&self, reason: String) -> HubError {
        HubError::Damaged { file: self.file.name.clone(), model: self.cache.model().to_owned(), reason }
    }

    /// A connection's error, where a part of the file is there already.
    fn interrupted(&self, error: HubError, done_bytes: u64) -> HubError {
        match error {
            HubError::Unreachable { reason, .. } if done_bytes > 0 => HubError::Interrupted {
                file: self.file.name.clone(),
                done_bytes,
                total_bytes: self.total_bytes(),
                reason,
            },
            error => error,
        }
    }
}

/// Whether an answer that said its length was that long.
fn is_whole(response: &Response, came_bytes: u64) -> bool {
    let header = response.headers().get(reqwest::header::CONTENT_LENGTH);
    header.and_then(|length| length.to_str().ok()?.parse().ok()) == Some(came_bytes)
}

/// Does something that blocks with a content, on a thread of its own. A future that is dropped meanwhile leaves the
/// content, and the lock that it holds, to that thread.
async fn on_disk(
    mut partial: Partial,
    act: impl FnOnce(&mut Partial) -> io::Result<()> + Send + 'static,
) -> Result<Partial, HubError> {
    let path = partial.path().to_owned();
    let acting = tokio::task::spawn_blocking(move || act(&mut partial).map(|()| partial));
    acting.await.unwrap_or_else(|died| Err(io::Error::other(died))).map_err(|source| io_error(path, source))
}
