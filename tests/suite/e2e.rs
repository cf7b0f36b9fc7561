//! End-to-end tests: real processes of the `helion` binary on loopback, used as a person would.

mod bad_input;
mod generate;
mod gguf;
mod harness;
mod lost;
mod quantized;
mod strangers;
mod tools;
