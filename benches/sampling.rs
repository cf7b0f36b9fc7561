//! What choosing a token costs, out of a vocabulary of 150,000.
//!
//! `cargo bench --bench sampling`
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use helion::client::sampling::{Sampler, SamplingOptions};

const VOCABULARY: usize = 150_000;

fn main() {
    divan::main();
}

/// Logits like a model's: a few stand out, most lie around a mean far below.
fn logits() -> Vec<f32> {
    let mut state = 1_u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    (0..VOCABULARY).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 4.0 + 2.0 / (uniform() + 0.01)).collect()
}

/// Logits of a model that knows nothing: all tokens are about as likely.
fn flat_logits() -> Vec<f32> {
    logits().iter().map(|logit| (logit * 1e3).sin() / 10.0).collect()
}

#[divan::bench(args = ["greedy", "plain", "top_k 50", "top_p 0.9", "top_k 50 top_p 0.9", "min_p 0.05", "flat top_p 0.9"])]
fn sample(bencher: divan::Bencher<'_, '_>, filter: &str) {
    let mut options = SamplingOptions { temperature: 0.7, seed: Some(1), ..SamplingOptions::default() };
    match filter {
        "greedy" => options.temperature = 0.0,
        "plain" => {}
        "top_k 50" => options.top_k = 50,
        "top_p 0.9" | "flat top_p 0.9" => options.top_p = 0.9,
        "top_k 50 top_p 0.9" => (options.top_k, options.top_p) = (50, 0.9),
        "min_p 0.05" => options.min_p = 0.05,
        other => panic!("no filter {other}"),
    }
    let logits = if filter.starts_with("flat") { flat_logits() } else { logits() };
    let mut sampler = Sampler::new(options, &[]).unwrap();
    bencher.bench_local(|| sampler.sample(&logits).unwrap());
}
