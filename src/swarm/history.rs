//! What a peer sent on in a session, so that a hop that takes a lost one's place can be told all of it again.
//!
//! A history holds rows by lane and position. A step that starts at an earlier position of its lane overwrites what was
//! there, as it does in the KV caches of the hops behind, and lanes are copied and dropped as they are there. A hop's rows are
//! hidden states, the client's are token ids; this
//! module only counts and cuts them. Rows of steps that begin at different lengths are never put together where the model's
//! positions depend on the length: a replay has to give the same positions as the steps did.
//!
//! # Why it is not a plane of the KV pages
//!
//! Rows are kept as the buffers that they were sent in: nothing is copied, or converted, and a replay sends them again. A plane would take
//! a copy of each into the engine's memory and one out of it; its room would be set aside for every page from the start, in a format
//! for all sessions, and these send theirs in formats of their own, some packed and some not at all (at the last hop). A client, which
//! has no engine and no pages, keeps its token ids in the same way. What goes with pages goes
//! with rows, too: rollback and lane copies here, admission by a bound on their bytes, hand-over row by row.
//!
//! # What was
//!
//! A replay gives the state after some step, and the steps behind it are sent again. By then they may have overwritten rows,
//! copied to lanes or dropped them here, and the same has to happen to what was there before. So a lane keeps what it was before
//! such a step until the client holds the step's answer: nobody asks for anything older.

mod lane;

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
};

pub use self::lane::Rows;
use self::lane::{Lane, Segment};
use super::lanes::LaneChanges;

/// What a session sent on. See the module's docs.
#[derive(Debug)]
pub struct History<T> {
    lanes: BTreeMap<u32, Lives<T>>,
    /// The last step that no replay is asked to stand before.
    confirmed: u64,
    is_whole: bool,
}

/// A lane, now and before.
#[derive(Debug)]
struct Lives<T> {
    now: Lane<T>,
    /// What it was before these steps, in their order.
    before: VecDeque<(u64, Lane<T>)>,
}

impl<T: Rows> Lives<T> {
    /// What it was after step `through`, and maybe rows of later ones.
    fn after(&self, through: u64) -> &Lane<T> {
        self.before.iter().find(|(step, _)| *step > through).map_or(&self.now, |(_, lane)| lane)
    }

    /// Keeps what the lane is now, for as long as somebody may ask for it.
    fn preserve(&mut self, step: u64, confirmed: u64) {
        let is_kept = self.before.back().is_some_and(|(last, _)| *last == step);
        if step > confirmed && !is_kept {
            self.before.push_back((step, self.now.clone()));
        }
    }
}

impl<T> Default for Lives<T> {
    fn default() -> Self {
        Self { now: Lane::default(), before: VecDeque::new() }
    }
}

/// Where in a lane the rows of a step belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The step's number.
    pub step: u64,
    /// The lane.
    pub lane: u32,
    /// Of the first row.
    pub position: usize,
    /// Of the length that the positions were taken for; 0 where no length matters.
    pub length_class: usize,
}

/// A part of a history, as it is given to another peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<T> {
    /// Of what the lane was before this step; 0: of what it is now.
    pub before: u64,
    /// Where the rows belong.
    pub place: Place,
    /// `None`: the lane was empty.
    pub rows: Option<T>,
}

/// How far a replay has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cursor {
    lane: u32,
    position: usize,
}

/// Consecutive rows of one lane and one length class.
#[derive(Debug, PartialEq, Eq)]
pub struct Part<T> {
    /// The lane.
    pub lane: u32,
    /// Of the first row.
    pub position: usize,
    /// See [`Place`].
    pub length_class: usize,
    /// In order.
    pub rows: Vec<T>,
    /// How many they are together.
    pub count: usize,
}

impl<T> Default for History<T> {
    fn default() -> Self {
        Self { lanes: BTreeMap::new(), confirmed: 0, is_whole: true }
    }
}

impl<T: Rows> History<T> {
    /// Whether nothing was forgotten.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// How many rows there are, over all lanes; those that lanes share count in each.
    pub fn count(&self) -> usize {
        self.lanes.values().map(|lane| lane.now.end()).sum()
    }

    /// How many rows a lane has.
    pub fn end(&self, lane: u32) -> usize {
        self.lanes.get(&lane).map_or(0, |lane| lane.now.end())
    }

    /// All that there is, lane by lane: given to [`History::restore`] it makes the same history.
    pub fn entries(&self) -> impl Iterator<Item = Entry<T>> {
        self.lanes.iter().flat_map(|(&lane, lives)| {
            let before = lives.before.iter().map(|(step, lane)| (*step, lane));
            before.chain([(0, &lives.now)]).flat_map(move |(before, version)| {
                let nothing =
                    Entry { before, place: Place { step: 0, lane, position: 0, length_class: 0 }, rows: None };
                let empty = (version.is_empty() && before > 0).then_some(nothing);
                let rows = version.from(0).map(move |segment| {
                    let Segment { step, position, length_class, ref rows } = *segment;
                    Entry { before, place: Place { step, lane, position, length_class }, rows: Some(rows.clone()) }
                });
                empty.into_iter().chain(rows)
            })
        })
    }

    /// Adds an entry of another history, in their order. One that leaves a gap ends the history.
    pub fn restore(&mut self, entry: Entry<T>) {
        if !self.is_whole {
            return;
        }
        let Entry { before, place: Place { step, lane, position, length_class }, rows } = entry;
        let Lives { now, before: versions } = self.lanes.entry(lane).or_default();
        let last = versions.back().map_or(0, |(step, _)| *step);
        if before > last {
            versions.push_back((before, Lane::default()));
        }
        let version = if before == 0 { Some(now) } else { versions.back_mut().map(|(_, version)| version) };
        let version = version.filter(|version| (before == 0 || before >= last) && version.end() == position);
        match (version, rows) {
            (None, _) => self.forget(),
            (Some(_), None) => {}
            (Some(version), Some(rows)) => version.push(Segment { step, position, length_class, rows }),
        }
    }

    /// These rows of a lane, in pieces; `None` where not all of them are there.
    pub fn rows(&self, lane: u32, wanted: Range<usize>) -> Option<Vec<T>> {
        let segments = self.lanes.get(&lane)?.now.from(wanted.start);
        let parts = segments.take_while(|segment| segment.position < wanted.end).map(|segment| {
            let start = wanted.start.max(segment.position);
            segment.rows.slice(start - segment.position..wanted.end.min(segment.end()) - segment.position)
        });
        let parts: Vec<T> = parts.collect();
        (parts.iter().map(T::count).sum::<usize>() == wanted.len()).then_some(parts)
    }

    /// Forgets everything, for good.
    pub fn forget(&mut self) {
        self.lanes.clear();
        self.is_whole = false;
    }

    /// Nobody will ask for the state before the end of step `number`.
    pub fn confirm(&mut self, number: u64) {
        if number <= self.confirmed {
            return;
        }
        self.confirmed = number;
        for lane in self.lanes.values_mut() {
            lane.before.retain(|(step, _)| *step > number);
        }
        self.lanes.retain(|_, lane| !lane.now.is_empty() || !lane.before.is_empty());
    }

    /// Keeps the rows of a step; what the lane had from their position on is overwritten. Rows that would leave a gap end
    /// the history: then it can't be replayed.
    pub fn keep(&mut self, place: Place, rows: T) {
        if !self.is_whole {
            return;
        }
        let Place { step, lane, position, length_class } = place;
        let lane = self.lanes.entry(lane).or_default();
        if lane.now.end() > position {
            lane.preserve(step, self.confirmed);
            lane.now.truncate(position);
        }
        if lane.now.end() != position {
            self.forget();
            return;
        }
        lane.now.push(Segment { step, position, length_class, rows });
    }

    /// Copies and drops lanes, as a step did.
    pub fn change_lanes(&mut self, step: u64, changes: &LaneChanges) {
        if !self.is_whole {
            return;
        }
        let now = |from: &u32| self.lanes.get(from).map(|lane| lane.now.clone()).unwrap_or_default();
        let copies: Vec<(u32, Lane<T>)> = changes.copies.iter().map(|(from, to)| (*to, now(from))).collect();
        let drops = changes.drops.iter().map(|lane| (*lane, Lane::default()));
        for (lane, new) in copies.into_iter().chain(drops) {
            let lane = self.lanes.entry(lane).or_default();
            lane.preserve(step, self.confirmed);
            lane.now = new;
        }
        self.lanes.retain(|_, lane| !lane.now.is_empty() || !lane.before.is_empty());
    }

    /// The next rows behind `cursor` of the state after step `through`, `most` at a time; moves the cursor behind them. `None` where
    /// there are no more yet: then the cursor stays, and goes on where rows are added, lane by lane.
    pub fn next(&self, cursor: &mut Cursor, through: u64, most: usize) -> Option<Part<T>> {
        let most = most.max(1);
        for (&lane, lives) in self.lanes.range(cursor.lane..) {
            let position = if lane == cursor.lane { cursor.position } else { 0 };
            let mut left = lives.after(through).from(position).take_while(|segment| segment.step <= through).peekable();
            let Some(length_class) = left.peek().map(|segment| segment.length_class) else { continue };
            let mut part = Part { lane, position, length_class, rows: Vec::new(), count: 0 };
            for segment in left.take_while(|segment| segment.length_class == length_class) {
                let from = position + part.count - segment.position;
                let count = (segment.rows.count() - from).min(most - part.count);
                part.rows.push(segment.rows.slice(from..from + count));
                part.count += count;
                if part.count == most {
                    break;
                }
            }
            *cursor = Cursor { lane, position: position + part.count };
            return Some(part);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl Rows for Vec<u32> {
        fn count(&self) -> usize {
            self.len()
        }

        fn slice(&self, rows: Range<usize>) -> Self {
            self[rows].to_vec()
        }
    }

    /// A row that tells how many refer to it.
    impl Rows for std::rc::Rc<()> {
        fn count(&self) -> usize {
            1
        }

        fn slice(&self, _rows: Range<usize>) -> Self {
            self.clone()
        }
    }

    fn place(step: u64, position: usize) -> Place {
        Place { step, lane: 0, position, length_class: 0 }
    }

    fn all(history: &History<Vec<u32>>, through: u64, most: usize) -> Vec<(u32, usize, Vec<u32>)> {
        let mut cursor = Cursor::default();
        std::iter::from_fn(|| history.next(&mut cursor, through, most))
            .map(|part| (part.lane, part.position, part.rows.concat()))
            .collect()
    }

    #[test]
    fn rows_come_back_in_order_and_in_pieces() {
        let mut history = History::default();
        history.keep(place(1, 0), vec![1, 2, 3]);
        history.keep(place(2, 3), vec![4]);
        history.keep(Place { lane: 7, ..place(3, 0) }, vec![9]);
        assert_eq!(all(&history, 3, 2), [(0, 0, vec![1, 2]), (0, 2, vec![3, 4]), (7, 0, vec![9])]);
        assert_eq!(all(&history, 1, 9), [(0, 0, vec![1, 2, 3])]);
        assert_eq!(all(&history, 0, 9), []);
    }

    #[test]
    fn a_cursor_goes_on_where_more_was_kept() {
        let mut history = History::default();
        let mut cursor = Cursor::default();
        history.keep(place(1, 0), vec![1]);
        assert_eq!(history.next(&mut cursor, 9, 4).unwrap().rows, [[1]]);
        assert_eq!(history.next(&mut cursor, 9, 4), None);
        history.keep(place(2, 1), vec![2]);
        assert_eq!(history.next(&mut cursor, 9, 4).unwrap().rows, [[2]]);
    }

    #[test]
    fn lengths_are_not_mixed() {
        let mut history = History::default();
        for (step, length_class) in [(1, 5), (2, 5), (3, 6)] {
            history.keep(Place { length_class, ..place(step, step as usize - 1) }, vec![step as u32]);
        }
        let classes: Vec<_> = {
            let mut cursor = Cursor::default();
            std::iter::from_fn(|| history.next(&mut cursor, 9, 9)).map(|part| (part.length_class, part.count)).collect()
        };
        assert_eq!(classes, [(5, 2), (6, 1)]);
    }

    #[test]
    fn rows_are_found_by_their_positions() {
        let mut history = History::default();
        for (step, rows) in [vec![0, 1, 2], vec![3], vec![4, 5]].into_iter().enumerate() {
            history.keep(place(step as u64 + 1, rows[0] as usize), rows);
        }
        assert_eq!(history.rows(0, 1..5), Some(vec![vec![1, 2], vec![3], vec![4]]));
        assert_eq!(history.rows(0, 0..6).map(|parts| parts.concat()), Some(vec![0, 1, 2, 3, 4, 5]));
        assert_eq!((history.rows(0, 4..7), history.rows(1, 0..1)), (None, None));
    }

    #[test]
    fn a_gap_ends_the_history() {
        let mut history = History::default();
        history.keep(place(1, 1), vec![1]);
        assert!(!history.is_whole());
        history.keep(place(2, 0), vec![1]);
        assert_eq!(all(&history, 9, 9), [], "what is gone stays gone");
    }

    fn changes(copies: &[(u32, u32)], drops: &[u32]) -> LaneChanges {
        LaneChanges { copies: copies.to_vec(), drops: drops.to_vec() }
    }

    #[test]
    fn lanes_change_places_and_what_they_were_can_still_be_told() {
        let mut history = History::default();
        history.keep(place(1, 0), vec![1, 2]);
        history.keep(Place { lane: 1, ..place(2, 0) }, vec![7]);
        history.change_lanes(3, &changes(&[(0, 1), (1, 0), (0, 2)], &[]));
        history.keep(Place { lane: 2, ..place(4, 1) }, vec![8]);
        history.change_lanes(5, &changes(&[], &[0]));
        let now = [(1, 0, vec![1, 2]), (2, 0, vec![1, 8])];
        assert_eq!(all(&history, 5, 9), now);
        assert_eq!(all(&history, 4, 9), [(0, 0, vec![7]), (1, 0, vec![1, 2]), (2, 0, vec![1, 8])]);
        assert_eq!(all(&history, 3, 9), [(0, 0, vec![7]), (1, 0, vec![1, 2]), (2, 0, vec![1, 2])]);
        assert_eq!(all(&history, 2, 9), [(0, 0, vec![1, 2]), (1, 0, vec![7])]);
        assert_eq!((history.count(), history.end(0), history.end(2)), (4, 0, 2));
        history.confirm(5);
        assert_eq!(all(&history, 5, 9), now);
        assert!(history.lanes.values().all(|lane| lane.before.is_empty()) && history.lanes.len() == 2);
    }

    #[test]
    fn copies_share_what_they_have_in_common() {
        let mut history = History::default();
        let row = std::rc::Rc::new(());
        for step in 0..640 {
            history.keep(place(step + 1, step as usize), row.clone());
        }
        for step in 641..700 {
            history.change_lanes(step, &changes(&[(0, 1), (0, 2), (0, 3)], &[]));
            history.confirm(step);
        }
        assert_eq!((std::rc::Rc::strong_count(&row), history.count()), (1 + 640, 4 * 640));
        history.keep(Place { lane: 3, ..place(700, 630) }, row.clone());
        // The chunk that was cut is the lane's own now.
        assert!(std::rc::Rc::strong_count(&row) < 1 + 640 + 64);
        assert_eq!((history.end(3), history.end(0)), (631, 640));
    }

    /// What is done to a history in a test: of the lanes, from which share of them on, how many rows.
    #[derive(Debug, Clone)]
    enum Change {
        Rows(Vec<(u32, f64, usize)>),
        Lanes(LaneChanges),
    }

    fn any_change() -> impl Strategy<Value = Change> {
        let rows = proptest::collection::vec((0u32..4, 0.0..=1.4f64, 1usize..40), 1..4);
        let copies = proptest::collection::btree_map(0u32..4, 0u32..5, 0..4);
        let lanes = (copies, 0u32..8).prop_map(|(copies, drop)| {
            let drops = (drop < 4 && !copies.contains_key(&drop)).then_some(drop).into_iter().collect();
            Change::Lanes(LaneChanges { copies: copies.into_iter().map(|(to, from)| (from, to)).collect(), drops })
        });
        prop_oneof![rows.prop_map(Change::Rows), lanes]
    }

    proptest! {
        /// A replay of the state after any step that may still be asked for gives what plain lists of rows held then, whatever
        /// was overwritten, copied and dropped since.
        #[test]
        fn a_replay_is_what_the_lanes_held(
            steps in proptest::collection::vec(any_change(), 1..30), most in 1usize..90, credit in 1u64..6,
        ) {
            let mut history = History::default();
            let mut held: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
            let mut states = vec![held.clone()];
            for (number, change) in (1u64..).zip(steps) {
                match change {
                    Change::Rows(runs) => for (lane, back, rows) in runs {
                        let lane_held = held.entry(lane).or_default();
                        let position = (lane_held.len() as f64 * back.min(1.0)) as usize;
                        let rows: Vec<u32> = (0..rows).map(|row| number as u32 * 1000 + lane * 100 + row as u32).collect();
                        lane_held.truncate(position);
                        lane_held.extend(&rows);
                        history.keep(Place { lane, ..place(number, position) }, rows);
                    },
                    Change::Lanes(changes) => {
                        let before = held.clone();
                        for (from, to) in &changes.copies {
                            held.insert(*to, before.get(from).cloned().unwrap_or_default());
                        }
                        changes.drops.iter().for_each(|lane| { held.remove(lane); });
                        history.change_lanes(number, &changes);
                    }
                }
                held.retain(|_, rows| !rows.is_empty());
                states.push(held.clone());
                let confirmed = number.saturating_sub(credit);
                history.confirm(confirmed);
                let mut copy = History { confirmed, ..History::default() };
                history.entries().for_each(|entry| copy.restore(entry));
                for (through, expected) in (confirmed..).zip(&states[confirmed as usize..]) {
                    let parts = all(&history, through, most);
                    prop_assert_eq!(&all(&copy, through, most), &parts);
                    prop_assert!(parts.iter().all(|(_, _, rows)| rows.len() <= most));
                    let mut found: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
                    for (lane, position, rows) in parts {
                        let lane = found.entry(lane).or_default();
                        prop_assert_eq!(lane.len(), position);
                        lane.extend(rows);
                    }
                    prop_assert_eq!(&found, expected);
                }
                prop_assert_eq!(history.count(), held.values().map(Vec::len).sum::<usize>());
            }
        }
    }
}
