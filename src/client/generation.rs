//! Generating text through a swarm: prompt in chunks, then token by token.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{
    Client, ClientError, Work,
    sampling::{Sampler, SamplingOptions},
    session::{Input, Recovery, Route, Session, Step, StepAnswer, Want},
    stop::StopStrings,
};
use crate::{engine::LaneRun, model::tokenizer::TextStream, swarm::ticket::SessionLimits};

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
}

/// How many tokens.
#[derive(Debug, Clone, Serialize)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Generated.
    pub completion_tokens: usize,
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
        self.run(Run { started, longest, prompt_ids, options, room: longest }, &mut None, on_event).await
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
        self.run(Run { started, longest, prompt_ids, options, room }, conversation, on_event).await
    }

    /// How long the sequence may get.
    fn longest(&self, prompt_ids: &[u32], options: &GenerationOptions) -> Result<usize, ClientError> {
        if options.max_tokens == 0 {
            return Err(ClientError::Request("max-tokens is 0: ask for at least one token".to_owned()));
        }
        Ok(self.check_prompt(prompt_ids)?.min(prompt_ids.len().saturating_add(options.max_tokens)))
    }

    async fn run(
        &self,
        run: Run<'_>,
        kept: &mut Option<Conversation>,
        on_event: &mut (dyn FnMut(GenerationEvent) + Send),
    ) -> Result<Generation, ClientError> {
        let Run { started, longest, prompt_ids, options, room } = run;
        let mut sampler = Sampler::new(options.sampling.clone(), prompt_ids)?;
        let chunk = options.prefill_chunk.max(1);
        let limits = SessionLimits {
            max_lanes: 1,
            max_tokens: room as u64,
            max_in_flight: CHUNKS_IN_FLIGHT,
            max_step_tokens: chunk.min(room) as u32,
        };
        let mut conversation = match kept.take().filter(|kept| kept.session.limits() == limits) {
            Some(conversation) => conversation,
            None => {
                let work = Work { prompt: prompt_ids.len(), chunk, tokens: longest - prompt_ids.len() };
                let (session, _) = self.open_session_for(work, limits, options.wait).await?;
                Conversation { session, ids: Vec::new() }
            }
        };
        let route_time = started.elapsed();
        on_event(GenerationEvent::Route { route: entries(&conversation.session.route()) });
        let mut recoveries = 0;

        let mut writer = Writer {
            stream: Some(self.model().tokenizer().stream(prompt_ids)),
            stops: StopStrings::new(options.stop.iter().cloned()),
            text: String::new(),
            output_ids: Vec::new(),
        };
        // Where positions depend on the length, what is held was computed for another one.
        let depends_on_length = self.model().spec().length_class(1) > 0;
        let start = if depends_on_length { 0 } else { conversation.shared(prompt_ids) };
        let session = &mut conversation.session;
        let mut answer = self.prefill(session, Chunks { ids: prompt_ids, start, size: chunk }, &mut None).await?;
        let mut first_token = None;
        let mut logits = Vec::new();
        let finish_reason = loop {
            recoveries += tell_recoveries(session, on_event);
            logits = self.logits(&answer, logits)?;
            let id = sampler.sample(&logits)?;
            first_token.get_or_insert_with(|| started.elapsed());
            let position = prompt_ids.len() + writer.output_ids.len();
            let ends = if self.model().is_eos(id) && !options.ignore_eos {
                Some(FinishReason::Eos)
            } else {
                (position + 1 >= longest).then_some(FinishReason::Length)
            };
            let ends = writer.write(id, ends, on_event)?;
            if let Some(reason) = ends {
                break reason;
            }
            if session.move_if_better(longest - position).await {
                on_event(GenerationEvent::Route { route: entries(&session.route()) });
            }
            answer = if self.model().spec().position_boundary() == Some(position) {
                // All positions change here: the session is rolled back to 0.
                let all = [prompt_ids, &writer.output_ids].concat();
                self.prefill(session, Chunks { ids: &all, start: 0, size: chunk }, &mut None).await?
            } else {
                self.decode(session, id, position).await?
            };
        };
        let total = started.elapsed();

        let completion_tokens = writer.output_ids.len();
        let decode_time = total.saturating_sub(first_token.unwrap_or(total)).as_secs_f64();
        let (route, exact) = (entries(&session.route()), session.is_exact());
        let wire_codec = Some(session.wire_codec()).filter(|codec| !codec.is_lossless()).map(|codec| codec.to_string());
        // The last token was never sent.
        conversation.ids = prompt_ids.iter().chain(&writer.output_ids[..completion_tokens - 1]).copied().collect();
        *kept = Some(conversation);
        Ok(Generation {
            text: writer.text,
            prompt_ids: prompt_ids.to_vec(),
            output_ids: writer.output_ids,
            finish_reason,
            usage: Usage { prompt_tokens: prompt_ids.len(), completion_tokens },
            timing: Timing {
                route_ms: millis(route_time),
                time_to_first_token_ms: millis(first_token.unwrap_or(total)),
                decode_tokens_per_second: (completion_tokens > 1)
                    .then(|| (completion_tokens - 1) as f64 / decode_time.max(1e-9)),
                total_ms: millis(total),
            },
            route,
            recoveries,
            exact,
            wire_codec,
        })
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
        let chunks = Chunks { ids, start: 0, size: options.prefill_chunk.max(1) };
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
        let Chunks { ids, start, size } = prompt;
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
                    lanes: vec![LaneRun { lane: 0, position, tokens: chunk.len() }],
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
                logits.extend(self.logits(&answer, Vec::new())?);
            }
            last = Some(answer);
        }
    }

    async fn decode(&self, session: &mut Session, id: u32, position: usize) -> Result<StepAnswer, ClientError> {
        session.send(Step {
            lanes: vec![LaneRun { lane: 0, position, tokens: 1 }],
            input: Input::Tokens(vec![id]),
            want: Want::Last,
            rope_length: Some(position + 1),
        })?;
        Ok(session.receive().await?)
    }

    /// The logits of an answer's rows, in the memory of `logits`. A large head is long arithmetic: then the runtime is told, so that other tasks go on
    /// elsewhere. For a small one that would take longer than the head itself.
    fn logits(&self, answer: &StepAnswer, logits: Vec<f32>) -> Result<Vec<f32>, ClientError> {
        /// Multiplications that take about a millisecond.
        const LONG: usize = 1 << 23;
        let Some(hidden) = &answer.hidden else { return Ok(Vec::new()) };
        let edges = self.model().edges();
        let spec = self.model().spec();
        if hidden.rows * spec.hidden_size * spec.vocab_size < LONG {
            return Ok(edges.logits_into(hidden, logits)?);
        }
        Ok(tokio::task::block_in_place(|| edges.logits_into(hidden, logits))?)
    }
}

/// One generation.
struct Run<'a> {
    started: Instant,
    /// Tokens that the sequence may have.
    longest: usize,
    prompt_ids: &'a [u32],
    options: &'a GenerationOptions,
    /// Tokens that the session may have.
    room: usize,
}

/// The tokens of a sequence from `start` on, to be sent in chunks.
struct Chunks<'a> {
    ids: &'a [u32],
    start: usize,
    size: usize,
}

/// Turns tokens into text as they come.
struct Writer {
    stream: Option<TextStream>,
    stops: StopStrings,
    text: String,
    output_ids: Vec<u32>,
}

impl Writer {
    /// Writes a token, and where it is the last one (`ends`) what was held back too, so that there is one event a token.
    /// An end-of-sequence token is no text. Returns why the generation ends, if it does.
    fn write(
        &mut self,
        id: u32,
        ends: Option<FinishReason>,
        on_event: &mut (dyn FnMut(GenerationEvent) + Send),
    ) -> Result<Option<FinishReason>, ClientError> {
        self.output_ids.push(id);
        let mut piece = match &mut self.stream {
            Some(stream) if ends != Some(FinishReason::Eos) => stream.push(id)?,
            _ => String::new(),
        };
        if ends.is_some()
            && let Some(stream) = self.stream.take()
        {
            piece += &stream.finish();
        }
        let released = self.stops.push(&piece);
        let mut text = released.text;
        if ends.is_some() && !released.stopped {
            text += &self.stops.finish();
        }
        self.text += &text;
        on_event(GenerationEvent::Token { token_id: id, text });
        Ok(if released.stopped { Some(FinishReason::Stop) } else { ends })
    }
}

/// Tells of the hops that were lost since the last answer. Returns how many there were.
fn tell_recoveries(session: &mut Session, on_event: &mut (dyn FnMut(GenerationEvent) + Send)) -> usize {
    let entry = |(peer, blocks): &(libp2p::PeerId, std::ops::Range<usize>)| RouteEntry {
        peer_id: peer.to_string(),
        span: [blocks.start, blocks.end],
    };
    let recoveries = session.take_recoveries();
    for Recovery { hop, lost, replacement, took, route } in &recoveries {
        let recovery = RecoveryEntry {
            hop: *hop,
            lost: lost.to_string(),
            replacement: replacement.iter().map(entry).collect(),
            ms: millis(*took),
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
