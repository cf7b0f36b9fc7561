//! `helion client generate`: continue a prompt.

use std::{future::Future, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use clap::Args;
use libp2p::PeerId;

use super::{
    arguments::{SwarmArgs, Usage, count, seconds},
    output::{Display, Shown, say, summary},
    signals::Signals,
};
use crate::{
    client::{
        Client, PeerRules, RouteMode,
        generation::{Conversation, Generation, GenerationOptions},
        local_model::{EdgesChoice, LocalModel, ModelIdentity},
        observer::Observer,
        sampling::{InvalidOption, SamplingOptions},
        session::Patience,
    },
    engine::DeviceChoice,
    model::{chat::Message, source::ModelSource},
    swarm::{WireCodec, ticket::SessionLimits},
};

/// A session has no more lanes.
const MOST_SAMPLES: u64 = SessionLimits::LARGEST.max_lanes as u64;

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    swarm: SwarmArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    rules: RuleArgs,
    #[command(flatten)]
    pub(super) generation: GenerationArgs,
    /// Samples of what may follow. The prompt is computed once; the seed of each is one more than that of the one before. JSON
    /// objects say which sample they are of in "index".
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=MOST_SAMPLES))]
    num_return_sequences: usize,
    /// Print one JSON object with the text, the ids, the timing and the route.
    #[arg(long, conflicts_with = "json_stream")]
    json: bool,
    /// Print one JSON object a line: the route, every token as it comes, then what --json prints.
    #[arg(long)]
    json_stream: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false, id = "prompt_source")]
struct PromptSource {
    /// The text to continue.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// A file with the text to continue.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// The token ids to continue, separated by commas.
    #[arg(long, value_name = "ID,…", value_delimiter = ',')]
    input_ids: Option<Vec<u32>>,
}

#[derive(Debug, Args)]
struct PromptArgs {
    #[command(flatten)]
    source: PromptSource,
    /// Take the prompt as a user's message and write it as the model's chat template does.
    #[arg(long, conflicts_with = "input_ids")]
    chat: bool,
}

/// Which peers may be hops.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct RuleArgs {
    /// Go through these peers, in this order, instead of the fastest ones. Where one is lost, another may take its place.
    #[arg(long, value_name = "PEER_ID,…", value_delimiter = ',')]
    route: Vec<PeerId>,
    /// Use no other peers than these.
    #[arg(long, value_name = "PEER_ID,…", value_delimiter = ',')]
    allow_peers: Vec<PeerId>,
    /// Don't use these peers.
    #[arg(long, value_name = "PEER_ID,…", value_delimiter = ',')]
    block_peers: Vec<PeerId>,
    /// What the route is chosen for: latency (one token as soon as possible), throughput (as many tokens of long prompts a second as
    /// possible), or auto, which goes by the work: a long prompt and what follows it by the time that both take.
    #[arg(long, env = "HELION_ROUTE_MODE", value_name = "MODE", default_value_t = RouteMode::Auto)]
    route_mode: RouteMode,
    /// How hidden states are packed on the wire: raw, or q8 (8-bit blockwise: half the bytes of bf16, and the tokens may differ
    /// from those of one machine). Only peers that speak it are used.
    #[arg(long, env = "HELION_WIRE_CODEC", value_name = "CODEC", default_value_t = WireCodec::Raw)]
    wire_codec: WireCodec,
}

impl RuleArgs {
    /// A client that keeps to them.
    pub(super) fn apply(&self, client: Client) -> Client {
        let rules = PeerRules {
            route: self.route.clone(),
            allow: self.allow_peers.iter().copied().collect(),
            block: self.block_peers.iter().copied().collect(),
        };
        client.with_rules(rules).with_route_mode(self.route_mode).with_wire_codec(self.wire_codec)
    }
}

/// How to generate: shared with the chat.
#[derive(Debug, Clone, Args)]
pub(super) struct GenerationArgs {
    /// Tokens to generate at most.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = count())]
    max_tokens: usize,
    /// Randomness; 0 always takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Choose among the likeliest tokens that together have this probability.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Choose among this many of the likeliest tokens; 0 is all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Choose among tokens at least this likely, relative to the likeliest one.
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,
    /// Divide the logits of tokens that appeared, prompt included, by this; 1 is off.
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f32,
    /// Subtract this from a token's logit for every time it was generated.
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Subtract this from the logit of every token that was generated.
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Makes random choices repeatable [default: a new one every time].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// End before this text appears. May be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after the end-of-sequence token.
    #[arg(long)]
    ignore_eos: bool,
    /// Tokens of the prompt in one step: hop 2 works on one chunk while hop 1 works on the next.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=4096))]
    prefill_chunk: usize,
    /// How long to wait for a swarm that does not have all blocks yet, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = seconds(0))]
    wait: u64,
    /// How long a step may take while all hops are alive, and each part of what another peer is told that takes a lost one's place, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = seconds(1))]
    step_timeout: u64,
    /// How long to look for another peer where one is lost in the middle, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Patience::default().recovery.as_secs(), value_parser = seconds(0))]
    recovery_wait: u64,
}

impl GenerationArgs {
    pub(super) fn options(&self) -> Result<GenerationOptions, Usage> {
        let sampling = SamplingOptions {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            seed: self.seed,
        };
        sampling.validate().map_err(|InvalidOption { field, value, range }| {
            Usage(format!("--{} is {value}, but must be {range}", field.replace('_', "-")))
        })?;
        Ok(GenerationOptions {
            max_tokens: self.max_tokens,
            sampling,
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            prefill_chunk: self.prefill_chunk,
            wait: Duration::from_secs(self.wait),
            ..GenerationOptions::default()
        })
    }

    pub(super) fn patience(&self) -> Patience {
        Patience {
            step: Duration::from_secs(self.step_timeout),
            recovery: Duration::from_secs(self.recovery_wait),
            ..Patience::default()
        }
    }
}

/// Opens the model's own part and joins its swarm.
pub(super) async fn connect(args: &SwarmArgs, patience: Patience) -> anyhow::Result<Client> {
    let model = load_model(args).await?;
    connect_with(args, model, patience).await
}

/// Finds a model, and which one exactly it is.
async fn find_model(args: &SwarmArgs) -> anyhow::Result<(ModelSource, ModelIdentity)> {
    let source = ModelSource::open(&args.model.model, args.model.hub.options()).await?;
    let identity = ModelIdentity {
        dht_prefix: super::node::prefix(args.dht_prefix.as_deref(), &source)?,
        quants: args.require_quant.clone(),
        ..ModelIdentity::of(&source).await?
    };
    Ok((source, identity))
}

/// Joins the swarm of a model only to look at it: nothing of the model is loaded.
pub(super) async fn observe(args: &SwarmArgs) -> anyhow::Result<Observer> {
    let (source, identity) = find_model(args).await?;
    let network = args.network()?;
    Ok(Observer::connect(identity, source.spec().num_blocks(), network, args.join_timeout()).await?)
}

/// Opens the model's own part.
pub(super) async fn load_model(args: &SwarmArgs) -> anyhow::Result<Arc<LocalModel>> {
    let (source, identity) = find_model(args).await?;
    let checkpoint = source.fetch_edges().await?;
    let choice = EdgesChoice {
        dtype: args.dtype.dtype(),
        quant: args.head_quant,
        device: DeviceChoice::Auto,
        threads: args.threads,
    };
    // On a thread of its own, so that Ctrl-C is heard meanwhile.
    let loaded = tokio::task::spawn_blocking(move || LocalModel::load(&checkpoint, identity, choice)).await?;
    Ok(Arc::new(loaded?))
}

/// Joins the swarm of a model.
pub(super) async fn connect_with(
    args: &SwarmArgs,
    model: Arc<LocalModel>,
    patience: Patience,
) -> anyhow::Result<Client> {
    Ok(Client::connect(model, args.network()?, patience, args.join_timeout()).await?)
}

/// Does `work` with a client and leaves the swarm, however the work ended: the hops are told that its sessions are over, and
/// don't hold their cache until they notice.
pub(super) async fn use_client<T>(
    client: &Client,
    signals: &mut Signals,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let result = signals.guard(work).await;
    client.stop().await;
    result
}

/// Generates and shows what comes. Ends early where nobody reads it any more.
pub(super) async fn generate_shown(
    client: &Client,
    ids: &[u32],
    options: &GenerationOptions,
    shown: Shown,
) -> anyhow::Result<Generation> {
    let display = Display::new(shown);
    let mut show = |event| display.event(&event);
    tokio::select! {
        generation = client.generate(ids, options, &mut show) => Ok(generation?),
        error = display.failed() => Err(error.into()),
    }
}

/// As [`generate_shown`], so many samples.
async fn samples_shown(
    client: &Client,
    ids: &[u32],
    options: &GenerationOptions,
    samples: usize,
    shown: Shown,
) -> anyhow::Result<Vec<Generation>> {
    let display = Display::new(shown);
    let mut show = |sample, event| display.event_of(sample, &event);
    tokio::select! {
        generations = client.generate_many(ids, options, samples, &mut show) => Ok(generations?),
        error = display.failed() => Err(error.into()),
    }
}

/// As [`generate_shown`], as text, in the session of the conversation.
pub(super) async fn answer_shown(
    client: &Client,
    conversation: &mut Option<Conversation>,
    ids: &[u32],
    options: &GenerationOptions,
) -> anyhow::Result<Generation> {
    let display = Display::new(Shown::Text);
    let mut show = |event| display.event(&event);
    tokio::select! {
        generation = client.generate_on(conversation, ids, options, &mut show) => Ok(generation?),
        error = display.failed() => Err(error.into()),
    }
}

impl PromptArgs {
    fn ids(&self, model: &LocalModel) -> anyhow::Result<Vec<u32>> {
        let text = match (&self.source.input_ids, &self.source.prompt, &self.source.prompt_file) {
            (Some(ids), ..) => return Ok(ids.clone()),
            (None, Some(text), _) => text.clone(),
            (None, None, Some(path)) => std::fs::read_to_string(path)
                .with_context(|| format!("the prompt can't be read from {}", path.display()))?,
            (None, None, None) => return Err(Usage("a prompt is needed".to_owned()).into()),
        };
        if self.chat {
            return chat_ids(model, &[Message::new("user", text)]);
        }
        Ok(model.tokenizer().encode(&text, true)?)
    }
}

/// A conversation as the model's chat template writes it, ready for the model's answer.
pub(super) fn chat_ids(model: &LocalModel, messages: &[Message]) -> anyhow::Result<Vec<u32>> {
    let template =
        model.template().with_context(|| format!("{} has no chat template: it is no chat model", model.name()))?;
    let text = template.render(messages, true)?;
    // The template writes the special tokens itself.
    Ok(model.tokenizer().encode(&text, false)?)
}

pub(super) async fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let options = args.generation.options()?;
    let connecting = async {
        let model = load_model(&args.swarm).await?;
        let ids = args.prompt.ids(&model)?;
        let client = connect_with(&args.swarm, model, args.generation.patience()).await?;
        Ok((args.rules.apply(client), ids))
    };
    let (client, ids) = signals.guard(connecting).await?;
    let shown = match (args.json, args.json_stream) {
        (true, _) => Shown::Json,
        (_, true) => Shown::JsonStream,
        _ => Shown::Text,
    };
    let generations = match args.num_return_sequences {
        1 => {
            let generation = use_client(&client, &mut signals, generate_shown(&client, &ids, &options, shown)).await?;
            shown.result(&generation)?;
            vec![generation]
        }
        samples => {
            let generating = samples_shown(&client, &ids, &options, samples, shown);
            let generations = use_client(&client, &mut signals, generating).await?;
            shown.samples(&generations)?;
            generations
        }
    };
    if shown == Shown::Text {
        say(format_args!("{}", summary(&generations)));
    }
    Ok(())
}
