//! Opening a session on the hops of a route: connections, tickets, answers.

use std::{
    collections::HashMap,
    ops::Range,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future;
use libp2p::PeerId;

use super::{Handing, Moves, Prefix, Repairs, Route, RouteHop, Session, SessionError, prefix::Prompt, shows_life};
use crate::{
    client::Client,
    swarm::{
        Link, LinkError, Swarm,
        announcement::{Announcement, unix_ms},
        history::History,
        proto::session as proto,
        ticket::{SessionId, SessionLimits, Ticket},
    },
};

/// How long a hop that lives may take to open a session. It reports a next hop that it can't reach sooner than that.
const OPENING_OF_THE_LIVING: Duration = Duration::from_secs(12);

/// How long a ticket may be used to open a session.
const TICKET_LIFETIME: Duration = Duration::from_secs(3600);

/// What hops have of a session, as they said when it was opened.
pub(super) type Openings = HashMap<PeerId, proto::Opened>;

/// A hop and the link to it.
pub(super) struct HopLink {
    pub(super) announcement: Announcement,
    pub(super) peer: PeerId,
    pub(super) blocks: Range<usize>,
    pub(super) link: Link,
}

impl HopLink {
    /// Takes over what the peer announced since, if it still serves these blocks: an announcement expires, and where the peer is may
    /// change while a session lasts.
    pub(super) fn learn(&mut self, newest: Option<Announcement>) {
        let (start, end) = (self.blocks.start, self.blocks.end);
        let is_news = |newest: &Announcement| {
            newest.sequence > self.announcement.sequence && newest.span.start <= start && end <= newest.span.end
        };
        if let Some(newest) = newest.filter(is_news) {
            self.announcement = newest;
        }
    }

    /// Without the link.
    pub(super) fn route_hop(&self) -> RouteHop {
        RouteHop { announcement: self.announcement.clone(), blocks: self.blocks.clone() }
    }

    /// Connects to a hop, unless that was done before.
    pub(super) async fn connect(swarm: Swarm, hop: RouteHop, within: Duration) -> Result<Self, SessionError> {
        let RouteHop { announcement, blocks } = hop;
        let peer = announcement.peer_id;
        let linked = tokio::time::timeout(within, swarm.link(peer, &announcement.addresses)).await;
        match linked.unwrap_or(Err(LinkError::Timeout { peer, after: within })) {
            Ok(link) => Ok(Self { announcement, peer, blocks, link }),
            Err(source) => Err(SessionError::Unreachable { peer, blocks, source }),
        }
    }

    /// As [`HopLink::connect`], to all hops of a route at once.
    ///
    /// # Errors
    /// Of the first that can't be reached. The client is told of the others: peers that were lost together are not to be found out
    /// about one by one.
    pub(super) async fn connect_all(
        client: &Client,
        hops: &[RouteHop],
        within: Duration,
    ) -> Result<Vec<Self>, SessionError> {
        let links = hops.iter().map(|hop| Self::connect(client.swarm().clone(), hop.clone(), within));
        let (mut linked, mut first_error) = (Vec::new(), None);
        for link in future::join_all(links).await {
            match link {
                Ok(link) => linked.push(link),
                Err(error) if first_error.is_none() => first_error = Some(error),
                Err(error) => {
                    tracing::warn!(%error, "another hop is gone");
                    error.peer_to_avoid().into_iter().for_each(|peer| client.failed(peer));
                }
            }
        }
        first_error.map_or(Ok(linked), Err)
    }
}

impl Session {
    /// Connects to every hop of the route, where that was not done before, and shows it its ticket. Doesn't wait for the answers:
    /// the first steps may follow at once, and a hop that refuses is replaced as one that is lost. Only where the hops are
    /// likely to hold pages that the `prompt` begins with it waits, and [`Session::held`] says how much they do.
    ///
    /// # Errors
    /// Where a hop can't be reached.
    pub async fn open(
        client: &Client,
        route: &Route,
        limits: SessionLimits,
        prompt: Option<Prompt<'_>>,
    ) -> Result<Self, SessionError> {
        let within = client.patience().opening;
        let hops = HopLink::connect_all(client, &route.hops, within).await?;
        let id = SessionId::random();
        let unopened = hops.iter().map(|hop| hop.peer).collect();
        let mut session = Self {
            client: client.clone(),
            id,
            epoch: 1,
            hops,
            unopened,
            mailbox: client.inbox().register(id),
            limits,
            wire_dtype: route.wire_dtype,
            wire_codec: route.wire_codec,
            next_number: 1,
            confirmed: 0,
            sent: std::collections::VecDeque::new(),
            last_answer: Instant::now(),
            history: History::default(),
            repairs: Repairs::new(route.is_uniform() && route.wire_codec.is_lossless()),
            moves: Moves::new(Instant::now()),
            handing: Handing::default(),
            cut: None,
            telling: None,
            broken: None,
            prefix: Prefix::default(),
        };
        if let Some(prompt) = &prompt {
            session.prefix = Prefix::of(client, route, prompt);
        }
        let all: Vec<usize> = (0..session.hops.len()).collect();
        if let Err(error) = session.show_tickets(&all) {
            session.broken = Some(error);
        } else if let Some(prompt) = prompt
            && session.prefix.is_awaited()
        {
            session.begin_with_prefix(&prompt).await;
        }
        Ok(session)
    }

    /// Shows these hops their tickets for the present route and epoch.
    pub(super) fn show_tickets(&self, hops: &[usize]) -> Result<(), SessionError> {
        let identity = self.client.model().identity();
        let own = self.client.swarm().peer_id();
        let expires_unix_ms = unix_ms() + TICKET_LIFETIME.as_millis() as u64;
        for &index in hops {
            let (hop, next) = (&self.hops[index], self.hops.get(index + 1));
            let ticket = Ticket {
                session: self.id,
                epoch: self.epoch,
                client: own,
                hop: hop.peer,
                upstream: if index == 0 { own } else { self.hops[index - 1].peer },
                downstream: next.map_or(own, |next| next.peer),
                dht_prefix: identity.dht_prefix.clone(),
                fingerprint: identity.fingerprint,
                blocks: hop.blocks.clone(),
                wire_dtype: self.wire_dtype,
                wire_codec: self.wire_codec,
                limits: self.limits,
                take_over_from: self.handing.taken_over_by(hop.peer),
                expires_unix_ms,
            };
            let mut open = ticket
                .sign(self.client.swarm().identity().keypair())
                .map_err(|error| SessionError::Misuse(format!("the session's ticket can't be signed: {error}")))?;
            open.next = next.and_then(|next| next.announcement.signed.clone());
            self.offer_prefix(index, &mut open);
            self.send_to(hop, proto::frame::Body::Open(open), Bytes::new())?;
        }
        Ok(())
    }

    /// Waits until these hops hold the session, and returns what each of them has of it. A hop that doesn't even answer a ping
    /// `within` this time is lost; one that does is only waiting for the hop behind it.
    pub(super) async fn wait_until_open(&mut self, hops: &[usize], within: Duration) -> Result<Openings, SessionError> {
        let asked = Instant::now();
        for hop in hops {
            self.send_to(&self.hops[*hop], proto::frame::Body::Ping(proto::Ping { nonce: 0 }), Bytes::new())?;
        }
        let mut deadline = asked + within;
        let mut opened = HashMap::new();
        loop {
            let waiting: Vec<&HopLink> =
                hops.iter().map(|hop| &self.hops[*hop]).filter(|hop| !opened.contains_key(&hop.peer)).collect();
            let Some(&first) = waiting.first() else { break };
            let unopened: Vec<PeerId> = waiting.iter().map(|hop| hop.peer).collect();
            let Ok(event) = tokio::time::timeout_at(deadline.into(), self.mailbox.next()).await else {
                let dead = waiting.iter().find(|hop| !shows_life(&hop.link, asked));
                let patience = asked + within.max(OPENING_OF_THE_LIVING);
                if dead.is_none() && deadline < patience {
                    deadline = patience;
                    continue;
                }
                let why = format!("it did not open the session within {:.0} s", asked.elapsed().as_secs_f64());
                let lost = dead.copied().unwrap_or(first).peer;
                // Those that froze together are not to be found out about one by one.
                let silent: Vec<PeerId> =
                    waiting.iter().filter(|hop| !shows_life(&hop.link, asked)).map(|hop| hop.peer).collect();
                silent.into_iter().filter(|peer| *peer != lost).for_each(|peer| self.give_up_on(peer));
                return Err(self.silent(lost, why));
            };
            match self.sift_in_turn(event) {
                Ok(Some((from, proto::frame::Body::Opened(answer), _))) => {
                    self.learn_load(from, &answer);
                    opened.insert(from, answer);
                }
                Ok(_) => {}
                Err(error) => match error.peer_to_avoid().filter(|_| error.is_of_a_leaving_hop()) {
                    // It has the session, and keeps it until its turn to be left comes.
                    Some(peer) if self.handing.is_to_be_left(peer) && !unopened.contains(&peer) => {}
                    Some(peer) if !unopened.contains(&peer) => self.handing.leave_at(peer, Instant::now()),
                    _ => return Err(error),
                },
            }
        }
        self.unopened.retain(|peer| !opened.contains_key(peer));
        Ok(opened)
    }
}
