//! The integration tests: one binary, one module a subject, so that they link once.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod e2e;
mod gguf;
mod golden;
mod house;
mod hub;
mod load;
mod loading;
mod made;
mod packed;
mod proxy;
mod swarm;
mod tokenizers;
