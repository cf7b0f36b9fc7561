//! One sequence that grows behind a prompt: its choices, its text, its end.

use std::time::{Duration, Instant};

use super::{
    FinishReason, Generation, GenerationEvent, GenerationOptions, PromptTokens, RouteEntry, Timing, Usage, millis,
};
use crate::{
    client::{
        ClientError,
        local_model::LocalModel,
        sampling::{Sampler, SamplingOptions},
        stop::StopStrings,
    },
    model::tokenizer::TextStream,
};

/// A sample of a prompt's continuations.
pub(super) struct Sample {
    /// Of the session.
    pub(super) lane: u32,
    /// What was chosen so far.
    pub(super) output_ids: Vec<u32>,
    sampler: Sampler,
    ignores_eos: bool,
    stream: Option<TextStream>,
    stops: StopStrings,
    text: String,
    first_token: Option<Duration>,
    end: Option<(FinishReason, Duration)>,
}

/// What the samples of a prompt have in common in the end.
pub(super) struct Told<'a> {
    pub(super) prompt_ids: &'a [u32],
    /// Tokens of the prompt that the hops had already.
    pub(super) cached: usize,
    pub(super) route_time: Duration,
    pub(super) total: Duration,
    pub(super) route: Vec<RouteEntry>,
    pub(super) recoveries: usize,
    pub(super) exact: bool,
    pub(super) wire_codec: Option<String>,
}

impl Sample {
    /// The sample with this index; its seed is so far from the one of the options.
    pub(super) fn new(
        index: usize,
        model: &LocalModel,
        prompt_ids: &[u32],
        options: &GenerationOptions,
    ) -> Result<Self, ClientError> {
        let seed = options.sampling.seed.map(|seed| seed.wrapping_add(index as u64));
        Ok(Self {
            lane: index as u32,
            output_ids: Vec::new(),
            sampler: Sampler::new(SamplingOptions { seed, ..options.sampling.clone() }, prompt_ids)?,
            ignores_eos: options.ignore_eos,
            stream: Some(model.tokenizer().stream(prompt_ids)),
            stops: StopStrings::new(options.stop.iter().cloned()),
            text: String::new(),
            first_token: None,
            end: None,
        })
    }

    /// Whether it has not come to its end.
    pub(super) fn goes_on(&self) -> bool {
        self.end.is_none()
    }

    /// Chooses the next token out of `logits` (`[vocabulary]`).
    pub(super) fn choose(&mut self, logits: &[f32], is_last: bool, now: Now<'_>) -> Result<(), ClientError> {
        let id = self.sampler.sample(logits)?;
        self.first_token.get_or_insert_with(|| now.started.elapsed());
        let ends = if now.model.is_eos(id) && !self.ignores_eos {
            Some(FinishReason::Eos)
        } else {
            is_last.then_some(FinishReason::Length)
        };
        let (ends, text) = self.write(id, ends)?;
        (now.on_event)(self.lane as usize, GenerationEvent::Token { token_id: id, text });
        self.end = ends.map(|reason| (reason, now.started.elapsed()));
        Ok(())
    }

    /// Adds a token, and where it is the last one (`ends`) what was held back too, so that there is one event a token. An
    /// end-of-sequence token is no text. Returns why the generation ends, if it does, and the text that is certain now.
    fn write(&mut self, id: u32, ends: Option<FinishReason>) -> Result<(Option<FinishReason>, String), ClientError> {
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
        Ok((if released.stopped { Some(FinishReason::Stop) } else { ends }, text))
    }

    /// The result.
    pub(super) fn into_generation(self, told: &Told<'_>) -> Generation {
        // All have ended before the result is told.
        let (finish_reason, total) = self.end.unwrap_or((FinishReason::Length, told.total));
        let first_token = self.first_token.unwrap_or(total);
        let completion_tokens = self.output_ids.len();
        let decode_seconds = total.saturating_sub(first_token).as_secs_f64();
        Generation {
            text: self.text,
            prompt_ids: told.prompt_ids.to_vec(),
            output_ids: self.output_ids,
            finish_reason,
            usage: Usage {
                prompt_tokens: told.prompt_ids.len(),
                completion_tokens,
                prompt_tokens_details: (told.cached > 0).then_some(PromptTokens { cached_tokens: told.cached }),
            },
            timing: Timing {
                route_ms: millis(told.route_time),
                time_to_first_token_ms: millis(first_token),
                decode_tokens_per_second: (completion_tokens > 1)
                    .then(|| (completion_tokens - 1) as f64 / decode_seconds.max(1e-9)),
                total_ms: millis(total),
            },
            route: told.route.clone(),
            recoveries: told.recoveries,
            exact: told.exact,
            wire_codec: told.wire_codec.clone(),
        }
    }
}

/// What a choice needs besides its logits.
pub(super) struct Now<'a> {
    pub(super) model: &'a LocalModel,
    /// When the generation began.
    pub(super) started: Instant,
    /// Told the sample's index, and what happens.
    pub(super) on_event: &'a mut (dyn FnMut(usize, GenerationEvent) + Send),
}
