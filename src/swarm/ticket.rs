//! Tickets: what a client allows one hop to do in one session.
//!
//! The client signs one ticket a hop. A hop believes nothing else about a session: the ticket names the only peer whose
//! steps count, the only peer that outputs go to, the blocks, the model and the limits. A ticket is bound to its hop, so it
//! can't be shown to another one, and to an epoch, so that one of an old route is worth nothing in a new one.

use std::{fmt, ops::Range};

use libp2p::{
    PeerId,
    identity::{Keypair, PublicKey},
};
use prost::Message;

use crate::{
    model::{Dtype, fingerprint::Fingerprint},
    swarm::{
        WireCodec,
        proto::{announcement, session as proto},
    },
};

/// Keeps a ticket's signature from being valid for anything else that the same key signs.
const DOMAIN: &[u8] = b"helion-ticket-v1\0";

/// How far two honest clocks may differ: an expiry is not enforced more strictly than that.
const CLOCK_LEEWAY_MS: u64 = 5 * 60 * 1000;

/// A session's name: 128 random bits, so that it can't be guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId([u8; 16]);

impl SessionId {
    /// A fresh random id.
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// Reads the 16 bytes of a frame's `session` field; `None` for any other length.
    pub fn from_wire(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The bytes of a frame's `session` field.
    pub fn to_wire(self) -> bytes::Bytes {
        bytes::Bytes::copy_from_slice(&self.0)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a session may use on a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionLimits {
    /// Lanes of the session.
    pub max_lanes: u32,
    /// Tokens in the KV cache, over all lanes.
    pub max_tokens: u64,
    /// Steps under way at a time: the session's credit.
    pub max_in_flight: u32,
    /// Rows of one step.
    pub max_step_tokens: u32,
}

impl SessionLimits {
    /// The most that a ticket may ask of this version, whatever a node's settings: what a frame and a batch can carry.
    pub const LARGEST: Self = Self { max_lanes: 64, max_tokens: 1 << 24, max_in_flight: 16, max_step_tokens: 4096 };
}

/// The signed content of an `Open` frame. See the module's docs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// The session it is for.
    pub session: SessionId,
    /// The route's epoch.
    pub epoch: u64,
    /// Who signed it, and the only peer whose control frames count.
    pub client: PeerId,
    /// The hop that it is for.
    pub hop: PeerId,
    /// The only peer whose steps count.
    pub upstream: PeerId,
    /// Where outputs go; the client itself behind the last hop.
    pub downstream: PeerId,
    /// The swarm's prefix.
    pub dht_prefix: String,
    /// The model, bit for bit.
    pub fingerprint: Fingerprint,
    /// The blocks to run, half-open.
    pub blocks: Range<usize>,
    /// How hidden states travel, and what the residual is rounded to after every block.
    pub wire_dtype: Dtype,
    /// How they are packed.
    pub wire_codec: WireCodec,
    /// What the session may use.
    pub limits: SessionLimits,
    /// The only peer that may hand its session over to the hop, where the hop takes the place of one that leaves.
    pub take_over_from: Option<PeerId>,
    /// When it may no longer be used to open, Unix milliseconds.
    pub expires_unix_ms: u64,
}

/// Why an `Open` frame's ticket is not believed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TicketError {
    /// Not a ticket at all.
    #[error("the ticket can't be read: {0}")]
    Unreadable(String),
    /// A field makes no sense.
    #[error("the ticket's {field} is {value}")]
    BadField {
        /// Which.
        field: &'static str,
        /// What it says.
        value: String,
    },
    /// The signature is not that of the client it names.
    #[error("the ticket is not signed by its client {0}")]
    NotSigned(PeerId),
    /// Too old.
    #[error("the ticket expired {0} s ago: check the clocks of both machines")]
    Expired(u64),
}

impl Ticket {
    /// Signs the ticket with the client's key. Everything else of the frame stays empty.
    ///
    /// # Errors
    /// Where the key can't sign, which an ed25519 key always can.
    pub fn sign(&self, key: &Keypair) -> Result<proto::Open, libp2p::identity::SigningError> {
        let ticket = proto::Ticket {
            session: self.session.to_wire(),
            epoch: self.epoch,
            client: self.client.to_bytes().into(),
            hop: self.hop.to_bytes().into(),
            upstream: self.upstream.to_bytes().into(),
            downstream: self.downstream.to_bytes().into(),
            dht_prefix: self.dht_prefix.clone(),
            fingerprint: bytes::Bytes::copy_from_slice(&self.fingerprint.0),
            start: self.blocks.start as u32,
            end: self.blocks.end as u32,
            wire_dtype: announcement::Dtype::from(self.wire_dtype).into(),
            wire_codec: announcement::WireCodec::from(self.wire_codec).into(),
            max_lanes: self.limits.max_lanes,
            max_tokens: self.limits.max_tokens,
            max_in_flight: self.limits.max_in_flight,
            max_step_tokens: self.limits.max_step_tokens,
            expires_unix_ms: self.expires_unix_ms,
            take_over_from: self.take_over_from.map(|peer| peer.to_bytes().into()).unwrap_or_default(),
        }
        .encode_to_vec();
        let signature = key.sign(&[DOMAIN, &ticket].concat())?;
        Ok(proto::Open {
            ticket: ticket.into(),
            public_key: key.public().encode_protobuf().into(),
            signature: signature.into(),
            ..Default::default()
        })
    }

    /// Reads and checks the ticket of an `Open` frame. That the client is the peer that sent it, and that the hop is
    /// oneself, is for the caller to check.
    ///
    /// # Errors
    /// See [`TicketError`].
    pub fn verify(open: &proto::Open, now_unix_ms: u64) -> Result<Self, TicketError> {
        let wire = proto::Ticket::decode(open.ticket.clone()).map_err(|e| TicketError::Unreadable(e.to_string()))?;
        let ticket = Self::from_wire(wire)?;
        let key = PublicKey::try_decode_protobuf(&open.public_key)
            .map_err(|e| TicketError::Unreadable(format!("public key: {e}")))?;
        let signed = [DOMAIN, &open.ticket].concat();
        if key.to_peer_id() != ticket.client || !key.verify(&signed, &open.signature) {
            return Err(TicketError::NotSigned(ticket.client));
        }
        let enforced = ticket.expires_unix_ms.saturating_add(CLOCK_LEEWAY_MS);
        if enforced < now_unix_ms {
            return Err(TicketError::Expired((now_unix_ms - ticket.expires_unix_ms) / 1000));
        }
        Ok(ticket)
    }

    fn from_wire(wire: proto::Ticket) -> Result<Self, TicketError> {
        let bad = |field, value: String| TicketError::BadField { field, value };
        let peer =
            |field, bytes: &[u8]| PeerId::from_bytes(bytes).map_err(|_| bad(field, format!("{} bytes", bytes.len())));
        if wire.start >= wire.end {
            return Err(bad("block range", format!("{}:{}", wire.start, wire.end)));
        }
        for (field, value) in [
            ("max_lanes", u64::from(wire.max_lanes)),
            ("max_tokens", wire.max_tokens),
            ("max_in_flight", u64::from(wire.max_in_flight)),
            ("max_step_tokens", u64::from(wire.max_step_tokens)),
        ] {
            if value == 0 {
                return Err(bad(field, "0".to_owned()));
            }
        }
        Ok(Self {
            session: SessionId::from_wire(&wire.session)
                .ok_or_else(|| bad("session id", format!("{} bytes, not 16", wire.session.len())))?,
            epoch: wire.epoch,
            client: peer("client", &wire.client)?,
            hop: peer("hop", &wire.hop)?,
            upstream: peer("upstream", &wire.upstream)?,
            downstream: peer("downstream", &wire.downstream)?,
            fingerprint: Fingerprint(
                wire.fingerprint
                    .as_ref()
                    .try_into()
                    .map_err(|_| bad("fingerprint", format!("{} bytes, not 32", wire.fingerprint.len())))?,
            ),
            blocks: wire.start as usize..wire.end as usize,
            wire_dtype: wire.wire_dtype().try_into().map_err(|_| bad("wire dtype", wire.wire_dtype.to_string()))?,
            wire_codec: announcement::WireCodec::try_from(wire.wire_codec)
                .map_err(|_| bad("wire codec", format!("{}, which this version doesn't know", wire.wire_codec)))?
                .into(),
            limits: SessionLimits {
                max_lanes: wire.max_lanes,
                max_tokens: wire.max_tokens,
                max_in_flight: wire.max_in_flight,
                max_step_tokens: wire.max_step_tokens,
            },
            take_over_from: (!wire.take_over_from.is_empty())
                .then(|| peer("take_over_from", &wire.take_over_from))
                .transpose()?,
            expires_unix_ms: wire.expires_unix_ms,
            dht_prefix: wire.dht_prefix,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(client: &Keypair) -> Ticket {
        let peer = || Keypair::generate_ed25519().public().to_peer_id();
        Ticket {
            session: SessionId::random(),
            epoch: 3,
            client: client.public().to_peer_id(),
            hop: peer(),
            upstream: peer(),
            downstream: peer(),
            dht_prefix: "org/model".to_owned(),
            fingerprint: Fingerprint([7; 32]),
            blocks: 2..6,
            wire_dtype: Dtype::Bf16,
            wire_codec: WireCodec::Q8,
            limits: SessionLimits { max_lanes: 1, max_tokens: 100, max_in_flight: 4, max_step_tokens: 64 },
            take_over_from: Some(peer()),
            expires_unix_ms: 1_000_000_000,
        }
    }

    #[test]
    fn a_signed_ticket_is_read_back() {
        let key = Keypair::generate_ed25519();
        let ticket = ticket(&key);
        let open = ticket.sign(&key).unwrap();
        assert_eq!(Ticket::verify(&open, 1_000_000_000).unwrap(), ticket);
    }

    #[test]
    fn anothers_signature_and_changed_bytes_are_refused() {
        let (key, other) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let ticket = ticket(&key);
        let forged = ticket.sign(&other).unwrap();
        assert_eq!(Ticket::verify(&forged, 0), Err(TicketError::NotSigned(ticket.client)));

        let mut changed = ticket.sign(&key).unwrap();
        let mut wire = proto::Ticket::decode(changed.ticket.clone()).unwrap();
        wire.end += 1;
        changed.ticket = wire.encode_to_vec().into();
        assert_eq!(Ticket::verify(&changed, 0), Err(TicketError::NotSigned(ticket.client)));
    }

    #[test]
    fn expiry_allows_for_clocks_that_differ() {
        let key = Keypair::generate_ed25519();
        let open = ticket(&key).sign(&key).unwrap();
        assert!(Ticket::verify(&open, 1_000_000_000 + CLOCK_LEEWAY_MS).is_ok());
        assert!(matches!(Ticket::verify(&open, 1_000_000_001 + CLOCK_LEEWAY_MS), Err(TicketError::Expired(300))));
    }

    #[test]
    fn senseless_fields_are_named() {
        let key = Keypair::generate_ed25519();
        for (change, field) in [
            (Box::new(|t: &mut proto::Ticket| t.end = t.start) as Box<dyn Fn(&mut proto::Ticket)>, "block range"),
            (Box::new(|t| t.max_lanes = 0), "max_lanes"),
            (Box::new(|t| t.session = vec![1, 2].into()), "session id"),
            (Box::new(|t| t.wire_dtype = 99), "wire dtype"),
            (Box::new(|t| t.wire_codec = 99), "wire codec"),
            (Box::new(|t| t.upstream = vec![0; 3].into()), "upstream"),
            (Box::new(|t| t.take_over_from = vec![0; 3].into()), "take_over_from"),
        ] {
            let mut open = ticket(&key).sign(&key).unwrap();
            let mut wire = proto::Ticket::decode(open.ticket.clone()).unwrap();
            change(&mut wire);
            open.ticket = wire.encode_to_vec().into();
            let error = Ticket::verify(&open, 0).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
