//! Pages that are kept when their session is over, for others that start with the same tokens.
//!
//! A page goes by a name ([`PageKey`]) in which whoever makes it has put everything that the page's contents depend on: this
//! module compares names and knows nothing else of them. A prefix is a run of pages whose names are looked up one after the
//! other, so a page is of no use without those in front of it, and of these the later ones are given up first.
//!
//! What is kept costs nobody anything: an idle page counts as one that can be had, and is given up when somebody needs it
//! ([`KeptPages::make_room`], under the same lock under which pages are handed out, so that nobody waits for it). It is always
//! the owner that keeps most who gives up a page, the one that was used least recently: an owner that floods the cache floods
//! its own part of it. A page that a session is using meanwhile counts as used.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Instant,
};

use super::{
    hidden::HiddenStates,
    job::Owner,
    pages::{PageId, PagePool},
};

/// A page's name: a hash of its tokens, of all tokens in front of them, and of everything else that keys and values
/// depend on: the model and how it is computed, here and in the blocks in front, the format in which hidden states travel, and
/// who may see the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageKey(pub [u8; 32]);

/// The pages that are kept. See the module's docs.
#[derive(Debug)]
pub(super) struct KeptPages {
    pages: HashMap<PageKey, KeptPage>,
    by_page: HashMap<PageId, PageKey>,
    /// Of each owner that has any: the pages by their last use, the earliest first.
    owners: BTreeMap<Owner, BTreeMap<u64, PageKey>>,
    /// Counts uses.
    uses: u64,
    row_bytes: usize,
    most_row_bytes: usize,
}

/// One of them.
#[derive(Debug)]
pub(super) struct KeptPage {
    pub(super) page: PageId,
    /// What its tokens came out as; `None` where nobody needs it, or there was no room.
    pub(super) rows: Option<HiddenStates>,
    owner: Owner,
    used: u64,
    used_at: Instant,
}

/// A page that may be kept from now on.
#[derive(Debug)]
pub(super) struct NewPage {
    pub(super) page: PageId,
    pub(super) rows: Option<HiddenStates>,
}

impl KeptPages {
    /// None yet; with room for so many bytes of rows.
    pub(super) fn new(most_row_bytes: usize) -> Self {
        Self {
            pages: HashMap::new(),
            by_page: HashMap::new(),
            owners: BTreeMap::new(),
            uses: 0,
            row_bytes: 0,
            most_row_bytes,
        }
    }

    /// How many.
    pub(super) fn count(&self) -> usize {
        self.pages.len()
    }

    /// Bytes of rows that are kept with them.
    pub(super) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    pub(super) fn contains(&self, key: &PageKey) -> bool {
        self.pages.contains_key(key)
    }

    /// The pages with these names, up to the first that is not there.
    pub(super) fn find<'a>(&'a self, keys: &'a [PageKey]) -> impl Iterator<Item = &'a KeptPage> {
        keys.iter().map_while(|key| self.pages.get(key))
    }

    /// A prefix was used.
    pub(super) fn used(&mut self, keys: &[PageKey], now: Instant) {
        // The last one first, so that it is also the first to go.
        for key in keys.iter().rev() {
            let Some(kept) = self.pages.get_mut(key) else { continue };
            self.uses += 1;
            if let Some(order) = self.owners.get_mut(&kept.owner) {
                order.remove(&kept.used);
                order.insert(self.uses, *key);
            }
            (kept.used, kept.used_at) = (self.uses, now);
        }
    }

    /// Keeps the pages of a prefix that are not kept yet, and counts all of them as used. One that is kept under another name
    /// stays as it is.
    pub(super) fn keep(&mut self, owner: Owner, prefix: Vec<(PageKey, NewPage)>, now: Instant, pool: &mut PagePool) {
        let keys: Vec<PageKey> = prefix.iter().map(|(key, _)| *key).collect();
        for (key, NewPage { page, rows }) in prefix {
            if self.pages.contains_key(&key) || !pool.keep(page) {
                continue;
            }
            let rows = rows.filter(|rows| rows.bytes.len() <= self.most_row_bytes);
            self.row_bytes += rows.as_ref().map_or(0, |rows| rows.bytes.len());
            self.uses += 1;
            self.owners.entry(owner).or_default().insert(self.uses, key);
            self.by_page.insert(page, key);
            self.pages.insert(key, KeptPage { page, rows, owner, used: self.uses, used_at: now });
        }
        self.used(&keys, now);
        while self.row_bytes > self.most_row_bytes
            && let Some(owner) = self.largest_owner(&BTreeSet::new())
            && let Some(key) = self.owners[&owner].values().next().copied()
        {
            self.remove(&key, pool);
        }
    }

    /// Gives up idle pages until `count` are free, or none is idle.
    pub(super) fn make_room(&mut self, count: usize, pool: &mut PagePool) {
        let mut all_in_use = BTreeSet::new();
        while pool.free() < count
            && pool.available() > pool.free()
            && let Some(owner) = self.largest_owner(&all_in_use)
        {
            match self.first_idle(owner, pool) {
                Some(key) => self.remove(&key, pool),
                None => {
                    all_in_use.insert(owner);
                }
            }
        }
    }

    /// Of an owner's pages the one that was used least recently and is idle. Those in use that are met go to the end, so that they
    /// are not met again before the others.
    fn first_idle(&mut self, owner: Owner, pool: &PagePool) -> Option<PageKey> {
        for _ in 0..self.owners.get(&owner)?.len() {
            let key = *self.owners.get(&owner)?.values().next()?;
            let kept = self.pages.get(&key)?;
            if pool.is_idle(kept.page) {
                return Some(key);
            }
            let at = kept.used_at;
            self.used(&[key], at);
        }
        None
    }

    /// Who keeps most, of those that are not left out.
    fn largest_owner(&self, without: &BTreeSet<Owner>) -> Option<Owner> {
        let owners = self.owners.iter().filter(|(owner, _)| !without.contains(owner));
        owners.max_by_key(|(_, pages)| pages.len()).map(|(owner, _)| *owner)
    }

    /// A page need not be kept any more. Whether it was.
    pub(super) fn give_up(&mut self, page: PageId, pool: &mut PagePool) -> bool {
        let key = self.by_page.get(&page).copied();
        key.inspect(|key| self.remove(key, pool)).is_some()
    }

    /// Gives up what nobody has used since `before`.
    pub(super) fn expire(&mut self, before: Instant, pool: &mut PagePool) {
        let late: Vec<PageKey> =
            self.pages.iter().filter(|(_, kept)| kept.used_at < before).map(|(key, _)| *key).collect();
        late.iter().for_each(|key| self.remove(key, pool));
    }

    fn remove(&mut self, key: &PageKey, pool: &mut PagePool) {
        let Some(kept) = self.pages.remove(key) else { return };
        self.by_page.remove(&kept.page);
        if let Some(order) = self.owners.get_mut(&kept.owner) {
            order.remove(&kept.used);
            if order.is_empty() {
                self.owners.remove(&kept.owner);
            }
        }
        self.row_bytes -= kept.rows.map_or(0, |rows| rows.bytes.len());
        pool.give_up(kept.page);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::{engine::pages::Claim, model::Dtype};

    const PAGES: u32 = 12;

    fn owner(number: u64) -> Owner {
        Owner::of(&number)
    }

    /// Page `depth` of a chain.
    fn key(chain: u8, depth: usize) -> PageKey {
        let mut key = [chain; 32];
        key[1] = depth as u8;
        PageKey(key)
    }

    fn chain(chain: u8, pages: usize) -> Vec<PageKey> {
        (0..pages).map(|depth| key(chain, depth)).collect()
    }

    fn rows(bytes: usize) -> HiddenStates {
        HiddenStates { dtype: Dtype::F32, rows: 16, hidden: 1, bytes: vec![0; bytes].into() }
    }

    /// Keeps a chain in pages of its own, which are idle then.
    fn fill(kept: &mut KeptPages, pool: &mut PagePool, who: u64, keys: &[PageKey]) {
        let pages = pool.take(Claim::Running, keys.len()).unwrap();
        let named = keys.iter().zip(&pages).map(|(key, page)| (*key, NewPage { page: *page, rows: Some(rows(10)) }));
        kept.keep(owner(who), named.collect(), Instant::now(), pool);
        pool.give_back(pages);
    }

    #[test]
    fn a_prefix_goes_from_its_end_and_the_least_recently_used_one_first() {
        let (mut kept, mut pool) = (KeptPages::new(1000), PagePool::new(8));
        fill(&mut kept, &mut pool, 1, &chain(1, 4));
        fill(&mut kept, &mut pool, 1, &chain(2, 4));
        kept.used(&chain(1, 4), Instant::now());
        kept.make_room(2, &mut pool);
        assert_eq!((kept.find(&chain(1, 4)).count(), kept.find(&chain(2, 4)).count(), pool.free()), (4, 2, 2));
        kept.make_room(5, &mut pool);
        assert_eq!((kept.find(&chain(1, 4)).count(), kept.find(&chain(2, 4)).count(), kept.row_bytes()), (3, 0, 30));
    }

    #[test]
    fn whoever_keeps_most_gives_up_first() {
        let (mut kept, mut pool) = (KeptPages::new(1000), PagePool::new(12));
        fill(&mut kept, &mut pool, 1, &chain(1, 3));
        for number in 2..5 {
            fill(&mut kept, &mut pool, 2, &chain(number, 3));
        }
        kept.make_room(6, &mut pool);
        assert_eq!(kept.find(&chain(1, 3)).count(), 3, "a flood takes what is its own");
    }

    #[test]
    fn a_page_in_use_is_passed_over() {
        let (mut kept, mut pool) = (KeptPages::new(1000), PagePool::new(4));
        fill(&mut kept, &mut pool, 1, &chain(1, 2));
        let held: Vec<PageId> = kept.find(&chain(1, 2)).map(|kept| kept.page).collect();
        pool.share(&held);
        fill(&mut kept, &mut pool, 1, &chain(2, 2));
        kept.make_room(2, &mut pool);
        assert_eq!((kept.find(&chain(1, 2)).count(), kept.count(), pool.free()), (2, 2, 2));
        kept.make_room(3, &mut pool);
        assert_eq!(pool.free(), 2, "nobody waits for what can't be had");
        assert!(kept.give_up(held[1], &mut pool) && !kept.give_up(held[1], &mut pool));
        assert_eq!((kept.find(&chain(1, 2)).count(), pool.references(held[1])), (1, 1));
    }

    #[test]
    fn rows_have_a_bound_and_time_ends_everything() {
        let (mut kept, mut pool) = (KeptPages::new(25), PagePool::new(8));
        fill(&mut kept, &mut pool, 1, &chain(1, 2));
        fill(&mut kept, &mut pool, 1, &chain(2, 2));
        assert_eq!((kept.row_bytes(), kept.find(&chain(2, 2)).count(), kept.count()), (20, 2, 2));
        let page = pool.take(Claim::Running, 1).unwrap();
        let large = vec![(key(9, 0), NewPage { page: page[0], rows: Some(rows(26)) })];
        kept.keep(owner(1), large, Instant::now(), &mut pool);
        pool.give_back(page);
        assert!(kept.find(&chain(9, 1)).all(|kept| kept.rows.is_none()), "kept without what there is no room for");
        kept.expire(Instant::now() + Duration::from_secs(1), &mut pool);
        assert_eq!((kept.count(), kept.row_bytes(), pool.free()), (0, 0, 8));
        assert!(kept.owners.is_empty() && kept.by_page.is_empty());
    }

    #[derive(Debug, Clone)]
    enum Action {
        /// A session of an owner adopts what it finds of a chain, computes the rest up to so many pages, keeps them.
        Run {
            owner: u64,
            chain: u8,
            pages: usize,
        },
        /// The session that began first ends.
        End,
        Expire {
            keeps: usize,
        },
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            4 => (0..3u64, 0..5u8, 1..8usize).prop_map(|(owner, chain, pages)| Action::Run { owner, chain, pages }),
            3 => Just(Action::End),
            1 => (0..5usize).prop_map(|keeps| Action::Expire { keeps }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        /// Sessions get every page that no session holds, whatever is kept; a prefix is only found where it was kept; no page is lost.
        #[test]
        fn what_is_kept_is_in_nobodys_way(actions in prop::collection::vec(action(), 1..60)) {
            let (mut kept, mut pool) = (KeptPages::new(200), PagePool::new(PAGES));
            // What each session holds; and what was written to each page: which chain's which page.
            let mut sessions: Vec<Vec<PageId>> = Vec::new();
            let mut written: HashMap<PageId, PageKey> = HashMap::new();
            let begin = Instant::now();
            let mut times = vec![begin];
            for (time, action) in actions.into_iter().enumerate() {
                let now = begin + Duration::from_secs(time as u64 + 1);
                times.push(now);
                match action {
                    Action::Run { owner: who, chain: number, pages } => {
                        let keys = chain(number, pages);
                        let mut held: Vec<PageId> = kept.find(&keys).map(|kept| kept.page).collect();
                        for (page, key) in held.iter().zip(&keys) {
                            prop_assert_eq!(written[page], *key, "a page that is found holds what its name says");
                        }
                        pool.share(&held);
                        let lacking = pages - held.len();
                        let by_sessions: BTreeSet<PageId> =
                            sessions.iter().flatten().chain(&held).copied().collect();
                        prop_assert_eq!(pool.has(Claim::Running, lacking), by_sessions.len() + lacking <= PAGES as usize);
                        kept.make_room(lacking, &mut pool);
                        let Some(new) = pool.take(Claim::Running, lacking) else {
                            prop_assert!(by_sessions.len() + lacking > PAGES as usize);
                            pool.give_back(held);
                            continue;
                        };
                        for (page, key) in new.iter().zip(&keys[held.len()..]) {
                            written.insert(*page, *key);
                        }
                        held.extend(new);
                        let named = keys.iter().zip(&held);
                        let named = named.map(|(key, page)| (*key, NewPage { page: *page, rows: Some(rows(16)) }));
                        kept.keep(owner(who), named.collect(), now, &mut pool);
                        sessions.push(held);
                    }
                    Action::End if !sessions.is_empty() => pool.give_back(sessions.remove(0)),
                    Action::End => {}
                    Action::Expire { keeps } => {
                        kept.expire(times[times.len().saturating_sub(keeps + 1)], &mut pool);
                    }
                }
                let idle = kept.pages.values().filter(|kept| pool.is_idle(kept.page)).count();
                prop_assert_eq!(pool.available() - pool.free(), idle);
                prop_assert_eq!(kept.owners.values().map(BTreeMap::len).sum::<usize>(), kept.count());
                prop_assert_eq!(kept.by_page.len(), kept.count());
                let bytes: usize = kept.pages.values().filter_map(|kept| Some(kept.rows.as_ref()?.bytes.len())).sum();
                prop_assert!(bytes == kept.row_bytes() && bytes <= 200);
            }
            sessions.into_iter().for_each(|held| pool.give_back(held));
            prop_assert_eq!(pool.available(), PAGES as usize);
            kept.make_room(PAGES as usize, &mut pool);
            prop_assert_eq!((pool.free(), kept.count()), (PAGES as usize, 0));
        }
    }
}
