//! Generating text through a swarm: prompt in chunks, then token by token.
//!
//! Several samples of one prompt are lanes of one session: the prompt is computed once, its lane is copied, and each step has a
//! token of every sample that goes on.

mod sample;

use std::time::{Duration, Instant};

use serde::Serialize;

use self::sample::{Now, Sample, Told};
use super::{
    Client, ClientError, Work,
    sampling::SamplingOptions,
    session::{Input, Prompt, Recovery, Route, Session, Step, StepAnswer, Want},
};
use crate::{
    engine::{EdgeError, Edges, HiddenStates, LaneRun},
    swarm::ticket::SessionLimits,
};

/// Chunks of a prompt under way at a time: enough that every hop of a usual route has one to work on.
const CHUNKS_IN_FLIGHT: u32 = 4;

/// What to generate.
#[derive(Debug, Clone)]
pub struct GenerationOptions {
    /// Tokens at most; the model's context is a limit too.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Generation ends before the first of these in the text.
    pub stop: Vec<String>,
    /// Goes on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Tokens of the prompt in one step.
    pub prefill_chunk: usize,
    /// How long to wait for a swarm that is not complete.
    pub wait: Duration,
    /// Whose generation it is, among those of this client. The hops compute a prompt's beginning once for all generations of one tenant
    /// that share it, and no other tenant's can tell. `None`: nothing is shared, nor kept for others.
    pub tenant: Option<String>,
}

impl Default for GenerationOptions {
    fn default() -> Self {
        Self {
            max_tokens: 256,
            sampling: SamplingOptions::default(),
            stop: Vec::new(),
            ignore_eos: false,
            prefill_chunk: 128,
            wait: Duration::ZERO,
            tenant: Some(String::new()),
        }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop string appeared.
    Stop,
    /// As many tokens as were asked for, or as the context holds.
    Length,
    /// The model ended the sequence.
    Eos,
}

/// One hop in a [`Generation`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RouteEntry {
    /// The hop's peer.
    pub peer_id: String,
    /// The blocks it ran, half-open.
    pub span: [usize; 2],
}

/// A lost hop in a [`GenerationEvent`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RecoveryEntry {
    /// Which hop of the route it was, counted from 1.
    pub hop: usize,
    /// Its peer.
    pub lost: String,
    /// Who runs its blocks now.
    pub replacement: Vec<RouteEntry>,
    /// From noticing the loss to the next answer.
    pub ms: f64,
    /// It left on purpose and handed over what it had: nothing was computed again. Only where that is so.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub handed_over: bool,
}

/// How many tokens.
#[derive(Debug, Clone, Serialize)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Generated.
    pub completion_tokens: usize,
    /// Of the prompt's, where some were there already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokens>,
}

/// How the prompt's tokens were had.
#[derive(Debug, Clone, Serialize)]
pub struct PromptTokens {
    /// The hops held them from an earlier generation.
    pub cached_tokens: usize,
}

/// How long it took.
#[derive(Debug, Clone, Serialize)]
pub struct Timing {
    /// Finding the route and opening the session.
    pub route_ms: f64,
    /// From the start to the first token, the route included.
    pub time_to_first_token_ms: f64,
    /// Of the tokens after the first; absent where there is one at most.
    pub decode_tokens_per_second: Option<f64>,
    /// All of it.
    pub total_ms: f64,
}

/// `client generate --json`.
#[derive(Debug, Clone, Serialize)]
pub struct Generation {
    /// The generated text, without special tokens and the stop string.
    pub text: String,
    /// The prompt.
    pub prompt_ids: Vec<u32>,
    /// What was generated, the end-of-sequence token included.
    pub output_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How many tokens.
    pub usage: Usage,
    /// How long it took.
    pub timing: Timing,
    /// Through whom it went.
    pub route: Vec<RouteEntry>,
    /// How many lost hops were replaced on the way.
    pub recoveries: usize,
    /// Whether all hops computed alike and nothing was lost on the wire, so that the tokens are those of one machine.
    pub exact: bool,
    /// How hidden states were packed on the wire, where that loses something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wire_codec: Option<String>,
}

/// What happens on the way.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum GenerationEvent {
    /// The route was chosen; again where the session moves to a better one.
    Route {
        /// Its hops.
        route: Vec<RouteEntry>,
    },
    /// A hop was lost, and others took its place.
    Recovery {
        /// What happened.
        recovery: RecoveryEntry,
        /// All hops from now on.
        route: Vec<RouteEntry>,
    },
    /// A token was chosen.
    Token {
        /// Its id.
        token_id: u32,
        /// The text that is certain now; may be empty.
        text: String,
    },
}

/// A session that outlives a generation: what comes next starts from what it holds.
pub struct Conversation {
    session: Session,
    /// What its hops hold.
    ids: Vec<u32>,
}

impl Conversation {
    /// How many tokens of a prompt need not be sent. The last one always is: its answer is wanted.
    fn shared(&self, prompt_ids: &[u32]) -> usize {
        let same = self.ids.iter().zip(prompt_ids).take_while(|(held, wanted)| held == wanted).count();
        same.min(prompt_ids.len().saturating_sub(1))
    }

    /// Waits, in a pause between two turns, until one of the hops leaves or the connection to one was cut: then [`Conversation::attend`]
    /// should be called. It may be dropped at any time.
    pub async fn wants_attention(&mut self) {
        self.session.wants_attention().await;
    }

    /// Has a hop that leaves hand over what it holds of the conversation, or connects again. Not to be dropped before its end.
    pub async fn attend(&mut self) {
        self.session.attend().await;
    }
}

impl Client {
    /// Generates from `prompt_ids`, and calls `on_event` as it goes. Hops that are lost on the way are replaced.
    ///
    /// # Errors
    /// Where the request makes no sense for the model (an empty or too long prompt, ids outside the vocabulary, sampling
    /// settings out of range), the swarm is incomplete, or no hop takes a lost one's place in time.
    pub async fn generate(
        &self,
        prompt_ids: &[u32],
        options: &GenerationOptions,
        on_event: &mut (dyn FnMut(GenerationEvent) + Send),
    ) -> Result<Generation, ClientError> {
        let started = Instant::now();
        let longest = self.longest(prompt_ids, options)?;
        let run = Run { started, longest, prompt_ids, options, room: longest, samples: 1 };
        self.run_one(run, &mut None, on_event).await
    }

    /// Generates so many samples from one prompt, each as [`Client::generate`] would with a seed of its own: the one of the options
    /// plus the sample's index. The prompt is computed once, and what the samples have in common is held once.
    ///
    /// `on_event` is told the sample's index with what happens; what concerns all of them comes with index 0.
    ///
    /// # Errors
    /// As [`Client::generate`], and where there are no samples, or more than a session may have lanes.
    pub async fn generate_many(
        &self,
        prompt_ids: &[u32],
        options: &GenerationOptions,
        samples: usize,
        on_event: &mut (dyn FnMut(usize, GenerationEvent) + Send),
    ) -> Result<Vec<Generation>, ClientError> {
        let started = Instant::now();
        let most = SessionLimits::LARGEST.max_lanes as usize;
        if samples == 0 || samples > most {
            return Err(ClientError::Request(format!("{samples} samples are asked for: ask for 1 to {most}")));
        }
        let longest = self.longest(prompt_ids, options)?;
        let run = Run { started, longest, prompt_ids, options, room: longest, samples };
        self.run(run, &mut None, on_event).await
    }

    /// As [`Client::generate`], in the session of the generation before it: only the tokens behind what both have in common are
    /// sent. Where it fails or is given up, the session is closed, and the next generation opens another one.
    ///
    /// # Errors
    /// As [`Client::generate`].
    pub async fn generate_on(
        &self,
        conversation: &mut Option<Conversation>,
        prompt_ids: &[u32],
        options: &GenerationOptions,
        on_event: &mut (dyn FnMut(GenerationEvent) + Send),
    ) -> Result<Generation, ClientError> {
        let started = Instant::now();
        let longest = self.longest(prompt_ids, options)?;
        // It may get as long as the model allows; that reserves nothing.
        let room = self.model().spec().max_context;
        let run = Run { started, longest, prompt_ids, options, room, samples: 1 };
        self.run_one(run, conversation, on_event).await
    }

    /// How long the sequence may get.
    fn longest(&self, prompt_ids: &[u32], options: &GenerationOptions) -> Result<usize, ClientError> {
        if options.max_tokens == 0 {
            return Err(ClientError::Request("max-tokens is 0: ask for at least one token".to_owned()));
        }
        Ok(self.check_prompt(prompt_ids)?.min(prompt_ids.len().saturating_add(options.max_tokens)))
    }

    async fn run_one(
        &self,
        run: Run<'_>,
        kept: &mut Option<Conversation>,
        on_event: &mut (dyn FnMut(GenerationEvent) + Send),
    ) -> Result<Generation, ClientError> {
        let generations = self.run(run, kept, &mut |_, event| on_event(event)).await?;
        // As many as samples.
        generations.into_iter().next().ok_or_else(|| ClientError::Request("no sample is asked for".to_owned()))
    }

    /// Where there is one sample only, its session is kept.
    async fn run(
        &self,
        run: Run<'_>,
        kept: &mut Option<Conversation>,
        on_event: &mut (dyn FnMut(usize, GenerationEvent) + Send),
    ) -> Result<Vec<Generation>, ClientError> {
        let Run { started, longest, prompt_ids, options, room, samples: count } = run;
        let mut samples: Vec<Sample> =
            (0..count).map(|index| Sample::new(index, self.model(), prompt_ids, options)).collect::<Result<_, _>>()?;
        let chunk = options.prefill_chunk.max(1);
        let limits = SessionLimits {
            max_lanes: count as u32,
            max_tokens: (room.saturating_mul(count) as u64).min(SessionLimits::LARGEST.max_tokens.max(room as u64)),
            max_in_flight: CHUNKS_IN_FLIGHT,
            max_step_tokens: chunk.min(room).max(count) as u32,
        };
        // Where positions depend on the length, what is held was computed for another one.
        let depends_on_length = self.model().spec().length_class(1) > 0;
        let (mut conversation, start) = match kept.take().filter(|kept| kept.session.limits() == limits) {
            Some(conversation) => {
                let start = if depends_on_length { 0 } else { conversation.shared(prompt_ids) };
                (conversation, start)
            }
            None => {
                let work = Work { prompt: prompt_ids.len(), chunk, tokens: longest - prompt_ids.len() };
                let prompt = options.tenant.as_deref().map(|tenant| Prompt { tenant, ids: prompt_ids });
                let (session, _) = self.open_session_with(work, limits, options.wait, prompt).await?;
                let start = session.held();
                (Conversation { session, ids: Vec::new() }, start)
            }
        };
        let route_time = started.elapsed();
        on_event(0, GenerationEvent::Route { route: entries(&conversation.session.route()) });
        let mut recoveries = 0;

        let session = &mut conversation.session;
        let prompt = Chunks { ids: prompt_ids, start, size: chunk, lane: 0 };
        let answer = self.prefill(session, prompt, &mut None).await?;
        // All samples begin with the prompt's last row, then each has one of its own.
        let seat = self.model().edges().seat();
        let mut logits = self.logits(&answer, |edges, hidden| edges.logits_at(&seat, hidden, Vec::new()))?;
        let mut position = prompt_ids.len();
        loop {
            recoveries += tell_recoveries(session, &mut |event| on_event(0, event));
            let vocabulary = self.model().spec().vocab_size;
            let is_first = position == prompt_ids.len();
            let mut ended = Vec::new();
            for (row, sample) in samples.iter_mut().filter(|sample| sample.goes_on()).enumerate() {
                let row = if is_first { 0 } else { row };
                let is_last = position + 1 >= longest;
                let now = Now { model: self.model(), started, on_event };
                sample.choose(&logits[row * vocabulary..][..vocabulary], is_last, now)?;
                ended.extend((!sample.goes_on()).then_some(sample.lane));
            }
            let going: Vec<&Sample> = samples.iter().filter(|sample| sample.goes_on()).collect();
            if going.is_empty() {
                break;
            }
            if session.move_if_better(longest - position).await {
                on_event(0, GenerationEvent::Route { route: entries(&session.route()) });
            }
            if is_first {
                let copies: Vec<_> = going.iter().map(|sample| (0, sample.lane)).filter(|(_, to)| *to > 0).collect();
                if !copies.is_empty() {
                    session.copy_lanes(&copies)?;
                }
                ended.retain(|lane| *lane == 0);
            }
            if !ended.is_empty() {
                session.drop_lanes(&ended)?;
            }
            logits = if self.model().spec().position_boundary() == Some(position) {
                // All positions change here: the lanes are rolled back to 0.
                let mut all = Vec::new();
                for sample in going {
                    let ids = [prompt_ids, &sample.output_ids].concat();
                    let lane = Chunks { ids: &ids, start: 0, size: chunk, lane: sample.lane };
                    let answer = self.prefill(session, lane, &mut None).await?;
                    all.extend(self.logits(&answer, Edges::logits)?);
                }
                all
            } else {
                let answer = self.decode(session, &going, position).await?;
                self.logits(&answer, |edges, hidden| edges.logits_at(&seat, hidden, logits))?
            };
            position += 1;
        }

        let told = Told {
            prompt_ids,
            cached: start,
            route_time,
            total: started.elapsed(),
            route: entries(&session.route()),
            recoveries,
            exact: session.is_exact(),
            wire_codec: Some(session.wire_codec()).filter(|codec| !codec.is_lossless()).map(|codec| codec.to_string()),
        };
        if let [sample] = &samples[..] {
            // The last token was never sent.
            let sent = sample.output_ids.len() - 1;
            conversation.ids = prompt_ids.iter().chain(&sample.output_ids[..sent]).copied().collect();
            *kept = Some(conversation);
        }
        Ok(samples.into_iter().map(|sample| sample.into_generation(&told)).collect())
    }

    /// The logits of every position of `ids`: `[ids, vocabulary]`, row-major.
    ///
    /// # Errors
    /// As [`Client::generate`].
    pub async fn score(&self, ids: &[u32], options: &GenerationOptions) -> Result<Vec<f32>, ClientError> {
        self.check_prompt(ids)?;
        let limits = SessionLimits {
            max_lanes: 1,
            max_tokens: ids.len() as u64,
            max_in_flight: CHUNKS_IN_FLIGHT,
            max_step_tokens: options.prefill_chunk.min(ids.len()).max(1) as u32,
        };
        let work = Work::prompt(ids.len(), options.prefill_chunk.max(1));
        let (mut session, _) = self.open_session_for(work, limits, options.wait).await?;
        let logits = Vec::with_capacity(ids.len() * self.model().spec().vocab_size);
        let mut all = Some(logits);
        let chunks = Chunks { ids, start: 0, size: options.prefill_chunk.max(1), lane: 0 };
        self.prefill(&mut session, chunks, &mut all).await?;
        Ok(all.unwrap_or_default())
    }

    /// How long a sequence that starts with this prompt may get.
    fn check_prompt(&self, ids: &[u32]) -> Result<usize, ClientError> {
        let spec = self.model().spec();
        if ids.is_empty() {
            return Err(ClientError::Request("the prompt is empty: give at least one token".to_owned()));
        }
        if ids.len() > spec.max_context {
            return Err(ClientError::Request(format!(
                "the prompt has {} tokens, and the context of {} holds {}: shorten it by {}",
                ids.len(),
                self.model().name(),
                spec.max_context,
                ids.len() - spec.max_context
            )));
        }
        if let Some((at, id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= spec.vocab_size) {
            return Err(ClientError::Request(format!(
                "token {at} of the prompt is {id}, and the vocabulary has {} ids, 0 to {}",
                spec.vocab_size,
                spec.vocab_size - 1
            )));
        }
        Ok(spec.max_context)
    }

    /// Sends the prompt in chunks, as many at a time as the credit allows, so that the hops work side by side. Returns the last
    /// answer, which has the last row; where `logits` are wanted, every answer has all rows, and theirs are added.
    async fn prefill(
        &self,
        session: &mut Session,
        prompt: Chunks<'_>,
        logits: &mut Option<Vec<f32>>,
    ) -> Result<StepAnswer, ClientError> {
        let Chunks { ids, start, size, lane } = prompt;
        let mut chunks = ids[start..].chunks(size).peekable();
        let mut position = start;
        let mut last = None;
        loop {
            while session.credit() > 0
                && let Some(chunk) = chunks.next()
            {
                let want = match (&logits, chunks.peek()) {
                    (Some(_), _) => Want::All,
                    (None, None) => Want::Last,
                    (None, Some(_)) => Want::Nothing,
                };
                session.send(Step {
                    lanes: vec![LaneRun { lane, position, tokens: chunk.len() }],
                    input: Input::Tokens(chunk.to_vec()),
                    want,
                    rope_length: Some(ids.len()),
                })?;
                position += chunk.len();
            }
            if session.in_flight() == 0 {
                // No chunk is left. The prompt is not empty, so there was an answer.
                return last.ok_or_else(|| ClientError::Request("the prompt is empty".to_owned()));
            }
            let answer = session.receive().await?;
            if let Some(logits) = logits {
                logits.extend(self.logits(&answer, Edges::logits)?);
            }
            last = Some(answer);
        }
    }

    /// The last token of every sample, in one step.
    async fn decode(
        &self,
        session: &mut Session,
        samples: &[&Sample],
        position: usize,
    ) -> Result<StepAnswer, ClientError> {
        session.send(Step {
            lanes: samples.iter().map(|sample| LaneRun { lane: sample.lane, position, tokens: 1 }).collect(),
            input: Input::Tokens(samples.iter().filter_map(|sample| sample.output_ids.last().copied()).collect()),
            want: Want::Last,
            rope_length: Some(position + 1),
        })?;
        loop {
            // Lanes may have been copied or dropped in front of it.
            let answer = session.receive().await?;
            if session.in_flight() == 0 {
                return Ok(answer);
            }
        }
    }

    /// The logits of an answer's rows, by `compute`. A large head is long arithmetic: then the runtime is told, so that other tasks go on
    /// elsewhere. For a small one that would take longer than the head itself.
    fn logits(
        &self,
        answer: &StepAnswer,
        compute: impl FnOnce(&Edges, &HiddenStates) -> Result<Vec<f32>, EdgeError>,
    ) -> Result<Vec<f32>, ClientError> {
        /// Multiplications that take about a millisecond.
        const LONG: usize = 1 << 23;
        let Some(hidden) = &answer.hidden else { return Ok(Vec::new()) };
        let edges = self.model().edges();
        let spec = self.model().spec();
        if hidden.rows * spec.hidden_size * spec.vocab_size < LONG {
            return Ok(compute(edges, hidden)?);
        }
        Ok(tokio::task::block_in_place(|| compute(edges, hidden))?)
    }
}

/// One generation, or several of one prompt.
struct Run<'a> {
    started: Instant,
    /// Tokens that the sequence may have.
    longest: usize,
    prompt_ids: &'a [u32],
    options: &'a GenerationOptions,
    /// Tokens that each lane of the session may have.
    room: usize,
    samples: usize,
}

/// The tokens of a sequence from `start` on, to be sent in chunks.
struct Chunks<'a> {
    ids: &'a [u32],
    start: usize,
    size: usize,
    lane: u32,
}

/// Tells of the hops that were lost since the last answer. Returns how many there were.
fn tell_recoveries(session: &mut Session, on_event: &mut (dyn FnMut(GenerationEvent) + Send)) -> usize {
    let entry = |(peer, blocks): &(libp2p::PeerId, std::ops::Range<usize>)| RouteEntry {
        peer_id: peer.to_string(),
        span: [blocks.start, blocks.end],
    };
    let recoveries = session.take_recoveries();
    for Recovery { hop, lost, replacement, took, route, handed_over } in &recoveries {
        let recovery = RecoveryEntry {
            hop: *hop,
            lost: lost.to_string(),
            replacement: replacement.iter().map(entry).collect(),
            ms: millis(*took),
            handed_over: *handed_over,
        };
        on_event(GenerationEvent::Recovery { recovery, route: route.iter().map(entry).collect() });
    }
    recoveries.len()
}

/// A route as results name it.
pub fn entries(route: &Route) -> Vec<RouteEntry> {
    route
        .hops
        .iter()
        .map(|hop| RouteEntry {
            peer_id: hop.announcement.peer_id.to_string(),
            span: [hop.blocks.start, hop.blocks.end],
        })
        .collect()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
