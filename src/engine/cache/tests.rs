//! Sessions at the desk, without an engine: whatever they do, pages are neither lost nor written to by two.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::engine::{
    lanes::{LaneRun, PageCopy},
    pages::Claim,
};

const PAGES: u32 = 24;
const BLOCKS: Range<usize> = 2..5;

/// How a step ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    /// All rows are computed.
    Done,
    /// After this many rows; the pass in which the copies would be made may not have got that far.
    Fails { rows: usize, copied: bool },
    /// It got its pages, and was never begun.
    NeverBegins,
}

#[derive(Debug, Clone)]
enum Action {
    Step { session: usize, runs: Vec<(u32, usize, usize)>, end: End },
    Copy { session: usize, pairs: Vec<(u32, u32)> },
    DropLane { session: usize, lane: u32 },
    Share { session: usize, lane: u32, tokens: usize },
    Adopt { session: usize, lane: u32, prefix: usize },
    DropPrefix { prefix: usize },
    DropSession { session: usize },
}

fn action() -> impl Strategy<Value = Action> {
    let runs = prop::collection::vec((0..4u32, 0..50usize, 1..40usize), 1..4);
    let end = prop_oneof![
        3 => Just(End::Done),
        1 => (0..60usize, any::<bool>()).prop_map(|(rows, copied)| End::Fails { rows, copied }),
        1 => Just(End::NeverBegins),
    ];
    let session = 0..4usize;
    prop_oneof![
        8 => (session.clone(), runs, end).prop_map(|(session, runs, end)| Action::Step { session, runs, end }),
        4 => (session.clone(), prop::collection::vec((0..4u32, 0..4u32), 1..4))
            .prop_map(|(session, pairs)| Action::Copy { session, pairs }),
        1 => (session.clone(), 0..4u32).prop_map(|(session, lane)| Action::DropLane { session, lane }),
        2 => (session.clone(), 0..4u32, 0..80usize)
            .prop_map(|(session, lane, tokens)| Action::Share { session, lane, tokens }),
        2 => (session.clone(), 0..4u32, 0..8usize)
            .prop_map(|(session, lane, prefix)| Action::Adopt { session, lane, prefix }),
        1 => (0..8usize).prop_map(|prefix| Action::DropPrefix { prefix }),
        1 => session.prop_map(|session| Action::DropSession { session }),
    ]
}

/// What lies where, and what should.
struct Model {
    desk: Arc<Desk>,
    /// Of every page, what was written to each slot.
    slots: Vec<[u32; PAGE_TOKENS]>,
    next: u32,
    sessions: Vec<(Cache, BTreeMap<u32, Vec<u32>>)>,
    prefixes: Vec<(SharedPages, Vec<u32>)>,
}

impl Model {
    fn new() -> Self {
        let desk = Arc::new(Desk::new(PAGES));
        let session = || (Cache::new(desk.clone(), BLOCKS), BTreeMap::new());
        let sessions = (0..4).map(|_| session()).collect();
        Self { desk, slots: vec![[0; PAGE_TOKENS]; PAGES as usize], next: 1, sessions, prefixes: Vec::new() }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Step { session, runs, end } => self.step(session, &runs, end),
            Action::Copy { session, pairs } => {
                let (cache, lanes) = &mut self.sessions[session];
                cache.copy_lanes(&pairs);
                let copies: Vec<_> =
                    pairs.iter().map(|(from, _)| lanes.get(from).cloned().unwrap_or_default()).collect();
                for ((_, to), copy) in pairs.iter().zip(copies) {
                    lanes.insert(*to, copy);
                }
            }
            Action::DropLane { session, lane } => {
                let (cache, lanes) = &mut self.sessions[session];
                cache.drop_lane(lane);
                lanes.remove(&lane);
            }
            Action::Share { session, lane, tokens } => {
                let (cache, lanes) = &self.sessions[session];
                let prefix = cache.share_prefix(lane, tokens);
                let held = lanes.get(&lane).map_or(&[][..], |held| held);
                assert_eq!(prefix.tokens(), tokens.min(held.len()) / PAGE_TOKENS * PAGE_TOKENS);
                let held = held[..prefix.tokens()].to_vec();
                self.prefixes.push((prefix, held));
            }
            Action::Adopt { session, lane, prefix } => {
                let Some((pages, held)) = self.prefixes.get(prefix) else { return };
                let (cache, lanes) = &mut self.sessions[session];
                cache.adopt(lane, pages).unwrap();
                lanes.insert(lane, held.clone());
            }
            Action::DropPrefix { prefix } if prefix < self.prefixes.len() => drop(self.prefixes.swap_remove(prefix)),
            Action::DropPrefix { .. } => {}
            Action::DropSession { session } => {
                self.sessions[session] = (Cache::new(self.desk.clone(), BLOCKS), BTreeMap::new());
            }
        }
    }

    /// What the batcher and the pass do.
    fn step(&mut self, session: usize, runs: &[(u32, usize, usize)], end: End) {
        let (cache, lanes) = &mut self.sessions[session];
        let mut seen = BTreeSet::new();
        let runs: Vec<LaneRun> = runs
            .iter()
            .filter(|(lane, ..)| seen.insert(*lane))
            .map(|&(lane, back, tokens)| LaneRun { lane, position: cache.end(lane).saturating_sub(back), tokens })
            .collect();
        let copies = {
            let mut state = self.desk.lock();
            let (table, pool) = (&mut cache.table, &mut state.pages);
            let (needed, claim) = (table.needed(&runs, pool), table.claim());
            let could_ever = table.could_ever(&runs, pool);
            let Some(pages) = pool.take(claim, needed) else {
                assert!(needed > pool.free() || claim == Claim::New);
                return;
            };
            assert!(could_ever && pages.len() == needed);
            table.extend(&runs, pages, pool)
        };
        if end == End::NeverBegins {
            return self.desk.give_back(cache.table.release());
        }
        let (rows, copied) = match end {
            End::Fails { rows, copied } => (rows, copied),
            _ => (usize::MAX, true),
        };
        if copied {
            for PageCopy { from, to } in copies {
                self.slots[to as usize] = self.slots[from as usize];
            }
        }
        let mut left = if copied { rows } else { 0 };
        for run in &runs {
            let lane = lanes.entry(run.lane).or_default();
            lane.truncate(run.position);
            for position in run.position..run.end() {
                if left > 0 {
                    let page = cache.table.pages(run.lane)[position / PAGE_TOKENS];
                    self.slots[page as usize][position % PAGE_TOKENS] = self.next;
                    left -= 1;
                }
                if end == End::Done {
                    lane.push(self.next);
                }
                self.next += 1;
            }
        }
        let superfluous = if end == End::Done { cache.table.commit(&runs) } else { cache.table.abandon(&runs) };
        self.desk.give_back(superfluous);
    }

    fn check(&self) {
        let state = self.desk.lock();
        let mut references = vec![0u32; PAGES as usize];
        for (cache, lanes) in &self.sessions {
            for (page, count) in cache.table.references() {
                references[page as usize] += count;
            }
            for lane in 0..4 {
                let held = lanes.get(&lane).map_or(&[][..], |held| held);
                assert_eq!(cache.end(lane), held.len());
                self.check_contents(cache.table.pages(lane), held);
            }
        }
        for (prefix, held) in &self.prefixes {
            prefix.pages.iter().for_each(|page| references[*page as usize] += 1);
            self.check_contents(&prefix.pages, held);
        }
        let found: Vec<u32> = (0..PAGES).map(|page| state.pages.references(page)).collect();
        assert_eq!(found, references);
        assert_eq!(state.pages.free(), references.iter().filter(|count| **count == 0).count());
        assert_eq!(state.pages.shared(), references.iter().filter(|count| **count > 1).count());
    }

    fn check_contents(&self, pages: &[PageId], held: &[u32]) {
        assert_eq!(pages.len(), held.len().div_ceil(PAGE_TOKENS));
        let contents = pages.iter().flat_map(|page| self.slots[*page as usize]).take(held.len());
        assert!(contents.eq(held.iter().copied()), "a page was overwritten, or not copied");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn pages_are_free_or_referred_to_and_hold_what_their_lanes_wrote(
        actions in prop::collection::vec(action(), 1..60),
    ) {
        let mut model = Model::new();
        for action in actions {
            model.act(action);
            model.check();
        }
        let Model { desk, sessions, prefixes, .. } = model;
        drop((sessions, prefixes));
        prop_assert_eq!(desk.lock().pages.free(), PAGES as usize);
    }
}

#[test]
fn a_prefix_is_for_sessions_of_its_engine_and_blocks() {
    let (desk, other) = (Arc::new(Desk::new(4)), Arc::new(Desk::new(4)));
    let prefix = Cache::new(desk.clone(), BLOCKS).share_prefix(0, 100);
    assert_eq!((prefix.tokens(), prefix.blocks()), (0, BLOCKS));
    assert_eq!(Cache::new(other, BLOCKS).adopt(0, &prefix), Err(AdoptError::OtherEngine));
    let error = Cache::new(desk.clone(), 2..6).adopt(0, &prefix).unwrap_err();
    assert_eq!(error.to_string(), "the prefix holds keys and values of blocks 2:5, and the session runs through 2:6");
    Cache::new(desk, 3..5).adopt(0, &prefix).unwrap();
}

#[test]
fn a_session_that_had_a_step_is_expected_until_it_comes_or_ends_or_is_late() {
    let desk = Arc::new(Desk::new(1));
    let (one, other) = (Cache::new(desk.clone(), BLOCKS), Cache::new(desk.clone(), BLOCKS));
    let (now, nobody) = (Instant::now(), |_| false);
    assert!(!desk.lock().expects_more(nobody, now));
    desk.lock().stepped(one.number, now);
    assert!(desk.lock().expects_more(|session| session == other.number, now));
    assert!(!desk.lock().expects_more(|session| session == one.number, now));
    desk.lock().stepped(other.number, now + NEXT_TOKEN);
    drop(one);
    assert!(desk.lock().expects_more(nobody, now + NEXT_TOKEN));
    assert!(!desk.lock().expects_more(nobody, now + 2 * NEXT_TOKEN));
}

#[test]
fn places_in_the_queue_are_given_back_by_their_owner() {
    let desk = Desk::new(1);
    let mut state = desk.lock();
    let owners = [1, 2, 3].map(|number| Owner::of(&number));
    for owner in [owners[0], owners[0], owners[1]] {
        state.enter(owner, 4).unwrap();
    }
    assert_eq!(state.enter(owners[0], 4), Err(StepError::QueueFull { limit: 2 }));
    state.enter(owners[2], 4).unwrap();
    assert_eq!(state.enter(owners[1], 4), Err(StepError::QueueFull { limit: 4 }));
    for owner in [owners[0], owners[0], owners[1], owners[2]] {
        state.leave(owner);
    }
    assert_eq!((state.queued, state.queued_by.len()), (0, 0));
}
