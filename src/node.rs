//! Serving a swarm: a node hosts a span of blocks and computes them for others.
//!
//! [`Node::start`] joins the DHT, chooses a span ([`placement`]), loads it and announces it; from then on [`sessions`] takes
//! the frames that arrive. A frame is held against its ticket ([`border`]) and against the session's numbered log ([`log`]),
//! computed by the engine, and its output pushed straight to the next hop.

pub mod bootstrap;
pub mod border;
mod early;
mod held;
pub mod log;
pub mod placement;
mod session;
pub mod sessions;
mod settings;

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future;

use self::{
    border::Hosted,
    sessions::{Host, NodeService, SessionSettings, Sessions},
};
use crate::{
    engine::{
        DeviceChoice, Engine, EngineOptions, LoadError,
        speed::{Decode, Speed},
    },
    model::{
        Dtype, KvDtype, Quant,
        fingerprint::Fingerprint,
        inspect,
        source::{ModelSource, SourceError},
    },
    swarm::{
        AnnounceError, DiscoverError, JoinError, StartError, Swarm, SwarmConfig, WireCodec,
        announcement::{Announcement, State},
    },
};

/// How often the announcement is made anew with the current load.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(30);

/// How often sessions that outlived their clients are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// What is kept with the pages of prefixes may take one part in this many of what is kept of sessions' history, beside it.
const KEPT_SHARE: usize = 4;

/// How long the own speed is measured for at most.
const MEASURE_FOR: Duration = Duration::from_millis(500);

/// Which blocks to host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockChoice {
    /// These.
    Exactly(Range<usize>),
    /// As many as this, where the swarm needs them most.
    Count(usize),
    /// As many as memory holds, where the swarm needs them most.
    Auto,
}

/// Where the first peers come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// From the configured initial peers; none that answers is an error.
    InitialPeers,
    /// From nobody: this node is the first.
    NewSwarm,
    /// From the local network and the remembered peers; a new swarm where there are none.
    Search,
}

/// What to serve, and how.
pub struct NodeOptions {
    /// What the model is called: a hub id or a directory's name.
    pub model: String,
    /// The hub's revision; empty for local files.
    pub revision: String,
    /// Which model exactly.
    pub fingerprint: Fingerprint,
    /// The swarm's prefix.
    pub dht_prefix: String,
    /// What others see this node as; may be empty.
    pub public_name: String,
    /// Which blocks.
    pub blocks: BlockChoice,
    /// Where it computes.
    pub device: DeviceChoice,
    /// What it computes in; `None`: as the checkpoint is stored.
    pub dtype: Option<Dtype>,
    /// What its KV cache is kept in; `None`: what it computes in.
    pub kv_dtype: Option<KvDtype>,
    /// How matrices are quantized.
    pub quant: Quant,
    /// Threads that compute; `None`: one a core.
    pub threads: Option<usize>,
    /// Tokens in the KV pool.
    pub cache_tokens: usize,
    /// Limits of its sessions.
    pub sessions: SessionSettings,
    /// Where the first peers come from.
    pub beginning: Beginning,
    /// How long to look for them.
    pub join_timeout: Duration,
}

/// What a node is doing.
#[derive(Debug, Clone, PartialEq)]
pub enum NodeEvent {
    /// It has joined a swarm of this many known peers.
    Joined {
        /// Peers known so far.
        peers: usize,
    },
    /// It found nobody and starts a swarm of its own.
    NewSwarm,
    /// It will host these blocks.
    Chose {
        /// The span.
        span: Range<usize>,
        /// Of this many blocks.
        of: usize,
    },
    /// It is loading its blocks.
    Loading {
        /// Blocks loaded.
        done: usize,
        /// Blocks to load.
        of: usize,
    },
    /// It serves.
    Online {
        /// Bytes of weights in memory.
        loaded_bytes: u64,
        /// Tokens a second through the span, one lane.
        tokens_per_second: f64,
    },
}

/// Why a node can't serve.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The network can't be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// No initial peer can be reached.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The swarm can't be looked up.
    #[error(transparent)]
    Discover(#[from] DiscoverError),
    /// The node can't be announced.
    #[error(transparent)]
    Announce(#[from] AnnounceError),
    /// The files of the span can't be had.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The span can't be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The blocks asked for are not the model's.
    #[error("--blocks {}:{} is outside of {model}, which has blocks 0:{blocks}", asked.start, asked.end)]
    NoSuchBlocks {
        /// What was asked for.
        asked: Range<usize>,
        /// The model.
        model: String,
        /// How many it has.
        blocks: usize,
    },
    /// More blocks than the model has.
    #[error("--num-blocks {asked} is more than {model} has: {blocks}")]
    TooManyBlocks {
        /// What was asked for.
        asked: usize,
        /// The model.
        model: String,
        /// How many it has.
        blocks: usize,
    },
    /// Not even one block fits.
    #[error(
        "no block of {model} fits into the free memory: one takes {block_bytes} bytes, {free_bytes} are free; a smaller --dtype or --kv-dtype, --quant q4_k or fewer --attn-cache-tokens may help"
    )]
    NoRoom {
        /// The model.
        model: String,
        /// What one block takes, its part of the KV pool included.
        block_bytes: u64,
        /// What is free.
        free_bytes: u64,
    },
    /// The loading thread died.
    #[error("loading the blocks failed: {0}")]
    Died(String),
}

/// A node that serves. [`Node::leave`] ends it well; where it is dropped instead, its announcement is left to expire.
pub struct Node {
    swarm: Swarm,
    sessions: Arc<Sessions>,
    model: String,
    span: Range<usize>,
    /// Its files stay in the cache as long as it serves, for whoever starts it again or changes its span.
    _source: ModelSource,
    announcement: Announcement,
    announcing: tokio::task::JoinHandle<()>,
    sweeping: tokio::task::JoinHandle<()>,
}

impl Node {
    /// Joins, chooses, loads, announces. Returns when the node serves; `on_event` tells of the way there. Where `stop` comes
    /// first, or something fails, the announcement is withdrawn; then, and only for `stop`, there is no node and no error.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub async fn start(
        source: ModelSource,
        options: NodeOptions,
        network: SwarmConfig,
        on_event: OnEvent,
        stop: impl Future<Output = ()> + Send,
    ) -> Result<Option<Self>, NodeError> {
        let blocks = source.spec().num_blocks();
        if let BlockChoice::Exactly(asked) = &options.blocks
            && (asked.is_empty() || asked.end > blocks)
        {
            return Err(NodeError::NoSuchBlocks { asked: asked.clone(), model: options.model.clone(), blocks });
        }
        let model = options.model.clone();
        if let BlockChoice::Count(asked) = options.blocks
            && asked > blocks
        {
            return Err(NodeError::TooManyBlocks { asked, model, blocks });
        }
        let sessions = Sessions::new(options.sessions);
        let swarm = Swarm::start(network, Arc::new(NodeService(sessions.clone()))).await?;
        let serving = tokio::select! {
            serving = begin(&swarm, &sessions, source, options, on_event) => serving.map(Some),
            () = stop => Ok(None),
        };
        match serving {
            Ok(Some(Serving { span, source, engine, announcement })) => {
                let announcing = tokio::spawn(keep_announced(swarm.clone(), engine, announcement.clone()));
                let sweeping = tokio::spawn(keep_swept(sessions.clone()));
                Ok(Some(Self { swarm, sessions, model, span, _source: source, announcement, announcing, sweeping }))
            }
            other => {
                swarm.withdraw().await;
                swarm.stop().await;
                other.map(|_| None)
            }
        }
    }

    /// The network.
    pub fn swarm(&self) -> &Swarm {
        &self.swarm
    }

    /// What its model is called.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The blocks that it hosts.
    pub fn span(&self) -> Range<usize> {
        self.span.clone()
    }

    /// Its sessions.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// Waits until the node's owner asks it, from elsewhere, to leave.
    pub async fn drain_requested(&self) {
        self.sessions.drain_requested().await;
    }

    /// Leaves on purpose: takes no new sessions, tells the clients of those that it has to go elsewhere, serves them until they
    /// are gone, though no longer than `patience`; then withdraws its announcement and stops the network.
    pub async fn leave(self, patience: Duration) {
        self.announcing.abort();
        let draining = Announcement { state: State::Draining, ..self.announcement.clone() };
        let announcing = async {
            if self.sessions.count() > 0
                && let Err(error) = self.swarm.announce(draining).await
            {
                tracing::debug!(%error, "the swarm does not know that this node is leaving");
            }
        };
        // The first begins first: new sessions are refused before the swarm is told.
        let moving = future::join3(self.sessions.leave(), announcing, self.sessions.all_ended());
        if tokio::time::timeout(patience, moving).await.is_err() {
            tracing::warn!(sessions = self.sessions.count(), "leaving although some sessions did not go elsewhere");
        }
        self.swarm.withdraw().await;
        self.swarm.stop().await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.announcing.abort();
        self.sweeping.abort();
    }
}

/// Told what a node is doing.
pub type OnEvent = Arc<dyn Fn(NodeEvent) + Send + Sync>;

/// A node that came to serve.
struct Serving {
    span: Range<usize>,
    source: ModelSource,
    engine: Engine,
    announcement: Announcement,
}

/// The way to serving: join, choose, announce, load, measure, announce.
async fn begin(
    swarm: &Swarm,
    sessions: &Sessions,
    source: ModelSource,
    options: NodeOptions,
    on_event: OnEvent,
) -> Result<Serving, NodeError> {
    let blocks = source.spec().num_blocks();
    match join(swarm, options.beginning, options.join_timeout).await? {
        0 => on_event(NodeEvent::NewSwarm),
        peers => on_event(NodeEvent::Joined { peers }),
    }
    let dtype = options.dtype.unwrap_or(source.spec().stored_dtype);
    let span = choose_blocks(swarm, &source, &options, dtype).await?;
    on_event(NodeEvent::Chose { span: span.clone(), of: blocks });
    let mut announcement = announcement(swarm, &options, &span, dtype, blocks);
    swarm.announce(announcement.clone()).await?;

    let checkpoint = source.fetch_blocks(span.clone()).await?;
    let engine_options = EngineOptions {
        device: options.device,
        kv_dtype: options.kv_dtype,
        quant: options.quant,
        threads: options.threads,
        cache_tokens: options.cache_tokens,
        // A session has one step in the engine at the most.
        queue: options.sessions.max_sessions,
        kept_bytes: options.sessions.history_bytes / KEPT_SHARE,
        ..EngineOptions::new(span.clone(), dtype)
    };
    let progress = on_event.clone();
    let died = |error: tokio::task::JoinError| NodeError::Died(error.to_string());
    let loading = tokio::task::spawn_blocking(move || {
        Engine::load(&checkpoint, engine_options, &mut |done, of| progress(NodeEvent::Loading { done, of }))
    });
    let engine = loading.await.map_err(died)??;
    let measured = engine.clone();
    let tokens_per_second = tokio::task::spawn_blocking(move || measure(&measured)).await.map_err(died)?;

    let hosted = Hosted {
        peer: swarm.peer_id(),
        dht_prefix: options.dht_prefix,
        fingerprint: options.fingerprint,
        span: span.clone(),
    };
    sessions.serve(Host { engine: engine.clone(), swarm: swarm.downgrade(), hosted });
    announcement.state = State::Online;
    announcement.quant = engine.quantization().to_owned();
    announcement.quant_settings = engine.quant_settings().iter().map(Quant::to_string).collect();
    announcement.kernel_path = engine.kernel_path().to_owned();
    announcement.compute_tokens_per_second = tokens_per_second;
    update_load(&mut announcement, &engine);
    swarm.announce(announcement.clone()).await?;
    on_event(NodeEvent::Online { loaded_bytes: engine.loaded_bytes(), tokens_per_second });
    Ok(Serving { span, source, engine, announcement })
}

/// Joins the DHT. Returns how many peers are known: 0 where a new swarm begins.
pub async fn join(swarm: &Swarm, beginning: Beginning, timeout: Duration) -> Result<usize, JoinError> {
    match beginning {
        Beginning::NewSwarm => Ok(0),
        Beginning::InitialPeers => Ok(swarm.join(timeout).await?.peers),
        Beginning::Search => Ok(swarm.search(timeout).await.map_or(0, |joined| joined.peers)),
    }
}

async fn choose_blocks(
    swarm: &Swarm,
    source: &ModelSource,
    options: &NodeOptions,
    dtype: Dtype,
) -> Result<Range<usize>, NodeError> {
    let spec = source.spec();
    let count = match &options.blocks {
        BlockChoice::Exactly(span) => return Ok(span.clone()),
        BlockChoice::Count(count) => *count,
        BlockChoice::Auto => {
            let cache = (options.kv_dtype.unwrap_or(dtype.into()), options.cache_tokens);
            let block_bytes = source.largest_block_bytes(dtype, options.quant, cache);
            let free_bytes = inspect::usable_memory_bytes(inspect::free_memory_bytes());
            match (free_bytes / block_bytes.max(1)) as usize {
                0 => return Err(NodeError::NoRoom { model: options.model.clone(), block_bytes, free_bytes }),
                fits => fits,
            }
        }
    };
    let found = match swarm.discover(&options.dht_prefix, spec.num_blocks()).await {
        Ok(found) => found.announcements,
        Err(DiscoverError::Alone) => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let others =
        found.iter().filter(|other| other.fingerprint == options.fingerprint.0 && other.peer_id != swarm.peer_id());
    let coverage = placement::coverage(spec.num_blocks(), others);
    placement::choose_span(&coverage, count).ok_or_else(|| NodeError::NoSuchBlocks {
        asked: 0..count,
        model: options.model.clone(),
        blocks: spec.num_blocks(),
    })
}

fn announcement(
    swarm: &Swarm,
    options: &NodeOptions,
    span: &Range<usize>,
    dtype: Dtype,
    blocks: usize,
) -> Announcement {
    Announcement {
        model: options.model.clone(),
        revision: options.revision.clone(),
        public_name: options.public_name.clone(),
        state: State::Joining,
        dtype,
        dht_prefix: options.dht_prefix.clone(),
        fingerprint: options.fingerprint.0,
        model_blocks: blocks,
        span: span.clone(),
        quant: "none".to_owned(),
        wire_codecs: WireCodec::LOSSY.to_vec(),
        ..Announcement::blank(swarm.peer_id())
    }
}

fn update_load(announcement: &mut Announcement, engine: &Engine) {
    let load = engine.load_now();
    announcement.cache_tokens_left = load.cache_tokens_left as u64;
    announcement.cache_tokens_total = load.cache_tokens_total as u64;
    announcement.queue = load.queue as u32;
}

async fn keep_announced(swarm: Swarm, engine: Engine, mut announcement: Announcement) {
    let mut every = tokio::time::interval(ANNOUNCE_EVERY);
    every.tick().await;
    loop {
        every.tick().await;
        update_load(&mut announcement, &engine);
        if let Err(error) = swarm.announce(announcement.clone()).await {
            tracing::warn!(%error, "the announcement could not be renewed; trying again in {} s", ANNOUNCE_EVERY.as_secs());
        }
    }
}

async fn keep_swept(sessions: Arc<Sessions>) {
    let mut every = tokio::time::interval(SWEEP_EVERY);
    loop {
        every.tick().await;
        sessions.sweep(Instant::now());
    }
}

/// Decode speed through the whole span, one lane, tokens a second; 0 where it can't be measured.
fn measure(engine: &Engine) -> f64 {
    /// The median of more would not be much truer.
    const STEPS: usize = 16;
    let steps = Decode { limit: Some(MEASURE_FOR), ..Decode::new(1, STEPS) };
    Speed::of_blocks(engine).decode(&steps).unwrap_or_else(|error| {
        tracing::warn!(%error, "the node announces no speed of its own");
        0.0
    })
}
