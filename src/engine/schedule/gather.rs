//! Whether to start with the steps that are ready, or to wait a moment for sessions that are about to come.
//!
//! Decoding reads every weight once a pass, so that a pass of eight sessions takes little longer than one of a single session. But
//! sessions that were together in a pass come on one after another, and whoever starts with the first of them runs two
//! passes where one would do: at this hop, and at every hop behind it, since the two parts come there apart as well. Nothing
//! brings them together again: a group of sessions falls apart, and stays so.
//!
//! # Lingering keeps groups together
//!
//! What comes from one pass of the hop before comes in a burst. So an engine that could start lingers until nobody has come for
//! a part of a pass, [`BURST`] or [`LINGER`].
//!
//! # Forming brings them together
//!
//! The engine at a route's first hop can also wait until all sessions that decode are here, once, and they are one group from then on.
//! That takes long, as long as a chunk of a prompt may take at most, and the tokens to come pay it back. It has a purse of its own
//! ([`PURSE`], [`FORMING_PART`]), so that it costs no more than a part of the time where it fails: where sessions go round at speeds of
//! their own, for example. Only the first hop forms groups: two hops could each hold a part and wait for the other's.
//!
//! # One group or several
//!
//! If hops have machines of their own, several groups that are at different hops at a time keep all machines busy, and are better than
//! one. Then the first hop neither lingers nor forms, the others wait for the rest of a burst only, and groups become as many as there is
//! room for. One group is better
//!
//! - where this engine takes the larger part of a token's time: two groups would only stand in line for it;
//! - where hops share a machine (two nodes on one, a node and its client) and groups take the processor from each other. That shows:
//!   while others are on their way, passes take longer than the processor's time that they need.
//!
//! # When nobody waits
//!
//! - When nobody is about to come: none of the sessions that decode is away, or those that are should have been back long ago, or go
//!   round at another speed. A session that is alone never waits, and one that ends or falls silent is expected for twice the time
//!   that it used to stay away.
//! - When lingering brought nobody of late: then it is tried now and then only.
//! - When a row is no cheaper in a larger pass, beyond [`MOST_ROWS`], or a pass is over sooner than a thread wakes up,
//!   [`SHORTEST_PASS`].

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// With more rows a pass is no longer limited by reading the weights, and a row costs the same in any.
const MOST_ROWS: usize = 32;

/// In seconds: to be woken up takes a part of it.
const SHORTEST_PASS: f64 = 0.001;

/// The part of a pass for which nobody must have come, where one group is better than several, and at a head.
const LINGER: f64 = 1.0 / 8.0;

/// Where it isn't known to be: what the hop before sent in one go is here sooner.
const BURST: f64 = 1.0 / 32.0;

/// So many times as long it lingers at the most, while one after another comes.
const LINGERS: f64 = 4.0;

/// Lingers of which brought somebody, if they are tried each time.
const LUCKY: f64 = 0.25;

/// Of passes in which lingering seems to be of no use it is tried in one of so many.
const TRIES: u64 = 8;

/// The part of the time that forming may take.
const FORMING_PART: f64 = 1.0 / 16.0;

/// What may be spent on forming at first, and be saved up, as a multiple of the longest wait for it.
const PURSE: f64 = 2.0;

/// A session that stays away for so many times as long as at worst of late isn't about to come.
const OVERDUE: f64 = 2.0;

/// A session that stays away for so many times as long as those that are here goes round at a speed of its own.
const SLOWER: f64 = 3.0;

/// The shortest wait for one that should have come, in seconds.
const SOON: f64 = 0.02;

/// How many times as long as they take of the processor passes may take on a machine that nobody shares.
const QUIET: f64 = 1.25;

/// Counted as no slower than this.
const SLOWEST: f64 = 4.0;

/// What is left of the slowness after each pass, so that it is found out again after some hundred.
const SLOWNESS_KEPT: f64 = 0.996;

/// A session that had a step is expected to decode soon for so long: a token goes round a swarm in less, as a rule.
const NEXT_TOKEN: Duration = Duration::from_secs(2);

/// A step that is ready.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Here {
    pub(in crate::engine) session: u64,
    pub(in crate::engine) rows: usize,
    pub(in crate::engine) arrived: Instant,
}

/// Where steps meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Meeting {
    /// At the model's first block.
    FirstHop,
    /// At other blocks only.
    LaterHop,
    /// At a client's head, which its own generations share.
    Head,
}

/// How long a pass took.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Took {
    pub(in crate::engine) time: Duration,
    /// Of the processor, by one of the threads that computed.
    pub(in crate::engine) processor: Duration,
}

/// Knows which sessions decode, and when they come back. See the module's docs.
#[derive(Debug)]
pub(in crate::engine) struct Gather {
    meeting: Meeting,
    sessions: BTreeMap<u64, Session>,
    costs: Costs,
    /// How many times as long as they take of the processor passes take while others are on their way.
    slowness: f64,
    /// Which part of lingers brought somebody.
    luck: f64,
    passes: u64,
    waiting: Option<Waiting>,
    /// Whether somebody was on the way when the pass began.
    others_away: bool,
    /// What may be spent on forming, in seconds.
    purse: f64,
    /// Until when it was filled.
    filled: Option<Instant>,
}

/// A wait that isn't over.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    since: Instant,
    /// Steps that were here then.
    steps: usize,
    forms: bool,
}

/// What is known of a session that had a step.
#[derive(Debug)]
struct Session {
    stepped: Instant,
    rows: usize,
    decodes: bool,
    is_here: bool,
    away: Option<Away>,
}

/// How long a session stays away, in seconds.
#[derive(Debug, Clone, Copy)]
struct Away {
    mean: f64,
    /// How much longer of late, at worst.
    longer: f64,
}

/// Those that are about to come.
#[derive(Debug, Default)]
struct Expected {
    rows: usize,
    /// Seconds until the last of them should be here.
    within: f64,
}

impl Gather {
    pub(in crate::engine) fn new(meeting: Meeting) -> Self {
        Self {
            meeting,
            sessions: BTreeMap::new(),
            costs: Costs::default(),
            slowness: 1.0,
            luck: 1.0,
            passes: 0,
            waiting: None,
            others_away: false,
            purse: f64::INFINITY,
            filled: None,
        }
    }

    /// A session came with a step. `decodes` says that it is a short one.
    pub(in crate::engine) fn came(&mut self, session: u64, decodes: bool, at: Instant) {
        let Some(known) = self.sessions.get_mut(&session) else { return };
        known.is_here = true;
        if !(decodes && known.decodes) {
            return;
        }
        let time = at.saturating_duration_since(known.stepped).as_secs_f64();
        known.away = Some(match known.away {
            None => Away { mean: time, longer: 0.0 },
            Some(Away { mean, longer }) => {
                Away { mean: mean + (time - mean) / 4.0, longer: (longer * 0.75).max(time - mean) }
            }
        });
    }

    /// A session's step is finished, at the end of a pass. `decodes` says that it was a short one.
    pub(in crate::engine) fn stepped(&mut self, step: Here, decodes: bool, now: Instant) {
        let away = self.sessions.get(&step.session).and_then(|known| known.away);
        let known = Session { stepped: now, rows: step.rows, decodes, is_here: false, away };
        self.sessions.insert(step.session, known);
    }

    /// A session is closed.
    pub(in crate::engine) fn forget(&mut self, session: u64) {
        self.sessions.remove(&session);
    }

    /// Whether a session is about to come back for its next token.
    pub(in crate::engine) fn expects_more(&self, now: Instant) -> bool {
        self.sessions.values().any(|session| !session.is_here && session.is_recent(now))
    }

    /// A pass with `steps` steps begins.
    pub(in crate::engine) fn begins(&mut self, steps: usize, now: Instant) {
        self.passes += 1;
        let others_away = self.away(now).any(|session| !session.is_overdue(session.away, now));
        self.others_away = others_away;
        let Some(waiting) = self.waiting.take() else { return };
        if waiting.forms {
            self.purse -= seconds(waiting.since, now);
        } else {
            let brought = if steps > waiting.steps { 1.0 } else { 0.0 };
            self.luck += (brought - self.luck) / 8.0;
        }
    }

    /// Nobody is here any more: who waited was given up, and so is the wait.
    pub(in crate::engine) fn gives_up(&mut self, now: Instant) {
        if let Some(waiting) = self.waiting.take().filter(|waiting| waiting.forms) {
            self.purse -= seconds(waiting.since, now);
        }
    }

    /// A pass of `rows` rows, all of sessions that decode, took so long.
    pub(in crate::engine) fn ran(&mut self, rows: usize, took: Took, now: Instant) {
        let Took { time, processor } = took;
        let (time, processor) = (time.as_secs_f64(), processor.as_secs_f64());
        self.costs.ran(rows, processor);
        self.slowness = 1.0 + (self.slowness - 1.0) * SLOWNESS_KEPT;
        if self.others_away && processor > 0.0 {
            self.slowness += ((time / processor).clamp(1.0, SLOWEST) - self.slowness) / 4.0;
        }
        if let Some(before) = self.filled.replace(now) {
            self.purse += FORMING_PART * now.saturating_duration_since(before).as_secs_f64();
        }
    }

    /// Until when to wait with `here`, all of sessions that decode; `None`: start now. To be asked again then, and when somebody has
    /// come. To form a group, no step waits longer than `limit`.
    pub(in crate::engine) fn wait(&mut self, here: &[Here], limit: Duration, now: Instant) -> Option<Instant> {
        let rows = here.iter().map(|step| step.rows).sum();
        let pass = self.costs.of(rows).filter(|pass| *pass >= SHORTEST_PASS && rows < MOST_ROWS)?;
        let usual = here.iter().filter_map(|step| self.sessions.get(&step.session)?.away);
        let usual = usual.reduce(|a, b| if a.mean > b.mean { a } else { b });
        let expected = self.expected(usual, now);
        let is_better_together = self.is_better_together(rows + expected.rows, usual);
        let linger = pass
            * match self.meeting {
                Meeting::FirstHop | Meeting::LaterHop if is_better_together => LINGER,
                Meeting::FirstHop => 0.0,
                Meeting::LaterHop => BURST,
                Meeting::Head => LINGER,
            };
        if expected.rows == 0 || linger == 0.0 {
            return None;
        }
        let waited = here.iter().map(|step| seconds(step.arrived, now));
        let (oldest, newest) = (waited.clone().reduce(f64::max)?, waited.reduce(f64::min)?);
        let forms = rows + expected.rows <= MOST_ROWS && self.may_form(oldest, limit.as_secs_f64(), now);
        let within = if forms {
            expected.within.min(limit.as_secs_f64() - oldest)
        } else if self.waiting.is_some_and(|waiting| waiting.forms) || self.is_unlucky() {
            return None;
        } else {
            (linger - newest).min(LINGERS * linger - oldest)
        };
        if within <= 0.0 {
            return None;
        }
        if self.waiting.is_none_or(|waiting| waiting.forms != forms) {
            self.waiting = Some(Waiting { since: now, steps: here.len(), forms });
        }
        Some(now + Duration::from_secs_f64(within))
    }

    /// Whether lingering seems to be of no use, and this isn't the time to try it again.
    fn is_unlucky(&self) -> bool {
        self.luck < LUCKY && !self.passes.is_multiple_of(TRIES)
    }

    /// Whether there is time to form a group, or to go on with it, with a step that has waited for `oldest` seconds.
    fn may_form(&mut self, oldest: f64, limit: f64, now: Instant) -> bool {
        self.purse = self.purse.min(PURSE * limit);
        let since = self.waiting.filter(|waiting| waiting.forms).map(|waiting| waiting.since);
        let purse = match since {
            Some(since) => self.purse - seconds(since, now),
            // Half a wait is worse than none.
            None => self.purse - limit / 2.0,
        };
        self.meeting == Meeting::FirstHop && oldest < limit && purse > 0.0
    }

    /// Whether one group of so many rows is better than two of half as many, if sessions stay away as `usual`.
    fn is_better_together(&self, rows: usize, usual: Option<Away>) -> bool {
        if self.slowness > QUIET {
            return true;
        }
        match (self.costs.of(rows.div_ceil(2)), self.costs.of(rows), usual) {
            (Some(half), Some(whole), Some(away)) => 2.0 * half > whole + away.mean,
            _ => false,
        }
    }

    /// Who is about to come. Sessions that haven't come back yet are taken for `usual` ones.
    fn expected(&self, usual: Option<Away>, now: Instant) -> Expected {
        let due = self.away(now).filter_map(|session| {
            let away = session.away.or(usual)?;
            let is_slower = usual.is_some_and(|usual| away.mean > SLOWER * usual.mean);
            let within = away.mean + away.longer - seconds(session.stepped, now);
            (!is_slower && !session.is_overdue(Some(away), now)).then_some((session.rows, within.max(SOON)))
        });
        due.fold(Expected::default(), |sum, (rows, within)| Expected {
            rows: sum.rows + rows,
            within: sum.within.max(within),
        })
    }

    /// The sessions that decoded of late and aren't here.
    fn away(&self, now: Instant) -> impl Iterator<Item = &Session> {
        let is_away = move |session: &&Session| session.decodes && !session.is_here && session.is_recent(now);
        self.sessions.values().filter(is_away)
    }
}

impl Session {
    fn is_recent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.stepped) < NEXT_TOKEN
    }

    /// Whether it should have been back long ago, if it stays away as `away` says.
    fn is_overdue(&self, away: Option<Away>, now: Instant) -> bool {
        away.is_some_and(|away| seconds(self.stepped, now) > OVERDUE * (away.mean + away.longer))
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}

/// What passes took of the processor, in seconds, by their rows; each new one counts as much as all before it.
#[derive(Debug, Default)]
struct Costs {
    known: BTreeMap<usize, f64>,
}

impl Costs {
    fn ran(&mut self, rows: usize, took: f64) {
        if rows <= MOST_ROWS {
            self.known.entry(rows).and_modify(|cost| *cost = (*cost + took) / 2.0).or_insert(took);
        }
    }

    /// What a pass with so many rows takes, by those with the next fewer and the next more that are known.
    fn of(&self, rows: usize) -> Option<f64> {
        let fewer = self.known.range(..=rows).next_back();
        let more = self.known.range(rows..).next();
        match (fewer, more) {
            (Some((few, cost)), Some((many, dearer))) if few < many => {
                let part = (rows - few) as f64 / (many - few) as f64;
                Some(cost + part * (dearer - cost))
            }
            (Some((_, cost)), _) | (None, Some((_, cost))) => Some(*cost),
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests;
