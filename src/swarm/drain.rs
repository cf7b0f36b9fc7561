//! Asking a node from elsewhere to leave: who may, and how it is proved.
//!
//! Whoever holds a node's key is its owner. A process can't connect to its own peer id, so the request is sent by another
//! identity and signed with the node's key. It says until when it counts, so that a copy of it is soon worth nothing.

use libp2p::identity::{Keypair, PublicKey, SigningError};

use super::proto::rpc;

/// Keeps the signature from being valid for anything else that the same key signs.
const DOMAIN: &[u8] = b"helion-drain-v1\0";

/// How long a request counts: enough for clocks that differ.
const LIFETIME_MS: u64 = 5 * 60 * 1000;

/// Why a request to leave is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DrainError {
    /// It is not the owner's.
    #[error("the request to leave is not signed with this node's key")]
    NotSigned,
    /// Too old, or meant to count for too long.
    #[error("the request to leave does not count now: check the clocks of both machines")]
    NotNow,
}

fn signed_bytes(expires_unix_ms: u64) -> Vec<u8> {
    [DOMAIN, &expires_unix_ms.to_le_bytes()].concat()
}

/// A request that counts from now on, signed with the node's `key`.
///
/// # Errors
/// Where the key can't sign, which an ed25519 key always can.
pub fn sign(key: &Keypair, now_unix_ms: u64) -> Result<rpc::DrainRequest, SigningError> {
    let expires_unix_ms = now_unix_ms.saturating_add(LIFETIME_MS);
    let signature = key.sign(&signed_bytes(expires_unix_ms))?.into();
    Ok(rpc::DrainRequest { expires_unix_ms, signature })
}

/// Checks a request with the node's own public key.
///
/// # Errors
/// See [`DrainError`].
pub fn verify(request: &rpc::DrainRequest, key: &PublicKey, now_unix_ms: u64) -> Result<(), DrainError> {
    if !key.verify(&signed_bytes(request.expires_unix_ms), &request.signature) {
        return Err(DrainError::NotSigned);
    }
    let latest = now_unix_ms.saturating_add(2 * LIFETIME_MS);
    if (now_unix_ms..=latest).contains(&request.expires_unix_ms) { Ok(()) } else { Err(DrainError::NotNow) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_owner_may_ask_and_only_for_a_while() {
        let (owner, stranger) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let now = 1_000_000_000;
        let request = sign(&owner, now).unwrap();
        assert_eq!(verify(&request, &owner.public(), now), Ok(()));
        assert_eq!(verify(&request, &owner.public(), now + LIFETIME_MS + 1), Err(DrainError::NotNow));
        assert_eq!(verify(&sign(&stranger, now).unwrap(), &owner.public(), now), Err(DrainError::NotSigned));
        let prolonged = rpc::DrainRequest { expires_unix_ms: u64::MAX, ..request };
        assert_eq!(verify(&prolonged, &owner.public(), now), Err(DrainError::NotSigned));
    }
}
