use proptest::prelude::*;
use pulp::{Scalar, Scalar128b, Scalar256b, Scalar512b, WithSimd};

use super::{
    super::{
        alibi::Alibi,
        floats::Stored,
        pages::{PAGE_TOKENS, PageId},
        planes::{KvPlanes, Planes},
    },
    RowRun,
    kernel::Kernel,
    tile::{Attend, TileRoom},
};
use crate::{
    engine::kernels::tests::numbers,
    model::{Dtype, KvDtype, spec::AlibiSpec},
};

/// What is left of one token's keys, or values, in one head after it was kept.
fn kept(dtype: KvDtype, numbers: &[f32]) -> Vec<f64> {
    fn through<T: Stored>(numbers: &[f32]) -> Vec<f64> {
        let mut narrow = vec![T::default(); numbers.len()];
        let scale = T::narrow(numbers, &mut narrow);
        narrow.into_iter().map(|number| f64::from(number.widen()) * f64::from(scale)).collect()
    }
    match dtype {
        KvDtype::F32 => through::<f32>(numbers),
        KvDtype::Bf16 => through::<half::bf16>(numbers),
        KvDtype::F16 => through::<half::f16>(numbers),
        KvDtype::Q8 => through::<i8>(numbers),
    }
}

/// The formula in f64, for one row. `rows` are all tokens of a lane, and keys and values are as they are kept.
fn attend_naively(kernel: &Kernel, dtype: KvDtype, rows: &[f32], row: usize) -> Vec<f64> {
    let (size, width) = (kernel.head_size, kernel.row_width());
    let head = |row: usize, index: usize| &rows[row * width + index * size..][..size];
    let seen = kernel.first_seen(row)..row + 1;
    let mut biases = vec![0.0; row + 1];
    let mut mixed = Vec::new();
    for index in 0..kernel.heads {
        let kv = index / kernel.group();
        if let Some(alibi) = &kernel.alibi {
            alibi.biases(index, 0, &mut biases);
        }
        let score = |key: usize| {
            let keys = kept(dtype, head(key, kernel.heads + kv));
            let score: f64 = head(row, index).iter().zip(keys).map(|(q, k)| f64::from(*q) * k).sum();
            let score = score * f64::from(kernel.scale);
            let capped = kernel.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
            capped + f64::from(biases[key])
        };
        let scores: Vec<f64> = seen.clone().map(score).collect();
        let sink = kernel.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[index]));
        let highest = scores.iter().copied().fold(sink, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
        let sum = weights.iter().sum::<f64>() + (sink - highest).exp();
        let mut total = vec![0.0; size];
        for (key, weight) in seen.clone().zip(weights) {
            for (total, value) in total.iter_mut().zip(kept(dtype, head(key, kernel.heads + kernel.kv_heads + kv))) {
                *total += value * weight / sum;
            }
        }
        mixed.extend(total);
    }
    mixed
}

/// Some lanes, each with all of its rows and its pages.
struct Lanes {
    rows: Vec<Vec<f32>>,
    pages: Vec<Vec<PageId>>,
}

impl Lanes {
    /// Lanes of these lengths, whose pages lie in an order that `seed` decides.
    fn new(kernel: &Kernel, lengths: &[usize], seed: u32) -> Self {
        let rows = (7..).zip(lengths).map(|(lane, tokens)| numbers(tokens * kernel.row_width(), lane)).collect();
        let count: usize = lengths.iter().map(|tokens| tokens.div_ceil(PAGE_TOKENS)).sum();
        let mut order: Vec<(u32, PageId)> =
            (0..count as PageId).map(|page| (page.wrapping_mul(seed) % 97, page)).collect();
        order.sort_unstable();
        let mut order = order.into_iter().map(|(_, page)| page);
        let pages = lengths.iter().map(|tokens| order.by_ref().take(tokens.div_ceil(PAGE_TOKENS)).collect()).collect();
        Self { rows, pages }
    }

    fn page_count(&self) -> usize {
        self.pages.iter().map(Vec::len).sum()
    }

    /// Runs all lanes, as many rows of each at a time as `chunks` says over and over. Returns the results by lane.
    fn run(&self, kernel: &Kernel, planes: &mut KvPlanes, chunks: &[usize]) -> Vec<Vec<f32>> {
        let width = kernel.row_width();
        let mut found = vec![Vec::new(); self.rows.len()];
        let mut starts = vec![0; self.rows.len()];
        let mut mixed = Vec::new();
        for turn in 0.. {
            let (mut qkv, mut runs, mut lanes) = (Vec::new(), Vec::new(), Vec::new());
            for (lane, rows) in self.rows.iter().enumerate() {
                let start = starts[lane];
                let count = chunks[(turn + lane) % chunks.len()].min(rows.len() / width - start);
                if count > 0 {
                    let first_row = qkv.len() / width;
                    runs.push(RowRun { first_row, rows: count, position: start, pages: &self.pages[lane] });
                    lanes.push(lane);
                    qkv.extend_from_slice(&rows[start * width..(start + count) * width]);
                    starts[lane] += count;
                }
            }
            if runs.is_empty() {
                break;
            }
            kernel.run(&qkv, &runs, planes, &mut mixed);
            for (lane, run) in lanes.into_iter().zip(&runs) {
                found[lane]
                    .extend_from_slice(&mixed[run.first_row * kernel.q_width()..][..run.rows * kernel.q_width()]);
            }
        }
        found
    }
}

/// Two lanes whose pages lie interleaved, in chunks that end at odd places.
fn kernel_follows_the_formula_in(dtype: KvDtype, kernel: &Kernel) {
    let lanes = Lanes::new(kernel, &[141, 23], 31);
    let mut planes = KvPlanes::new(dtype, lanes.page_count(), kernel.kv_heads, kernel.head_size);
    let found = lanes.run(kernel, &mut planes, &[1, 17, 40, 3]);
    for (lane, found) in found.iter().enumerate() {
        for (row, found) in found.chunks_exact(kernel.q_width()).enumerate() {
            for (found, expected) in found.iter().zip(attend_naively(kernel, dtype, &lanes.rows[lane], row)) {
                assert!((f64::from(*found) - expected).abs() < 1e-5, "lane {lane}: {found} for {expected}");
            }
        }
    }
}

fn kernel_follows_the_formula(kernel: &Kernel) {
    kernel_follows_the_formula_in(KvDtype::F32, kernel);
}

fn kernel() -> Kernel {
    Kernel { heads: 6, kv_heads: 2, head_size: 20, scale: 0.4, window: None, soft_cap: None, sinks: None, alibi: None }
}

/// Everything at once.
fn full_kernel() -> Kernel {
    let alibi = Some(Alibi::new(&AlibiSpec { factor: 0.3, rounding: Dtype::Bf16 }, 6));
    let sinks = Some(vec![0.3, -1.0, 2.0, 5.0, 0.0, 1.0]);
    Kernel { head_size: 84, window: Some(70), soft_cap: Some(3.0), sinks, alibi, ..kernel() }
}

#[test]
fn full_attention() {
    kernel_follows_the_formula(&kernel());
}

#[test]
fn heads_of_any_size() {
    for head_size in [1, 8, 16, 80, 128] {
        kernel_follows_the_formula(&Kernel { head_size, scale: 0.2, ..kernel() });
    }
}

#[test]
fn one_key_head_a_query_head_and_one_for_all() {
    for kv_heads in [1, 6] {
        kernel_follows_the_formula(&Kernel { kv_heads, ..kernel() });
    }
}

#[test]
fn windows_within_a_page_and_across_blocks() {
    for window in [1, 3, 16, 17, 30, 64, 65, 100, 500] {
        kernel_follows_the_formula(&Kernel { window: Some(window), ..kernel() });
    }
}

#[test]
fn soft_cap_and_sinks() {
    kernel_follows_the_formula(&Kernel { soft_cap: Some(0.7), ..kernel() });
    kernel_follows_the_formula(&Kernel { sinks: Some(vec![0.3, -1.0, 2.0, 5.0, 0.0, 1.0]), ..kernel() });
}

#[test]
fn linear_biases() {
    for rounding in [Dtype::F32, Dtype::Bf16] {
        let alibi = Some(Alibi::new(&AlibiSpec { factor: 0.4, rounding }, 6));
        kernel_follows_the_formula(&Kernel { kv_heads: 6, alibi, ..kernel() });
    }
    let alibi = Some(Alibi::new(&AlibiSpec { factor: 1.0, rounding: Dtype::F32 }, 6));
    kernel_follows_the_formula(&Kernel { window: Some(19), alibi, ..kernel() });
}

#[test]
fn every_format_is_read_as_it_was_kept() {
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::F16, KvDtype::Q8] {
        kernel_follows_the_formula_in(dtype, &kernel());
        kernel_follows_the_formula_in(dtype, &full_kernel());
    }
}

/// What was in a page before, and what comes behind a row, is not looked at: not even a NaN.
#[test]
fn what_a_row_does_not_see_does_not_matter() {
    for kernel in [kernel(), Kernel { window: Some(9), ..kernel() }] {
        let lanes = Lanes::new(&kernel, &[61], 1);
        let clean = || KvPlanes::new(KvDtype::F32, 4, 2, 20);
        let mut dirty = clean();
        let nans = [f32::NAN; 40];
        if let KvPlanes::F32(planes) = &mut dirty {
            (0..64).for_each(|token| planes.store(token / 16, token as usize % 16, &nans, &nans));
        }
        let expected = lanes.run(&kernel, &mut clean(), &[61]);
        for chunks in [[61, 1], [1, 1], [13, 2]] {
            assert_eq!(lanes.run(&kernel, &mut dirty, &chunks), expected);
        }
        let mut ending = Lanes::new(&kernel, &[61], 1);
        ending.rows[0][60 * kernel.row_width()..].fill(f32::NAN);
        let found = ending.run(&kernel, &mut clean(), &[61]);
        assert_eq!(found[0][..60 * kernel.q_width()], expected[0][..60 * kernel.q_width()]);
        assert!(found[0][60 * kernel.q_width()..].iter().all(|number| number.is_nan()));
    }
}

/// What is not finite stays visible, also in codes, which can't say it.
#[test]
fn a_key_or_value_that_is_not_finite_shows() {
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::F16, KvDtype::Q8] {
        for (at, odd) in [(6 * 20, f32::NAN), (6 * 20 + 3, f32::INFINITY), (8 * 20 + 1, f32::NEG_INFINITY)] {
            let mut lanes = Lanes::new(&kernel(), &[20], 1);
            lanes.rows[0][2 * kernel().row_width() + at] = odd;
            let mut planes = KvPlanes::new(dtype, 2, 2, 20);
            let found = &lanes.run(&kernel(), &mut planes, &[20])[0];
            let rows: Vec<bool> = found.chunks(120).map(|row| row.iter().all(|number| number.is_finite())).collect();
            assert_eq!(rows[..2], [true; 2], "{dtype} {at}");
            assert!(rows[2..].iter().any(|finite| !finite), "{dtype} {at}");
        }
    }
}

/// Attention of the last rows of the first lane on a path of our choice.
struct OnPath<'a, T> {
    kernel: &'a Kernel,
    planes: &'a Planes<T>,
    lanes: &'a Lanes,
    rows: usize,
}

impl<T: Stored> OnPath<'_, T> {
    fn run(&self, attend: impl Fn(Attend<'_, T>)) -> Vec<f32> {
        let Self { kernel, planes, lanes, rows } = self;
        let (width, group) = (kernel.row_width(), kernel.group());
        let count = lanes.rows[0].len() / width;
        let mut all = vec![0.0; rows * kernel.q_width()];
        for kv_head in 0..kernel.kv_heads {
            let mut mixed = vec![0.0; rows * group * kernel.head_size];
            attend(Attend {
                kernel,
                planes,
                pages: &lanes.pages[0],
                position: count - rows,
                kv_head,
                qkv: &lanes.rows[0][(count - rows) * width..],
                mixed: &mut mixed,
                room: &mut TileRoom::default(),
            });
            let head = group * kernel.head_size;
            for (row, mixed) in mixed.chunks_exact(head).enumerate() {
                all[row * kernel.q_width() + kv_head * head..][..head].copy_from_slice(mixed);
            }
        }
        all
    }
}

#[test]
fn bits_are_the_same_on_every_width_of_vectors() {
    for kernel in [kernel(), full_kernel(), Kernel { kv_heads: 6, head_size: 64, ..kernel() }] {
        let lanes = Lanes::new(&kernel, &[150], 1);
        let mut planes = KvPlanes::new(KvDtype::Q8, lanes.page_count(), kernel.kv_heads, kernel.head_size);
        let found = lanes.run(&kernel, &mut planes, &[150]);
        let KvPlanes::Q8(planes) = &planes else { panic!("asked for q8") };
        // One row reads codes, many read them widened.
        for rows in [1, 2, 21] {
            let path = OnPath { kernel: &kernel, planes, lanes: &lanes, rows };
            let expected = &found[0][(150 - rows) * kernel.q_width()..];
            assert_eq!(path.run(|attend| attend.with_simd(Scalar)), expected, "portable");
            assert_eq!(path.run(|attend| attend.with_simd(Scalar128b)), expected, "4 lanes");
            assert_eq!(path.run(|attend| attend.with_simd(Scalar256b)), expected, "8 lanes");
            assert_eq!(path.run(|attend| attend.with_simd(Scalar512b)), expected, "16 lanes");
        }
    }
}

/// 32,768 tokens, in blocks of which hundreds have a new highest score: the last rows against the formula.
#[test]
fn a_long_context_stays_right() {
    for dtype in [KvDtype::F32, KvDtype::Q8] {
        let kernel = Kernel { heads: 2, kv_heads: 1, head_size: 8, scale: 1.5, ..kernel() };
        let (tokens, width) = (32_768, kernel.row_width());
        let lanes = Lanes::new(&kernel, &[tokens], 1);
        let mut planes = KvPlanes::new(dtype, lanes.page_count(), 1, 8);
        kernel.keep_all(&lanes.rows[0], &lanes.pages[0], &mut planes);
        let mut mixed = Vec::new();
        let last = tokens - 3;
        let run = RowRun { first_row: 0, rows: 3, position: last, pages: &lanes.pages[0] };
        kernel.run(&lanes.rows[0][last * width..], &[run], &mut planes, &mut mixed);
        for (row, mixed) in mixed.chunks_exact(kernel.q_width()).enumerate() {
            for (found, expected) in mixed.iter().zip(attend_naively(&kernel, dtype, &lanes.rows[0], last + row)) {
                assert!((f64::from(*found) - expected).abs() < 2e-6, "{found} for {expected}");
            }
        }
    }
}

impl Kernel {
    fn keep_all(&self, rows: &[f32], pages: &[PageId], planes: &mut KvPlanes) {
        let count = rows.len() / self.row_width();
        let run = [RowRun { first_row: 0, rows: count, position: 0, pages }];
        super::super::planes::each!(planes, planes => self.keep(rows, &run, planes));
    }
}

/// How far results are from those of exact keys and values, in parts of their size (root of mean squares).
#[test]
fn codes_of_eight_bits_cost_less_than_a_hundredth() {
    let kernel = Kernel { heads: 8, kv_heads: 2, head_size: 128, scale: 128f32.powf(-0.5), ..kernel() };
    let lanes = Lanes::new(&kernel, &[400], 3);
    let results = |dtype: KvDtype| {
        let mut planes = KvPlanes::new(dtype, lanes.page_count(), 2, 128);
        lanes.run(&kernel, &mut planes, &[400]).concat()
    };
    let exact = results(KvDtype::F32);
    let size: f32 = exact.iter().map(|number| number * number).sum();
    let error = |dtype: KvDtype| {
        let squares = results(dtype).iter().zip(&exact).map(|(found, exact)| (found - exact).powi(2)).sum::<f32>();
        (squares / size).sqrt()
    };
    let [bf16, f16, q8] = [KvDtype::Bf16, KvDtype::F16, KvDtype::Q8].map(error);
    println!("bf16 {bf16:.1e}, f16 {f16:.1e}, q8 {q8:.1e}");
    assert!(f16 < 5e-4 && bf16 < 4e-3 && q8 < 1e-2, "bf16 {bf16}, f16 {f16}, q8 {q8}");
}

fn any_kernel() -> impl Strategy<Value = Kernel> {
    let shape = (1..4usize, 1..4usize, prop_oneof![1..40usize, Just(64), Just(96)]);
    let options = (prop::option::of(1..90usize), prop::option::of(0.5f32..4.0), any::<bool>(), any::<bool>());
    (shape, options).prop_map(|((kv_heads, group, head_size), (window, soft_cap, sinks, alibi))| {
        let heads = kv_heads * group;
        let sinks = sinks.then(|| numbers(heads, 3));
        let alibi = alibi.then(|| Alibi::new(&AlibiSpec { factor: 0.5, rounding: Dtype::F32 }, heads));
        Kernel { heads, kv_heads, head_size, scale: 0.3, window, soft_cap, sinks, alibi }
    })
}

fn any_dtype() -> impl Strategy<Value = KvDtype> {
    prop_oneof![Just(KvDtype::F32), Just(KvDtype::Bf16), Just(KvDtype::F16), Just(KvDtype::Q8)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However steps are cut, whatever else is in the batch, wherever pages lie, on one thread or several.
    #[test]
    fn bits_depend_on_the_lane_alone(
        kernel in any_kernel(),
        dtype in any_dtype(),
        lengths in prop::collection::vec(1..150usize, 1..4),
        chunks in prop::collection::vec(0..60usize, 1..5),
        seeds in (1..1000u32, 1..1000u32),
        threads in 1..4usize,
    ) {
        let chunks: Vec<usize> = chunks.into_iter().chain([1]).collect();
        let planes = |pages: usize| KvPlanes::new(dtype, pages, kernel.kv_heads, kernel.head_size);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let lanes = Lanes::new(&kernel, &lengths, seeds.0);
        let found = pool.install(|| lanes.run(&kernel, &mut planes(lanes.page_count()), &chunks));
        let other = Lanes::new(&kernel, &lengths, seeds.1);
        for (lane, found) in found.iter().enumerate() {
            let alone = Lanes { rows: vec![other.rows[lane].clone()], pages: vec![other.pages[lane].clone()] };
            let expected = alone.run(&kernel, &mut planes(other.page_count()), &[usize::MAX]);
            prop_assert!(found.iter().zip(&expected[0]).all(|(a, b)| a.to_bits() == b.to_bits()), "lane {}", lane);
        }
    }
}
