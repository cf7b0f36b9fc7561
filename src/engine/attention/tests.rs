use half::{bf16, f16};

use super::*;
use crate::model::{Dtype, spec::AlibiSpec};

/// Numbers that look random, in -1..1.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// The formula, one query head at a time, in f64. `rows` are all tokens of a lane.
fn attend_naively(kernel: &Kernel, rows: &[f32]) -> Vec<f64> {
    let (size, width) = (kernel.head_size, kernel.row_width());
    let count = rows.len() / width;
    let head = |row: usize, index: usize| &rows[row * width + index * size..][..size];
    let mut mixed = Vec::new();
    for query in 0..count {
        let seen = kernel.window.map_or(0, |window| (query + 1).saturating_sub(window))..=query;
        for index in 0..kernel.heads {
            let kv = index / kernel.group();
            let score = |key: usize| {
                let pairs = head(query, index).iter().zip(head(key, kernel.heads + kv));
                let score: f64 =
                    pairs.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * f64::from(kernel.scale);
                let capped = kernel.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
                (capped + kernel.alibi.as_ref().map_or(0.0, |alibi| f64::from(alibi.bias(index, key)))).exp()
            };
            let weights: Vec<f64> = seen.clone().map(score).collect();
            let sink = kernel.sinks.as_ref().map_or(0.0, |sinks| f64::from(sinks[index]).exp());
            let sum = weights.iter().sum::<f64>() + sink;
            mixed.extend((0..size).map(|i| {
                let values = seen.clone().map(|key| f64::from(head(key, kernel.heads + kernel.kv_heads + kv)[i]));
                values.zip(&weights).map(|(value, weight)| value * weight / sum).sum::<f64>()
            }));
        }
    }
    mixed
}

/// Two lanes whose pages lie interleaved, in chunks that end at odd places.
fn kernel_follows_the_formula(kernel: &Kernel) {
    let width = kernel.row_width();
    let lengths = [41, 23];
    let lanes = [numbers(lengths[0] * width, 5), numbers(lengths[1] * width, 6)];
    let pages: [Vec<PageId>; 2] = [vec![4, 0, 2], vec![1, 3]];
    let KvPlanes::F32(mut planes) = KvPlanes::new(Dtype::F32, 5, kernel.kv_heads, kernel.head_size) else {
        panic!("asked for f32")
    };
    let mut found: [Vec<f32>; 2] = Default::default();
    for chunk in [0..1, 1..18, 18..19, 19..41] {
        let mut qkv = Vec::new();
        let mut runs = Vec::new();
        for lane in 0..2 {
            let rows = chunk.start..chunk.end.min(lengths[lane]);
            if !rows.is_empty() {
                runs.push(RowRun {
                    first_row: qkv.len() / width,
                    rows: rows.len(),
                    position: rows.start,
                    pages: &pages[lane],
                });
                qkv.extend_from_slice(&lanes[lane][rows.start * width..rows.end * width]);
            }
        }
        let mut mixed = Vec::new();
        kernel.run(&qkv, &runs, &mut planes, &mut mixed);
        for (lane, run) in runs.iter().enumerate() {
            found[lane].extend_from_slice(&mixed[run.first_row * kernel.q_width()..][..run.rows * kernel.q_width()]);
        }
    }
    for lane in 0..2 {
        let expected = attend_naively(kernel, &lanes[lane]);
        assert_eq!(found[lane].len(), expected.len());
        for (found, expected) in found[lane].iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-5, "lane {lane}: {found} for {expected}");
        }
    }
}

fn kernel() -> Kernel {
    Kernel { heads: 6, kv_heads: 2, head_size: 20, scale: 0.4, window: None, soft_cap: None, sinks: None, alibi: None }
}

#[test]
fn full_attention() {
    kernel_follows_the_formula(&kernel());
}

#[test]
fn one_key_head_a_query_head() {
    kernel_follows_the_formula(&Kernel { kv_heads: 6, ..kernel() });
}

#[test]
fn windows_within_a_page_and_across_pages() {
    for window in [1, 3, 16, 17, 30, 100] {
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
fn a_cache_in_halves_holds_rounded_keys_and_values() {
    let mut bf = match KvPlanes::new(Dtype::Bf16, 2, 1, 3) {
        KvPlanes::Bf16(planes) => planes,
        _ => panic!("asked for bf16"),
    };
    bf.store(1, 2, &[1.001, 2.0, 3.0], &[-1.001, 0.1, 0.0]);
    assert_eq!(bf.keys(1, 0, 3)[6..], [1.001, 2.0, 3.0].map(bf16::from_f32));
    let mut half = match KvPlanes::new(Dtype::F16, 2, 1, 3) {
        KvPlanes::F16(planes) => planes,
        _ => panic!("asked for f16"),
    };
    half.store(0, 0, &[1.001, 2.0, 3.0], &[-1.001, 0.1, 0.0]);
    assert_eq!(half.values(0, 0, 1), [-1.001, 0.1, 0.0].map(f16::from_f32));
}
