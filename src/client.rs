//! Using a swarm: routes, sessions, generation, sampling.

pub mod sampling;
