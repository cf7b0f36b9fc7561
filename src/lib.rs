//! Helion: many machines run one language model together.

pub mod client;
pub mod config;
pub mod engine;
pub mod model;
pub mod node;
pub mod swarm;
