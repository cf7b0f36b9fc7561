//! What a client has learnt of the delays between its hops. Plain data: time is an argument.
//!
//! A client measures how far its peers are from itself, and can't ask how far they are from each other. But a step tells: what it
//! took, without the hops' waiting and computing and the two legs that begin or end here, is what the legs between the hops took
//! together. Several such sums over different routes tell the legs apart.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::PeerId;

/// More than the routes of a few minutes have; the one that was seen longest ago makes room.
const MOST: usize = 1024;

/// Routes between machines change within hours, not minutes.
const LIFETIME: Duration = Duration::from_secs(1800);

/// How much of a difference is believed at once: whatever else delays a step makes a leg look longer, and nothing makes it look
/// shorter.
const SHORTER_SHARE: f64 = 0.5;
const LONGER_SHARE: f64 = 0.15;

/// Two peers; a leg is as long either way.
type Pair = (PeerId, PeerId);

/// The legs that are known.
#[derive(Debug, Default)]
pub(crate) struct Legs(HashMap<Pair, Leg>);

#[derive(Debug)]
struct Leg {
    seconds: f64,
    at: Instant,
}

fn pair(one: PeerId, other: PeerId) -> Pair {
    if one < other { (one, other) } else { (other, one) }
}

impl Legs {
    /// All legs of a route took this long together, seconds. `suppose` says what is supposed of one that is not known.
    pub(crate) fn learn(
        &mut self,
        hops: &[PeerId],
        together: f64,
        suppose: impl Fn(PeerId, PeerId) -> f64,
        now: Instant,
    ) {
        let legs: Vec<(Pair, f64)> = hops
            .windows(2)
            .map(|hops| {
                let pair = pair(hops[0], hops[1]);
                (pair, self.fresh(pair, now).unwrap_or_else(|| suppose(hops[0], hops[1])))
            })
            .collect();
        if legs.is_empty() {
            return;
        }
        let off = together - legs.iter().map(|(_, seconds)| seconds).sum::<f64>();
        let share = if off < 0.0 { SHORTER_SHARE } else { LONGER_SHARE };
        let each = share * off / legs.len() as f64;
        for (pair, seconds) in legs {
            self.0.insert(pair, Leg { seconds: (seconds + each).max(0.0), at: now });
        }
        if self.0.len() > MOST {
            self.0.retain(|_, leg| now.saturating_duration_since(leg.at) < LIFETIME);
        }
        while self.0.len() > MOST
            && let Some(oldest) = self.0.iter().min_by_key(|(_, leg)| leg.at).map(|(pair, _)| *pair)
        {
            self.0.remove(&oldest);
        }
    }

    fn fresh(&self, pair: Pair, now: Instant) -> Option<f64> {
        let leg = self.0.get(&pair)?;
        (now.saturating_duration_since(leg.at) < LIFETIME).then_some(leg.seconds)
    }

    /// The one-way delays that are known, seconds; each pair once.
    pub(crate) fn known(&self, now: Instant) -> HashMap<Pair, f64> {
        self.0.keys().filter_map(|pair| Some((*pair, self.fresh(*pair, now)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legs_are_told_apart_by_routes_that_share_some() {
        let [a, b, c] = std::array::from_fn(|_| PeerId::random());
        let (mut legs, now) = (Legs::default(), Instant::now());
        let suppose = |_, _| 0.05;
        for _ in 0..200 {
            legs.learn(&[a, b, c], 0.004 + 0.09, suppose, now);
            legs.learn(&[b, a], 0.004, suppose, now);
        }
        let known = legs.known(now);
        assert!((known[&pair(a, b)] - 0.004).abs() < 1e-4, "{known:?}");
        assert!((known[&pair(c, b)] - 0.09).abs() < 1e-3, "{known:?}");
        assert!(legs.known(now + LIFETIME).is_empty());
    }

    #[test]
    fn a_single_delay_makes_a_leg_little_longer_and_the_table_is_bounded() {
        let [a, b] = std::array::from_fn(|_| PeerId::random());
        let (mut legs, now) = (Legs::default(), Instant::now());
        legs.learn(&[a, b], 0.01, |_, _| 0.01, now);
        legs.learn(&[a, b], 0.11, |_, _| 0.01, now);
        assert!(legs.known(now)[&pair(a, b)] < 0.03);
        for at in 0..MOST as u64 + 10 {
            legs.learn(&[PeerId::random(), b], 0.01, |_, _| 0.01, now + Duration::from_millis(at));
        }
        assert_eq!(legs.0.len(), MOST);
        legs.learn(&[a], 0.5, |_, _| 0.01, now);
    }
}
