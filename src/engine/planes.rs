//! Where keys and values lie: one K and one V plane for each block.
//!
//! What belongs to one head in one page is contiguous, because that is what one step of attention reads: of the keys a tile
//! `[head_size][PAGE_TOKENS]`, tokens in lanes, so that 16 scores are computed side by side; of the values a tile
//! `[PAGE_TOKENS][head_size]`, for they are added up token by token. Planes are allocated once, at start. The system hands
//! out zeroed memory lazily, so that a page takes memory when a session first writes to it.
//!
//! Codes of 8 bits have a scale for each token and head, in planes of their own.

use half::{bf16, f16, vec::HalfBitsVecExt};

use super::{
    floats::Stored,
    pages::{PAGE_TOKENS, PageId},
};
use crate::model::KvDtype;

/// Where planes begin in memory: at the beginning of a cache line, so that no vector lies in two.
const ALIGNMENT: usize = 64;

/// The planes of one block, in one of four formats.
pub(super) enum KvPlanes {
    F32(Planes<f32>),
    Bf16(Planes<bf16>),
    F16(Planes<f16>),
    Q8(Planes<i8>),
}

/// The planes of one block.
pub(super) struct Planes<T> {
    keys: Plane<T>,
    values: Plane<T>,
    /// Scales `[pages, kv_heads, PAGE_TOKENS]` of the keys, where there are any.
    key_scales: Vec<f32>,
    /// The same of the values.
    value_scales: Vec<f32>,
    kv_heads: usize,
    head_size: usize,
    /// One head's numbers on their way in.
    narrow: Vec<T>,
}

/// Numbers from a cache line's beginning on.
struct Plane<T> {
    numbers: Vec<T>,
    start: usize,
}

/// Bytes that can't be a page of these planes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum WrongPage {
    #[error("a page of {found} bytes, and one of this block's has {expected}")]
    Length { expected: usize, found: usize },
    #[error("a page with a number that is not finite")]
    NonFinite,
}

/// The same expression for planes of any format.
macro_rules! each {
    ($all:expr, $planes:ident => $expression:expr) => {
        match $all {
            KvPlanes::F32($planes) => $expression,
            KvPlanes::Bf16($planes) => $expression,
            KvPlanes::F16($planes) => $expression,
            KvPlanes::Q8($planes) => $expression,
        }
    };
}
pub(super) use each;

impl KvPlanes {
    /// Bytes of both planes; `None` if they are more than can be counted.
    pub(super) fn size_in_bytes(dtype: KvDtype, pages: usize, kv_heads: usize, head_size: usize) -> Option<usize> {
        [pages, PAGE_TOKENS, kv_heads, dtype.head_bytes(head_size)]
            .into_iter()
            .try_fold(2usize, |product, size| product.checked_mul(size))
    }

    pub(super) fn new(dtype: KvDtype, pages: usize, kv_heads: usize, head_size: usize) -> Self {
        // `vec![0; n]` of an integer or f32 asks the system for zeroed memory; of a half it would write every zero.
        let shape = [pages, kv_heads, head_size];
        match dtype {
            KvDtype::F32 => Self::F32(Planes::new(shape, |count| vec![0.0; count])),
            KvDtype::Bf16 => Self::Bf16(Planes::new(shape, |count| vec![0u16; count].reinterpret_into())),
            KvDtype::F16 => Self::F16(Planes::new(shape, |count| vec![0u16; count].reinterpret_into())),
            KvDtype::Q8 => Self::Q8(Planes::new(shape, |count| vec![0; count])),
        }
    }

    /// Copies all keys and values of a page over those of another, for a lane that writes to a page that it shares.
    pub(super) fn copy_page(&mut self, from: PageId, to: PageId) {
        each!(self, planes => planes.copy_page(from, to))
    }

    /// Appends what the first `tokens` of a page hold, for a node that computes alike: keys `[kv_heads, head_size,
    /// PAGE_TOKENS]`, values `[kv_heads, PAGE_TOKENS, head_size]`, and of codes the scales of keys and of values, `[kv_heads,
    /// PAGE_TOKENS]` in f32; all little-endian. The other tokens are zeros: what lies there is some other session's.
    pub(super) fn page_bytes(&self, page: PageId, tokens: usize, bytes: &mut Vec<u8>) {
        each!(self, planes => planes.page_bytes(page, tokens, bytes))
    }

    /// Takes over what [`KvPlanes::page_bytes`] of another node gave.
    ///
    /// # Errors
    /// They are not as many as a page of this block has, or one of the numbers is a NaN or an infinity; nothing was changed.
    pub(super) fn set_page_bytes(&mut self, page: PageId, bytes: &[u8]) -> Result<(), WrongPage> {
        each!(self, planes => planes.set_page_bytes(page, bytes))
    }
}

impl<T: Stored> Planes<T> {
    fn new([pages, kv_heads, head_size]: [usize; 3], zeroed: impl Fn(usize) -> Vec<T>) -> Self {
        let tokens = pages * kv_heads * PAGE_TOKENS;
        let plane = || {
            let numbers = zeroed(tokens * head_size + ALIGNMENT / size_of::<T>());
            // The system may say that it can't tell.
            let start = numbers.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT / size_of::<T>());
            Plane { numbers, start }
        };
        let scales = || vec![0.0; if T::SCALED { tokens } else { 0 }];
        Self {
            keys: plane(),
            values: plane(),
            key_scales: scales(),
            value_scales: scales(),
            kv_heads,
            head_size,
            narrow: vec![T::default(); head_size],
        }
    }

    /// Numbers of one head in one page.
    fn tile(&self) -> usize {
        PAGE_TOKENS * self.head_size
    }

    fn index(&self, page: PageId, head: usize) -> usize {
        page as usize * self.kv_heads + head
    }

    /// Writes one token's keys and values, `[kv_heads, head_size]` each.
    pub(super) fn store(&mut self, page: PageId, slot: usize, keys: &[f32], values: &[f32]) {
        let (size, tile) = (self.head_size, self.tile());
        for head in 0..self.kv_heads {
            let index = self.index(page, head);
            let scale = T::narrow(&keys[head * size..][..size], &mut self.narrow);
            let to = self.keys.slice_mut(index * tile, tile);
            for (to, key) in to.as_chunks_mut::<PAGE_TOKENS>().0.iter_mut().zip(&self.narrow) {
                to[slot] = *key;
            }
            let to = self.values.slice_mut(index * tile + slot * size, size);
            let value_scale = T::narrow(&values[head * size..][..size], to);
            if T::SCALED {
                self.key_scales[index * PAGE_TOKENS + slot] = scale;
                self.value_scales[index * PAGE_TOKENS + slot] = value_scale;
            }
        }
    }

    /// A page's keys of one head, `[head_size][PAGE_TOKENS]`.
    #[inline(always)]
    pub(super) fn keys(&self, page: PageId, head: usize) -> &[T] {
        self.keys.slice(self.index(page, head) * self.tile(), self.tile())
    }

    /// A page's values of one head, `[PAGE_TOKENS][head_size]`.
    #[inline(always)]
    pub(super) fn values(&self, page: PageId, head: usize) -> &[T] {
        self.values.slice(self.index(page, head) * self.tile(), self.tile())
    }

    /// The scales of a page's keys of one head. Only codes have them.
    #[inline(always)]
    pub(super) fn key_scales(&self, page: PageId, head: usize) -> &[f32; PAGE_TOKENS] {
        &self.key_scales.as_chunks().0[self.index(page, head)]
    }

    /// The scales of a page's values of one head. Only codes have them.
    #[inline(always)]
    pub(super) fn value_scales(&self, page: PageId, head: usize) -> &[f32; PAGE_TOKENS] {
        &self.value_scales.as_chunks().0[self.index(page, head)]
    }

    fn copy_page(&mut self, from: PageId, to: PageId) {
        let page = self.kv_heads * self.tile();
        let (source, target) = (from as usize * page, to as usize * page);
        for plane in [&mut self.keys, &mut self.values] {
            let start = plane.start;
            plane.numbers.copy_within(start + source..start + source + page, start + target);
        }
        if T::SCALED {
            let page = self.kv_heads * PAGE_TOKENS;
            let (source, target) = (from as usize * page, to as usize * page);
            for scales in [&mut self.key_scales, &mut self.value_scales] {
                scales.copy_within(source..source + page, target);
            }
        }
    }

    fn page_bytes(&self, page: PageId, tokens: usize, bytes: &mut Vec<u8>) {
        bytes.reserve(self.bytes_of_a_page());
        let held = |token: usize, number: &T| if token < tokens { *number } else { T::default() };
        for head in 0..self.kv_heads {
            for row in self.keys(page, head).as_chunks::<PAGE_TOKENS>().0 {
                row.iter().enumerate().for_each(|(token, key)| held(token, key).write(bytes));
            }
        }
        for head in 0..self.kv_heads {
            for (token, row) in self.values(page, head).chunks_exact(self.head_size).enumerate() {
                row.iter().for_each(|value| held(token, value).write(bytes));
            }
        }
        if T::SCALED {
            for scales in [Self::key_scales, Self::value_scales] {
                for head in 0..self.kv_heads {
                    let scales = scales(self, page, head).iter().enumerate();
                    scales.for_each(|(token, scale)| if token < tokens { *scale } else { 0.0 }.write(bytes));
                }
            }
        }
    }

    fn set_page_bytes(&mut self, page: PageId, bytes: &[u8]) -> Result<(), WrongPage> {
        let expected = self.bytes_of_a_page();
        if bytes.len() != expected {
            return Err(WrongPage::Length { expected, found: bytes.len() });
        }
        let numbers = self.kv_heads * self.tile();
        let (own, scales) = bytes.split_at(2 * numbers * size_of::<T>());
        if !is_finite::<T>(own) || !is_finite::<f32>(scales) {
            return Err(WrongPage::NonFinite);
        }
        let mut rest = bytes;
        for plane in [&mut self.keys, &mut self.values] {
            let (own, others) = rest.split_at(numbers * size_of::<T>());
            read(own, plane.slice_mut(page as usize * numbers, numbers));
            rest = others;
        }
        if T::SCALED {
            let tokens = self.kv_heads * PAGE_TOKENS;
            for scales in [&mut self.key_scales, &mut self.value_scales] {
                let (own, others) = rest.split_at(tokens * size_of::<f32>());
                read(own, &mut scales[page as usize * tokens..][..tokens]);
                rest = others;
            }
        }
        Ok(())
    }

    fn bytes_of_a_page(&self) -> usize {
        let scale = if T::SCALED { size_of::<f32>() } else { 0 };
        2 * self.kv_heads * PAGE_TOKENS * (self.head_size * size_of::<T>() + scale)
    }
}

impl<T> Plane<T> {
    #[inline(always)]
    fn slice(&self, from: usize, count: usize) -> &[T] {
        &self.numbers[self.start + from..][..count]
    }

    fn slice_mut(&mut self, from: usize, count: usize) -> &mut [T] {
        &mut self.numbers[self.start + from..][..count]
    }
}

fn is_finite<T: Stored>(bytes: &[u8]) -> bool {
    bytes.chunks_exact(size_of::<T>()).all(|bytes| T::read(bytes).widen().is_finite())
}

fn read<T: Stored>(bytes: &[u8], to: &mut [T]) {
    for (to, bytes) in to.iter_mut().zip(bytes.chunks_exact(size_of::<T>())) {
        *to = T::read(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [KvDtype; 4] = [KvDtype::F32, KvDtype::Bf16, KvDtype::F16, KvDtype::Q8];

    /// Three pages of two heads of three, of which every token holds something else.
    fn filled(dtype: KvDtype) -> KvPlanes {
        let mut all = KvPlanes::new(dtype, 3, 2, 3);
        for page in 0..3 {
            for slot in 0..PAGE_TOKENS {
                let tokens: [f32; 12] = std::array::from_fn(|i| (i * 7 + slot * 5 + page as usize * 3) as f32 * 0.37);
                each!(&mut all, planes => planes.store(page, slot, &tokens[..6], &tokens[6..]));
            }
        }
        all
    }

    fn bytes_of(planes: &KvPlanes, page: PageId) -> Vec<u8> {
        let mut bytes = Vec::new();
        planes.page_bytes(page, PAGE_TOKENS, &mut bytes);
        bytes
    }

    #[test]
    fn keys_lie_by_number_and_values_by_token() {
        let KvPlanes::Bf16(planes) = filled(KvDtype::Bf16) else { panic!("asked for bf16") };
        let expected = |page: usize, slot: usize, i: usize| bf16::from_f32((i * 7 + slot * 5 + page * 3) as f32 * 0.37);
        for (page, head, slot, i) in [(0, 0, 0, 0), (2, 1, 15, 2), (1, 1, 7, 0), (1, 0, 3, 1)] {
            assert_eq!(planes.keys(page, head)[i * PAGE_TOKENS + slot], expected(page as usize, slot, head * 3 + i));
            assert_eq!(planes.values(page, head)[slot * 3 + i], expected(page as usize, slot, 6 + head * 3 + i));
        }
        assert!(planes.key_scales.is_empty());
        assert_eq!(planes.keys.slice(0, 1).as_ptr().align_offset(ALIGNMENT), 0);
    }

    #[test]
    fn codes_come_with_the_scale_of_their_head() {
        let KvPlanes::Q8(planes) = filled(KvDtype::Q8) else { panic!("asked for q8") };
        // The second head's keys in page 1, slot 2: 34, 41 and 48 steps of 0.37.
        let scale = planes.key_scales(1, 1)[2];
        assert_eq!(scale, 48.0 * 0.37 / 127.0);
        assert_eq!([0, 1, 2].map(|i| planes.keys(1, 1)[i * PAGE_TOKENS + 2]), [90, 108, 127]);
        assert_eq!(planes.value_scales(1, 1)[2], 90.0 * 0.37 / 127.0);
    }

    #[test]
    fn a_copied_page_holds_the_same_and_its_neighbours_what_they_held() {
        for dtype in ALL {
            let mut all = filled(dtype);
            let before = [0, 1, 2].map(|page| bytes_of(&all, page));
            assert!(before[0] != before[2]);
            all.copy_page(2, 0);
            assert_eq!([0, 1, 2].map(|page| bytes_of(&all, page)), [2, 1, 2].map(|page: usize| before[page].clone()));
        }
    }

    #[test]
    fn a_page_travels_as_bytes_and_another_length_is_refused() {
        for dtype in ALL {
            let (from, mut to) = (filled(dtype), KvPlanes::new(dtype, 2, 2, 3));
            let bytes = bytes_of(&from, 2);
            assert_eq!(Some(bytes.len()), KvPlanes::size_in_bytes(dtype, 1, 2, 3));
            to.set_page_bytes(1, &bytes).unwrap();
            assert_eq!(bytes_of(&to, 1), bytes);
            assert!(bytes_of(&to, 0).iter().all(|byte| *byte == 0));
            for wrong in [&bytes[1..], &[bytes.as_slice(), &[0]].concat(), &[]] {
                let error = to.set_page_bytes(1, wrong).unwrap_err();
                assert_eq!(error, WrongPage::Length { expected: bytes.len(), found: wrong.len() });
            }
            // The last four bytes are the last value's, or the last scale's; a key's are in front.
            for at in [0, bytes.len() - 4] {
                let mut wrong = bytes.clone();
                wrong[at..at + 4].fill(0xFF);
                let is_code = dtype == KvDtype::Q8 && at == 0;
                assert_eq!(to.set_page_bytes(1, &wrong).is_err(), !is_code);
            }
            to.set_page_bytes(1, &bytes).unwrap();
            assert_eq!(bytes_of(&to, 1), bytes);
        }
    }

    #[test]
    fn tokens_behind_a_lanes_end_do_not_travel() {
        for dtype in ALL {
            let (full, mut part) = (filled(dtype), KvPlanes::new(dtype, 3, 2, 3));
            let mut bytes = Vec::new();
            full.page_bytes(1, 5, &mut bytes);
            for slot in 0..5 {
                let tokens: [f32; 12] = std::array::from_fn(|i| (i * 7 + slot * 5 + 3) as f32 * 0.37);
                each!(&mut part, planes => planes.store(1, slot, &tokens[..6], &tokens[6..]));
            }
            assert_eq!(bytes, bytes_of(&part, 1));
        }
    }

    #[test]
    fn sizes_that_overflow_are_none() {
        assert_eq!(KvPlanes::size_in_bytes(KvDtype::Q8, 2, 3, 64), Some(2 * 2 * 16 * 3 * 68));
        assert_eq!(KvPlanes::size_in_bytes(KvDtype::F32, usize::MAX / 4, 8, 128), None);
    }
}
