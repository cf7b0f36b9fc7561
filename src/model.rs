//! What a checkpoint says: configuration, families, tensors, tokenizer, chat template, and where its files are.

pub mod chat;
pub mod checkpoint;
pub mod dtype;
pub mod family;
pub mod fingerprint;
pub mod generation;
pub mod gguf;
pub mod hub;
pub mod inspect;
pub mod quant;
pub mod source;
pub mod spec;
pub mod tokenizer;

pub use dtype::{Dtype, KvDtype};
pub use quant::Quant;
