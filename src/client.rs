//! Using a swarm: routes, sessions, generation, sampling.
//!
//! A [`Client`] holds a model's edges ([`local_model`]) and a place in the DHT. It looks the swarm up ([`view`]), chooses a
//! [`route`], opens a [`session`] on its hops and generates ([`generation`]): tokens are embedded here, run through the
//! blocks of the hops, and come back as hidden states that the head turns into logits and [`sampling`] into the next token.

mod backoff;
mod choice;
pub mod generation;
mod inbox;
mod legs;
pub mod local_model;
pub mod models;
pub mod observer;
mod prefixes;
pub mod route;
pub mod sampling;
pub mod session;
pub mod speeds;
pub mod stop;
pub mod view;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use libp2p::PeerId;
use rand::RngExt;

use self::{
    backoff::Backoff,
    choice::{Chooser, room_soon},
    inbox::Inbox,
    local_model::LocalModel,
    observer::Observer,
    prefixes::Prefixes,
    sampling::{InvalidOption, SampleError},
    session::{Patience, Prompt, Route, Session, SessionError},
    view::{Incomplete, SwarmView},
};
pub use self::{
    choice::{BadRoute, PeerRules, RouteMode, Work},
    inbox::Traffic,
};
use crate::{
    engine::{EdgeError, LoadError},
    model::{Dtype, chat::ChatError, generation::GenerationError, tokenizer::TokenizerError},
    swarm::{DiscoverError, JoinError, StartError, Swarm, SwarmConfig, WireCodec, ticket::SessionLimits},
};

/// How many other routes are tried where a hop can't be reached or has no room.
const ROUTE_ATTEMPTS: usize = 4;

/// How often an incomplete swarm is looked up again while waiting for it, on average.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The next pause of a client that waits for a peer: all that wait for the same one should not ask at the same moments.
pub(crate) fn look_again() -> Duration {
    LOOK_AGAIN.mul_f64(rand::rng().random_range(0.5..=1.5))
}

/// Why a client can't do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The request makes no sense for the model.
    #[error("{0}")]
    Request(String),
    /// The swarm does not cover the model.
    #[error(transparent)]
    Incomplete(Box<Incomplete>),
    /// The route that the user wants can't be had.
    #[error(transparent)]
    Route(#[from] BadRoute),
    /// A session could not be opened, or was lost.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The network can't be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// No peer of the swarm can be reached.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// A look-up failed.
    #[error(transparent)]
    Discover(#[from] DiscoverError),
    /// The model's edges can't be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The edges can't compute that.
    #[error(transparent)]
    Edge(#[from] EdgeError),
    /// The tokenizer is missing or broken.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template is broken, or refuses the messages.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The generation settings of the checkpoint are broken.
    #[error(transparent)]
    Defaults(#[from] GenerationError),
    /// A sampling setting is out of range.
    #[error(transparent)]
    Sampling(#[from] InvalidOption),
    /// No token can be chosen.
    #[error(transparent)]
    Sample(#[from] SampleError),
}

impl ClientError {
    /// Whether steps may have been applied by some hops although there is no answer to them: `None` where no step was to be sent.
    pub fn maybe_applied(&self) -> Option<bool> {
        match self {
            Self::Session(SessionError::Unreachable { .. } | SessionError::Edge(_) | SessionError::Misuse(_)) => None,
            Self::Session(error) => Some(error.maybe_applied()),
            _ => None,
        }
    }
}

/// A client of one model's swarm. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    observer: Observer,
    model: Arc<LocalModel>,
    inbox: Arc<Inbox>,
    patience: Patience,
    rules: Arc<PeerRules>,
    route_mode: RouteMode,
    wire_codec: WireCodec,
    backoff: Arc<Mutex<Backoff>>,
    prefixes: Arc<Prefixes>,
}

impl Client {
    /// Starts the network and joins the swarm.
    ///
    /// # Errors
    /// Where the network can't be started, or no initial peer can be reached.
    pub async fn connect(
        model: Arc<LocalModel>,
        config: SwarmConfig,
        patience: Patience,
        join_timeout: Duration,
    ) -> Result<Self, ClientError> {
        let inbox = Arc::new(Inbox::default());
        let swarm = observer::join(config, inbox.clone(), join_timeout).await?;
        let observer = Observer::of(swarm, model.identity().clone(), model.spec().num_blocks());
        Ok(Self {
            observer,
            model,
            inbox,
            patience,
            rules: Arc::default(),
            route_mode: RouteMode::Auto,
            wire_codec: WireCodec::Raw,
            backoff: Arc::default(),
            prefixes: Arc::default(),
        })
    }

    /// Uses only hops that the rules allow.
    #[must_use]
    pub fn with_rules(self, rules: PeerRules) -> Self {
        Self { rules: Arc::new(rules), ..self }
    }

    /// Chooses routes for this, whatever the work is.
    #[must_use]
    pub fn with_route_mode(self, route_mode: RouteMode) -> Self {
        Self { route_mode, ..self }
    }

    /// Packs hidden states like this on the wire, and uses only hops that can.
    #[must_use]
    pub fn with_wire_codec(mut self, codec: WireCodec) -> Self {
        self.observer.require_codec(codec);
        Self { wire_codec: codec, ..self }
    }

    /// The network.
    pub fn swarm(&self) -> &Swarm {
        self.observer.swarm()
    }

    /// The swarm as it is now.
    pub fn observer(&self) -> &Observer {
        &self.observer
    }

    /// The client's part of the model.
    pub fn model(&self) -> &LocalModel {
        &self.model
    }

    /// What was received in all sessions.
    pub fn traffic(&self) -> &Traffic {
        &self.inbox.traffic
    }

    pub(crate) fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    pub(crate) fn prefixes(&self) -> &Prefixes {
        &self.prefixes
    }

    pub(crate) fn patience(&self) -> Patience {
        self.patience
    }

    pub(crate) fn rules(&self) -> &PeerRules {
        &self.rules
    }

    fn backoff(&self) -> MutexGuard<'_, Backoff> {
        // Nothing in the critical sections panics half-way.
        self.backoff.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A peer failed: for a while others are chosen, where there are some.
    pub(crate) fn failed(&self, peer: PeerId) {
        self.observer.forget(peer);
        self.backoff().failed(peer, Instant::now());
    }

    /// A peer did what it was asked.
    pub(crate) fn succeeded(&self, peer: PeerId) {
        self.backoff().succeeded(peer);
    }

    /// Whether another peer should be chosen.
    pub(crate) fn avoids(&self, peer: PeerId, now: Instant) -> bool {
        self.backoff().avoids(peer, now)
    }

    /// The peers that answer. What is known of them is enough, unless they are to be looked up.
    pub(crate) async fn view(&self, look: bool) -> Result<SwarmView, ClientError> {
        if !look && let Some(view) = self.observer.recent() {
            return Ok(view);
        }
        self.look().await
    }

    /// The peers that answer now.
    async fn look(&self) -> Result<SwarmView, ClientError> {
        let mut view = self.observer.look_around().await?;
        self.observer.measure(&mut view, true).await;
        view.leave_out_silent();
        self.observer.fill_in_speeds(&mut view);
        Ok(view)
    }

    /// Opens a session on the best route, or on the next best where a hop can't be reached. A warm client goes by what it knows of
    /// the swarm and waits for nothing: a hop that refuses the session or is gone is replaced as the first step is awaited. Where
    /// what is known fails, or is not enough, the client looks again. An incomplete swarm is looked up until `wait` is over.
    ///
    /// # Errors
    /// [`Incomplete`] where blocks have no peer that answers, or the last attempt's error.
    pub async fn open_session(&self, limits: SessionLimits, wait: Duration) -> Result<(Session, Route), ClientError> {
        self.open_session_for(Work::DECODE, limits, wait).await
    }

    /// As [`Client::open_session`], on the route that is best for this work.
    ///
    /// # Errors
    /// As [`Client::open_session`].
    pub async fn open_session_for(
        &self,
        work: Work,
        limits: SessionLimits,
        wait: Duration,
    ) -> Result<(Session, Route), ClientError> {
        self.open_session_with(work, limits, wait, None).await
    }

    /// As [`Client::open_session_for`], for a session that begins with this prompt: see [`Session::open`].
    ///
    /// # Errors
    /// As [`Client::open_session`].
    pub async fn open_session_with(
        &self,
        work: Work,
        limits: SessionLimits,
        wait: Duration,
        prompt: Option<Prompt<'_>>,
    ) -> Result<(Session, Route), ClientError> {
        let started = Instant::now();
        let room = room_soon(work.prompt, &limits);
        let work = work.seen_as(self.route_mode);
        let mut last_error: Option<ClientError> = None;
        let (mut look, mut attempts) = (false, 0);
        while attempts < ROUTE_ATTEMPTS {
            // What is known may be out of date, so it is no reason to give up.
            let is_last_word = look && started.elapsed() >= wait;
            let known = if look { None } else { self.observer.recent() };
            look = true;
            let view = match known {
                Some(view) => {
                    if work.is_long() {
                        self.observer.measure_bandwidth_meanwhile(&view);
                    }
                    view
                }
                None => match self.look().await {
                    Ok(mut view) => {
                        if work.is_long() {
                            self.observer.measure_bandwidth(&mut view).await;
                        }
                        view
                    }
                    Err(error) if started.elapsed() >= wait => return Err(last_error.unwrap_or(error)),
                    // Whoever could tell may be there in a moment, as those who serve may.
                    Err(error) => {
                        tracing::debug!(%error, "the swarm can't be looked up yet");
                        tokio::time::sleep(look_again()).await;
                        continue;
                    }
                },
            };
            let route = match self.choose_route(&self.chooser(&view, work, room)) {
                Ok(Some(route)) => Route { wire_codec: self.wire_codec, ..route },
                Ok(None) if is_last_word => {
                    return Err(last_error.unwrap_or_else(|| ClientError::Incomplete(Box::new(view.incomplete()))));
                }
                Err(error) if is_last_word => return Err(last_error.unwrap_or(error.into())),
                _ => {
                    if started.elapsed() < wait {
                        tokio::time::sleep(look_again()).await;
                    }
                    continue;
                }
            };
            attempts += 1;
            match Session::open(self, &route, limits, prompt).await {
                Ok(session) => return Ok((session, route)),
                Err(error) => match error.peer_to_avoid() {
                    Some(peer) => {
                        tracing::warn!(%error, "trying another route");
                        self.failed(peer);
                        last_error = Some(error.into());
                    }
                    None => return Err(error.into()),
                },
            }
        }
        Err(last_error.unwrap_or_else(|| ClientError::Request("no route was tried".to_owned())))
    }

    /// The user's route, or the fastest one; peers that failed of late have a part in it only where there is nobody else.
    fn choose_route(&self, chooser: &Chooser<'_>) -> Result<Option<Route>, BadRoute> {
        let blocks = 0..chooser.view.blocks;
        if let Some(hops) = self.rules.given(chooser.view)? {
            return Ok(Some(Route::new(hops)));
        }
        let now = Instant::now();
        let allowed = |peer: PeerId| self.rules.allows(peer);
        let good = chooser.fastest(blocks.clone(), |peer| {
            allowed(peer.announcement.peer_id) && !self.avoids(peer.announcement.peer_id, now)
        });
        let hops = good.or_else(|| chooser.fastest(blocks, |peer| allowed(peer.announcement.peer_id)));
        Ok(hops.map(Route::new))
    }

    /// Chooses among the peers of a view, for a session that needs room for so many tokens soon.
    pub(crate) fn chooser<'a>(&self, view: &'a SwarmView, work: Work, room: u64) -> Chooser<'a> {
        let spec = self.model.spec();
        // Of an f32 session it is half; what matters is how peers compare.
        let row_bytes = self.wire_codec.row_bytes(Dtype::Bf16, spec.hidden_size);
        let (work, legs) = (work.seen_as(self.route_mode), self.observer.known_legs());
        Chooser { view, work, row_bytes, room, legs }
    }

    /// Leaves the swarm.
    pub async fn stop(&self) {
        self.swarm().stop().await;
    }
}
