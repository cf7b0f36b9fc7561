//! A peer's identity: the ed25519 key whose hash is its peer id.
//!
//! The key file holds libp2p's protobuf encoding of the private key, the format that Petals and the libp2p tools use. Whoever
//! holds the file can speak as that peer, so it is made with mode 0600, and a file that is broken is an error and never
//! replaced: silently getting a new peer id would cut a node off from everything that was said to or about the old one.
//!
//! Two processes with one identity would each look like the other's ghost (their announcements take turns, connections of
//! one are closed in favour of the other's), so [`Identity::load`] takes an advisory lock on the key file and keeps it for as
//! long as the value lives.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use libp2p::{
    PeerId,
    identity::{Keypair, PublicKey},
};

/// An encoded ed25519 key is 68 bytes; anything beyond this is some other file.
const MAX_KEY_FILE_BYTES: u64 = 4096;

/// A key pair, and the lock on the file it came from.
#[derive(Debug)]
pub struct Identity {
    keypair: Keypair,
    /// Dropping it gives the identity back.
    lock: Option<File>,
}

/// Why an identity could not be loaded or made.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// There is no such file.
    #[error("there is no identity file {path}: make one with `helion identity new {path}`")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// [`Identity::create_new`] never overwrites.
    #[error("the identity file {path} exists already and is not overwritten: choose another path, or move it away")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file's content is not a private key.
    #[error(
        "the identity file {path} is broken ({reason}); it is left as it is: restore it from a copy, or move it away to get a new identity"
    )]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process runs with this identity.
    #[error(
        "the identity {path} is in use by another process: stop that one, or give this one its own with --identity-path"
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot {action} the identity file {path}: {source}")]
    Io {
        /// `read`, `create`, ….
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}

impl Identity {
    /// An identity that lives as long as this value, for clients and tests.
    pub fn ephemeral() -> Self {
        Self { keypair: Keypair::generate_ed25519(), lock: None }
    }

    /// Loads the identity in `path`, or makes one there (mode 0600, parent directories included) if there is no such file,
    /// and locks it.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        match Self::load(path) {
            Err(IdentityError::Missing { .. }) => {}
            other => return other,
        }
        match write_new_key(path, &Keypair::generate_ed25519()) {
            // Another process made it in between: that key is as good as ours.
            Ok(()) | Err(IdentityError::Exists { .. }) => Self::load(path),
            Err(error) => Err(error),
        }
    }

    /// Loads the identity in `path` and locks it.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        let (keypair, file) = read_key(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { keypair, lock: Some(file) }),
            Err(TryLockError::WouldBlock) => Err(IdentityError::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(source)) if source.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!(path = %path.display(), "this file system has no locks: make sure that only one process uses this identity");
                Ok(Self { keypair, lock: Some(file) })
            }
            Err(TryLockError::Error(source)) => {
                Err(IdentityError::Io { action: "lock", path: path.to_owned(), source })
            }
        }
    }

    /// Reads the identity in `path` without the lock: to look at it while a node runs with it.
    pub fn read(path: &Path) -> Result<Self, IdentityError> {
        let (keypair, _file) = read_key(path)?;
        Ok(Self { keypair, lock: None })
    }

    /// Makes a new identity in `path`, which must not exist, and locks it.
    pub fn create_new(path: &Path) -> Result<Self, IdentityError> {
        write_new_key(path, &Keypair::generate_ed25519())?;
        Self::load(path)
    }

    /// The hash of the public key: this peer's name in the swarm.
    pub fn peer_id(&self) -> PeerId {
        self.keypair.public().to_peer_id()
    }

    /// Whether it came from a file and is this process's: other runs had it before, or will have it.
    pub fn is_stored(&self) -> bool {
        self.lock.is_some()
    }

    /// The key pair itself, to sign with.
    pub fn keypair(&self) -> &Keypair {
        &self.keypair
    }

    /// The public half.
    pub fn public_key(&self) -> PublicKey {
        self.keypair.public()
    }
}

fn read_key(path: &Path) -> Result<(Keypair, File), IdentityError> {
    let io_error = |source| IdentityError::Io { action: "read", path: path.to_owned(), source };
    let broken = |reason: String| IdentityError::Broken { path: path.to_owned(), reason };
    let file = File::open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => IdentityError::Missing { path: path.to_owned() },
        _ => io_error(source),
    })?;
    let metadata = file.metadata().map_err(io_error)?;
    if !metadata.is_file() {
        return Err(broken("it is not a regular file".into()));
    }
    let mut bytes = Vec::new();
    (&file).take(MAX_KEY_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io_error)?;
    if bytes.is_empty() {
        return Err(broken("it is empty".into()));
    }
    if bytes.len() as u64 > MAX_KEY_FILE_BYTES {
        return Err(broken(format!("it has more than {MAX_KEY_FILE_BYTES} bytes, which no private key has")));
    }
    let keypair = Keypair::from_protobuf_encoding(&bytes)
        .map_err(|error| broken(format!("{} bytes that are not a libp2p private key: {error}", bytes.len())))?;
    warn_if_others_can_read(path, &metadata);
    Ok((keypair, file))
}

#[cfg(unix)]
fn warn_if_others_can_read(path: &Path, metadata: &fs::Metadata) {
    use std::os::unix::fs::PermissionsExt;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let path = path.display();
        tracing::warn!(%path, "others can read this identity file (mode {mode:o}): whoever reads it can speak as this peer; `chmod 600 {path}`");
    }
}

#[cfg(not(unix))]
fn warn_if_others_can_read(_path: &Path, _metadata: &fs::Metadata) {}

/// Writes the key so that `path` either doesn't exist or is complete, whatever happens in between, and is never overwritten:
/// a temporary file next to it, then a hard link, which fails if the name is taken.
fn write_new_key(path: &Path, keypair: &Keypair) -> Result<(), IdentityError> {
    let io_error = |action| move |source| IdentityError::Io { action, path: path.to_owned(), source };
    let exists = || IdentityError::Exists { path: path.to_owned() };
    if path.symlink_metadata().is_ok() {
        return Err(exists());
    }
    let bytes = keypair.to_protobuf_encoding().map_err(|error| io_error("encode")(io::Error::other(error)))?;
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(io_error("create the directory of"))?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}-{:016x}.new", std::process::id(), rand::random::<u64>()));
    let temporary = path.with_file_name(name);
    let written = write_private(&temporary, &bytes).and_then(|()| match fs::hard_link(&temporary, path) {
        // Some file systems have no hard links. There the file itself is made exclusively, if not at one stroke.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => write_private(path, &bytes),
        other => other,
    });
    // Best effort: a left-over is private to the user and has a name that says what it is.
    let _ = fs::remove_file(&temporary);
    written.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => exists(),
        _ => io_error("create")(source),
    })
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_created_is_loaded_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/node.key");
        let created = Identity::load_or_create(&path).unwrap().peer_id();
        assert_eq!(Identity::load(&path).unwrap().peer_id(), created);
        assert_eq!(Identity::load_or_create(&path).unwrap().peer_id(), created);
        let left: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["node.key"]);
    }

    #[cfg(unix)]
    #[test]
    fn the_file_is_private_to_the_user() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.key");
        drop(Identity::create_new(&path).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn new_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.key");
        let first = Identity::create_new(&path).unwrap().peer_id();
        assert!(matches!(Identity::create_new(&path), Err(IdentityError::Exists { .. })));
        assert_eq!(Identity::read(&path).unwrap().peer_id(), first);
    }

    #[test]
    fn a_broken_file_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.key");
        let good = Keypair::generate_ed25519().to_protobuf_encoding().unwrap();
        for content in [&b""[..], b"not a key", &good[..good.len() - 1], &[0; 5000]] {
            fs::write(&path, content).unwrap();
            for result in [Identity::load_or_create(&path), Identity::load(&path), Identity::read(&path)] {
                let message = result.unwrap_err().to_string();
                assert!(message.contains("node.key") && message.contains("broken"), "{message}");
            }
            assert_eq!(fs::read(&path).unwrap(), content);
        }
        let message = Identity::load_or_create(dir.path()).unwrap_err().to_string();
        assert!(message.contains("not a regular file"), "{message}");
    }

    #[test]
    fn an_identity_is_used_by_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.key");
        let held = Identity::load_or_create(&path).unwrap();
        for result in [Identity::load(&path), Identity::load_or_create(&path)] {
            assert!(matches!(result, Err(IdentityError::InUse { .. })));
        }
        assert_eq!(Identity::read(&path).unwrap().peer_id(), held.peer_id());
        drop(held);
        Identity::load(&path).unwrap();
    }

    #[test]
    fn a_missing_file_names_the_way_out() {
        let message = Identity::load(Path::new("/nonexistent/node.key")).unwrap_err().to_string();
        assert!(message.contains("helion identity new /nonexistent/node.key"), "{message}");
    }
}
