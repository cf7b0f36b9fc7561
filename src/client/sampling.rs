//! Choosing the next token from the model's logits.
//!
//! In this order: penalties, temperature, top-k, top-p, min-p, one draw. Each filter only finds a *cut* (a logit and an
//! id, below which tokens are out), so nothing sorts the vocabulary, however flat the distribution is (top-k and top-p select, and sort
//! a few dozens), and a filter that lets everything through changes nothing at all.
//!
//! **Replays are exact.** Token `n`'s random number is a function of the seed and `n` alone, so a generation that is
//! taken up again after its first `n` tokens goes on as it would have. Penalties are computed in `f32` on the logits as
//! they come, as transformers does; weights and the draw in `f64` with an exponential of our own (`sampling/exact.rs`), and sums of weights
//! in the order of ids or in integers, so that equal logits give equal tokens on every machine.

mod exact;

use std::{
    cmp::Ordering,
    collections::{HashMap, HashSet},
};

/// How many tokens top-p sorts; it looks among so many of the likeliest first, and most nuclei are smaller.
const FIRST_NUCLEUS: usize = 64;

/// The likeliest token's probability where top-p adds them up. With 2^23 tokens the sum is still below 2^64; what is below a unit
/// is together less than a millionth of the likeliest.
const MASS: f64 = (1u64 << 40) as f64;

/// How tokens are chosen. The default is greedy: the likeliest token, always.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits: below 1 likelier tokens win more often, above 1 less often. 0 is greedy.
    pub temperature: f32,
    /// Keeps the smallest set of likeliest tokens that together have at least this probability. 1 keeps all.
    /// (Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration".)
    pub top_p: f32,
    /// Keeps this many of the likeliest tokens, those with lower ids first where logits are equal. 0 keeps all.
    pub top_k: usize,
    /// Keeps tokens whose probability is at least this share of the likeliest token's. 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occur in the prompt or the output, once each, as
    /// in transformers. 1 changes nothing. (Keskar et al. 2019, "CTRL".)
    pub repetition_penalty: f32,
    /// Taken off a token's logit for each time that it occurs in the output, as in OpenAI's API and in vLLM.
    pub frequency_penalty: f32,
    /// Taken off the logits of tokens that occur in the output at all, as in OpenAI's API and in vLLM.
    pub presence_penalty: f32,
    /// Makes the choice repeatable. A random seed is drawn where absent.
    pub seed: Option<u64>,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: None,
        }
    }
}

/// A sampling option is out of its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} is {value}, but must be {range}")]
pub struct InvalidOption {
    /// The option's name.
    pub field: &'static str,
    /// What it was set to.
    pub value: f32,
    /// What it may be.
    pub range: &'static str,
}

impl SamplingOptions {
    /// Checks every option's range.
    ///
    /// # Errors
    /// [`InvalidOption`] for the first option that is out of its range.
    pub fn validate(&self) -> Result<(), InvalidOption> {
        let penalty = -2.0..=2.0;
        let checks = [
            ("temperature", self.temperature, (0.0..=100.0).contains(&self.temperature), "from 0 (greedy) to 100"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0 && self.repetition_penalty <= 100.0,
                "above 0 and at most 100 (1 changes nothing)",
            ),
            ("frequency_penalty", self.frequency_penalty, penalty.contains(&self.frequency_penalty), "from -2 to 2"),
            ("presence_penalty", self.presence_penalty, penalty.contains(&self.presence_penalty), "from -2 to 2"),
        ];
        match checks.into_iter().find(|(.., valid, _)| !valid) {
            Some((field, value, _, range)) => Err(InvalidOption { field, value, range }),
            None => Ok(()),
        }
    }

    /// Whether the likeliest token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}

/// The logits are unusable, so no token was chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// There is nothing to choose from.
    #[error("there are no logits to choose a token from")]
    Empty,
    /// A logit is NaN or infinite: the model's computation went wrong somewhere.
    #[error(
        "the logit of token {id} is {value}: the model's output is broken (a hop computes wrongly, or its dtype overflows)"
    )]
    NonFinite {
        /// The first token that it is true for.
        id: usize,
        /// Its logit.
        value: f32,
    },
}

/// Chooses the tokens of one generation.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    seed: u64,
    /// Tokens of the output so far: the number of the next one.
    tokens: u64,
    /// Ids of the prompt; kept only where the repetition penalty asks for them.
    prompt: HashSet<u32>,
    /// How often each id occurs in the output; at most one entry for each token of the vocabulary.
    output: HashMap<u32, u32>,
    scratch: Scratch,
}

/// Buffers that are kept from token to token; their size is the vocabulary's.
#[derive(Debug, Clone, Default)]
struct Scratch {
    /// The logits with penalties.
    logits: Vec<f32>,
    /// Unnormalised probabilities: 1 for the likeliest token.
    weights: Vec<f64>,
    /// Ids, being selected from.
    ids: Vec<u32>,
}

/// The last token that is in, in order of falling logits and then rising ids.
#[derive(Debug, Clone, Copy)]
struct Cut {
    logit: f32,
    id: u32,
}

impl Cut {
    fn keeps(&self, logit: f32, id: u32) -> bool {
        logit > self.logit || (logit == self.logit && id <= self.id)
    }
}

impl Sampler {
    /// A sampler for the text that follows `prompt_ids`.
    ///
    /// # Errors
    /// [`InvalidOption`], as [`SamplingOptions::validate`].
    pub fn new(options: SamplingOptions, prompt_ids: &[u32]) -> Result<Self, InvalidOption> {
        options.validate()?;
        let penalised = options.repetition_penalty != 1.0;
        Ok(Self {
            seed: options.seed.unwrap_or_else(rand::random),
            prompt: if penalised { prompt_ids.iter().copied().collect() } else { HashSet::new() },
            options,
            tokens: 0,
            output: HashMap::new(),
            scratch: Scratch::default(),
        })
    }

    /// The seed in use: the given one, or the one that was drawn.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Counts a token of the output that was not chosen here (a replay, or a forced token), as if it had been.
    pub fn accept(&mut self, id: u32) {
        self.tokens += 1;
        let options = &self.options;
        if options.repetition_penalty != 1.0 || options.frequency_penalty != 0.0 || options.presence_penalty != 0.0 {
            *self.output.entry(id).or_default() += 1;
        }
    }

    /// Chooses the next token from `logits` (`[vocabulary]`) and counts it as part of the output.
    ///
    /// # Errors
    /// [`SampleError`]; nothing was counted then.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SampleError> {
        if let Some(id) = logits.iter().position(|logit| !logit.is_finite()) {
            return Err(SampleError::NonFinite { id, value: logits[id] });
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.logits.clear();
        scratch.logits.extend_from_slice(logits);
        self.penalise(&mut scratch.logits);
        let Some(best) = argmax(&scratch.logits) else { return Err(SampleError::Empty) };
        let id = if self.options.is_greedy() { best } else { self.draw(&mut scratch, best) };
        self.scratch = scratch;
        self.accept(id);
        Ok(id)
    }

    fn penalise(&self, logits: &mut [f32]) {
        let options = &self.options;
        if options.repetition_penalty != 1.0 {
            let fresh = self.output.keys().filter(|id| !self.prompt.contains(id));
            for &id in self.prompt.iter().chain(fresh) {
                // An id beyond the logits can't be chosen anyway.
                if let Some(logit) = logits.get_mut(id as usize) {
                    let penalty = options.repetition_penalty;
                    *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
                }
            }
        }
        if options.frequency_penalty != 0.0 || options.presence_penalty != 0.0 {
            for (&id, &count) in &self.output {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit -= options.frequency_penalty * count as f32;
                    *logit -= options.presence_penalty;
                }
            }
        }
        // A large logit times a large penalty may leave f32's range; it stays the extreme that it is.
        logits.iter_mut().for_each(|logit| *logit = logit.clamp(f32::MIN, f32::MAX));
    }

    fn draw(&self, scratch: &mut Scratch, best: u32) -> u32 {
        let Scratch { logits, weights, ids } = scratch;
        let (top, temperature) = (f64::from(logits[best as usize]), f64::from(self.options.temperature));
        weights.resize(logits.len(), 0.0);
        exact::weigh(logits, top, temperature, weights);

        // Everything is in until a filter says otherwise.
        let mut cut = Cut { logit: f32::MIN, id: u32::MAX };
        if self.options.top_k > 0 && self.options.top_k < logits.len() {
            cut = top_k(logits, ids, self.options.top_k);
        }
        if self.options.top_p < 1.0 {
            cut = top_p(logits, weights, ids, (cut, f64::from(self.options.top_p)));
        }
        let min_weight = f64::from(self.options.min_p);

        let kept = |(id, weight): (usize, &f64)| {
            let id = id as u32;
            (cut.keeps(logits[id as usize], id) && *weight >= min_weight).then_some((id, *weight))
        };
        let total: f64 = weights.iter().enumerate().filter_map(kept).map(|(_, weight)| weight).sum();
        let target = exact::uniform(self.seed, self.tokens) * total;
        let mut sum = 0.0;
        // Rounding may leave the sum a hair under the target; the last token with a chance is meant then.
        let mut last = best;
        for (id, weight) in weights.iter().enumerate().filter_map(kept) {
            sum += weight;
            if weight > 0.0 {
                last = id;
            }
            if sum > target {
                break;
            }
        }
        last
    }
}

/// The id of the largest logit, the lowest where several are.
fn argmax(logits: &[f32]) -> Option<u32> {
    let best = logits.iter().enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map(|(id, _)| id as u32)
}

/// Likeliest first; equal logits by rising id.
fn by_rank(logits: &[f32]) -> impl Fn(&u32, &u32) -> Ordering {
    |a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
}

fn cut_at(logits: &[f32], id: u32) -> Cut {
    Cut { logit: logits[id as usize], id }
}

/// The cut behind the `k` likeliest tokens; `k` is at least 1 and less than there are.
///
/// One look at each logit: those above the least that may still be in are gathered, and the worse half of them is thrown out
/// whenever there are twice as many as needed.
fn top_k(logits: &[f32], ids: &mut Vec<u32>, k: usize) -> Cut {
    ids.clear();
    let mut least = f32::NEG_INFINITY;
    for (id, logit) in logits.iter().enumerate() {
        // Ids rise: of equal logits, those that are there already stay.
        if logit.total_cmp(&least).is_gt() {
            ids.push(id as u32);
            if ids.len() == 2 * k {
                let (_, last, _) = ids.select_nth_unstable_by(k - 1, by_rank(logits));
                least = logits[*last as usize];
                ids.truncate(k);
            }
        }
    }
    let (_, last, _) = ids.select_nth_unstable_by(k - 1, by_rank(logits));
    cut_at(logits, *last)
}

/// The cut behind the smallest set of likeliest tokens, out of those within `cut`, that has the share `p` of their
/// probability.
///
/// Probabilities are added up as integers: in whatever order that is done, the sums are the same. So the place of the cut can be closed in
/// on: of the tokens that it is among, those of the better half are taken together, and then the cut is either among them or
/// among the others. That reads about twice as many tokens as there are and sorts a handful, also where all are about as
/// likely.
fn top_p(logits: &[f32], weights: &[f64], ids: &mut Vec<u32>, (cut, p): (Cut, f64)) -> Cut {
    let mass = |id: &u32| (weights[*id as usize] * MASS) as u64;
    let inside = |id: &u32| cut.keeps(logits[*id as usize], *id);
    let everything = 0..logits.len() as u32;
    let total: u64 = everything.clone().filter(inside).map(|id| mass(&id)).sum();
    let mut missing = ((p * total as f64).ceil() as u64).clamp(1, total.max(1));
    // Tokens below this are together no more than what may be left out, so the set is found without them.
    let negligible = (total - missing.min(total)) / logits.len() as u64;
    ids.clear();
    ids.extend(everything.filter(|id| inside(id) && mass(id) >= negligible));
    let mut place = 0..ids.len();
    // Most sets are small.
    let mut middle = FIRST_NUCLEUS;
    while place.len() > FIRST_NUCLEUS {
        ids[place.clone()].select_nth_unstable_by(middle - place.start, by_rank(logits));
        let better: u64 = ids[place.start..middle].iter().map(mass).sum();
        if better >= missing {
            place.end = middle;
        } else {
            missing -= better;
            place.start = middle;
        }
        middle = place.start + place.len() / 2;
    }
    ids[place.clone()].sort_unstable_by(by_rank(logits));
    let last = ids[place].iter().find(|id| {
        missing = missing.saturating_sub(mass(id));
        missing == 0
    });
    last.map_or(cut, |id| cut_at(logits, *id))
}

#[cfg(test)]
mod tests;
