//! What a node says of itself, signed: its span, state, speed, free cache and addresses.
//!
//! An announcement travels as [`SignedAnnouncement`]: the encoded body, the public key and a signature over
//! `"helion-announcement-v1\0" ‖ body`. The peer id follows from the key, so it matters little from whom one comes. Everything
//! that arrives passes [`verify`] before it is held, handed on or shown: sizes, ranges, expiry and signature. The typed form,
//! [`Announcement`], is made from what passed; a reader that meets an enum value of a newer version can't type it and leaves it
//! out, while the DHT keeps storing it for others.

pub mod arithmetic;
pub mod set;

use std::{ops::Range, time::Duration};

use arithmetic::compute_alike;
use libp2p::{
    Multiaddr, PeerId,
    identity::{Keypair, PublicKey},
};
use prost::Message;

use super::{
    WireCodec,
    proto::announcement::{self as wire, SignedAnnouncement},
};
use crate::model::Dtype;

/// Separates these signatures from all others that the same key makes.
pub const SIGNATURE_DOMAIN: &[u8] = b"helion-announcement-v1\0";
/// An entry that claims to live longer is refused: after a crash, a ghost is gone by then.
pub const MAX_LIFETIME: Duration = Duration::from_secs(10 * 60);
/// How long after it expired an announcement still says where its peer may be dialled: a session's hops outlast what was announced
/// when it began, and the clocks of two peers may differ.
pub const MAX_LATENESS: Duration = Duration::from_secs(3600);
/// What a speed may be, where it isn't 0, which is none: sums and quotients of such numbers are finite.
const SPEEDS: std::ops::RangeInclusive<f64> = 1e-6..=1e12;
/// How far the clocks of two machines may be apart before entries at the edge of [`MAX_LIFETIME`] are refused.
pub const CLOCK_LEEWAY: Duration = Duration::from_secs(60);
/// Bytes of a whole signed entry. A usual one has about 500.
pub const MAX_SIGNED_BYTES: usize = 4096;
/// Bytes of a DHT prefix.
pub const MAX_PREFIX_BYTES: usize = 256;
/// Blocks of a model; the largest known ones have a few hundred.
pub const MAX_MODEL_BLOCKS: usize = 10_000;
/// Addresses of a peer: a few interfaces, two transports, two IP versions, relays.
pub const MAX_ADDRESSES: usize = 16;
const MAX_ADDRESS_BYTES: usize = 256;
const MAX_NAME_BYTES: usize = 256;
const MAX_ADAPTERS: usize = 16;
/// More than will ever be worth having.
const MAX_WIRE_CODECS: usize = 16;
/// Likewise.
const MAX_QUANT_SETTINGS: usize = 16;
const MAX_PUBLIC_KEY_BYTES: usize = 128;
const FINGERPRINT_BYTES: usize = 32;

/// What a node can do for sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// It loads its blocks and serves nothing yet.
    Joining,
    /// It takes sessions.
    Online,
    /// It serves its sessions and takes no new ones.
    Draining,
    /// It left on purpose.
    Offline,
}

/// A node's statement about itself.
///
/// To make one, start from [`Announcement::blank`] and fill in what the node knows; the swarm fills in the addresses, the
/// sequence and the expiry when it signs. In one that was received everything is as the peer signed it, `peer_id` follows from
/// the signature, and `signed` holds the original.
#[derive(Debug, Clone, PartialEq)]
pub struct Announcement {
    /// Whose it is.
    pub peer_id: PeerId,
    /// The swarm it belongs to.
    pub dht_prefix: String,
    /// The model's hub id or name, for people.
    pub model: String,
    /// Which weights and arithmetic: hops of one route have equal ones.
    pub fingerprint: [u8; FINGERPRINT_BYTES],
    /// The hub's revision, empty where there is none.
    pub revision: String,
    /// How many blocks the whole model has.
    pub model_blocks: usize,
    /// The hosted blocks.
    pub span: Range<usize>,
    /// What the node can do for sessions.
    pub state: State,
    /// Of the arithmetic, and so of the hidden states on the wire.
    pub dtype: Dtype,
    /// `none` or the quantization's name.
    pub quant: String,
    /// The settings of `--quant` under each of which the node would have its matrices just as it has them; see [`arithmetic`].
    pub quant_settings: Vec<String>,
    /// Which kernels compute.
    pub kernel_path: String,
    /// One lane through the whole span, as the node measured it.
    pub compute_tokens_per_second: f64,
    /// 0: not measured.
    pub network_tokens_per_second: f64,
    /// KV cache tokens that are free.
    pub cache_tokens_left: u64,
    /// KV cache tokens in all.
    pub cache_tokens_total: u64,
    /// Steps waiting.
    pub queue: u32,
    /// The lossy codecs that it speaks.
    pub wire_codecs: Vec<WireCodec>,
    /// Names of the adapters that are loaded.
    pub adapters: Vec<String>,
    /// Where to dial, without `/p2p`.
    pub addresses: Vec<Multiaddr>,
    /// Reached over a relay only.
    pub relayed: bool,
    /// What the operator calls the node.
    pub public_name: String,
    /// Of the software.
    pub version: String,
    /// The highest one counts.
    pub sequence: u64,
    /// Unix milliseconds after which it counts no more.
    pub expires_unix_ms: u64,
    /// The original, in one that was received or signed.
    pub signed: Option<SignedAnnouncement>,
}

/// Why an announcement was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnouncementError {
    /// The signed entry is too large.
    #[error(
        "the announcement has {bytes} bytes, more than the {MAX_SIGNED_BYTES} allowed: shorten its names or addresses"
    )]
    TooLarge {
        /// Of the whole entry.
        bytes: usize,
    },
    /// It isn't an announcement.
    #[error("the announcement cannot be decoded: {0}")]
    Malformed(String),
    /// The signature is not by that key over that body.
    #[error("the announcement's signature is wrong")]
    BadSignature,
    /// A field is outside what is allowed.
    #[error("the announcement's {field} is not allowed: {reason}")]
    Field {
        /// The field's name in `proto/announcement.proto`.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// It counts no more.
    #[error("the announcement expired {ago_ms} ms ago (or this machine's clock is ahead)")]
    Expired {
        /// Milliseconds since then.
        ago_ms: u64,
    },
    /// It claims to live too long.
    #[error(
        "the announcement claims to live {ahead_ms} ms more, past the 10 minutes allowed (or this machine's clock is behind)"
    )]
    TooFarAhead {
        /// Milliseconds until then.
        ahead_ms: u64,
    },
    /// An enum value of another version.
    #[error("the announcement's {field} is a value that this version of helion doesn't know")]
    UnknownVariant {
        /// The field's name in `proto/announcement.proto`.
        field: &'static str,
    },
}

/// An announcement that passed [`verify`].
#[derive(Debug, Clone)]
pub struct Verified {
    peer_id: PeerId,
    body: wire::Announcement,
    signed: SignedAnnouncement,
}

impl Verified {
    /// Whose it is, by its signature.
    pub fn peer_id(&self) -> PeerId {
        self.peer_id
    }

    /// What it says. All caps and ranges hold; enum values may be unknown ones.
    pub fn body(&self) -> &wire::Announcement {
        &self.body
    }

    /// The original.
    pub fn signed(&self) -> &SignedAnnouncement {
        &self.signed
    }
}

/// Unix time in milliseconds, the clock of announcements.
pub fn unix_ms() -> u64 {
    // A clock before 1970 is as good as none: 0 makes everything look unexpired rather than stopping the node.
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The sequence number after `last` at `now_unix_ms`: always higher, and higher than any given before a restart.
pub fn next_sequence(last: u64, now_unix_ms: u64) -> u64 {
    last.saturating_add(1).max(now_unix_ms)
}

/// Checks an entry from outside: sizes, ranges, expiry, and last (it costs 0.1 ms) the signature.
pub fn verify(signed: &SignedAnnouncement, now_unix_ms: u64) -> Result<Verified, AnnouncementError> {
    verify_late(signed, now_unix_ms, Duration::ZERO)
}

/// [`verify`] of an entry that may have expired, so long ago at the most.
fn verify_late(signed: &SignedAnnouncement, now_unix_ms: u64, late: Duration) -> Result<Verified, AnnouncementError> {
    let bytes = signed.encoded_len();
    if bytes > MAX_SIGNED_BYTES {
        return Err(AnnouncementError::TooLarge { bytes });
    }
    let body =
        wire::Announcement::decode(signed.body.as_ref()).map_err(|e| AnnouncementError::Malformed(e.to_string()))?;
    check_fields(&body)?;
    check_expiry(body.expires_unix_ms, now_unix_ms, late)?;
    if signed.public_key.len() > MAX_PUBLIC_KEY_BYTES {
        return Err(refused("public_key", format!("it has {} bytes", signed.public_key.len())));
    }
    let key = PublicKey::try_decode_protobuf(&signed.public_key)
        .map_err(|error| AnnouncementError::Malformed(format!("its public key: {error}")))?;
    if !key.verify(&message_to_sign(&signed.body), &signed.signature) {
        return Err(AnnouncementError::BadSignature);
    }
    Ok(Verified { peer_id: key.to_peer_id(), body, signed: signed.clone() })
}

fn message_to_sign(body: &[u8]) -> Vec<u8> {
    [SIGNATURE_DOMAIN, body].concat()
}

fn refused(field: &'static str, reason: impl Into<String>) -> AnnouncementError {
    AnnouncementError::Field { field, reason: reason.into() }
}

fn check_fields(body: &wire::Announcement) -> Result<(), AnnouncementError> {
    check_prefix(&body.dht_prefix)?;
    let names = [
        ("model", &body.model),
        ("revision", &body.revision),
        ("quant", &body.quant),
        ("kernel_path", &body.kernel_path),
        ("public_name", &body.public_name),
        ("version", &body.version),
    ];
    for (field, name) in names {
        check_name(field, name)?;
    }
    if body.wire_codecs.len() > MAX_WIRE_CODECS {
        return Err(refused("wire_codecs", format!("{} of them, {MAX_WIRE_CODECS} at most", body.wire_codecs.len())));
    }
    if body.adapters.len() > MAX_ADAPTERS {
        return Err(refused("adapters", format!("{} of them, {MAX_ADAPTERS} at most", body.adapters.len())));
    }
    body.adapters.iter().try_for_each(|name| check_name("adapters", name))?;
    let settings = body.quant_settings.len();
    if settings > MAX_QUANT_SETTINGS {
        return Err(refused("quant_settings", format!("{settings} of them, {MAX_QUANT_SETTINGS} at most")));
    }
    body.quant_settings.iter().try_for_each(|name| check_name("quant_settings", name))?;
    if body.fingerprint.len() != FINGERPRINT_BYTES {
        return Err(refused("fingerprint", format!("{} bytes, not {FINGERPRINT_BYTES}", body.fingerprint.len())));
    }
    let blocks = body.model_blocks;
    if blocks == 0 || blocks as usize > MAX_MODEL_BLOCKS {
        return Err(refused("model_blocks", format!("{blocks}, not 1 to {MAX_MODEL_BLOCKS}")));
    }
    if body.start >= body.end || body.end > blocks {
        let reason = format!("{}..{} is empty or outside the model's {blocks} blocks", body.start, body.end);
        return Err(refused("span", reason));
    }
    for (field, speed) in [
        ("compute_tokens_per_second", body.compute_tokens_per_second),
        ("network_tokens_per_second", body.network_tokens_per_second),
    ] {
        if speed != 0.0 && !SPEEDS.contains(&speed) {
            return Err(refused(field, format!("{speed} is no speed")));
        }
    }
    if body.addresses.len() > MAX_ADDRESSES {
        return Err(refused("addresses", format!("{} of them, {MAX_ADDRESSES} at most", body.addresses.len())));
    }
    parse_addresses(body).map(drop)
}

/// Checks a DHT prefix: not empty, short, printable.
pub fn check_prefix(prefix: &str) -> Result<(), AnnouncementError> {
    if prefix.is_empty() {
        return Err(refused("dht_prefix", "it is empty"));
    }
    if prefix.len() > MAX_PREFIX_BYTES {
        return Err(refused("dht_prefix", format!("{} bytes, {MAX_PREFIX_BYTES} at most", prefix.len())));
    }
    check_name("dht_prefix", prefix)
}

/// Names end up on people's terminals, so they are short and hold no control characters.
fn check_name(field: &'static str, name: &str) -> Result<(), AnnouncementError> {
    if name.len() > MAX_NAME_BYTES {
        return Err(refused(field, format!("{} bytes, {MAX_NAME_BYTES} at most", name.len())));
    }
    if name.chars().any(char::is_control) {
        return Err(refused(field, "it contains control characters"));
    }
    Ok(())
}

fn check_expiry(expires_unix_ms: u64, now_unix_ms: u64, late: Duration) -> Result<(), AnnouncementError> {
    let limit = (MAX_LIFETIME + CLOCK_LEEWAY).as_millis() as u64;
    if expires_unix_ms.saturating_add(late.as_millis() as u64) <= now_unix_ms {
        return Err(AnnouncementError::Expired { ago_ms: now_unix_ms - expires_unix_ms });
    }
    let ahead_ms = expires_unix_ms.saturating_sub(now_unix_ms);
    if ahead_ms > limit {
        return Err(AnnouncementError::TooFarAhead { ahead_ms });
    }
    Ok(())
}

fn parse_addresses(body: &wire::Announcement) -> Result<Vec<Multiaddr>, AnnouncementError> {
    body.addresses
        .iter()
        .map(|bytes| {
            if bytes.len() > MAX_ADDRESS_BYTES {
                return Err(refused("addresses", format!("one has {} bytes", bytes.len())));
            }
            Multiaddr::try_from(bytes.to_vec()).map_err(|error| refused("addresses", error.to_string()))
        })
        .collect()
}

impl Announcement {
    /// An announcement of `peer_id` with nothing in it yet.
    pub fn blank(peer_id: PeerId) -> Self {
        Self {
            peer_id,
            dht_prefix: String::new(),
            model: String::new(),
            fingerprint: [0; FINGERPRINT_BYTES],
            revision: String::new(),
            model_blocks: 0,
            span: 0..0,
            state: State::Joining,
            dtype: Dtype::F32,
            quant: "none".to_owned(),
            quant_settings: Vec::new(),
            kernel_path: String::new(),
            compute_tokens_per_second: 0.0,
            network_tokens_per_second: 0.0,
            cache_tokens_left: 0,
            cache_tokens_total: 0,
            queue: 0,
            wire_codecs: Vec::new(),
            adapters: Vec::new(),
            addresses: Vec::new(),
            relayed: false,
            public_name: String::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            sequence: 0,
            expires_unix_ms: 0,
            signed: None,
        }
    }

    /// Signs this announcement as it stands, after checking it as its readers will.
    pub fn sign(&self, keypair: &Keypair, now_unix_ms: u64) -> Result<SignedAnnouncement, AnnouncementError> {
        let body = self.to_body();
        check_fields(&body)?;
        check_expiry(body.expires_unix_ms, now_unix_ms, Duration::ZERO)?;
        let body = body.encode_to_vec();
        let signature = keypair
            .sign(&message_to_sign(&body))
            .map_err(|error| AnnouncementError::Malformed(format!("cannot sign: {error}")))?;
        let signed = SignedAnnouncement {
            body: body.into(),
            public_key: keypair.public().encode_protobuf().into(),
            signature: signature.into(),
        };
        match signed.encoded_len() {
            bytes if bytes > MAX_SIGNED_BYTES => Err(AnnouncementError::TooLarge { bytes }),
            _ => Ok(signed),
        }
    }

    /// [`verify`] and [`Announcement::try_from`] in one.
    pub fn from_signed(signed: &SignedAnnouncement, now_unix_ms: u64) -> Result<Self, AnnouncementError> {
        Self::try_from(verify(signed, now_unix_ms)?)
    }

    /// The same of one that only says where a peer was when it last announced itself: it may have expired within [`MAX_LATENESS`].
    pub fn of_an_address(signed: &SignedAnnouncement, now_unix_ms: u64) -> Result<Self, AnnouncementError> {
        Self::try_from(verify_late(signed, now_unix_ms, MAX_LATENESS)?)
    }

    /// Whether both compute in the same way, so that a block gives the same bits at either.
    pub fn computes_like(&self, other: &Self) -> bool {
        compute_alike([self, other])
    }

    /// Whether it still counts.
    pub fn is_fresh(&self, now_unix_ms: u64) -> bool {
        self.expires_unix_ms > now_unix_ms
    }

    fn to_body(&self) -> wire::Announcement {
        // Numbers that don't fit become ones that `check_fields` refuses.
        let block = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        wire::Announcement {
            dht_prefix: self.dht_prefix.clone(),
            model: self.model.clone(),
            fingerprint: self.fingerprint.to_vec().into(),
            revision: self.revision.clone(),
            model_blocks: block(self.model_blocks),
            start: block(self.span.start),
            end: block(self.span.end),
            state: wire::State::from(self.state) as i32,
            dtype: wire::Dtype::from(self.dtype) as i32,
            quant: self.quant.clone(),
            kernel_path: self.kernel_path.clone(),
            compute_tokens_per_second: self.compute_tokens_per_second,
            network_tokens_per_second: self.network_tokens_per_second,
            cache_tokens_left: self.cache_tokens_left,
            cache_tokens_total: self.cache_tokens_total,
            queue: self.queue,
            adapters: self.adapters.clone(),
            quant_settings: self.quant_settings.clone(),
            wire_codecs: self.wire_codecs.iter().map(|codec| wire::WireCodec::from(*codec).into()).collect(),
            addresses: self.addresses.iter().map(|address| address.to_vec().into()).collect(),
            relayed: self.relayed,
            public_name: self.public_name.clone(),
            version: self.version.clone(),
            sequence: self.sequence,
            expires_unix_ms: self.expires_unix_ms,
        }
    }
}

impl TryFrom<Verified> for Announcement {
    type Error = AnnouncementError;

    fn try_from(verified: Verified) -> Result<Self, AnnouncementError> {
        let Verified { peer_id, body, signed } = verified;
        let addresses = parse_addresses(&body)?;
        let state = match body.state() {
            wire::State::Joining => State::Joining,
            wire::State::Online => State::Online,
            wire::State::Draining => State::Draining,
            wire::State::Offline => State::Offline,
            wire::State::Unspecified => return Err(AnnouncementError::UnknownVariant { field: "state" }),
        };
        let dtype = Dtype::try_from(body.dtype()).map_err(|_| AnnouncementError::UnknownVariant { field: "dtype" })?;
        let fingerprint = <[u8; FINGERPRINT_BYTES]>::try_from(body.fingerprint.as_ref())
            .map_err(|_| refused("fingerprint", "wrong length"))?;
        // One that this version doesn't know is of no use to it.
        let wire_codecs = body.wire_codecs().map(WireCodec::from).filter(|codec| !codec.is_lossless()).collect();
        Ok(Self {
            peer_id,
            wire_codecs,
            dht_prefix: body.dht_prefix,
            model: body.model,
            fingerprint,
            revision: body.revision,
            model_blocks: body.model_blocks as usize,
            span: body.start as usize..body.end as usize,
            state,
            dtype,
            quant: body.quant,
            quant_settings: body.quant_settings,
            kernel_path: body.kernel_path,
            compute_tokens_per_second: body.compute_tokens_per_second,
            network_tokens_per_second: body.network_tokens_per_second,
            cache_tokens_left: body.cache_tokens_left,
            cache_tokens_total: body.cache_tokens_total,
            queue: body.queue,
            adapters: body.adapters,
            addresses,
            relayed: body.relayed,
            public_name: body.public_name,
            version: body.version,
            sequence: body.sequence,
            expires_unix_ms: body.expires_unix_ms,
            signed: Some(signed),
        })
    }
}

impl From<State> for wire::State {
    fn from(state: State) -> Self {
        match state {
            State::Joining => Self::Joining,
            State::Online => Self::Online,
            State::Draining => Self::Draining,
            State::Offline => Self::Offline,
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Joining => "joining",
            Self::Online => "online",
            Self::Draining => "draining",
            Self::Offline => "offline",
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const NOW: u64 = 1_800_000_000_000;

    /// A small model's node, complete.
    pub(crate) fn sample(keypair: &Keypair) -> Announcement {
        Announcement {
            dht_prefix: "tests/Tiny-1B".into(),
            model: "tests/Tiny-1B".into(),
            fingerprint: [7; 32],
            model_blocks: 80,
            span: 0..16,
            state: State::Online,
            dtype: Dtype::Bf16,
            quant_settings: vec!["auto".into(), "none".into()],
            compute_tokens_per_second: 12.5,
            addresses: vec!["/ip4/127.0.0.1/tcp/31337".parse().unwrap()],
            sequence: NOW,
            expires_unix_ms: NOW + 60_000,
            ..Announcement::blank(keypair.public().to_peer_id())
        }
    }

    fn field(result: Result<impl std::fmt::Debug, AnnouncementError>) -> &'static str {
        match result.unwrap_err() {
            AnnouncementError::Field { field, .. } => field,
            other => panic!("not about a field: {other}"),
        }
    }

    #[test]
    fn what_is_signed_is_read_back() {
        let keypair = Keypair::generate_ed25519();
        let announcement = sample(&keypair);
        let signed = announcement.sign(&keypair, NOW).unwrap();
        let read = Announcement::from_signed(&signed, NOW).unwrap();
        assert_eq!(read, Announcement { signed: Some(signed), ..announcement });
    }

    #[test]
    fn a_changed_byte_is_a_bad_signature() {
        let keypair = Keypair::generate_ed25519();
        let signed = sample(&keypair).sign(&keypair, NOW).unwrap();
        let mut forged = signed.clone();
        let mut body = wire::Announcement::decode(signed.body.clone()).unwrap();
        body.end = 80;
        forged.body = body.encode_to_vec().into();
        assert_eq!(verify(&forged, NOW).unwrap_err(), AnnouncementError::BadSignature);
        let mut forged = signed.clone();
        forged.public_key = Keypair::generate_ed25519().public().encode_protobuf().into();
        assert_eq!(verify(&forged, NOW).unwrap_err(), AnnouncementError::BadSignature);
        // The same key over the bare body: a signature from another domain.
        let mut forged = signed;
        forged.signature = keypair.sign(&forged.body).unwrap().into();
        assert_eq!(verify(&forged, NOW).unwrap_err(), AnnouncementError::BadSignature);
    }

    #[test]
    fn expiry_is_at_most_ten_minutes_ahead() {
        let keypair = Keypair::generate_ed25519();
        let signed = sample(&keypair).sign(&keypair, NOW).unwrap();
        assert!(verify(&signed, NOW + 59_999).is_ok());
        assert_eq!(verify(&signed, NOW + 60_000).unwrap_err(), AnnouncementError::Expired { ago_ms: 0 });
        assert!(verify(&signed, NOW - 600_000).is_ok());
        assert!(matches!(verify(&signed, NOW - 600_001), Err(AnnouncementError::TooFarAhead { .. })));
    }

    #[test]
    fn an_address_outlives_its_announcement_by_an_hour() {
        let keypair = Keypair::generate_ed25519();
        let signed = sample(&keypair).sign(&keypair, NOW).unwrap();
        let (expiry, hour) = (NOW + 60_000, MAX_LATENESS.as_millis() as u64);
        for now in [NOW - 600_000, NOW, expiry, expiry + hour - 1] {
            assert!(Announcement::of_an_address(&signed, now).is_ok(), "{now}");
        }
        let gone = Announcement::of_an_address(&signed, expiry + hour).unwrap_err();
        assert_eq!(gone, AnnouncementError::Expired { ago_ms: hour });
        let ahead = Announcement::of_an_address(&signed, NOW - 600_001).unwrap_err();
        assert!(matches!(ahead, AnnouncementError::TooFarAhead { .. }), "{ahead}");
    }

    #[test]
    fn fields_are_checked() {
        let keypair = Keypair::generate_ed25519();
        let good = || sample(&keypair);
        let address: Multiaddr = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
        let cases = [
            ("dht_prefix", Announcement { dht_prefix: String::new(), ..good() }),
            ("dht_prefix", Announcement { dht_prefix: "x".repeat(257), ..good() }),
            ("dht_prefix", Announcement { dht_prefix: "a\u{1b}[2J".into(), ..good() }),
            ("span", Announcement { span: 3..3, ..good() }),
            ("span", Announcement { span: 70..81, ..good() }),
            ("model_blocks", Announcement { model_blocks: 10_001, ..good() }),
            ("model_blocks", Announcement { model_blocks: 0, ..good() }),
            ("public_name", Announcement { public_name: "x".repeat(257), ..good() }),
            ("public_name", Announcement { public_name: "\u{7}".into(), ..good() }),
            ("adapters", Announcement { adapters: vec![String::new(); 17], ..good() }),
            ("quant_settings", Announcement { quant_settings: vec!["auto".into(); 17], ..good() }),
            ("quant_settings", Announcement { quant_settings: vec!["\n".into()], ..good() }),
            ("addresses", Announcement { addresses: vec![address; 17], ..good() }),
            ("compute_tokens_per_second", Announcement { compute_tokens_per_second: f64::NAN, ..good() }),
            ("compute_tokens_per_second", Announcement { compute_tokens_per_second: 5e-324, ..good() }),
            ("compute_tokens_per_second", Announcement { compute_tokens_per_second: f64::MAX, ..good() }),
            ("network_tokens_per_second", Announcement { network_tokens_per_second: -1.0, ..good() }),
            ("network_tokens_per_second", Announcement { network_tokens_per_second: f64::INFINITY, ..good() }),
        ];
        for (expected, announcement) in cases {
            assert_eq!(field(announcement.sign(&keypair, NOW)), expected);
        }
    }

    #[test]
    fn a_whole_entry_has_a_cap() {
        let keypair = Keypair::generate_ed25519();
        let announcement = Announcement { adapters: vec!["x".repeat(256); 16], ..sample(&keypair) };
        assert!(matches!(announcement.sign(&keypair, NOW), Err(AnnouncementError::TooLarge { .. })));
    }

    #[test]
    fn values_of_a_newer_version_are_stored_but_not_typed() {
        let keypair = Keypair::generate_ed25519();
        let mut body = sample(&keypair).to_body();
        body.state = 99;
        let body = body.encode_to_vec();
        let signed = SignedAnnouncement {
            signature: keypair.sign(&message_to_sign(&body)).unwrap().into(),
            body: body.into(),
            public_key: keypair.public().encode_protobuf().into(),
        };
        let verified = verify(&signed, NOW).unwrap();
        assert_eq!(Announcement::try_from(verified).unwrap_err(), AnnouncementError::UnknownVariant { field: "state" });
    }

    #[test]
    fn a_sequence_only_rises() {
        assert_eq!(next_sequence(0, NOW), NOW);
        assert_eq!(next_sequence(NOW, NOW), NOW + 1);
        assert_eq!(next_sequence(NOW + 5, NOW - 1000), NOW + 6);
    }
}
