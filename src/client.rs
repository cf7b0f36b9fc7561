//! Using a swarm: routes, sessions, generation, sampling.
//!
//! A [`Client`] holds a model's edges ([`local_model`]) and a place in the DHT. It looks the swarm up ([`view`]), chooses a
//! [`route`], opens a [`session`] on its hops and generates ([`generation`]): tokens are embedded here, run through the
//! blocks of the hops, and come back as hidden states that the head turns into logits and [`sampling`] into the next token.

pub mod generation;
mod inbox;
pub mod local_model;
pub mod models;
pub mod observer;
pub mod route;
pub mod sampling;
pub mod session;
pub mod stop;
pub mod view;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use libp2p::PeerId;

pub use self::inbox::Traffic;
use self::{
    inbox::Inbox,
    local_model::LocalModel,
    observer::Observer,
    route::Candidate,
    sampling::{InvalidOption, SampleError},
    session::{Patience, Route, RouteHop, Session, SessionError},
    view::{Incomplete, SwarmView},
};
use crate::{
    engine::{EdgeError, LoadError},
    model::{chat::ChatError, generation::GenerationError, tokenizer::TokenizerError},
    swarm::{
        DiscoverError, JoinError, StartError, Swarm, SwarmConfig, announcement::Announcement, ticket::SessionLimits,
    },
};

/// How many other routes are tried where a hop can't be reached or has no room.
const ROUTE_ATTEMPTS: usize = 4;

/// How often an incomplete swarm is looked up again while waiting for it.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A block's time where a peer doesn't know its speed, seconds.
const UNKNOWN_BLOCK_SECONDS: f64 = 1e-3;

/// A one-way delay that was not measured, seconds.
const UNKNOWN_LINK_SECONDS: f64 = 1.0;

/// What passing a frame costs a hop besides the link's delay, seconds.
const HOP_SECONDS: f64 = 3e-4;

/// Why a client can't do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The request makes no sense for the model.
    #[error("{0}")]
    Request(String),
    /// The swarm does not cover the model.
    #[error(transparent)]
    Incomplete(Box<Incomplete>),
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

/// A client of one model's swarm. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    observer: Observer,
    model: Arc<LocalModel>,
    inbox: Arc<Inbox>,
    patience: Patience,
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
        Ok(Self { observer, model, inbox, patience })
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

    pub(crate) fn patience(&self) -> Patience {
        self.patience
    }

    /// Opens a session on the best route, or on the next best where a hop can't be reached or has no room. An incomplete
    /// swarm is looked up again until `wait` is over.
    ///
    /// # Errors
    /// [`Incomplete`] where blocks have no peer that answers, or the last attempt's error.
    pub async fn open_session(&self, limits: SessionLimits, wait: Duration) -> Result<(Session, Route), ClientError> {
        let started = Instant::now();
        let mut avoid: HashSet<PeerId> = HashSet::new();
        let mut last_error = None;
        for _ in 0..ROUTE_ATTEMPTS {
            let route = loop {
                let mut view = self.observer.look_up().await?;
                view.peers.retain(|peer| !avoid.contains(&peer.announcement.peer_id));
                self.observer.measure(&mut view, true).await;
                view.leave_out_silent();
                match choose_route(&view) {
                    Some(route) => break route,
                    None if started.elapsed() < wait => tokio::time::sleep(LOOK_AGAIN).await,
                    None => {
                        return Err(last_error.unwrap_or_else(|| ClientError::Incomplete(Box::new(view.incomplete()))));
                    }
                }
            };
            match Session::open(self, &route, limits).await {
                Ok(session) => return Ok((session, route)),
                Err(error) => match error.peer_to_avoid() {
                    Some(peer) => {
                        tracing::warn!(%error, "trying another route");
                        self.observer.forget(peer);
                        avoid.insert(peer);
                        last_error = Some(error.into());
                    }
                    None => return Err(error.into()),
                },
            }
        }
        Err(last_error.unwrap_or_else(|| ClientError::Request("no route was tried".to_owned())))
    }

    /// Leaves the swarm.
    pub async fn stop(&self) {
        self.swarm().stop().await;
    }
}

/// The fastest route through the online peers of a view.
fn choose_route(view: &SwarmView) -> Option<Route> {
    let candidates: Vec<Candidate> = view
        .online()
        .map(|peer| {
            let said = &peer.announcement;
            let speed = said.compute_tokens_per_second * said.span.len() as f64;
            Candidate {
                peer: said.peer_id,
                span: said.span.clone(),
                link_seconds: peer.rtt.map_or(UNKNOWN_LINK_SECONDS, |rtt| rtt.as_secs_f64() / 2.0) + HOP_SECONDS,
                block_seconds: if speed > 0.0 { 1.0 / speed } else { UNKNOWN_BLOCK_SECONDS },
            }
        })
        .collect();
    let announced: HashMap<PeerId, &Announcement> =
        view.online().map(|peer| (peer.announcement.peer_id, &peer.announcement)).collect();
    let hops = route::choose(view.blocks, &candidates)?
        .into_iter()
        .map(|hop| Some(RouteHop { announcement: (*announced.get(&hop.peer)?).clone(), blocks: hop.blocks }))
        .collect::<Option<Vec<_>>>()?;
    Some(Route::new(hops))
}
