//! One file from the hub into the cache.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};

use super::{Hub, HubError, HubOptions, Stage, Transfer, error::from_hub};

/// How long a download may stand still; a busy hub needs some seconds, and a dead connection never recovers.
const STALL: Duration = Duration::from_secs(60);

/// How often a waiting process looks whether another one has finished the same file, and a download is checked for
/// standing still.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// A file to be downloaded.
pub(super) struct Download<'a> {
    pub(super) model: &'a str,
    pub(super) hub: &'a Hub,
    pub(super) options: &'a HubOptions,
    pub(super) file: &'a str,
    /// 0 where it isn't known.
    pub(super) total_bytes: u64,
    /// Where the file will be.
    pub(super) path: &'a Path,
}

impl Download<'_> {
    /// Downloads the file, or waits for the process that does so already.
    pub(super) async fn run(&self) -> Result<(), HubError> {
        let _lock = self.lock().await?;
        if self.path.is_file() {
            return Ok(());
        }
        let activity = Arc::new(Activity {
            started: Instant::now(),
            last_ms: AtomicU64::new(0),
            file: self.file.to_owned(),
            total_bytes: self.total_bytes,
            options: self.options.clone(),
        });
        let download = self.hub.repository.download_file();
        let download = download.filename(self.file).revision(self.hub.commit.clone()).progress(Arc::clone(&activity));
        tokio::select! {
            downloaded = download.send() => match downloaded {
                Ok(_) => Ok(()),
                Err(error) => Err(from_hub(&error, self.model, &self.hub.endpoint)),
            },
            () = activity.stalled() => {
                Err(HubError::Stalled { file: self.file.to_owned(), seconds: STALL.as_secs() })
            }
        }
    }

    /// Keeps other processes from downloading the same file; they wait, and find it done. (The client library's own
    /// lock gives up after ten seconds.) Given back when it is dropped, or when the process dies.
    async fn lock(&self) -> Result<File, HubError> {
        let dir = &self.hub.state_dir;
        let path = dir.join(format!("{}.lock", self.file));
        let failed = |source| HubError::Io { path: path.clone(), source };
        fs::create_dir_all(dir).map_err(failed)?;
        let file = File::create(&path).map_err(failed)?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOOK_EVERY).await,
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
        }
    }
}

/// Hands progress on, and notices when there is none.
struct Activity {
    started: Instant,
    /// When something came last, in milliseconds from the start.
    last_ms: AtomicU64,
    file: String,
    total_bytes: u64,
    options: HubOptions,
}

impl Activity {
    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Returns when nothing has come for [`STALL`].
    async fn stalled(&self) {
        let stall_ms = u64::try_from(STALL.as_millis()).unwrap_or(u64::MAX);
        while self.elapsed_ms().saturating_sub(self.last_ms.load(Ordering::Relaxed)) < stall_ms {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn report(&self, done_bytes: u64) {
        let total_bytes = self.total_bytes.max(done_bytes);
        self.options.report(&Transfer { file: &self.file, stage: Stage::Downloading, done_bytes, total_bytes });
    }
}

impl ProgressHandler for Activity {
    fn on_progress(&self, event: &ProgressEvent) {
        self.last_ms.store(self.elapsed_ms(), Ordering::Relaxed);
        match event {
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                files.iter().for_each(|file| self.report(file.bytes_completed));
            }
            ProgressEvent::Download(DownloadEvent::AggregateProgress { bytes_completed, .. }) => {
                self.report(*bytes_completed);
            }
            ProgressEvent::Download(DownloadEvent::Start { .. } | DownloadEvent::Complete)
            | ProgressEvent::Upload(_) => {}
        }
    }
}

/// Removes a file of the cache: the link, and the blob behind it.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let blob = fs::canonicalize(path)?;
    fs::remove_file(path)?;
    match fs::remove_file(blob) {
        // On systems without links the file was the blob.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
