//! Who attends with whom: the rows of a pass, cut into groups of one shape.
//!
//! Lanes differ in length, and a device wants few large products. So rows are put in one group where a lane has as many
//! of them as the others and its pages are as many within a factor of two; the shorter lanes' pages are filled up by
//! repeating one, which the mask hides. All decoding lanes of about the same length are one product; a prompt's chunk is
//! one of its own. Groups are cut where their intermediate results would get too large.
//!
//! A plan is made on the host, once for all blocks with the same window, and sent as a few small tensors.

use std::collections::BTreeMap;

use candle_core::{Device, Result as TensorResult, Tensor};

use crate::engine::{
    pages::{PAGE_TOKENS, PageId},
    rope::Angles,
};

/// Consecutive rows of one lane.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) position: usize,
    pub(super) pages: &'a [PageId],
}

impl Run<'_> {
    /// Where in the planes the keys and values of its rows go.
    pub(super) fn slots(&self) -> impl Iterator<Item = u32> {
        let positions = self.position..self.position + self.rows;
        positions
            .map(|position| self.pages[position / PAGE_TOKENS] * PAGE_TOKENS as u32 + (position % PAGE_TOKENS) as u32)
    }
}

/// What the sizes of groups depend on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// A token sees so many tokens, itself included.
    pub(super) window: Option<usize>,
    /// Whether keys must be gathered from position 0 on, because scores depend on it.
    pub(super) whole: bool,
    pub(super) heads: usize,
    /// Numbers of a token's keys.
    pub(super) kv_width: usize,
    /// Numbers of a group's scores, or of its gathered keys, beyond which it is cut.
    pub(super) at_most: usize,
}

/// The groups of a pass.
pub(super) struct Plan {
    pub(super) groups: Vec<Group>,
    /// Where each row is among the groups' rows, one behind the other; `None` where that is its own number.
    pub(super) order: Option<Tensor>,
}

/// Rows of some lanes, as many of each.
pub(super) struct Group {
    /// How many lanes they are.
    pub(super) lanes: usize,
    /// Rows of each lane.
    pub(super) rows: usize,
    /// Pages of each lane.
    pub(super) pages_each: usize,
    /// Their numbers, `[lanes · pages_each]`.
    pub(super) pages: Tensor,
    /// What is added to scores: 0 where a row sees a key, else minus infinity. `[lanes, 1, rows, keys]`.
    pub(super) mask: Tensor,
    which: Which,
}

/// Which rows of the pass a group has.
enum Which {
    Consecutive { first: usize, count: usize },
    Listed(Tensor),
}

impl Group {
    /// The group's rows of `x`, `[rows of the pass, …]`.
    pub(super) fn select(&self, x: &Tensor) -> TensorResult<Tensor> {
        match &self.which {
            Which::Consecutive { first, count } => x.narrow(0, *first, *count),
            Which::Listed(rows) => x.contiguous()?.index_select(rows, 0),
        }
    }
}

/// Rows of one lane that see keys from `first_page` on.
struct Tile<'a> {
    first_row: usize,
    rows: usize,
    position: usize,
    first_page: usize,
    pages: &'a [PageId],
}

impl Plan {
    pub(super) fn new(runs: &[Run<'_>], shape: Shape, device: &Device) -> TensorResult<Self> {
        let mut kinds: BTreeMap<(usize, usize), Vec<Tile<'_>>> = BTreeMap::new();
        for tile in runs.iter().flat_map(|run| tiles(run, shape)) {
            kinds.entry((tile.rows, tile.pages.len().next_power_of_two())).or_default().push(tile);
        }
        let (mut groups, mut order) = (Vec::new(), Vec::new());
        for ((rows, pages), tiles) in &kinds {
            let lane = pages * PAGE_TOKENS * (shape.heads * rows).max(shape.kv_width);
            for tiles in tiles.chunks((shape.at_most / lane).max(1)) {
                order.extend(tiles.iter().flat_map(|tile| tile.first_row..tile.first_row + rows));
                groups.push(Group::new(tiles, shape.window, device)?);
            }
        }
        let order = match order.is_sorted() {
            true => None,
            false => {
                let mut places = vec![0u32; order.len()];
                order.iter().enumerate().for_each(|(place, row)| places[*row] = place as u32);
                Some(Tensor::new(places, device)?)
            }
        };
        Ok(Self { groups, order })
    }
}

/// A run in parts whose scores aren't too many, each with the pages that it sees.
fn tiles<'a>(run: &Run<'a>, shape: Shape) -> impl Iterator<Item = Tile<'a>> {
    let Run { first_row, rows, position, pages } = *run;
    let keys = pages.len().min((position + rows).div_ceil(PAGE_TOKENS)) * PAGE_TOKENS;
    let at_once = (shape.at_most / (shape.heads * keys)).clamp(1, rows);
    (0..rows).step_by(at_once).map(move |first| {
        let (rows, position) = (at_once.min(rows - first), position + first);
        let seen = shape.window.filter(|_| !shape.whole).map_or(0, |window| (position + 1).saturating_sub(window));
        let first_page = seen / PAGE_TOKENS;
        let pages = &pages[first_page..(position + rows).div_ceil(PAGE_TOKENS)];
        Tile { first_row: first_row + first, rows, position, first_page, pages }
    })
}

impl Group {
    /// `tiles` have the same number of rows, and at least one.
    fn new(tiles: &[Tile<'_>], window: Option<usize>, device: &Device) -> TensorResult<Self> {
        let (lanes, rows) = (tiles.len(), tiles.first().map_or(0, |tile| tile.rows));
        let pages_each = tiles.iter().map(|tile| tile.pages.len()).max().unwrap_or(0);
        // Filled up with a page of the lane itself: another lane's may hold what isn't finite, and 0 times that isn't 0.
        let pages = tiles.iter().flat_map(|tile| {
            let filling = std::iter::repeat(tile.pages[0]);
            tile.pages.iter().copied().chain(filling).take(pages_each)
        });
        let positions = tiles.iter().flat_map(|tile| (0..rows).map(|row| (tile.position + row) as u32));
        let bases = tiles.iter().map(|tile| (tile.first_page * PAGE_TOKENS) as u32);
        let mask = Mask {
            bases: Tensor::from_iter(bases, device)?.reshape((lanes, 1, 1, 1))?,
            positions: Tensor::from_iter(positions, device)?.reshape((lanes, 1, rows, 1))?,
            keys: pages_each * PAGE_TOKENS,
            window,
        };
        let listed = || tiles.iter().flat_map(|tile| tile.first_row..tile.first_row + rows);
        let first = tiles.first().map_or(0, |tile| tile.first_row);
        let which = match listed().eq(first..first + lanes * rows) {
            true => Which::Consecutive { first, count: lanes * rows },
            false => Which::Listed(Tensor::from_iter(listed().map(|row| row as u32), device)?),
        };
        Ok(Self { lanes, rows, pages_each, pages: Tensor::from_iter(pages, device)?, mask: mask.make(device)?, which })
    }
}

/// What a group's mask is made of.
struct Mask {
    /// Position of each lane's first key, `[lanes, 1, 1, 1]`.
    bases: Tensor,
    /// Of each row, `[lanes, 1, rows, 1]`.
    positions: Tensor,
    keys: usize,
    window: Option<usize>,
}

impl Mask {
    /// On the device: it is as large as one head's scores.
    fn make(&self, device: &Device) -> TensorResult<Tensor> {
        let keys = Tensor::arange(0, self.keys as u32, device)?.reshape((1, 1, 1, self.keys))?;
        let keys = keys.broadcast_add(&self.bases)?;
        let mut seen = keys.broadcast_le(&self.positions)?;
        if let Some(window) = self.window {
            // No context is longer, and their sum still fits.
            let window = Tensor::new(&[window.min(1 << 30) as u32], device)?;
            seen = (seen * keys.broadcast_add(&window)?.broadcast_gt(&self.positions)?)?;
        }
        let hidden = Tensor::new(&[f32::NEG_INFINITY], device)?.broadcast_as(seen.shape())?;
        seen.where_cond(&Tensor::zeros(seen.shape(), hidden.dtype(), device)?, &hidden)
    }
}

/// Rotary angles of the rows of a pass.
pub(super) struct Turns {
    /// `[rows, pairs]`.
    pub(super) cos: Tensor,
    /// Likewise.
    pub(super) sin: Tensor,
    pub(super) pairs: usize,
}

impl Turns {
    pub(super) fn new(angles: Angles, device: &Device) -> TensorResult<Self> {
        let (cos, sin, pairs) = angles.into_tables();
        let table = |values: Vec<f32>| Tensor::from_vec(values, ((), pairs), device);
        Ok(Self { cos: table(cos)?, sin: table(sin)?, pairs })
    }
}
