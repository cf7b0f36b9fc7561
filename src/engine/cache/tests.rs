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
    Keep { session: usize, lane: u32, pages: usize },
    Adopt { session: usize, lane: u32, prefix: usize },
    ForgetPrefixes,
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
        3 => (session.clone(), 0..4u32, 0..5usize)
            .prop_map(|(session, lane, pages)| Action::Keep { session, lane, pages }),
        2 => (session.clone(), 0..4u32, 0..8usize)
            .prop_map(|(session, lane, prefix)| Action::Adopt { session, lane, prefix }),
        1 => Just(Action::ForgetPrefixes),
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
    /// What was kept at some time.
    prefixes: Vec<Vec<u32>>,
}

/// The names of the pages that hold these.
fn keys(held: &[u32]) -> Vec<PageKey> {
    let ends = (1..=held.len() / PAGE_TOKENS).map(|pages| pages * PAGE_TOKENS);
    ends.map(|end| {
        let ids: Vec<u8> = held[..end].iter().flat_map(|id| id.to_le_bytes()).collect();
        PageKey(*blake3::hash(&ids).as_bytes())
    })
    .collect()
}

impl Model {
    fn new() -> Self {
        let desk = Arc::new(Desk::new(PAGES, 0, Meeting::FirstHop));
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
            Action::Keep { session, lane, pages } => {
                let (cache, lanes) = &self.sessions[session];
                let held = lanes.get(&lane).map_or(&[][..], |held| held);
                let held = &held[..(pages * PAGE_TOKENS).min(held.len())];
                cache.keep_prefix(lane, &keys(held), Vec::new());
                self.prefixes.push(held.to_vec());
            }
            Action::Adopt { session, lane, prefix } => {
                let Some(held) = self.prefixes.get(prefix) else { return };
                let (cache, lanes) = &mut self.sessions[session];
                let pages = cache.adopt_prefix(lane, &keys(held)).len();
                lanes.insert(lane, held[..pages * PAGE_TOKENS].to_vec());
            }
            Action::ForgetPrefixes => {
                let mut state = self.desk.lock();
                let DeskState { pages, kept, .. } = &mut *state;
                kept.expire(Instant::now() + Duration::from_secs(1), pages);
            }
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
            let claim = cache.table.claim();
            let could_ever = cache.table.could_ever(&runs, &state.pages);
            let Some(pages) = state.pages_for(&cache.table, &runs) else {
                let needed = cache.table.needed(&runs, &state.pages);
                assert!(needed > state.pages.available() || claim == Claim::New);
                return;
            };
            assert!(could_ever && pages.len() == cache.table.needed(&runs, &state.pages));
            cache.table.extend(&runs, pages, &state.pages)
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
        let mut kept = BTreeSet::new();
        for held in &self.prefixes {
            let pages: Vec<PageId> = state.kept.find(&keys(held)).map(|kept| kept.page).collect();
            self.check_contents(&pages, &held[..pages.len() * PAGE_TOKENS]);
            kept.extend(pages);
        }
        // Others may be kept whose first page is not, any more.
        (0..PAGES).filter(|page| state.pages.is_kept(*page)).for_each(|page| references[page as usize] += 1);
        assert!(kept.len() <= state.kept.count());
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
        let Model { desk, sessions, .. } = model;
        drop(sessions);
        prop_assert_eq!(desk.lock().pages.available(), PAGES as usize);
    }
}

/// A session that holds `pages` full pages.
fn session(desk: &Arc<Desk>, pages: usize) -> Cache {
    let mut cache = Cache::new(desk.clone(), BLOCKS);
    let runs = [LaneRun { lane: 0, position: 0, tokens: pages * PAGE_TOKENS }];
    let mut state = desk.lock();
    let taken = state.pages_for(&cache.table, &runs).unwrap();
    cache.table.extend(&runs, taken, &state.pages);
    drop(state);
    desk.give_back(cache.table.commit(&runs));
    cache
}

#[test]
fn a_prefix_that_is_taken_over_leaves_the_watermark() {
    let desk = Arc::new(Desk::new(32, 0, Meeting::FirstHop));
    let ids: Vec<u32> = (0..32 * PAGE_TOKENS as u32).collect();
    let mut first = session(&desk, 30);
    let more = [LaneRun { lane: 0, position: 30 * PAGE_TOKENS, tokens: 2 * PAGE_TOKENS }];
    let mut state = desk.lock();
    let taken = state.pages_for(&first.table, &more).unwrap();
    first.table.extend(&more, taken, &state.pages);
    drop(state);
    desk.give_back(first.table.commit(&more));
    first.keep_prefix(0, &keys(&ids), Vec::new());
    // While the first one holds them, another one takes nothing from anybody.
    let mut other = Cache::new(desk.clone(), BLOCKS);
    assert_eq!(other.adopt_prefix(0, &keys(&ids)).len(), 32);
    drop((first, other));
    let mut other = Cache::new(desk.clone(), BLOCKS);
    assert_eq!(other.adopt_prefix(0, &keys(&ids)).len(), 30);
    assert_eq!((other.end(0), desk.lock().pages.available()), (30 * PAGE_TOKENS, 2));
}

#[test]
fn a_step_back_into_pages_that_are_kept_needs_no_room() {
    let desk = Arc::new(Desk::new(8, 0, Meeting::FirstHop));
    let ids: Vec<u32> = (0..8 * PAGE_TOKENS as u32).collect();
    let cache = session(&desk, 8);
    cache.keep_prefix(0, &keys(&ids), Vec::new());
    let mut state = desk.lock();
    let back = [LaneRun { lane: 0, position: 100, tokens: 20 }];
    assert_eq!((cache.table.needed(&back, &state.pages), state.pages.available()), (2, 0));
    assert!(state.pages_for(&cache.table, &back).unwrap().is_empty());
    assert_eq!((state.kept.count(), state.kept.find(&keys(&ids)).count()), (6, 6));
}

#[test]
fn places_in_the_queue_are_given_back_by_their_owner() {
    let desk = Desk::new(1, 0, Meeting::FirstHop);
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
