//! Which models the swarms of a DHT serve: for somebody who has no model in mind yet.

use std::time::Duration;

use serde::Serialize;

use super::{
    ClientError,
    inbox::Inbox,
    local_model::ModelIdentity,
    observer::join,
    view::{SwarmView, spans},
};
use crate::{
    model::fingerprint::Fingerprint,
    swarm::{Swarm, SwarmConfig},
};

/// A model that is served, as `client models --json` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct ServedModel {
    /// Its hub id or name, as its nodes call it.
    pub model: String,
    /// The prefix that its peers meet under.
    pub dht_prefix: String,
    /// Which weights and arithmetic.
    pub fingerprint: String,
    /// The hub's revision; empty where there is none.
    pub revision: String,
    /// How many blocks it has.
    pub blocks: usize,
    /// How many of its peers are online.
    pub peers: usize,
    /// Whether every block has an online peer.
    pub complete: bool,
    /// Runs of blocks without one, half-open.
    pub missing: Vec<[usize; 2]>,
}

/// Starts the network, and joins the DHT to ask for [`served`] models.
///
/// # Errors
/// Where the network can't be started, or no initial peer can be reached.
pub async fn connect(config: SwarmConfig, join_timeout: Duration) -> Result<Swarm, ClientError> {
    join(config, std::sync::Arc::new(Inbox::default()), join_timeout).await
}

/// The models that are listed in the DHT, by name, each with what is there of it now.
///
/// # Errors
/// Where a look-up fails.
pub async fn served(swarm: &Swarm) -> Result<Vec<ServedModel>, ClientError> {
    let mut models = Vec::new();
    for listing in swarm.models().await? {
        let identity = ModelIdentity {
            name: listing.model,
            argument: String::new(),
            dht_prefix: listing.dht_prefix,
            fingerprint: Fingerprint(listing.fingerprint),
            quants: Vec::new(),
        };
        let discovery = swarm.discover(&identity.dht_prefix, listing.model_blocks).await?;
        let mut view = SwarmView::new(identity, listing.model_blocks);
        view.add(discovery.announcements);
        let missing = spans(&view.missing());
        models.push(ServedModel {
            model: view.identity.name.clone(),
            dht_prefix: view.identity.dht_prefix.clone(),
            fingerprint: view.identity.fingerprint.to_string(),
            revision: listing.revision,
            blocks: view.blocks,
            peers: view.online().count(),
            complete: missing.is_empty(),
            missing,
        });
    }
    models.sort_by(|a, b| (&a.model, &a.fingerprint).cmp(&(&b.model, &b.fingerprint)));
    Ok(models)
}
