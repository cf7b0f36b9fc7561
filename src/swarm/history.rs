//! What a peer sent on in a session, so that a hop that takes a lost one's place can be told all of it again.
//!
//! A history holds rows by lane and position. A step that starts at an earlier position of its lane overwrites what was
//! there, as it does in the KV caches of the hops behind. A hop's rows are hidden states, the client's are token ids; this
//! module only counts and cuts them. Rows of steps that begin at different lengths are never put together where the model's
//! positions depend on the length: a replay has to give the same positions as the steps did.

use std::{collections::BTreeMap, ops::Range};

/// Consecutive rows of one lane.
pub trait Rows: Sized {
    /// How many.
    fn count(&self) -> usize;
    /// Some of them.
    fn slice(&self, rows: Range<usize>) -> Self;
}

/// What a session sent on. See the module's docs.
#[derive(Debug)]
pub struct History<T> {
    lanes: BTreeMap<u32, Vec<Segment<T>>>,
    is_whole: bool,
}

/// The rows of one lane in one step.
#[derive(Debug)]
struct Segment<T> {
    step: u64,
    position: usize,
    length_class: usize,
    rows: T,
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
        Self { lanes: BTreeMap::new(), is_whole: true }
    }
}

impl<T: Rows> History<T> {
    /// Whether nothing was forgotten.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// How many rows there are, over all lanes.
    pub fn count(&self) -> usize {
        self.lanes.values().filter_map(|lane| lane.last()).map(Segment::end).sum()
    }

    /// Forgets everything, for good.
    pub fn forget(&mut self) {
        self.lanes.clear();
        self.is_whole = false;
    }

    /// Keeps the rows of a step; what the lane had from their position on is overwritten. Rows that would leave a gap end
    /// the history: then it can't be replayed.
    pub fn keep(&mut self, place: Place, rows: T) {
        if !self.is_whole {
            return;
        }
        self.roll_back(place.lane, place.position);
        let lane = self.lanes.entry(place.lane).or_default();
        let end = lane.last().map_or(0, Segment::end);
        if end != place.position {
            self.forget();
            return;
        }
        let Place { step, position, length_class, .. } = place;
        lane.push(Segment { step, position, length_class, rows });
    }

    /// Forgets what a lane has from `position` on.
    fn roll_back(&mut self, lane: u32, position: usize) {
        let Some(lane) = self.lanes.get_mut(&lane) else { return };
        let first_after = lane.partition_point(|segment| segment.end() <= position);
        lane.truncate(first_after + 1);
        if let Some(cut) = lane.last_mut().filter(|segment| segment.end() > position) {
            if cut.position < position {
                cut.rows = cut.rows.slice(0..position - cut.position);
            } else {
                lane.pop();
            }
        }
    }

    /// The next rows behind `cursor` of steps up to `through`, `most` at a time; moves the cursor behind them. `None` where
    /// there are no more yet: then the cursor stays, and goes on where rows are added, lane by lane.
    pub fn next(&self, cursor: &mut Cursor, through: u64, most: usize) -> Option<Part<T>> {
        let most = most.max(1);
        for (&lane, segments) in self.lanes.range(cursor.lane..) {
            let position = if lane == cursor.lane { cursor.position } else { 0 };
            let first = segments.partition_point(|segment| segment.end() <= position);
            let left = || segments[first..].iter().take_while(|segment| segment.step <= through);
            let Some(length_class) = left().next().map(|segment| segment.length_class) else { continue };
            let mut part = Part { lane, position, length_class, rows: Vec::new(), count: 0 };
            for segment in left().take_while(|segment| segment.length_class == length_class) {
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

impl<T: Rows> Segment<T> {
    fn end(&self) -> usize {
        self.position + self.rows.count()
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
    fn a_gap_ends_the_history() {
        let mut history = History::default();
        history.keep(place(1, 1), vec![1]);
        assert!(!history.is_whole());
        history.keep(place(2, 0), vec![1]);
        assert_eq!(all(&history, 9, 9), [], "what is gone stays gone");
    }

    proptest! {
        /// A replay gives what a plain list of rows holds, whatever was overwritten.
        #[test]
        fn a_replay_is_what_the_lane_holds(
            steps in proptest::collection::vec((0.0..=1.0f64, 1usize..5), 1..30), most in 1usize..7,
        ) {
            let mut history = History::default();
            let mut held: Vec<u32> = Vec::new();
            for (number, (back, rows)) in steps.into_iter().enumerate() {
                let position = (held.len() as f64 * back) as usize;
                let rows: Vec<u32> = (0..rows).map(|row| (number * 100 + row) as u32).collect();
                held.truncate(position);
                held.extend(&rows);
                history.keep(place(number as u64 + 1, position), rows);
            }
            let parts = all(&history, u64::MAX, most);
            prop_assert!(parts.iter().all(|(_, _, rows)| rows.len() <= most));
            prop_assert_eq!(parts.into_iter().flat_map(|(_, _, rows)| rows).collect::<Vec<_>>(), held);
        }
    }
}
