//! End-to-end tests: real processes of the `helion` binary on loopback, used as a person would.

mod away;
mod bad_input;
mod bench;
mod blame;
mod churn;
mod evil;
mod faults;
mod generate;
mod gguf;
mod harness;
mod idle;
mod lanes;
mod leaving;
mod long_links;
mod lost;
mod prefixes;
mod quantized;
mod relapse;
mod routes;
mod sessions;
mod strangers;
mod takeover;
mod tools;
