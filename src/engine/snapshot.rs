//! A session's cache on its way to another engine that computes alike: read here, rebuilt there.
//!
//! A [`Snapshot`] refers to the pages of a session as they are now, and keeps them so: a step that writes to one of them gets a
//! copy, as where lanes share pages. The other engine rebuilds the same lanes out of fresh pages ([`Cache::rebuild`]), and
//! lanes that share pages here share theirs there. What travels are *pieces*, one block's part of one page each, page after page
//! and within a page block after block. Planes belong to the batcher's thread, so it reads and writes the pieces, a few
//! between two passes: other sessions hardly notice.
//!
//! What comes from elsewhere is believed nothing: the lanes have to fit the pages, each piece has to have its block's size, and no
//! number may be a NaN or an infinity, which attention would spread.

use std::{collections::BTreeSet, fmt, ops::Range, sync::Arc};

use bytes::Bytes;

use super::{
    Engine,
    cache::{Cache, Desk},
    lanes::LaneLayout,
    pages::{Claim, PAGE_TOKENS, PageId, pages_for},
    pass::{PagePlace, Pass},
    planes::KvPlanes,
};

/// The lanes and pages of a session at one moment. Dropping it gives the pages back.
pub struct Snapshot {
    desk: Arc<Desk>,
    blocks: Range<usize>,
    lanes: Vec<LaneLayout>,
    /// With the tokens that count in each.
    pages: Vec<(PageId, usize)>,
}

/// Why pages can't be read, or taken over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The lanes and pages that are described can't be those of a session.
    #[error("lanes that no session has: {0}")]
    BadLanes(String),
    /// The bytes are not those of pages.
    #[error("pages that can't be used: {0}")]
    BadPage(String),
    /// There are not enough free pages.
    #[error(
        "the KV cache is full: the session needs room for {needed_tokens} tokens, and {free_tokens} of {total_tokens} are \
         free; a new session must leave a part of them to those that run"
    )]
    CacheFull {
        /// Room that the session needs, in whole pages.
        needed_tokens: usize,
        /// Room in pages that nobody holds.
        free_tokens: usize,
        /// The cache's size.
        total_tokens: usize,
    },
    /// The cache's device is at fault.
    #[error("the device failed: {0}")]
    Device(String),
    /// The engine is shutting down.
    #[error("the engine is closed")]
    Closed,
}

impl Snapshot {
    /// The lanes, which name their pages by their places in the snapshot.
    pub fn lanes(&self) -> &[LaneLayout] {
        &self.lanes
    }

    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// How many pieces they come in.
    pub fn pieces(&self) -> usize {
        self.pages.len() * self.blocks.len()
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").field("blocks", &self.blocks).field("lanes", &self.lanes).finish_non_exhaustive()
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        self.desk.give_back(self.pages.drain(..).map(|(page, _)| page));
    }
}

impl Cache {
    /// The session as it is now. It may go on meanwhile.
    pub fn snapshot(&self) -> Snapshot {
        let (lanes, pages) = self.table.layout();
        let ids: Vec<PageId> = pages.iter().map(|(page, _)| *page).collect();
        self.desk.lock().pages.share(&ids);
        Snapshot { desk: self.desk.clone(), blocks: self.blocks(), lanes, pages }
    }

    /// Makes an empty cache one that has these lanes on so many fresh pages, which [`Engine::write_pieces`] fills. Until
    /// [`Cache::finish_rebuilding`] no step may run.
    ///
    /// # Errors
    /// The lanes don't fit the pages, or there are not enough free ones; the cache stays empty.
    pub fn rebuild(&mut self, lanes: &[LaneLayout], pages: usize) -> Result<(), TransferError> {
        if !self.table.references().is_empty() {
            return Err(TransferError::BadLanes("the session has some already".to_owned()));
        }
        check_layout(lanes, pages).map_err(TransferError::BadLanes)?;
        let mut state = self.desk.lock();
        let (free, total) = (state.pages.available(), state.pages.total());
        let fresh = state.take_pages(Claim::New, pages).ok_or(TransferError::CacheFull {
            needed_tokens: pages.saturating_mul(PAGE_TOKENS),
            free_tokens: free * PAGE_TOKENS,
            total_tokens: total * PAGE_TOKENS,
        })?;
        self.table.rebuild(lanes, &fresh, &mut state.pages);
        drop(state);
        self.incoming = fresh;
        Ok(())
    }

    /// How many pieces a cache that is being rebuilt waits for.
    pub fn incoming_pieces(&self) -> usize {
        self.incoming.len() * self.blocks().len()
    }

    /// All pieces were written: the session goes on from them.
    pub fn finish_rebuilding(&mut self) {
        self.incoming.clear();
        self.table.mark_run();
    }
}

/// Whether lanes can be those of a session with so many pages.
fn check_layout(lanes: &[LaneLayout], pages: usize) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    let mut named = BTreeSet::new();
    for LaneLayout { lane, tokens, pages: own } in lanes {
        if *tokens == 0 || !seen.insert(*lane) {
            return Err(format!("lane {lane} is empty, or described twice"));
        }
        if own.len() != pages_for(*tokens) {
            return Err(format!("lane {lane} has {tokens} tokens on {} pages of {PAGE_TOKENS}", own.len()));
        }
        let distinct: BTreeSet<u32> = own.iter().copied().collect();
        if distinct.len() != own.len() {
            return Err(format!("lane {lane} has a page twice"));
        }
        named.extend(distinct);
    }
    let last = named.last().map_or(0, |last| *last as usize + 1);
    if last != pages || named.len() != pages {
        return Err(format!("{pages} pages, of which lanes name {} up to {last}", named.len()));
    }
    Ok(())
}

/// Called exactly once with the bytes of the pieces, on the engine's thread. It should be quick.
pub type ReadDone = Box<dyn FnOnce(Result<Vec<u8>, TransferError>) + Send>;

/// Called exactly once with the cache that was handed in, on the engine's thread or at once. It should be quick.
pub type WriteDone = Box<dyn FnOnce(Cache, Result<(), TransferError>) + Send>;

impl Engine {
    /// The next pieces of a snapshot from `first` on, as many as have no more than so many bytes together, or one.
    pub fn pieces_within(&self, snapshot: &Snapshot, first: usize, bytes: usize) -> Range<usize> {
        let sizes = self.piece_sizes(&snapshot.blocks);
        let mut left = bytes;
        let fits = |piece: &usize| {
            let size = sizes[piece % sizes.len()];
            let fits = size <= left || *piece == first;
            left = left.saturating_sub(size);
            fits
        };
        let count = (first..snapshot.pieces()).take_while(fits).count();
        first..first + count
    }

    /// Reads pieces of a snapshot of one of this engine's sessions.
    pub fn read_pieces(&self, snapshot: Arc<Snapshot>, pieces: Range<usize>, done: ReadDone) {
        if !Arc::ptr_eq(&snapshot.desk, &self.shared.desk) || pieces.end > snapshot.pieces() {
            return done(Err(TransferError::BadLanes("they are not this engine's".to_owned())));
        }
        self.transfer(Transfer::Read { snapshot, pieces, done });
    }

    /// Writes pieces to a cache that is being rebuilt; `bytes` are those that were read elsewhere, end to end.
    pub fn write_pieces(&self, cache: Cache, pieces: Range<usize>, write: (Bytes, WriteDone)) {
        let (bytes, done) = write;
        let sizes = self.piece_sizes(&cache.blocks());
        if pieces.end > cache.incoming_pieces() || !Arc::ptr_eq(&cache.desk, &self.shared.desk) {
            let message = format!("pieces {}:{} of {}", pieces.start, pieces.end, cache.incoming_pieces());
            return done(cache, Err(TransferError::BadLanes(message)));
        }
        let expected: usize = pieces.clone().map(|piece| sizes[piece % sizes.len()]).sum();
        if expected != bytes.len() {
            let message = format!("{} pieces of {} bytes, and here they have {expected}", pieces.len(), bytes.len());
            return done(cache, Err(TransferError::BadPage(message)));
        }
        self.transfer(Transfer::Write { cache, pieces, sizes, bytes, done });
    }

    fn transfer(&self, transfer: Transfer) {
        self.shared.desk.lock().transfers.push_back(transfer);
        self.shared.desk.notify();
    }

    /// Bytes of a piece of each of these blocks.
    fn piece_sizes(&self, blocks: &Range<usize>) -> Vec<usize> {
        let attention = self.shared.spec.blocks[blocks.clone()].iter().map(|block| &block.attention);
        let size = |kv_heads, head_size| KvPlanes::size_in_bytes(self.shared.kv_dtype, 1, kv_heads, head_size);
        // The whole cache's size was counted when it was made, so a page's can be.
        attention.map(|attention| size(attention.kv_heads, attention.head_size).unwrap_or(usize::MAX)).collect()
    }
}

/// Pieces that are to be read or written between two passes.
pub(super) enum Transfer {
    Read { snapshot: Arc<Snapshot>, pieces: Range<usize>, done: ReadDone },
    Write { cache: Cache, pieces: Range<usize>, sizes: Vec<usize>, bytes: Bytes, done: WriteDone },
}

impl Transfer {
    pub(super) fn run(self, span: &mut dyn Pass) {
        match self {
            Self::Read { snapshot, pieces, done } => {
                let mut bytes = Vec::new();
                let read = pieces.into_iter().try_for_each(|piece| {
                    let (page, tokens) = snapshot.pages[piece / snapshot.blocks.len()];
                    let block = snapshot.blocks.start + piece % snapshot.blocks.len();
                    span.read_page(PagePlace { block, page, tokens }, &mut bytes)
                });
                // The pages are given back first: whoever waits for the last piece may count them.
                drop(snapshot);
                done(read.map(|()| bytes));
            }
            Self::Write { cache, pieces, sizes, bytes, done } => {
                let (blocks, mut at) = (cache.blocks(), 0);
                let written = pieces.into_iter().try_for_each(|piece| {
                    let (page, block) = (cache.incoming[piece / blocks.len()], piece % blocks.len());
                    let own = &bytes[at..at + sizes[block]];
                    at += sizes[block];
                    span.write_page(PagePlace { block: blocks.start + block, page, tokens: PAGE_TOKENS }, own)
                });
                done(cache, written);
            }
        }
    }

    /// The engine is closed.
    pub(super) fn refuse(self) {
        match self {
            Self::Read { done, .. } => done(Err(TransferError::Closed)),
            Self::Write { cache, done, .. } => done(cache, Err(TransferError::Closed)),
        }
    }
}

#[cfg(test)]
pub(in crate::engine) mod tests {
    use std::{path::Path, sync::mpsc, time::Duration};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        engine::{DeviceChoice, EngineOptions, HiddenStates, Job, Keep, LaneRun},
        model::{Dtype, KvDtype, checkpoint::Checkpoint},
    };

    const PATIENCE: Duration = Duration::from_secs(60);

    fn engine(family: &str, kv_dtype: KvDtype) -> Engine {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family);
        let options = EngineOptions {
            cache_tokens: 512,
            kv_dtype: Some(kv_dtype),
            threads: Some(1),
            device: DeviceChoice::Cpu,
            ..EngineOptions::new(1..4, Dtype::F32)
        };
        Engine::load(&Checkpoint::open(&path).unwrap(), options, &mut |_, _| {}).unwrap()
    }

    fn rows(engine: &Engine, count: usize, seed: usize) -> HiddenStates {
        let width = engine.spec().hidden_size;
        let values: Vec<f32> = (0..count * width).map(|i| (((i + seed) * 37 % 101) as f32 - 50.0) / 30.0).collect();
        HiddenStates::from_f32(Dtype::F32, width, &values)
    }

    fn step(engine: &Engine, cache: Cache, lane: u32, tokens: usize) -> (Cache, Bytes) {
        let position = cache.end(lane);
        step_from(engine, cache, LaneRun { lane, position, tokens })
    }

    fn step_from(engine: &Engine, cache: Cache, run: LaneRun) -> (Cache, Bytes) {
        let (answer, answers) = mpsc::sync_channel(1);
        engine.submit(Job {
            cache,
            hidden: rows(engine, run.tokens, run.position),
            lanes: vec![run],
            rope_length: None,
            keep: Keep::All,
            deadline: std::time::Instant::now() + PATIENCE,
            cancelled: Arc::default(),
            done: Box::new(move |cache, result| answer.send((cache, result)).unwrap()),
        });
        let (cache, result) = answers.recv_timeout(PATIENCE).unwrap();
        (cache, result.unwrap().hidden.bytes)
    }

    fn read(engine: &Engine, snapshot: &Arc<Snapshot>, pieces: Range<usize>) -> Vec<u8> {
        let (answer, answers) = mpsc::sync_channel(1);
        engine.read_pieces(snapshot.clone(), pieces, Box::new(move |bytes| answer.send(bytes).unwrap()));
        answers.recv_timeout(PATIENCE).unwrap().unwrap()
    }

    fn write(
        engine: &Engine,
        cache: Cache,
        pieces: Range<usize>,
        bytes: Vec<u8>,
    ) -> (Cache, Result<(), TransferError>) {
        let (answer, answers) = mpsc::sync_channel(1);
        let done: WriteDone = Box::new(move |cache, result| answer.send((cache, result)).unwrap());
        engine.write_pieces(cache, pieces, (bytes.into(), done));
        answers.recv_timeout(PATIENCE).unwrap()
    }

    /// The same session in another engine.
    pub(in crate::engine) fn moved(from: &Engine, cache: &Cache, to: &Engine, part_bytes: usize) -> Cache {
        let snapshot = Arc::new(cache.snapshot());
        let mut copy = to.cache(cache.blocks()).unwrap();
        copy.rebuild(snapshot.lanes(), snapshot.pages()).unwrap();
        let mut first = 0;
        while first < snapshot.pieces() {
            let pieces = from.pieces_within(&snapshot, first, part_bytes);
            first = pieces.end;
            let bytes = read(from, &snapshot, pieces.clone());
            let (back, result) = write(to, copy, pieces, bytes);
            result.unwrap();
            copy = back;
        }
        copy.finish_rebuilding();
        copy
    }

    fn shared_pages(engine: &Engine) -> usize {
        engine.load_now().cache_tokens_shared / PAGE_TOKENS
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(6))]

        /// Lanes that grow, go back and share pages, in every format of the cache: what comes after them gives the same bits
        /// in both engines.
        #[test]
        fn a_session_goes_on_as_if_it_had_not_moved(
            actions in prop::collection::vec((0u32..3, 1usize..40, 0u32..3), 1..6), part in 1usize..100_000,
        ) {
            for kv_dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::F16, KvDtype::Q8] {
                let (here, there) = (engine("qwen3", kv_dtype), engine("qwen3", kv_dtype));
                let mut cache = here.cache(1..3).unwrap();
                for &(lane, tokens, copy) in &actions {
                    let position = cache.end(lane) / 2;
                    let run = if copy == 0 { position } else { cache.end(lane) };
                    cache = step_from(&here, cache, LaneRun { lane, position: run, tokens }).0;
                    cache.copy_lanes(&[(lane, copy)]);
                }
                let mut copy = moved(&here, &cache, &there, part);
                prop_assert_eq!(shared_pages(&here), shared_pages(&there));
                prop_assert_eq!(here.load_now().cache_tokens_left, there.load_now().cache_tokens_left);
                for lane in 0..3 {
                    prop_assert_eq!(cache.end(lane), copy.end(lane));
                    let (one, expected) = step(&here, cache, lane, 3);
                    let (other, found) = step(&there, copy, lane, 3);
                    prop_assert!(expected == found, "{} lane {}", kv_dtype, lane);
                    (cache, copy) = (one, other);
                }
                drop(copy);
                let load = there.load_now();
                prop_assert_eq!(load.cache_tokens_left, load.cache_tokens_total);
            }
        }
    }

    #[test]
    fn blocks_of_different_shapes_move_too() {
        for family in ["gemma3_text", "bloom", "gpt_oss"] {
            let (here, there) = (engine(family, KvDtype::F32), engine(family, KvDtype::F32));
            let (cache, _) = step(&here, here.cache(1..4).unwrap(), 0, 37);
            let copy = moved(&here, &cache, &there, 3000);
            assert_eq!(step(&here, cache, 0, 2).1, step(&there, copy, 0, 2).1, "{family}");
        }
    }

    #[test]
    fn a_snapshot_stays_as_it_was_while_the_session_goes_on() {
        let here = engine("qwen3", KvDtype::F32);
        let (cache, _) = step(&here, here.cache(1..4).unwrap(), 0, 20);
        let snapshot = Arc::new(cache.snapshot());
        let all = 0..snapshot.pieces();
        let before = read(&here, &snapshot, all.clone());
        let (cache, _) = step_from(&here, cache, LaneRun { lane: 0, position: 3, tokens: 30 });
        assert_eq!(read(&here, &snapshot, all), before);
        drop(snapshot);
        assert_eq!(shared_pages(&here), 0);
        drop(cache);
        assert_eq!(here.load_now().cache_tokens_left, 512);
    }

    #[test]
    fn lanes_that_no_session_has_are_refused() {
        let engine = engine("qwen3", KvDtype::F32);
        let lane = |lane: u32, tokens: usize, pages: &[u32]| LaneLayout { lane, tokens, pages: pages.to_vec() };
        for (lanes, pages, says) in [
            (vec![lane(0, 0, &[])], 0, "lane 0 is empty"),
            (vec![lane(0, 3, &[0]), lane(0, 3, &[1])], 2, "described twice"),
            (vec![lane(1, 17, &[0])], 1, "17 tokens on 1 pages"),
            (vec![lane(1, usize::MAX, &[0])], 1, "tokens on 1 pages"),
            (vec![lane(1, 17, &[0, 0])], 1, "a page twice"),
            (vec![lane(0, 17, &[0, 1])], 3, "3 pages"),
            (vec![lane(0, 17, &[0, 2])], 3, "3 pages"),
            (vec![lane(0, 17, &[0, u32::MAX])], 2, "2 pages"),
            (vec![], 1, "1 pages"),
            (vec![], usize::MAX, "pages"),
        ] {
            let mut cache = engine.cache(1..4).unwrap();
            let error = cache.rebuild(&lanes, pages).unwrap_err().to_string();
            assert!(error.contains(says), "{error} should say {says}");
            assert_eq!((cache.reserved_tokens(), cache.incoming_pieces()), (0, 0));
        }
        // 32 pages, of which a new session leaves two.
        let all: Vec<u32> = (0..31).collect();
        let error = engine.cache(1..4).unwrap().rebuild(&[lane(0, 31 * PAGE_TOKENS, &all)], 31).unwrap_err();
        assert!(matches!(error, TransferError::CacheFull { needed_tokens: 496, free_tokens: 512, .. }), "{error}");
        let (mut used, _) = step(&engine, engine.cache(1..4).unwrap(), 0, 1);
        assert!(matches!(used.rebuild(&[lane(1, 1, &[0])], 1), Err(TransferError::BadLanes(_))));
    }

    #[test]
    fn pieces_of_a_wrong_size_or_with_a_nan_are_refused() {
        let engine = engine("qwen3", KvDtype::F32);
        let mut cache = engine.cache(1..4).unwrap();
        cache.rebuild(&[LaneLayout { lane: 0, tokens: 20, pages: vec![0, 1] }], 2).unwrap();
        let size = engine.piece_sizes(&(1..2))[0];
        assert_eq!(cache.incoming_pieces(), 6);
        for (pieces, bytes, says) in [
            (0..1, vec![0; size - 1], "1 pieces of"),
            (0..2, vec![0; size], "2 pieces of"),
            (5..7, vec![0; 2 * size], "pieces 5:7 of 6"),
            (0..1, vec![0xFF; size], "not finite"),
        ] {
            let (back, result) = write(&engine, cache, pieces, bytes);
            let error = result.unwrap_err().to_string();
            assert!(error.contains(says), "{error} should say {says}");
            cache = back;
        }
        // A step may not run before all of them are there.
        let (answer, answers) = mpsc::sync_channel(1);
        engine.submit(Job {
            cache,
            hidden: rows(&engine, 1, 0),
            lanes: vec![LaneRun { lane: 0, position: 20, tokens: 1 }],
            rope_length: None,
            keep: Keep::All,
            deadline: std::time::Instant::now() + PATIENCE,
            cancelled: Arc::default(),
            done: Box::new(move |_, result| answer.send(result).unwrap()),
        });
        assert!(answers.recv_timeout(PATIENCE).unwrap().is_err());
    }
}
