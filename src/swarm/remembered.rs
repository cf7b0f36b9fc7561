//! Peers that were good recently, kept on disk, so that a node that is started without `--initial-peers` can come back.
//!
//! The file is text: the format and its version on the first line, then a Unix time and a multiaddress a line, newest first.
//! It is a cache: one that can't be read is ignored with a log line and written anew.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use libp2p::Multiaddr;

use super::addresses::split_peer;

const FORMAT: &str = "helion-peers 1";
/// Enough for some of them to be there still.
const MAX_PEERS: usize = 64;
/// Peers that weren't seen for so long are dropped.
const MAX_AGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// Far above what 64 lines take.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Addresses (with `/p2p`) that answered, with the Unix time in seconds of the last time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RememberedPeers {
    /// Newest first, one a peer.
    peers: Vec<(u64, Multiaddr)>,
}

/// The file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the file of remembered peers {path}: {source}")]
pub struct RememberError {
    path: PathBuf,
    source: io::Error,
}

impl RememberedPeers {
    /// Reads the file. One that is missing, stale or broken gives nobody; a broken one is named in the log.
    pub fn load(path: &Path, now_unix_s: u64) -> Self {
        let text = match fs::metadata(path).and_then(|metadata| match metadata.len() {
            length if length > MAX_FILE_BYTES => Err(io::Error::other(format!("it has {length} bytes"))),
            _ => fs::read_to_string(path),
        }) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Self::default(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "ignored the file of remembered peers; it will be written anew");
                return Self::default();
            }
        };
        Self::parse(&text, now_unix_s).unwrap_or_else(|reason| {
            tracing::warn!(path = %path.display(), reason, "ignored the file of remembered peers; it will be written anew");
            Self::default()
        })
    }

    fn parse(text: &str, now_unix_s: u64) -> Result<Self, String> {
        let mut lines = text.lines();
        match lines.next() {
            Some(FORMAT) => {}
            other => return Err(format!("it begins with {:?}, not {FORMAT:?}", other.unwrap_or_default())),
        }
        let mut remembered = Self::default();
        for (number, line) in lines.enumerate() {
            let entry = line.split_once(' ').and_then(|(seen, address)| {
                let address: Multiaddr = address.parse().ok()?;
                split_peer(&address)?;
                Some((seen.parse().ok()?, address))
            });
            let (seen, address) =
                entry.ok_or_else(|| format!("line {} is not a time and a multiaddress", number + 2))?;
            remembered.note(address, seen);
        }
        remembered.peers.retain(|(seen, _)| seen.saturating_add(MAX_AGE.as_secs()) > now_unix_s);
        Ok(remembered)
    }

    /// Notes that a peer answered at an address that ends in its `/p2p`; others are left out.
    pub fn note(&mut self, address: Multiaddr, now_unix_s: u64) {
        let Some((peer, _)) = split_peer(&address) else { return };
        let is_newer = |(seen, other): &(u64, Multiaddr)| {
            split_peer(other).is_some_and(|(other, _)| other == peer) && *seen > now_unix_s
        };
        if self.peers.iter().any(is_newer) {
            return;
        }
        self.peers.retain(|(_, other)| split_peer(other).is_some_and(|(other, _)| other != peer));
        let place = self.peers.partition_point(|(seen, _)| *seen > now_unix_s);
        self.peers.insert(place, (now_unix_s, address));
        self.peers.truncate(MAX_PEERS);
    }

    /// Whom to try, newest first.
    pub fn addresses(&self) -> Vec<Multiaddr> {
        self.peers.iter().map(|(_, address)| address.clone()).collect()
    }

    /// Writes the file, so that it is either the old one or the new one whatever happens.
    pub fn save(&self, path: &Path) -> Result<(), RememberError> {
        let mut text = format!("{FORMAT}\n");
        for (seen, address) in &self.peers {
            text.push_str(&format!("{seen} {address}\n"));
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}-{:08x}.new", std::process::id(), rand::random::<u32>()));
        let temporary = path.with_file_name(name);
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        parent
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::write(&temporary, text))
            .and_then(|()| fs::rename(&temporary, path))
            .map_err(|source| {
                let _ = fs::remove_file(&temporary);
                RememberError { path: path.to_owned(), source }
            })
    }
}

#[cfg(test)]
mod tests {
    use libp2p::PeerId;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn address(port: u16) -> Multiaddr {
        format!("/ip4/127.0.0.1/tcp/{port}/p2p/{}", PeerId::random()).parse().unwrap()
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/peers");
        let mut remembered = RememberedPeers::default();
        let (old, new) = (address(1), address(2));
        remembered.note(new.clone(), NOW);
        remembered.note(old.clone(), NOW - 10);
        remembered.save(&path).unwrap();
        let loaded = RememberedPeers::load(&path, NOW);
        assert_eq!(loaded, remembered);
        assert_eq!(loaded.addresses(), [new, old]);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn one_entry_a_peer_and_not_too_many() {
        let mut remembered = RememberedPeers::default();
        let (peer, first) = split_peer(&address(1)).unwrap();
        let moved: Multiaddr = "/ip4/127.0.0.1/tcp/9".parse().unwrap();
        remembered.note(first.with_p2p(peer).unwrap(), NOW);
        remembered.note(moved.clone().with_p2p(peer).unwrap(), NOW + 1);
        assert_eq!(remembered.addresses(), [moved.with_p2p(peer).unwrap()]);
        (0..100).for_each(|i| remembered.note(address(i), NOW + u64::from(i)));
        assert_eq!(remembered.addresses().len(), MAX_PEERS);
    }

    #[test]
    fn missing_stale_and_broken_files_give_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peers");
        assert_eq!(RememberedPeers::load(&path, NOW), RememberedPeers::default());
        let stale = format!("{FORMAT}\n{} {}\n", NOW - MAX_AGE.as_secs(), address(1));
        let broken =
            ["", "helion-peers 2\n", "helion-peers 1\nnonsense\n", "helion-peers 1\n5 /ip4/1.2.3.4/tcp/5\n", &stale];
        for text in broken {
            fs::write(&path, text).unwrap();
            assert_eq!(RememberedPeers::load(&path, NOW), RememberedPeers::default(), "{text}");
        }
        fs::write(&path, [0xff; 10]).unwrap();
        assert_eq!(RememberedPeers::load(&path, NOW), RememberedPeers::default());
    }
}
