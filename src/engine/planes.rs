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
}

impl<T: Stored> Planes<T> {
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
