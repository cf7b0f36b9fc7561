//! Names of the pages that a session begins with, as they travel: what lets sessions of one client share pages on a hop.
//!
//! The client hashes the tokens of each page, together with all tokens in front of them and a secret of its own, so a hop learns
//! nothing from a name but that two are equal. What a page's keys and values depend on besides its tokens is the *context*, the same
//! for all pages of a session on one hop. A hop adds the client's peer id, which is authenticated, and what it knows itself
//! (`node/session/prefix.rs`): names that were seen elsewhere are worth nothing to another peer.

use bytes::Bytes;

use super::proto::session as proto;

/// Bytes of a page's name.
pub const KEY_BYTES: usize = 16;

/// Pages that one frame names at most: 32 KiB of a header that may have 64, for 32,768 tokens of 16 a page.
pub const MOST_KEYS: usize = 2048;

/// Names of the first pages of lane 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixNames {
    /// A hash of what the pages depend on besides their tokens.
    pub context: [u8; 32],
    /// Of each page.
    pub keys: Vec<[u8; KEY_BYTES]>,
    /// What of the sequence's length its positions depend on; 0 where nothing does.
    pub length_class: u64,
    /// Tokens of a page.
    pub page_tokens: u32,
}

/// Why names can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// The context is no hash.
    #[error("the prefix's context has {0} bytes, not 32")]
    BadContext(usize),
    /// The names are cut off.
    #[error("the prefix's names have {0} bytes, and one takes {KEY_BYTES}")]
    BadKeys(usize),
    /// Too many.
    #[error("the prefix names {0} pages, and {MOST_KEYS} is the most")]
    TooMany(usize),
}

impl PrefixNames {
    /// Reads the names of a frame.
    ///
    /// # Errors
    /// See [`PrefixError`].
    pub fn from_wire(wire: &proto::Prefix) -> Result<Self, PrefixError> {
        let context = wire.context.as_ref().try_into().map_err(|_| PrefixError::BadContext(wire.context.len()))?;
        let (keys, rest) = wire.keys.as_chunks::<KEY_BYTES>();
        if !rest.is_empty() {
            return Err(PrefixError::BadKeys(wire.keys.len()));
        }
        if keys.len() > MOST_KEYS {
            return Err(PrefixError::TooMany(keys.len()));
        }
        Ok(Self { context, keys: keys.to_vec(), length_class: wire.length_class, page_tokens: wire.page_tokens })
    }

    /// As a frame carries them.
    pub fn to_wire(&self) -> proto::Prefix {
        proto::Prefix {
            context: Bytes::copy_from_slice(&self.context),
            keys: self.keys.concat().into(),
            length_class: self.length_class,
            page_tokens: self.page_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_wrong_ones_are_refused() {
        let names = PrefixNames { context: [1; 32], keys: vec![[2; 16], [3; 16]], length_class: 4, page_tokens: 16 };
        let wire = names.to_wire();
        assert_eq!(PrefixNames::from_wire(&wire), Ok(names));
        let with = |change: &dyn Fn(&mut proto::Prefix)| {
            let mut wire = wire.clone();
            change(&mut wire);
            PrefixNames::from_wire(&wire).unwrap_err()
        };
        assert_eq!(with(&|wire| wire.context = Bytes::new()), PrefixError::BadContext(0));
        assert_eq!(with(&|wire| wire.keys = vec![0; 33].into()), PrefixError::BadKeys(33));
        let many = (MOST_KEYS + 1) * KEY_BYTES;
        assert_eq!(with(&|wire| wire.keys = vec![0; many].into()), PrefixError::TooMany(MOST_KEYS + 1));
    }
}
