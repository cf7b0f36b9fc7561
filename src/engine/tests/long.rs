//! A long context against plain sums in f64: whatever is done to keys, values and positions in blocks and pages, and however far away
//! they are.

use safetensors::{Dtype as StoredDtype, serialize_to_file, tensor::TensorView};
use serde_json::json;

use super::*;
use crate::{engine::kernels::tests::numbers, model::family::read_config};

const TOKENS: usize = 32 << 10;
/// Tokens that are compared: those of short contexts, on both sides of a page's end, and the last ones, which are decoded.
const COMPARED: [usize; 7] = [0, 1, 4_095, 4_096, 20_000, TOKENS - 2, TOKENS - 1];
const HIDDEN: usize = 16;
const INNER: usize = 32;
const HEADS: usize = 2;
const HEAD: usize = 8;
const THETA: f64 = 10_000.0;
const EPSILON: f64 = 1e-5;
/// Of the first block, which makes its part of the reference cheap: all tokens need it. The second block sees everything.
const WINDOW: usize = 50;

/// A matrix `[outputs, inputs]`.
fn product(matrix: &[f32], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
}

fn normed(x: &[f64], weight: &[f32]) -> Vec<f64> {
    let squares = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (squares + EPSILON).sqrt();
    x.iter().zip(weight).map(|(x, weight)| x * scale * f64::from(*weight)).collect()
}

/// Turns a head's numbers by the angles of a position.
fn turned(head: &[f64], position: usize) -> Vec<f64> {
    let half = HEAD / 2;
    // Frequencies and angles are f32, as transformers has them: at 32,767 the rounding of an angle is what is left of it elsewhere.
    let frequency = |at: usize| 1.0 / THETA.powf(2.0 * (at % half) as f64 / HEAD as f64) as f32;
    let angle = |at: usize| f64::from(position as f32 * frequency(at));
    let other = |at: usize| if at < half { -head[at + half] } else { head[at - half] };
    (0..HEAD).map(|at| head[at] * angle(at).cos() + other(at) * angle(at).sin()).collect()
}

/// The weights of a block, by the last parts of their names.
type Weights = std::collections::HashMap<String, Vec<f32>>;

/// The block's output for the tokens `wanted`, of all tokens' inputs.
fn block(weights: &Weights, window: usize, x: &[Vec<f64>], wanted: impl Iterator<Item = usize>) -> Vec<Vec<f64>> {
    let of = |name: &str| &weights[name][..];
    let read: Vec<Vec<f64>> = x.iter().map(|x| normed(x, of("input_layernorm.weight"))).collect();
    let layer = |part: &str, x: &[f64]| {
        let y = product(of(&format!("self_attn.{part}_proj.weight")), x);
        let bias = of(&format!("self_attn.{part}_proj.bias"));
        y.iter().zip(bias).map(|(y, bias)| y + f64::from(*bias)).collect::<Vec<f64>>()
    };
    let keys: Vec<Vec<f64>> = read.iter().enumerate().map(|(position, x)| turned(&layer("k", x), position)).collect();
    let values: Vec<Vec<f64>> = read.iter().map(|x| layer("v", x)).collect();
    wanted
        .map(|position| {
            let queries = layer("q", &read[position]);
            let mut mixed = Vec::new();
            for query in queries.chunks(HEAD) {
                let query = turned(query, position);
                let seen = (position + 1).saturating_sub(window)..position + 1;
                let score =
                    |key: &Vec<f64>| query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() / (HEAD as f64).sqrt();
                let scores: Vec<f64> = keys[seen.clone()].iter().map(score).collect();
                let most = scores.iter().copied().fold(f64::MIN, f64::max);
                let shares: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let total: f64 = shares.iter().sum();
                let mut sum = vec![0.0; HEAD];
                for (value, share) in values[seen].iter().zip(&shares) {
                    sum.iter_mut().zip(value).for_each(|(sum, value)| *sum += value * share / total);
                }
                mixed.extend(sum);
            }
            let add = |x: &[f64], more: Vec<f64>| x.iter().zip(more).map(|(x, more)| x + more).collect::<Vec<f64>>();
            let x = add(&x[position], product(of("self_attn.o_proj.weight"), &mixed));
            let read = normed(&x, of("post_attention_layernorm.weight"));
            let up = product(of("mlp.up_proj.weight"), &read);
            let gate = product(of("mlp.gate_proj.weight"), &read);
            let inner: Vec<f64> = gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
            add(&x, product(of("mlp.down_proj.weight"), &inner))
        })
        .collect()
}

/// The model, and its blocks' weights.
fn model(dir: &Path) -> (Checkpoint, [Weights; 2]) {
    let config = json!({
        "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": 1, "vocab_size": 16,
        "rms_norm_eps": EPSILON, "rope_theta": THETA, "max_position_embeddings": TOKENS, "hidden_act": "silu",
        "tie_word_embeddings": true, "torch_dtype": "float32", "use_sliding_window": true, "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let spec = read_config(&config.to_string()).unwrap();
    let tensors: Vec<_> = (0..2).flat_map(|block| spec.block_tensors(block)).chain(spec.edge_tensors()).collect();
    let values: Vec<Vec<f32>> =
        tensors.iter().zip(1..).map(|(tensor, seed)| numbers(tensor.elements(), 7919 * seed)).collect();
    let bytes: Vec<Vec<u8>> =
        values.iter().map(|values| values.iter().flat_map(|value| value.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|(tensor, bytes)| {
        (tensor.name.clone(), TensorView::new(StoredDtype::F32, tensor.shape.clone(), bytes).unwrap())
    });
    serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    let weights = [0, 1].map(|block| {
        let prefix = format!("model.layers.{block}.");
        let own = tensors.iter().zip(&values);
        own.filter_map(|(tensor, values)| Some((tensor.name.strip_prefix(&prefix)?.to_owned(), values.clone())))
            .collect()
    });
    (Checkpoint::open(dir).unwrap(), weights)
}

#[test]
fn thirty_two_thousand_tokens_give_what_plain_sums_do() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, weights) = model(dir.path());
    let input = numbers(TOKENS * HIDDEN, 3);
    let rows: Vec<Vec<f64>> = input.chunks(HIDDEN).map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect();
    let between = block(&weights[0], WINDOW, &rows, 0..TOKENS);
    let expected = block(&weights[1], TOKENS, &between, COMPARED.into_iter());

    let options = EngineOptions { cache_tokens: TOKENS + TOKENS / 8, ..EngineOptions::new(0..2, Dtype::F32) };
    let engine = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap();
    let mut cache = engine.cache(0..2).unwrap();
    let mut found = Vec::new();
    // Two tokens are decoded, the others are a prompt in chunks that no page begins with.
    let mut at = 0;
    while at < TOKENS {
        let tokens = if at < TOKENS - 2 { (TOKENS - 2 - at).min(3_001) } else { 1 };
        let (mut job, answers) = job(cache, &[run(0, at, tokens)]);
        job.hidden = HiddenStates::from_f32(Dtype::F32, HIDDEN, &input[at * HIDDEN..(at + tokens) * HIDDEN]);
        engine.submit(job);
        let (back, result) = answers.recv_timeout(10 * PATIENCE).unwrap();
        found.extend(result.unwrap().hidden.to_f32());
        (cache, at) = (back, at + tokens);
    }
    for (token, expected) in COMPARED.into_iter().zip(expected) {
        let found = &found[token * HIDDEN..][..HIDDEN];
        let size = (expected.iter().map(|x| x * x).sum::<f64>() / HIDDEN as f64).sqrt();
        let error = found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(error < 1e-4 * size, "token {token}: off by {error} of {size}");
    }
}
