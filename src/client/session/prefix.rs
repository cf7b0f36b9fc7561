//! What a session begins with: pages that the hops hold from an earlier session of the same tenant.
//!
//! The prompt's pages are named when the session is opened, so that the hops keep them as they are filled. Where the hops are
//! likely to hold some of them already, the client waits for what each of them says and begins behind the shortest: a hop that
//! holds more is stepped back by the first step's position. What they held counts as the work of a step 0: a hop that takes a lost
//! one's place is told it as all else.
//!
//! At the end the hops are told the names of all that lane 0 has come to hold, the answer included, for the next turn of a chat.

use std::time::Duration;

use libp2p::PeerId;

use super::{HopLink, Input, Route, RouteHop, Session, SessionError};
use crate::{
    client::{
        Client,
        prefixes::{Context, Kinds, PageName, PagesOnHop, TenantSecret, are_worth},
    },
    engine::PAGE_TOKENS,
    swarm::{
        history::{Cursor, Place},
        prefix::PrefixNames,
        proto::session as proto,
    },
};

/// What a session is going to begin with.
#[derive(Debug, Clone, Copy)]
pub struct Prompt<'a> {
    /// Whose it is, among those that use this client: what they say is never shared with another tenant.
    pub tenant: &'a str,
    /// All of its tokens, which also give the length that its positions are taken for.
    pub ids: &'a [u32],
}

/// What a session knows of its beginning.
#[derive(Default)]
pub(super) struct Prefix {
    /// `None` where nothing is kept, or not any more.
    secret: Option<TenantSecret>,
    length_class: u64,
    /// Of the route that it was opened on.
    kinds: Kinds,
    /// Of each hop of that route.
    contexts: Vec<[u8; 32]>,
    /// Of the prompt's full pages.
    names: Vec<PageName>,
    /// The hops that it was opened on have them, as far as they are filled.
    filled: usize,
    /// The route has changed since.
    is_elsewhere: bool,
    is_awaited: bool,
    held: usize,
}

impl Prefix {
    /// Names what a session on this route begins with, and says whether it is likely to be there.
    pub(super) fn of(client: &Client, route: &Route, prompt: &Prompt<'_>) -> Self {
        let identity = client.swarm().identity();
        let Some(secret) = TenantSecret::new(identity.keypair(), prompt.tenant) else { return Self::default() };
        let mut prefix = Self {
            secret: Some(secret),
            length_class: client.model().spec().length_class(prompt.ids.len()) as u64,
            kinds: Kinds::of(&route.hops),
            names: secret.names(prompt.ids),
            ..Self::default()
        };
        for count in 1..=route.hops.len() {
            prefix.contexts.push(prefix.context(client, route, count, prefix.length_class).unwrap_or_default());
        }
        let mut expected = prefix.names.len();
        let mut round_trip = Duration::ZERO;
        for (hop, pages) in route.hops.iter().zip(&prefix.contexts) {
            let peer = hop.announcement.peer_id;
            let pages = PagesOnHop { peer, context: pages, names: &prefix.names };
            expected = expected.min(client.prefixes().expected(&pages, identity.is_stored()));
            round_trip = round_trip.max(client.observer().rtt(peer).unwrap_or_default());
            client.prefixes().met(peer);
        }
        prefix.is_awaited = are_worth(expected, round_trip);
        prefix
    }

    /// What the pages of the last of the route's first `count` hops depend on.
    fn context(&self, client: &Client, route: &Route, count: usize, length_class: u64) -> Option<[u8; 32]> {
        let context = Context {
            fingerprint: client.model().identity().fingerprint,
            length_class,
            wire_dtype: route.wire_dtype,
            wire_codec: route.wire_codec,
            since_lie: client.prefixes().since_lie(),
            kinds: Kinds::of(&route.hops[..count]),
        };
        Some(self.secret?.context(&context))
    }

    /// Whether the first step waits for what the hops say.
    pub(super) fn is_awaited(&self) -> bool {
        self.is_awaited
    }

    /// Tokens of the prompt that all hops held.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// The session goes on with other hops. Where these compute otherwise, what is there has no one name any more.
    pub(super) fn follow(&mut self, hops: &[HopLink]) {
        self.is_elsewhere = true;
        let hops: Vec<RouteHop> = hops.iter().map(HopLink::route_hop).collect();
        if Kinds::of(&hops) != self.kinds {
            self.secret = None;
        }
    }

    /// What the hops hold may be wrong: it is named to nobody.
    fn forget(&mut self) {
        self.secret = None;
    }

    /// Lane 0 is filled up to `end` on all hops.
    pub(super) fn is_filled(&mut self, client: &Client, hops: &[HopLink], end: usize) {
        let to = (end / PAGE_TOKENS).min(self.names.len());
        if to <= self.filled || self.is_elsewhere || self.secret.is_none() {
            return;
        }
        for (hop, context) in hops.iter().zip(&self.contexts) {
            let pages = PagesOnHop { peer: hop.peer, context, names: &self.names };
            client.prefixes().filled(&pages, self.filled, to);
        }
        self.filled = to;
    }
}

impl Session {
    /// Tokens of the prompt that all hops held when the session was opened: its first step may begin behind them. At most all but the
    /// last one, whose answer is wanted.
    pub fn held(&self) -> usize {
        self.prefix.held
    }

    /// Where an error says that a hop lied, nothing that this client's hops keep is used again.
    pub(super) fn distrust_liars(&mut self, error: &SessionError) {
        if error.is_of_a_lie() {
            self.prefix.forget();
            self.client.prefixes().distrust();
        }
    }

    /// Whether the hops have something after this step: of a session that began with a prefix also before the first.
    pub(super) fn has_begun(&self, applied: u64) -> bool {
        applied > 0 || self.prefix.held > 0
    }

    /// Names the prompt's pages in the opening of a hop. One that joins later is told by replay what it needs.
    pub(super) fn offer_prefix(&self, hop: usize, open: &mut proto::Open) {
        let prefix = &self.prefix;
        if prefix.is_elsewhere || prefix.secret.is_none() || prefix.names.is_empty() {
            return;
        }
        let names = PrefixNames {
            context: prefix.contexts[hop],
            keys: prefix.names.clone(),
            length_class: prefix.length_class,
            page_tokens: PAGE_TOKENS as u32,
        };
        open.prefix = Some(names.to_wire());
        open.adopt_prefix = prefix.is_awaited;
    }

    /// Waits for what the hops hold of the prompt. Where one of them can't be had, the session begins at the start and repairs itself.
    pub(super) async fn begin_with_prefix(&mut self, prompt: &Prompt<'_>) {
        let within = self.client.patience().overdue + self.client.patience().pong;
        let all: Vec<usize> = (0..self.hops.len()).collect();
        let opened = match self.wait_until_open(&all, within).await {
            Ok(opened) => opened,
            Err(error) => {
                self.broken = Some(error);
                return;
            }
        };
        let of_hop = |peer: PeerId| opened.get(&peer).map_or(0, |opened| opened.prefix_tokens);
        let mut held = self.prefix.names.len() * PAGE_TOKENS;
        for (hop, context) in self.hops.iter().zip(&self.prefix.contexts) {
            let tokens = usize::try_from(of_hop(hop.peer)).unwrap_or(usize::MAX);
            let pages = PagesOnHop { peer: hop.peer, context, names: &self.prefix.names };
            self.client.prefixes().holds_only(&pages, tokens / PAGE_TOKENS);
            held = held.min(tokens);
        }
        let held = held.min(prompt.ids.len().saturating_sub(1));
        self.prefix.held = held;
        if held > 0 {
            tracing::debug!(session = %self.id(), held, "the hops hold what the prompt begins with");
            let place = Place { step: 0, lane: 0, position: 0, length_class: self.prefix.length_class as usize };
            self.history.keep(place, Input::Tokens(prompt.ids[..held].to_vec()));
        }
    }

    /// The names of the pages that lane 0 holds, and what of a length its positions depend on; none where the hops may not all hold
    /// the same.
    pub(super) fn keys_at_close(&self) -> (Vec<PageName>, u64) {
        let is_settled =
            self.sent.is_empty() && self.telling.is_none() && self.broken.is_none() && self.has_begun(self.confirmed);
        let Some(secret) = self.prefix.secret.filter(|_| is_settled) else { return (Vec::new(), 0) };
        let (mut cursor, mut ids, mut length_class) = (Cursor::default(), Vec::new(), None);
        while let Some(part) = self.history.next(&mut cursor, u64::MAX, usize::MAX) {
            // Positions that were taken for another length have other names.
            if part.lane != 0 || *length_class.get_or_insert(part.length_class) != part.length_class {
                break;
            }
            for rows in part.rows {
                let Input::Tokens(tokens) = rows else { return (Vec::new(), 0) };
                ids.extend(tokens);
            }
        }
        (secret.names(&ids), length_class.unwrap_or(0) as u64)
    }

    /// How a hop is told that the session is over.
    pub(super) fn closing(&self, hop: usize, (names, length_class): &(Vec<PageName>, u64)) -> proto::Close {
        let context = self.prefix.context(&self.client, &self.route(), hop + 1, *length_class);
        let Some(context) = context.filter(|_| !names.is_empty()) else { return proto::Close::default() };
        let peer = self.hops[hop].peer;
        self.client.prefixes().met(peer);
        self.client.prefixes().filled(&PagesOnHop { peer, context: &context, names }, 0, names.len());
        let keys =
            PrefixNames { context, keys: names.clone(), length_class: *length_class, page_tokens: PAGE_TOKENS as u32 };
        proto::Close { prefix: Some(keys.to_wire()), applied: self.confirmed }
    }
}
