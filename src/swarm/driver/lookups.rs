//! Kademlia: queries under way, and records that others put.

use std::time::Duration;

use libp2p::{
    PeerId,
    kad::{
        self, GetRecordOk, InboundRequest, PutRecordError, QueryId, QueryResult, QueryStats, Quorum, Record, RecordKey,
    },
    swarm::ConnectionId,
};
use tokio::{sync::oneshot, time::Instant};

use super::Driver;
use crate::swarm::{
    announcement::{MAX_LIFETIME, set::Origin, unix_ms},
    network::REPLICAS,
    records::{Accepted, Bearer},
};

/// Replicas that are united before a look-up ends: more than half, from all of its disjoint paths in turn. One honest one among
/// them is enough, and whoever has crashed is among the last.
const ENOUGH_REPLICAS: usize = REPLICAS.get() * 5 / 8;

/// What a key holds, at all replicas that answered.
#[derive(Debug, Default)]
pub(in crate::swarm) struct Lookup {
    /// Values, this peer's own among them.
    pub(in crate::swarm) values: Vec<Vec<u8>>,
    /// Requests sent.
    pub(in crate::swarm) requests: usize,
}

/// A query under way, and who waits for it.
pub(super) enum Query {
    Bootstrap { requests: usize, reply: oneshot::Sender<usize> },
    Put { reply: oneshot::Sender<usize> },
    Get { lookup: Lookup, replicas: usize, last_news: Option<Instant>, reply: oneshot::Sender<Lookup> },
}

fn requests(stats: &QueryStats) -> usize {
    stats.num_requests() as usize
}

impl Driver {
    pub(super) fn bootstrap(&mut self, reply: oneshot::Sender<usize>) {
        match self.swarm.behaviour_mut().kad.bootstrap() {
            Ok(id) => {
                self.queries.insert(id, Query::Bootstrap { requests: 0, reply });
            }
            Err(_no_known_peers) => {
                let _ = reply.send(0);
            }
        }
    }

    pub(super) fn put(&mut self, key: RecordKey, value: Vec<u8>, reply: oneshot::Sender<usize>) {
        let expires = Some(std::time::Instant::now() + MAX_LIFETIME);
        let record = Record { expires, ..Record::new(key, value) };
        // With a smaller quorum kad would give up on the rest as soon as it is reached.
        match self.swarm.behaviour_mut().kad.put_record(record, Quorum::All) {
            Ok(id) => {
                self.queries.insert(id, Query::Put { reply });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot put a record");
                let _ = reply.send(0);
            }
        }
    }

    pub(super) fn get(&mut self, key: RecordKey, reply: oneshot::Sender<Lookup>) {
        let id = self.swarm.behaviour_mut().kad.get_record(key);
        self.queries.insert(id, Query::Get { lookup: Lookup::default(), replicas: 0, last_news: None, reply });
    }

    /// Ends look-ups to which nothing was added for a while: what is left are peers that don't answer.
    pub(super) fn end_quiet_lookups(&mut self, now: Instant) {
        let quiet: Duration = self.shared.tuning.lookup_quiet;
        for (id, query) in &self.queries {
            if let Query::Get { last_news: Some(last_news), .. } = query
                && now.duration_since(*last_news) >= quiet
                && let Some(mut running) = self.swarm.behaviour_mut().kad.query_mut(id)
            {
                running.finish();
            }
        }
    }

    pub(super) fn on_kad(&mut self, event: kad::Event) {
        match event {
            kad::Event::OutboundQueryProgressed { id, result, stats, step } => {
                self.on_query_progress(id, result, &stats, step.last);
            }
            kad::Event::InboundRequest {
                request: InboundRequest::PutRecord { source, connection, record: Some(record) },
            } => self.on_put(source, connection, &record),
            _ => {}
        }
    }

    fn on_query_progress(&mut self, id: QueryId, result: QueryResult, stats: &QueryStats, is_last: bool) {
        let Some(query) = self.queries.get_mut(&id) else { return };
        match (query, result) {
            (Query::Bootstrap { requests: sum, .. }, _) => *sum += requests(stats),
            (Query::Get { lookup, replicas, last_news, .. }, QueryResult::GetRecord(result)) => {
                lookup.requests = requests(stats);
                if let Ok(GetRecordOk::FoundRecord(found)) = result {
                    lookup.values.push(found.record.value);
                    if found.peer.is_some() {
                        *replicas += 1;
                        *last_news = Some(Instant::now());
                    }
                }
                let is_enough = *replicas >= ENOUGH_REPLICAS;
                if is_enough && let Some(mut running) = self.swarm.behaviour_mut().kad.query_mut(&id) {
                    running.finish();
                }
            }
            (Query::Put { .. }, QueryResult::PutRecord(result)) => {
                let stored = match &result {
                    Ok(_) => REPLICAS.get(),
                    Err(PutRecordError::QuorumFailed { success, .. } | PutRecordError::Timeout { success, .. }) => {
                        success.len()
                    }
                };
                if let Some(Query::Put { reply }) = self.queries.remove(&id) {
                    let _ = reply.send(stored);
                }
                return;
            }
            _ => {}
        }
        if is_last {
            match self.queries.remove(&id) {
                Some(Query::Bootstrap { requests, reply }) => drop(reply.send(requests)),
                Some(Query::Get { lookup, reply, .. }) => drop(reply.send(lookup)),
                Some(Query::Put { .. }) | None => {}
            }
        }
    }

    fn on_put(&mut self, source: PeerId, connection: ConnectionId, record: &Record) {
        let origin = {
            let peers = self.shared.peers();
            let remote =
                peers.get(&source).and_then(|known| known.connections.iter().find(|other| other.id == connection));
            match remote {
                Some(connection) => Origin::of(&connection.remote),
                // It has gone; what it put will come again.
                None => return,
            }
        };
        let bearer = Bearer { peer: source, origin };
        let store = self.swarm.behaviour_mut().kad.store_mut();
        match store.accept(&record.key, &record.value, bearer, unix_ms()) {
            Accepted::News(_) => {}
            Accepted::Malformed(reason) => tracing::debug!(peer = %source, reason, "refused a record"),
            Accepted::Forged => {
                tracing::warn!(peer = %source, "closed the connection of a peer that put a forged announcement");
                self.swarm.close_connection(connection);
            }
        }
    }
}
