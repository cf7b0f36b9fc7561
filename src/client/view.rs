//! What a client knows of a swarm: who serves what, what is missing, and whom it can't use and why.

use std::{fmt, ops::Range, time::Duration};

use libp2p::PeerId;
use serde::Serialize;

use super::{local_model::ModelIdentity, speeds::Speeds};
use crate::{
    model::fingerprint::Fingerprint,
    swarm::{
        WireCodec,
        announcement::{Announcement, State},
    },
};

/// One peer of the swarm.
#[derive(Debug, Clone)]
pub struct PeerView {
    /// What it says of itself.
    pub announcement: Announcement,
    /// The round trip to it, where it answered.
    pub rtt: Option<Duration>,
    /// What was seen of its speed.
    pub speeds: Speeds,
}

/// A swarm as seen at one moment.
#[derive(Debug, Clone)]
pub struct SwarmView {
    /// The model.
    pub identity: ModelIdentity,
    /// How many blocks it has.
    pub blocks: usize,
    /// The peers that serve it, in the order of their spans.
    pub peers: Vec<PeerView>,
    /// Peers under the same prefix that serve another model or revision. Never used.
    pub foreign: Vec<Announcement>,
    /// Peers that serve it in a quantization that was not asked for. Never used.
    pub unfit: Vec<Announcement>,
    /// What peers have to speak.
    pub codec: WireCodec,
    /// Peers that serve it and don't. Never used.
    pub without_codec: Vec<Announcement>,
    /// Peers that serve it, as the DHT says, and don't answer.
    pub silent: Vec<Announcement>,
}

impl SwarmView {
    /// Nobody, as yet.
    pub fn new(identity: ModelIdentity, blocks: usize) -> Self {
        Self {
            identity,
            blocks,
            peers: Vec::new(),
            foreign: Vec::new(),
            unfit: Vec::new(),
            codec: WireCodec::Raw,
            without_codec: Vec::new(),
            silent: Vec::new(),
        }
    }

    /// Adds what was discovered under the model's prefix. Peers that left are not in it.
    pub fn add(&mut self, announcements: impl IntoIterator<Item = Announcement>) {
        for announcement in announcements {
            if announcement.state == State::Offline {
                continue;
            }
            let ModelIdentity { fingerprint, quants, .. } = &self.identity;
            if Fingerprint(announcement.fingerprint) != *fingerprint || announcement.span.end > self.blocks {
                self.foreign.push(announcement);
            } else if !quants.is_empty() && !quants.contains(&announcement.quant) {
                self.unfit.push(announcement);
            } else if !self.codec.is_lossless() && !announcement.wire_codecs.contains(&self.codec) {
                self.without_codec.push(announcement);
            } else {
                self.peers.push(PeerView { announcement, rtt: None, speeds: Speeds::default() });
            }
        }
        self.peers
            .sort_by_key(|peer| (peer.announcement.span.start, peer.announcement.span.end, peer.announcement.peer_id));
    }

    /// One of the peers.
    pub(crate) fn peer_mut(&mut self, peer: PeerId) -> Option<&mut PeerView> {
        self.peers.iter_mut().find(|view| view.announcement.peer_id == peer)
    }

    /// Whether the online peers that answered serve all blocks.
    pub(crate) fn answering_cover_the_model(&self) -> bool {
        let answering = self.online().filter(|peer| peer.rtt.is_some());
        coverage(self.blocks, answering).iter().all(|count| *count > 0)
    }

    /// Puts the peers that did not answer aside: whoever does not answer now is no hop, whatever the DHT still says.
    pub fn leave_out_silent(&mut self) {
        let (answering, silent) = std::mem::take(&mut self.peers).into_iter().partition(|peer| peer.rtt.is_some());
        self.peers = answering;
        self.silent.extend(silent.into_iter().map(|peer: PeerView| peer.announcement));
    }

    /// The peers that take sessions now.
    pub fn online(&self) -> impl Iterator<Item = &PeerView> {
        self.peers.iter().filter(|peer| peer.announcement.state == State::Online)
    }

    /// How many online peers serve each block.
    pub fn coverage(&self) -> Vec<usize> {
        coverage(self.blocks, self.online())
    }

    /// The runs of blocks that nobody serves.
    pub fn missing(&self) -> Vec<Range<usize>> {
        uncovered(&self.coverage())
    }

    /// Why there is no route, as far as the view tells.
    pub fn incomplete(&self) -> Incomplete {
        Incomplete {
            model: self.identity.name.clone(),
            argument: self.identity.argument.clone(),
            blocks: self.blocks,
            missing: self.missing(),
            serving: self.online().map(|peer| (peer.announcement.peer_id, peer.announcement.span.clone())).collect(),
            joining: self
                .peers
                .iter()
                .filter(|peer| peer.announcement.state == State::Joining)
                .map(|peer| peer.announcement.span.clone())
                .collect(),
            foreign: self.foreign.iter().map(|foreign| (foreign.peer_id, Fingerprint(foreign.fingerprint))).collect(),
            silent: self.silent.iter().map(|silent| (silent.peer_id, silent.span.clone())).collect(),
            unfit: self.unfit.iter().map(|unfit| (unfit.span.clone(), unfit.quant.clone())).collect(),
            quants: self.identity.quants.clone(),
            codec: self.codec,
            without_codec: self.without_codec.iter().map(|peer| (peer.peer_id, peer.span.clone())).collect(),
            fingerprint: self.identity.fingerprint,
        }
    }
}

/// How many of these peers serve each block.
fn coverage<'a>(blocks: usize, peers: impl Iterator<Item = &'a PeerView>) -> Vec<usize> {
    let mut coverage = vec![0; blocks];
    for peer in peers {
        coverage[peer.announcement.span.clone()].iter_mut().for_each(|count| *count += 1);
    }
    coverage
}

/// The runs of zeros in `coverage`.
fn uncovered(coverage: &[usize]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (block, _) in coverage.iter().enumerate().filter(|(_, count)| **count == 0) {
        match runs.last_mut() {
            Some(run) if run.end == block => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    runs
}

/// Half-open ranges as JSON has them.
pub(super) fn spans(ranges: &[Range<usize>]) -> Vec<[usize; 2]> {
    ranges.iter().map(|range| [range.start, range.end]).collect()
}

/// The swarm does not cover the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Incomplete {
    model: String,
    argument: String,
    blocks: usize,
    missing: Vec<Range<usize>>,
    serving: Vec<(PeerId, Range<usize>)>,
    joining: Vec<Range<usize>>,
    foreign: Vec<(PeerId, Fingerprint)>,
    silent: Vec<(PeerId, Range<usize>)>,
    unfit: Vec<(Range<usize>, String)>,
    quants: Vec<String>,
    codec: WireCodec,
    without_codec: Vec<(PeerId, Range<usize>)>,
    fingerprint: Fingerprint,
}

impl Incomplete {
    /// The runs of blocks that nobody serves.
    pub fn missing(&self) -> &[Range<usize>] {
        &self.missing
    }
}

impl fmt::Display for Incomplete {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// More names than this don't help; the count does.
        const NAMED: usize = 8;
        let spans = |spans: &mut dyn Iterator<Item = String>| {
            let all: Vec<String> = spans.collect();
            let more = all.len().saturating_sub(NAMED);
            let named = all.into_iter().take(NAMED).collect::<Vec<_>>().join(", ");
            if more > 0 { format!("{named} and {more} more") } else { named }
        };
        let range = |range: &Range<usize>| format!("{}:{}", range.start, range.end);
        write!(f, "no peer serves ")?;
        if self.missing.len() == 1 && self.missing[0].len() == 1 {
            write!(f, "block {}", self.missing[0].start)?;
        } else {
            write!(f, "blocks {}", spans(&mut self.missing.iter().map(range)))?;
        }
        write!(f, " of {} (0:{} are needed)", self.model, self.blocks)?;
        match self.serving.len() {
            0 => write!(f, "; no peer of this model is online")?,
            count => {
                let noun = if count == 1 { "peer serves" } else { "peers serve" };
                write!(f, "; {count} {noun} {}", spans(&mut self.serving.iter().map(|(_, span)| range(span))))?;
            }
        }
        if !self.joining.is_empty() {
            write!(f, "; {} still loading {}", self.joining.len(), spans(&mut self.joining.iter().map(range)))?;
        }
        if !self.silent.is_empty() {
            let named = |(peer, span): &(PeerId, Range<usize>)| format!("{peer} ({})", range(span));
            write!(f, "; announced, but not answering: {}", spans(&mut self.silent.iter().map(named)))?;
        }
        if !self.unfit.is_empty() {
            let named = |(span, quant): &(Range<usize>, String)| format!("{} in {quant}", range(span));
            let (wanted, unfit) = (self.quants.join(" or "), spans(&mut self.unfit.iter().map(named)));
            write!(f, "; left out, because --require-quant asks for {wanted}: {unfit}")?;
        }
        if !self.without_codec.is_empty() {
            let named = |(peer, span): &(PeerId, Range<usize>)| format!("{peer} ({})", range(span));
            let without = spans(&mut self.without_codec.iter().map(named));
            write!(f, "; left out, because they don't speak --wire-codec {}: {without}", self.codec)?;
        }
        if let Some(gap) = self.missing.first() {
            write!(
                f,
                "; start one with `helion node serve --model {} --blocks {}:{} --initial-peers …`",
                self.argument, gap.start, gap.end
            )?;
        }
        if !self.foreign.is_empty() {
            write!(
                f,
                "; ignored under the same prefix, because they serve another model or revision (fingerprint {}, and yours is {}): {}",
                short(&self.foreign[0].1),
                short(&self.fingerprint),
                spans(&mut self.foreign.iter().map(|(peer, _)| peer.to_string()))
            )?;
        }
        Ok(())
    }
}

/// Enough of a fingerprint to tell two apart.
fn short(fingerprint: &Fingerprint) -> String {
    fingerprint.to_string().chars().take(12).collect()
}

/// `client status --json`.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// What the user called the model.
    pub model: String,
    /// The swarm's prefix.
    pub dht_prefix: String,
    /// Which model exactly.
    pub fingerprint: String,
    /// How many blocks it has.
    pub blocks: usize,
    /// Whether every block has an online peer.
    pub complete: bool,
    /// Online peers of each block.
    pub coverage: Vec<usize>,
    /// Runs of blocks without one, half-open.
    pub missing: Vec<[usize; 2]>,
    /// Everybody who serves this model.
    pub peers: Vec<PeerStatus>,
}

/// One peer in [`Status`].
#[derive(Debug, Clone, Serialize)]
pub struct PeerStatus {
    /// Its libp2p id.
    pub peer_id: String,
    /// What its owner calls it.
    pub public_name: Option<String>,
    /// The blocks it serves, half-open.
    pub span: [usize; 2],
    /// `JOINING`, `ONLINE` or `DRAINING`.
    pub state: String,
    /// What it computes in.
    pub dtype: String,
    /// How its weights are quantized.
    pub quant: String,
    /// Tokens a second through its span, one lane, as it measured itself.
    pub throughput: f64,
    /// Round trip, milliseconds; absent where it did not answer.
    pub rtt_ms: Option<f64>,
    /// Whether it is reached through a relay.
    pub relayed: bool,
    /// Free tokens of its KV pool.
    pub cache_tokens_left: u64,
    /// Its version of helion.
    pub version: String,
    /// Where it listens.
    pub addresses: Vec<String>,
}

impl From<&SwarmView> for Status {
    fn from(view: &SwarmView) -> Self {
        let missing = spans(&view.missing());
        Self {
            model: view.identity.name.clone(),
            dht_prefix: view.identity.dht_prefix.clone(),
            fingerprint: view.identity.fingerprint.to_string(),
            blocks: view.blocks,
            complete: missing.is_empty(),
            coverage: view.coverage(),
            missing,
            peers: view.peers.iter().map(PeerStatus::from).collect(),
        }
    }
}

impl From<&PeerView> for PeerStatus {
    fn from(peer: &PeerView) -> Self {
        let said = &peer.announcement;
        Self {
            peer_id: said.peer_id.to_string(),
            public_name: (!said.public_name.is_empty()).then(|| said.public_name.clone()),
            span: [said.span.start, said.span.end],
            state: said.state.to_string().to_uppercase(),
            dtype: said.dtype.to_string(),
            quant: said.quant.clone(),
            throughput: said.compute_tokens_per_second,
            rtt_ms: peer.rtt.map(|rtt| rtt.as_secs_f64() * 1e3),
            relayed: said.relayed,
            cache_tokens_left: said.cache_tokens_left,
            version: said.version.clone(),
            addresses: said.addresses.iter().map(ToString::to_string).collect(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A model called "m", of peers in one of these quantizations.
    pub(in crate::client) fn identity(quants: &[&str]) -> ModelIdentity {
        ModelIdentity {
            name: "m".to_owned(),
            argument: "m".to_owned(),
            dht_prefix: "m".to_owned(),
            fingerprint: Fingerprint([7; 32]),
            quants: quants.iter().map(ToString::to_string).collect(),
        }
    }

    fn peer(span: Range<usize>, quant: &str) -> Announcement {
        let quant = quant.to_owned();
        Announcement {
            span,
            quant,
            fingerprint: [7; 32],
            state: State::Online,
            ..Announcement::blank(PeerId::random())
        }
    }

    #[test]
    fn peers_in_another_quantization_than_the_one_asked_for_are_left_out_and_named() {
        let peers = [peer(0..4, "none"), peer(4..8, "q4_k"), peer(4..8, "q8_0")];
        for (quants, coverage) in [
            (&[][..], [1, 1, 1, 1, 2, 2, 2, 2]),
            (&["none"], [1, 1, 1, 1, 0, 0, 0, 0]),
            (&["none", "q8_0"], [1, 1, 1, 1, 1, 1, 1, 1]),
        ] {
            let mut view = SwarmView::new(identity(quants), 8);
            view.add(peers.clone());
            assert_eq!(view.coverage(), coverage, "{quants:?}");
        }
        let mut view = SwarmView::new(identity(&["none"]), 8);
        view.add(peers);
        let message = view.incomplete().to_string();
        for part in ["blocks 4:8", "--require-quant asks for none", "4:8 in q4_k", "4:8 in q8_0"] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn peers_that_do_not_speak_the_codec_are_left_out_and_named() {
        let identity = identity(&[]);
        let old = peer(0..8, "none");
        let new = Announcement { wire_codecs: vec![WireCodec::Q8], ..peer(0..6, "none") };
        let mut view = SwarmView { codec: WireCodec::Q8, ..SwarmView::new(identity.clone(), 8) };
        view.add([old.clone(), new.clone()]);
        assert_eq!(view.missing(), vec![6..8]);
        let message = view.incomplete().to_string();
        assert!(message.contains(&format!("don't speak --wire-codec q8: {} (0:8)", old.peer_id)), "{message}");
        let mut any = SwarmView::new(identity, 8);
        any.add([old, new]);
        assert!(any.missing().is_empty());
    }
}
