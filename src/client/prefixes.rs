//! What a client's prompts begin with: names for the pages of it, and which peers should hold them.
//!
//! A page's name is a keyed hash of its tokens chained to the page's in front, so that equal names mean equal beginnings. The key
//! is a secret of the *tenant*: derived from the client's own key and the tenant's name, so that neither a hop nor another
//! tenant can tell from a name what was said, or make one up. What the pages depend on besides tokens is the *context*: the
//! model, how hidden states travel, and how every hop computes whose blocks lie in front ([`Kinds`]).
//!
//! A warm client's session is opened by its first step, and waiting for what the hops hold costs a round trip. So the client waits
//! only where it remembers that this process filled the pages there, or where another run with the same key may have; and only for
//! enough of them.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use libp2p::{PeerId, identity::Keypair};

use super::session::RouteHop;
use crate::{
    engine::PAGE_TOKENS,
    model::{Dtype, fingerprint::Fingerprint},
    swarm::{
        WireCodec,
        announcement::arithmetic::Arithmetic,
        prefix::{KEY_BYTES, MOST_KEYS},
    },
};

/// Keeps a tenant's secret apart from all else that the key is used for.
const DOMAIN: &str = "helion 2026 secret of a tenant's prefixes v1";

/// Fewer pages are computed as quickly as they are asked for.
const LEAST_PAGES: usize = 2;

/// From so many pages on it is worth a round trip to ask peers for them that another run may have filled.
const LEAST_PAGES_OF_OTHERS: usize = 4;

/// What a page that need not be computed saves on all hops together: a page of prompt at 800 tokens a second. Hops that are faster
/// than that make the wait a round trip too long, in front of a prompt that takes one at least.
const PAGE_IS_WORTH: Duration = Duration::from_millis(20);

/// Names that are remembered, on all peers together: those of 16 contexts of 16,384 tokens on 4 hops, in 2 MiB.
const MOST_REMEMBERED: usize = 65_536;

/// Peers that are remembered to have had a session; where there are more, the memory begins anew.
const MOST_MET: usize = 4096;

/// A page's name on the wire.
pub(crate) type PageName = [u8; KEY_BYTES];

/// The secret that a tenant's names are made with.
#[derive(Clone, Copy)]
pub(crate) struct TenantSecret([u8; 32]);

impl TenantSecret {
    /// `None` where the key can't be written down, which an ed25519 key always can.
    pub(crate) fn new(key: &Keypair, tenant: &str) -> Option<Self> {
        let key = key.to_protobuf_encoding().ok()?;
        let mut hasher = blake3::Hasher::new_derive_key(DOMAIN);
        hasher.update(&(key.len() as u64).to_le_bytes()).update(&key).update(tenant.as_bytes());
        Some(Self(*hasher.finalize().as_bytes()))
    }

    /// The names of all pages that these tokens fill, though no more than a frame names.
    pub(crate) fn names(&self, ids: &[u32]) -> Vec<PageName> {
        let mut before = [0; 32];
        let pages = ids.chunks_exact(PAGE_TOKENS).take(MOST_KEYS);
        pages
            .map(|page| {
                let mut hasher = blake3::Hasher::new_keyed(&self.0);
                hasher.update(b"page").update(&before);
                page.iter().for_each(|id| {
                    hasher.update(&id.to_le_bytes());
                });
                before = *hasher.finalize().as_bytes();
                let mut name = [0; KEY_BYTES];
                name.copy_from_slice(&before[..KEY_BYTES]);
                name
            })
            .collect()
    }

    /// What the pages on a hop depend on besides their tokens.
    pub(crate) fn context(&self, of: &Context) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(b"context").update(&of.fingerprint.0);
        hasher.update(&of.length_class.to_le_bytes());
        hasher.update(&of.since_lie.to_le_bytes());
        let mut text = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        text(&of.wire_dtype.to_string());
        text(&of.wire_codec.to_string());
        for Kind { start, arithmetic } in &of.kinds.0 {
            text(&start.to_string());
            arithmetic.words().for_each(|word| text(&word));
        }
        *hasher.finalize().as_bytes()
    }
}

/// See [`TenantSecret::context`].
pub(crate) struct Context {
    pub(crate) fingerprint: Fingerprint,
    /// What of the sequence's length its positions depend on; 0 where nothing does.
    pub(crate) length_class: u64,
    pub(crate) wire_dtype: Dtype,
    pub(crate) wire_codec: WireCodec,
    /// As [`Prefixes::since_lie`] says.
    pub(crate) since_lie: u64,
    /// How the blocks up to the hop's own are computed.
    pub(crate) kinds: Kinds,
}

/// How the blocks from `start` on are computed: what all of their peers have in common. The format of the KV cache is in the kernel
/// path.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Kind {
    start: usize,
    arithmetic: Arithmetic,
}

/// How the blocks of a route are computed, from the first on. Where it is cut between hops that compute alike doesn't matter.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Kinds(Vec<Kind>);

impl Kinds {
    pub(crate) fn of<'a>(hops: impl IntoIterator<Item = &'a RouteHop>) -> Self {
        let mut kinds: Vec<Kind> = Vec::new();
        for hop in hops {
            let arithmetic = Arithmetic::of(&hop.announcement);
            let common = kinds.last().and_then(|kind| kind.arithmetic.clone().with(&arithmetic));
            match (kinds.last_mut(), common) {
                (Some(kind), Some(common)) => kind.arithmetic = common,
                _ => kinds.push(Kind { start: hop.blocks.start, arithmetic }),
            }
        }
        Self(kinds)
    }
}

/// What a client remembers of the pages that it has filled. Shared by its sessions.
#[derive(Debug, Default)]
pub(crate) struct Prefixes(Mutex<Memory>);

/// The names in two halves: where the newer one is full it becomes the older one, and what was that is forgotten.
#[derive(Debug, Default)]
struct Memory {
    newer: HashSet<PageName>,
    older: HashSet<PageName>,
    met: HashSet<PeerId>,
    since_lie: u64,
}

/// The pages of a prompt on a hop.
#[derive(Clone, Copy)]
pub(crate) struct PagesOnHop<'a> {
    pub(crate) peer: PeerId,
    pub(crate) context: &'a [u8; 32],
    pub(crate) names: &'a [PageName],
}

impl PagesOnHop<'_> {
    fn name(&self, page: usize) -> PageName {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.context).update(&self.names[page]).update(&self.peer.to_bytes());
        let mut name = [0; KEY_BYTES];
        name.copy_from_slice(&hasher.finalize().as_bytes()[..KEY_BYTES]);
        name
    }
}

impl Prefixes {
    fn lock(&self) -> MutexGuard<'_, Memory> {
        // Every change is one operation on a set.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A hop was found to lie. What it had said before may have been wrong as well, only less so, and the pages of all hops behind it were
    /// filled from that: by new names none of what is kept is ever met again.
    pub(crate) fn distrust(&self) {
        let mut memory = self.lock();
        *memory = Memory { since_lie: rand::random(), met: std::mem::take(&mut memory.met), ..Memory::default() };
    }

    /// What sets the names since the last lie apart from those before; 0 where there was none.
    pub(crate) fn since_lie(&self) -> u64 {
        self.lock().since_lie
    }

    /// How many of these pages the hop is likely to hold, from the first on: those that were filled there; all of them where it is not
    /// known and an `earlier_run` of this client may have filled them.
    pub(crate) fn expected(&self, of: &PagesOnHop<'_>, earlier_run: bool) -> usize {
        let memory = self.lock();
        if earlier_run && !memory.met.contains(&of.peer) {
            let may_be = of.names.len();
            return if may_be >= LEAST_PAGES_OF_OTHERS { may_be } else { 0 };
        }
        let knows = |page: &usize| {
            let name = of.name(*page);
            memory.newer.contains(&name) || memory.older.contains(&name)
        };
        (0..of.names.len()).take_while(knows).count()
    }

    /// A session was opened there.
    pub(crate) fn met(&self, peer: PeerId) {
        let mut memory = self.lock();
        if memory.met.len() >= MOST_MET {
            memory.met.clear();
        }
        memory.met.insert(peer);
    }

    /// Pages `from..to` are filled there.
    pub(crate) fn filled(&self, of: &PagesOnHop<'_>, from: usize, to: usize) {
        let mut memory = self.lock();
        for page in from..to.min(of.names.len()) {
            memory.newer.insert(of.name(page));
            if memory.newer.len() >= MOST_REMEMBERED / 2 {
                memory.older = std::mem::take(&mut memory.newer);
            }
        }
    }

    /// The hop holds no more than the first `held` pages.
    pub(crate) fn holds_only(&self, of: &PagesOnHop<'_>, held: usize) {
        let mut memory = self.lock();
        for page in held..of.names.len() {
            let name = of.name(page);
            memory.newer.remove(&name);
            memory.older.remove(&name);
        }
    }
}

/// Whether so many pages are worth a round trip to the farthest hop.
pub(crate) fn are_worth(pages: usize, round_trip: Duration) -> bool {
    pages >= LEAST_PAGES && PAGE_IS_WORTH.saturating_mul(pages as u32) >= round_trip
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::swarm::announcement::Announcement;

    fn secret(tenant: &str) -> TenantSecret {
        TenantSecret::new(&Keypair::ed25519_from_bytes([7; 32]).unwrap(), tenant).unwrap()
    }

    fn hop(start: usize, end: usize, quant: &str) -> RouteHop {
        let announcement = Announcement { quant: quant.to_owned(), ..Announcement::blank(PeerId::random()) };
        RouteHop { announcement, blocks: start..end }
    }

    #[test]
    fn names_say_which_tokens_came_before_and_nothing_to_others() {
        let ids: Vec<u32> = (0..40).collect();
        let names = secret("").names(&ids);
        assert_eq!(names.len(), 2, "the third page is not full");
        assert_eq!(secret("").names(&ids[..16]), names[..1]);
        let mut other = ids.clone();
        other[3] = 99;
        let changed = secret("").names(&other);
        assert!(names[0] != changed[0] && names[1] != changed[1], "what comes before counts");
        assert_ne!(secret("a").names(&ids), names);
        let stranger = TenantSecret::new(&Keypair::ed25519_from_bytes([8; 32]).unwrap(), "").unwrap();
        assert_ne!(stranger.names(&ids), names);
        assert_eq!(secret("").names(&vec![1; 16 * (MOST_KEYS + 5)]).len(), MOST_KEYS);
    }

    #[test]
    fn everything_that_pages_depend_on_is_in_the_context() {
        let context = |kinds: Kinds, change: &dyn Fn(&mut Context)| {
            let mut of = Context {
                fingerprint: Fingerprint([1; 32]),
                length_class: 0,
                wire_dtype: Dtype::Bf16,
                wire_codec: WireCodec::Raw,
                since_lie: 0,
                kinds,
            };
            change(&mut of);
            secret("").context(&of)
        };
        let uniform = || Kinds::of(&[hop(0, 4, "none"), hop(4, 8, "none")]);
        let plain = context(uniform(), &|_| {});
        assert_eq!(plain, context(Kinds::of(&[hop(0, 8, "none")]), &|_| {}), "cuts between equals don't matter");
        for other in [
            context(uniform(), &|of| of.fingerprint = Fingerprint([2; 32])),
            context(uniform(), &|of| of.length_class = 25),
            context(uniform(), &|of| of.since_lie = 1),
            context(uniform(), &|of| of.wire_dtype = Dtype::F32),
            context(uniform(), &|of| of.wire_codec = WireCodec::Q8),
            context(Kinds::of(&[hop(0, 4, "q8_0"), hop(4, 8, "none")]), &|_| {}),
            context(Kinds::of(&[hop(0, 4, "none"), hop(4, 8, "q8_0")]), &|_| {}),
        ] {
            assert_ne!(plain, other);
        }
        let at = |cut| context(Kinds::of(&[hop(0, cut, "q8_0"), hop(cut, 8, "none")]), &|_| {});
        assert_ne!(at(3), at(4), "where the kind changes matters");
    }

    #[test]
    fn what_was_filled_is_expected_until_the_hop_says_otherwise() {
        let (prefixes, names) = (Prefixes::default(), secret("").names(&[5; 160]));
        let of = |peer, context| PagesOnHop { peer, context, names: &names };
        let (peer, other) = (PeerId::random(), PeerId::random());
        assert_eq!(
            (prefixes.expected(&of(peer, &[1; 32]), false), prefixes.expected(&of(peer, &[1; 32]), true)),
            (0, 10)
        );
        prefixes.met(peer);
        assert_eq!(prefixes.expected(&of(peer, &[1; 32]), true), 0);
        prefixes.filled(&of(peer, &[1; 32]), 0, 7);
        assert_eq!(prefixes.expected(&of(peer, &[1; 32]), true), 7);
        assert_eq!(
            (prefixes.expected(&of(peer, &[2; 32]), true), prefixes.expected(&of(other, &[1; 32]), false)),
            (0, 0)
        );
        prefixes.holds_only(&of(peer, &[1; 32]), 3);
        assert_eq!(prefixes.expected(&of(peer, &[1; 32]), true), 3);
    }

    #[test]
    fn nothing_that_was_filled_before_a_lie_is_expected_after_it() {
        let (prefixes, names) = (Prefixes::default(), secret("").names(&[5; 160]));
        let of = PagesOnHop { peer: PeerId::random(), context: &[1; 32], names: &names };
        prefixes.met(of.peer);
        prefixes.filled(&of, 0, 7);
        assert_eq!(prefixes.since_lie(), 0);
        prefixes.distrust();
        assert_eq!((prefixes.expected(&of, true), prefixes.expected(&of, false)), (0, 0));
        let first = prefixes.since_lie();
        prefixes.distrust();
        assert!(first != 0 && prefixes.since_lie() != first);
    }

    #[test]
    fn memory_has_a_bound() {
        let (prefixes, names) = (Prefixes::default(), secret("").names(&[5; 16 * MOST_KEYS]));
        for _ in 0..50 {
            prefixes.filled(&PagesOnHop { peer: PeerId::random(), context: &[1; 32], names: &names }, 0, MOST_KEYS);
            prefixes.met(PeerId::random());
        }
        let memory = prefixes.lock();
        assert!(memory.newer.len() + memory.older.len() <= MOST_REMEMBERED);
    }

    #[test]
    fn a_round_trip_is_only_paid_for_what_is_worth_it() {
        assert!(are_worth(2, Duration::from_millis(1)) && are_worth(50, Duration::from_millis(200)));
        assert!(!are_worth(1, Duration::ZERO) && !are_worth(4, Duration::from_millis(100)));
    }
}
