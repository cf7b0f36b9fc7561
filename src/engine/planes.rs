//! Where keys and values lie: one K and one V plane for each block, in the engine's dtype.
//!
//! A plane is `[pages, kv_heads, PAGE_TOKENS, head_size]`: the keys of one head in one page are contiguous, because that
//! is what one product of attention reads. Planes are allocated once, at start. The system hands out zeroed memory
//! lazily, so that a page takes memory when a session first writes to it.

use half::{bf16, f16, vec::HalfBitsVecExt};

use super::{
    floats::Stored,
    pages::{PAGE_TOKENS, PageId},
};
use crate::model::Dtype;

/// The planes of one block, in one of three formats.
pub(super) enum KvPlanes {
    F32(Planes<f32>),
    Bf16(Planes<bf16>),
    F16(Planes<f16>),
}

/// The planes of one block.
pub(super) struct Planes<T> {
    keys: Vec<T>,
    values: Vec<T>,
    kv_heads: usize,
    head_size: usize,
}

impl KvPlanes {
    /// Bytes of both planes; `None` if they are more than can be counted.
    pub(super) fn size_in_bytes(dtype: Dtype, pages: usize, kv_heads: usize, head_size: usize) -> Option<usize> {
        [pages, PAGE_TOKENS, kv_heads, head_size, dtype.size_in_bytes()]
            .into_iter()
            .try_fold(2usize, |product, size| product.checked_mul(size))
    }

    pub(super) fn new(dtype: Dtype, pages: usize, kv_heads: usize, head_size: usize) -> Self {
        let count = pages * PAGE_TOKENS * kv_heads * head_size;
        // `vec![0; n]` of an integer or f32 asks the system for zeroed memory; of a half it would write every zero.
        let bits = || vec![0u16; count];
        match dtype {
            Dtype::F32 => Self::F32(Planes { keys: vec![0.0; count], values: vec![0.0; count], kv_heads, head_size }),
            Dtype::Bf16 => Self::Bf16(Planes {
                keys: bits().reinterpret_into(),
                values: bits().reinterpret_into(),
                kv_heads,
                head_size,
            }),
            Dtype::F16 => Self::F16(Planes {
                keys: bits().reinterpret_into(),
                values: bits().reinterpret_into(),
                kv_heads,
                head_size,
            }),
        }
    }

    /// Copies all keys and values of a page over those of another, for a lane that writes to a page that it shares.
    pub(super) fn copy_page(&mut self, from: PageId, to: PageId) {
        match self {
            Self::F32(planes) => planes.copy_page(from, to),
            Self::Bf16(planes) => planes.copy_page(from, to),
            Self::F16(planes) => planes.copy_page(from, to),
        }
    }
}

impl<T: Stored> Planes<T> {
    fn copy_page(&mut self, from: PageId, to: PageId) {
        let page = self.kv_heads * PAGE_TOKENS * self.head_size;
        let (from, to) = (self.start(from, 0), self.start(to, 0));
        self.keys.copy_within(from..from + page, to);
        self.values.copy_within(from..from + page, to);
    }

    fn start(&self, page: PageId, head: usize) -> usize {
        (page as usize * self.kv_heads + head) * PAGE_TOKENS * self.head_size
    }

    /// Writes one token's keys and values, `[kv_heads, head_size]` each.
    pub(super) fn store(&mut self, page: PageId, slot: usize, keys: &[f32], values: &[f32]) {
        for head in 0..self.kv_heads {
            let to = self.start(page, head) + slot * self.head_size;
            let from = head * self.head_size;
            let size = self.head_size;
            narrow(&keys[from..][..size], &mut self.keys[to..][..size]);
            narrow(&values[from..][..size], &mut self.values[to..][..size]);
        }
    }

    /// Keys of the first `tokens` tokens of a page, `[tokens, head_size]`.
    pub(super) fn keys(&self, page: PageId, head: usize, tokens: usize) -> &[T] {
        &self.keys[self.start(page, head)..][..tokens * self.head_size]
    }

    /// Values of the first `tokens` tokens of a page, `[tokens, head_size]`.
    pub(super) fn values(&self, page: PageId, head: usize, tokens: usize) -> &[T] {
        &self.values[self.start(page, head)..][..tokens * self.head_size]
    }
}

fn narrow<T: Stored>(from: &[f32], to: &mut [T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = T::narrow(*from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copied_page_holds_the_same_and_its_neighbours_what_they_held() {
        let mut all = KvPlanes::new(Dtype::F32, 3, 2, 3);
        let tokens = |page: u32| [1.0, 2.0, 3.0, 4.0, 5.0, 6.0].map(|value: f32| value + 10.0 * page as f32);
        if let KvPlanes::F32(planes) = &mut all {
            (0..3).for_each(|page| planes.store(page, 5, &tokens(page), &tokens(page + 3)));
        }
        all.copy_page(2, 0);
        let KvPlanes::F32(planes) = &all else { panic!("asked for f32") };
        for (page, source) in [(0, 2), (1, 1), (2, 2)] {
            for head in 0..2 {
                assert_eq!(planes.keys(page, head, 6)[15..], tokens(source)[head * 3..][..3]);
                assert_eq!(planes.values(page, head, 6)[15..], tokens(source + 3)[head * 3..][..3]);
            }
        }
    }
}
