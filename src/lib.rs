//! Helion: many machines run one language model together.
//!
//! # Concepts
//!
//! A transformer is a stack of *blocks* between two *edges*: the token embedding in front, the final norm and the output
//! head behind. A **node** hosts a *span* of blocks, `start..end`, and announces it in a Kademlia DHT under the model's
//! *prefix*; all peers under one prefix are a *swarm*. A **client** holds the edges. It looks the swarm up, chooses a
//! *route* of *hops* that together cover all blocks, and opens a *session* on it: one KV cache, spread over the hops.
//!
//! ```text
//!            embed                                                head, sample
//! client ────────────▶ hop 1 ────────▶ hop 2 ────────▶ hop 3 ────────────▶ client
//!    token id         blocks 0:3      blocks 3:6      blocks 6:8          next token
//! ```
//!
//! Text is generated in *steps*. A *prefill* step carries a chunk of the prompt, a *decode* step one token; each is a
//! matrix of *hidden states* that every hop runs through its blocks and pushes straight to the next one. The client hears
//! only the last hop, and only what it asked for: as a rule, the last position.
//!
//! # The house
//!
//! Each floor uses only those below it. A reader who follows one token walks the tree once, downwards and back.
//!
//! | module | what it is about |
//! |---|---|
//! | [`cli`] | reads arguments, prints |
//! | [`config`] | settings: defaults, file, environment, flags |
//! | [`client`] | using a swarm: routes, sessions, generation, sampling |
//! | [`node`] | serving a swarm: placement, sessions |
//! | [`swarm`] | peers: identity, transports, the DHT, announcements, frames, RPC |
//! | [`engine`] | running blocks: attention, KV pages, the step batcher, edges |
//! | [`model`] | what a checkpoint says: configuration, families, tensors, tokenizer, chat template, files |
//!
//! # A first example
//!
//! What the `helion client generate` command does, in short:
//!
//! ```no_run
//! use std::{sync::Arc, time::Duration};
//!
//! use helion::{
//!     client::{
//!         Client,
//!         generation::GenerationOptions,
//!         local_model::{EdgesChoice, LocalModel, ModelIdentity},
//!         session::Patience,
//!     },
//!     engine::DeviceChoice,
//!     model::{Quant, hub::HubOptions, source::ModelSource},
//!     swarm::{Role, SwarmConfig, identity::Identity},
//! };
//!
//! # async fn example() -> anyhow::Result<()> {
//! let source = ModelSource::open("path/to/model", HubOptions::default()).await?;
//! let identity = ModelIdentity::of(&source).await?;
//! let checkpoint = source.fetch_edges().await?;
//! let choice = EdgesChoice { dtype: None, quant: Quant::Auto, device: DeviceChoice::Auto, threads: None };
//! let model = Arc::new(LocalModel::load(&checkpoint, identity, choice)?);
//!
//! let network = SwarmConfig {
//!     initial_peers: vec!["/ip4/192.0.2.1/tcp/31337/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp".parse()?],
//!     ..SwarmConfig::new(Identity::ephemeral(), Role::Client)
//! };
//! let client = Client::connect(model, network, Patience::default(), Duration::from_secs(20)).await?;
//! let prompt = client.model().tokenizer().encode("Once upon a time", true)?;
//! let generation = client.generate(&prompt, &GenerationOptions::default(), &mut |_| {}).await?;
//! println!("{}", generation.text);
//! # Ok(())
//! # }
//! ```

pub mod cli;
pub mod client;
pub mod config;
pub mod engine;
pub mod model;
pub mod node;
pub mod swarm;
