//! The integration tests: one binary, one module a subject, so that they link once.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod e2e;
mod gguf;
mod golden;
mod house;
mod hub;
#[path = "../../benches/wan/link.rs"]
mod link;
mod load;
mod loading;
mod made;
mod packed;
mod swarm;
mod tokenizers;
