//! Beginning with pages that another session of the same client left, and leaving some.
//!
//! The client names the pages of its prompt when it opens the session. Where it waits for the answer, the session begins with as
//! many of them as are there; what it computes is kept under their names as the pages become full, with the rows that were
//! sent on for them: so a session that takes pages over has the history of what it never computed, and a lost next hop is told all
//! of it. At the close the client names what lane 0 has come to hold, answer included.
//!
//! A name counts for what this hop knows as well as for what the client says: the client's peer id, the blocks, the wire
//! format. So nobody is served pages that another peer filled, whatever names it sends.
//!
//! Names speak of the tokens that a session begins with, in order. As soon as lane 0 is written to anywhere else than at its end
//! (a step back, another lane's copy), or the route in front of this hop changes, no more is kept under them.

use std::sync::{Arc, atomic::Ordering};

use bytes::BytesMut;

use super::{Cache, HopSession, Inner, Kept, StepOfHistory};
use crate::{
    engine::{HiddenStates, PAGE_TOKENS, PageKey},
    swarm::{
        history::Place,
        prefix::PrefixNames,
        proto::{announcement, session as proto},
        ticket::Ticket,
    },
};

/// Keeps page names apart from every other hash.
const DOMAIN: &str = "helion 2026 page of a prefix v1";

/// The names that count here, of the first pages of lane 0.
pub(super) fn page_keys(ticket: &Ticket, names: &PrefixNames) -> Vec<PageKey> {
    if names.page_tokens as usize != PAGE_TOKENS {
        return Vec::new();
    }
    let mut base = blake3::Hasher::new_derive_key(DOMAIN);
    // All parts but the first have a fixed length.
    base.update(&ticket.client.to_bytes());
    for number in [
        ticket.blocks.start as u64,
        ticket.blocks.end as u64,
        announcement::Dtype::from(ticket.wire_dtype) as u64,
        announcement::WireCodec::from(ticket.wire_codec) as u64,
        names.length_class,
    ] {
        base.update(&number.to_le_bytes());
    }
    base.update(&ticket.fingerprint.0);
    base.update(&names.context);
    names.keys.iter().map(|key| PageKey(*base.clone().update(key).finalize().as_bytes())).collect()
}

/// What a session knows of its prefix.
#[derive(Debug, Default)]
pub(super) struct Prefix {
    /// Of the pages that lane 0 begins with; none where nothing is to be kept any more.
    keys: Vec<PageKey>,
    length_class: usize,
    /// Tokens that lane 0 held before the first step.
    held: usize,
    /// How far lane 0 holds what the names say; `None` before the first step.
    filled: Option<usize>,
}

impl Prefix {
    /// Tokens that lane 0 held before the first step.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// A replay put them there.
    pub(super) fn was_told(&mut self, tokens: usize) {
        self.held = tokens;
    }

    /// The names don't say any more what lane 0 holds from now on.
    pub(super) fn stop(&mut self) {
        self.keys = Vec::new();
    }

    /// Lane 0 was written to from `position` to `end`. Returns the names up to the last page that is full now, and which of them are
    /// new; `None` where there is nothing to be kept.
    fn written(&mut self, position: usize, end: usize, length_class: usize) -> Option<(Vec<PageKey>, usize)> {
        // The first step may begin in front of the end of what was held: another hop held less.
        let was = self.filled.unwrap_or(position);
        if position != was || length_class != self.length_class {
            self.stop();
        }
        self.filled = Some(end);
        let (first, full) = (was / PAGE_TOKENS, (end / PAGE_TOKENS).min(self.keys.len()));
        if first >= full {
            return None;
        }
        // Behind the last one they are of no more use.
        let keys = if full == self.keys.len() { std::mem::take(&mut self.keys) } else { self.keys[..full].to_vec() };
        Some((keys, first))
    }
}

impl HopSession {
    /// Begins with what is there of a prefix, where the client waits for that.
    pub(crate) fn begin_with(&self, names: &PrefixNames, adopt: bool) {
        let mut inner = self.lock();
        let keys = page_keys(&inner.ticket, names);
        let length_class = usize::try_from(names.length_class).unwrap_or(usize::MAX);
        let room = usize::try_from(inner.ticket.limits.max_tokens).unwrap_or(usize::MAX);
        let wanted = &keys[..keys.len().min(room / PAGE_TOKENS)];
        let mut held = 0;
        if adopt && let Some(cache) = &mut inner.cache {
            let rows = cache.adopt_prefix(0, wanted);
            held = cache.end(0);
            self.remember_prefix(&mut inner, rows, length_class);
        }
        inner.prefix = Prefix { keys, length_class, held, filled: None };
    }

    /// What was sent on for the pages of a prefix becomes the session's history, as of before its first step.
    fn remember_prefix(&self, inner: &mut Inner, rows: Vec<Option<HiddenStates>>, length_class: usize) {
        if inner.downstream.is_none() {
            return;
        }
        for (page, rows) in rows.into_iter().enumerate() {
            let permit = rows.as_ref().and_then(|rows| self.history_bytes.take(rows.bytes.len()));
            let (Some(states), Some(permit)) = (rows, permit) else {
                inner.replaying.history.forget();
                return;
            };
            let place = Place { step: 0, lane: 0, position: page * PAGE_TOKENS, length_class };
            inner.replaying.history.keep(place, Kept::new(states, Arc::new(permit)));
        }
    }

    /// A step was applied: keeps the pages that it has filled.
    pub(super) fn keep_what_is_full(&self, inner: &mut Inner, step: &StepOfHistory<'_>) {
        let Some(run) = step.lanes.iter().find(|run| run.lane == 0) else { return };
        let (position, end) = (run.position as usize, run.position as usize + run.tokens as usize);
        if inner.prefix.filled.is_none() {
            let reused = position.min(inner.prefix.held) as u64;
            self.counts.prefix_tokens_reused.fetch_add(reused, Ordering::Relaxed);
        }
        let length = if step.rope_length > 0 { step.rope_length as usize } else { end };
        let length_class = self.engine.spec().length_class(length);
        if let Some((keys, first)) = inner.prefix.written(position, end, length_class)
            && let Some(cache) = &inner.cache
        {
            keep(cache, inner, &keys, first);
        }
    }

    /// The client closes the session and names what lane 0 holds.
    pub(crate) fn keep_at_close(&self, close: &proto::Close) {
        let Some(Ok(names)) = close.prefix.as_ref().map(PrefixNames::from_wire) else { return };
        let inner = self.lock();
        // What is under way or was not applied here is not what the names speak of.
        if inner.log.is_running() || inner.log.last_applied() != close.applied || inner.replaying.is_filling() {
            return;
        }
        if let Some(cache) = &inner.cache {
            let mut keys = page_keys(&inner.ticket, &names);
            keys.truncate(cache.end(0) / PAGE_TOKENS);
            keep(cache, &inner, &keys, 0);
        }
    }
}

/// Keeps the first pages of lane 0, those from `first` on with the rows that were sent on for them.
fn keep(cache: &Cache, inner: &Inner, keys: &[PageKey], first: usize) {
    let mut rows = Vec::new();
    if inner.downstream.is_some() {
        let not_kept = cache.not_kept(keys);
        for page in (first..keys.len()).filter(|page| not_kept[*page]) {
            let start = page * PAGE_TOKENS;
            let parts = inner.replaying.history.rows(0, start..start + PAGE_TOKENS);
            rows.extend(parts.and_then(|parts| joined(&parts)).map(|states| (page, states)));
        }
    }
    cache.keep_prefix(0, keys, rows);
}

/// Rows in memory of their own, so that they don't hold on to the messages that they were a part of.
fn joined(parts: &[Kept]) -> Option<HiddenStates> {
    let first = parts.first()?.states();
    let mut bytes = BytesMut::with_capacity(parts.iter().map(|part| part.states().bytes.len()).sum());
    parts.iter().for_each(|part| bytes.extend_from_slice(&part.states().bytes));
    let rows = parts.iter().map(|part| part.states().rows).sum();
    Some(HiddenStates { rows, bytes: bytes.freeze(), ..first.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(pages: u8, held: usize) -> Prefix {
        Prefix { keys: (0..pages).map(|page| PageKey([page; 32])).collect(), held, ..Prefix::default() }
    }

    /// Of each write, how many names it keeps and from which page on.
    fn written(prefix: &mut Prefix, writes: &[(usize, usize)]) -> Vec<Option<(usize, usize)>> {
        let keeps = |(position, end): &(usize, usize)| prefix.written(*position, *end, 0);
        writes.iter().map(keeps).map(|kept| kept.map(|(keys, first)| (keys.len(), first))).collect()
    }

    #[test]
    fn pages_are_kept_as_they_become_full() {
        let writes = [(0, 10), (10, 40), (40, 47), (47, 48), (48, 100), (100, 200)];
        let expected = [None, Some((2, 0)), None, Some((3, 2)), Some((4, 3)), None];
        assert_eq!(written(&mut prefix(4, 0), &writes), expected);
    }

    #[test]
    fn the_first_step_may_begin_in_front_of_what_is_held() {
        assert_eq!(written(&mut prefix(4, 48), &[(31, 70)]), [Some((4, 1))]);
    }

    #[test]
    fn nothing_is_kept_once_the_names_may_be_wrong() {
        assert_eq!(written(&mut prefix(4, 0), &[(0, 20), (10, 40), (40, 64)]), [Some((1, 0)), None, None]);
        let mut prefix = prefix(4, 0);
        assert_eq!(prefix.written(0, 32, 7), None, "positions of another length");
        assert_eq!(written(&mut prefix, &[(32, 64)]), [None]);
    }
}
