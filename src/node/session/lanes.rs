//! Steps that copy and drop lanes: done at once, since they cost the engine nothing.
//!
//! Copies refer to the same pages of the KV cache and to the same rows of the history. They are passed on and kept for retries
//! as steps with rows are.

use std::sync::{Arc, MutexGuard};

use bytes::Bytes;

use super::{HopSession, Inner, Pending, Reply, Report, cache_away};
use crate::{
    engine::HiddenStates,
    node::border,
    swarm::{lanes::LaneChanges, proto::session as proto},
};

impl HopSession {
    /// Does what the step whose turn it is says, and passes it on.
    pub(super) fn change_lanes(
        self: &Arc<Self>,
        mut guard: MutexGuard<'_, Inner>,
        changes: &LaneChanges,
        pending: Pending,
    ) {
        let Pending { mut step, payload, permit } = pending;
        let number = step.number;
        let inner = &mut *guard;
        let Some(cache) = &mut inner.cache else {
            return self.step_failed(guard, Report { number, ..cache_away() });
        };
        let limits = (inner.ticket.limits.max_lanes, inner.ticket.limits.max_tokens);
        let checked = border::check_lane_changes(&step, &payload);
        let checked = checked.and_then(|()| changes.check(limits, |lane| cache.end(lane)).map_err(Into::into));
        if let Err(refusal) = checked {
            let report = Report::new(refusal.code, self.blame_for_steps(inner), refusal.message);
            return self.step_failed(guard, Report { number, ..report });
        }
        cache.copy_lanes(&changes.copies);
        changes.drops.iter().for_each(|lane| cache.drop_lane(*lane));
        // The names of a prefix speak of what lane 0 began with.
        if changes.copies.iter().any(|(_, to)| *to == 0) || changes.drops.contains(&0) {
            inner.prefix.stop();
        }
        if inner.downstream.is_some() {
            inner.replaying.history.change_lanes(number, changes);
        }
        step.times.push(proto::HopTime::default());
        let hidden = self.engine.spec().hidden_size;
        let output = HiddenStates { dtype: inner.ticket.wire_dtype, rows: 0, hidden, bytes: Bytes::new() };
        self.applied(guard, Reply { step, output, _permit: Arc::new(permit) });
    }
}
