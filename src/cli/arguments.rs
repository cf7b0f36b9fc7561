//! Arguments that several subcommands share, and how they become settings.

use std::{ops::Range, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, ValueEnum, builder::RangedU64ValueParser};
use libp2p::Multiaddr;

use crate::{
    config,
    engine::{DeviceChoice, MAX_THREADS},
    model::{Dtype, KvDtype, Quant, hub::HubOptions},
    swarm::{Role, SwarmConfig, identity::Identity},
};

/// The longest time that an argument may set: a day, seconds.
const LONGEST_SECONDS: u64 = 24 * 60 * 60;

/// The arguments are well formed and yet make no sense together: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Usage(pub(super) String);

/// Which model, and where its files are.
#[derive(Debug, Clone, Args)]
pub(super) struct ModelArgs {
    /// The model: a hub id (org/name), a directory with config.json, tokenizer.json and *.safetensors, or a GGUF file.
    #[arg(long, value_name = "HUB_ID|DIR|GGUF")]
    pub(super) model: String,
    #[command(flatten)]
    pub(super) hub: HubArgs,
}

/// How the hub is used.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct HubArgs {
    /// A branch, tag or commit of the hub's repository [default: main].
    #[arg(long)]
    pub(super) revision: Option<String>,
    /// An access token of the hub, for gated models [default: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, or the stored login].
    #[arg(long, hide_env_values = true)]
    pub(super) token: Option<String>,
    /// Where files of the hub are kept [default: HF_HUB_CACHE, or HF_HOME/hub].
    #[arg(long, value_name = "DIR")]
    pub(super) cache_dir: Option<PathBuf>,
    /// Use what was downloaded before and never the hub. (Also HF_HUB_OFFLINE.)
    #[arg(long)]
    pub(super) offline: bool,
    /// What downloaded weights may take on the disk, as 200GB or 50GiB; where more is needed, the least recently used that
    /// nobody uses are removed [default: what the disk has, less what the system needs].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) max_disk_space: Option<u64>,
}

impl HubArgs {
    pub(super) fn options(&self) -> HubOptions {
        HubOptions {
            revision: self.revision.clone(),
            token: self.token.clone(),
            cache_dir: self.cache_dir.clone(),
            offline: self.offline,
            max_disk_space_bytes: self.max_disk_space,
            progress: Some(super::progress::of_files()),
            hash_cache: Some(config::home().join("hashes")),
            ..HubOptions::default()
        }
    }
}

/// How a client finds the swarm of a model.
#[derive(Debug, Clone, Args)]
pub(super) struct SwarmArgs {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    pub(super) peers: PeerArgs,
    /// The name that the model's peers meet under [default: from the model's name].
    #[arg(long, value_name = "PREFIX")]
    pub(super) dht_prefix: Option<String>,
    /// Use only peers whose weights are in one of these formats, as they announce it: none (not quantized), q8_0, … [default:
    /// any].
    #[arg(long, value_name = "FORMAT,…", value_delimiter = ',')]
    pub(super) require_quant: Vec<String>,
    /// How long to look for the first peer, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = seconds(1))]
    pub(super) join_timeout: u64,
    /// What the client's part (embedding and head) is kept in: auto is as stored.
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto)]
    pub(super) dtype: DtypeArg,
    /// How embedding and head are quantized: auto (as stored), none, q8_0, q4_0, q4_k or q6_k.
    #[arg(long, env = "HELION_HEAD_QUANT", value_name = "QUANT", default_value_t = Quant::Auto)]
    pub(super) head_quant: Quant,
    /// Threads that the client's part computes on [default: one a core].
    #[arg(long, value_name = "N", value_parser = threads())]
    pub(super) threads: Option<usize>,
    /// A key file to be the same client in every run, made if it is not there: hops then compute what prompts begin with once for
    /// all runs [default: a new identity for each run].
    #[arg(long, value_name = "FILE")]
    pub(super) identity_path: Option<PathBuf>,
}

/// Where the first peers come from.
#[derive(Debug, Clone, Args)]
pub(super) struct PeerArgs {
    /// Peers to start from: multiaddrs that end in /p2p/<peer id>, separated by commas.
    #[arg(long, env = "INITIAL_PEERS", value_name = "MADDR,…", value_delimiter = ',')]
    pub(super) initial_peers: Vec<Multiaddr>,
    /// Don't look for peers on the local network.
    #[arg(long)]
    pub(super) no_mdns: bool,
    /// Neither use nor keep the addresses of peers that were met.
    #[arg(long)]
    pub(super) no_remember: bool,
}

impl PeerArgs {
    /// Where the addresses of peers are kept for the next start.
    pub(super) fn remember(&self) -> Option<PathBuf> {
        (!self.no_remember).then(|| config::home().join("peers"))
    }
}

/// Number formats, and `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum DtypeArg {
    /// As the checkpoint is stored.
    Auto,
    /// Single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// Half precision.
    F16,
}

impl DtypeArg {
    pub(super) fn dtype(self) -> Option<Dtype> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(Dtype::F32),
            Self::Bf16 => Some(Dtype::Bf16),
            Self::F16 => Some(Dtype::F16),
        }
    }
}

/// Formats of a KV cache, and `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum KvDtypeArg {
    /// What the blocks compute in.
    Auto,
    /// Single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// Half precision.
    F16,
    /// Codes of 8 bits.
    Q8,
}

impl KvDtypeArg {
    pub(super) fn dtype(self) -> Option<KvDtype> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(KvDtype::F32),
            Self::Bf16 => Some(KvDtype::Bf16),
            Self::F16 => Some(KvDtype::F16),
            Self::Q8 => Some(KvDtype::Q8),
        }
    }
}

/// `auto`, `cpu` or `cuda:N`.
pub(super) fn device(text: &str) -> Result<DeviceChoice, String> {
    match text {
        "auto" => Ok(DeviceChoice::Auto),
        "cpu" => Ok(DeviceChoice::Cpu),
        "cuda" => Ok(DeviceChoice::Cuda(0)),
        _ => text
            .strip_prefix("cuda:")
            .and_then(|number| number.parse().ok())
            .map(DeviceChoice::Cuda)
            .ok_or_else(|| "the choices are auto, cpu and cuda:N".to_owned()),
    }
}

/// A whole number of seconds, `least` to a day.
pub(super) fn seconds(least: u64) -> RangedU64ValueParser<u64> {
    RangedU64ValueParser::new().range(least..=LONGEST_SECONDS)
}

/// A number of something, at least one.
pub(super) fn count() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// A number of threads.
pub(super) fn threads() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=MAX_THREADS as u64)
}

/// A number of bytes: `1500000`, `200GB` (powers of 1000), `50GiB` (powers of 1024). A fraction is fine where there is a unit.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let wrong = || "a size is a number with a unit: 500MB, 1.5TB, 50GiB".to_owned();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim().to_ascii_lowercase());
    if matches!(unit.as_str(), "" | "b") {
        return number.parse().map_err(|_| wrong());
    }
    let place = ["k", "m", "g", "t"].into_iter().position(|prefix| unit.starts_with(prefix)).ok_or_else(wrong)?;
    let base: f64 = match &unit[1..] {
        "" | "b" => 1_000.0,
        "i" | "ib" => 1_024.0,
        _ => return Err(wrong()),
    };
    let bytes = number.parse::<f64>().map_err(|_| wrong())? * base.powi(place as i32 + 1);
    // So many are exact in an f64, and no disk is larger.
    if bytes < 2f64.powi(53) { Ok(bytes as u64) } else { Err(wrong()) }
}

/// A half-open range of blocks, `START:END`.
pub(super) fn block_range(text: &str) -> Result<Range<usize>, String> {
    let wrong = || "a range is START:END, half-open: 0:4 is blocks 0, 1, 2 and 3".to_owned();
    let (start, end) = text.split_once(':').ok_or_else(wrong)?;
    let start = usize::from_str(start).map_err(|_| wrong())?;
    let end = usize::from_str(end).map_err(|_| wrong())?;
    if start >= end {
        return Err(format!("{start}:{end} holds no block; {}", wrong()));
    }
    Ok(start..end)
}

/// The configuration of a client's network: an identity for this one run, no listening.
pub(super) fn client_network(peers: &PeerArgs) -> anyhow::Result<SwarmConfig> {
    Ok(SwarmConfig {
        initial_peers: peers.initial_peers.clone(),
        remember: peers.remember(),
        mdns: !peers.no_mdns && peers.initial_peers.is_empty(),
        ..SwarmConfig::new(Identity::ephemeral(), Role::Client)
    })
}

impl SwarmArgs {
    /// The configuration of the client's network: an identity for this one run, or the one that is asked for.
    pub(super) fn network(&self) -> anyhow::Result<SwarmConfig> {
        let network = client_network(&self.peers)?;
        Ok(match &self.identity_path {
            Some(path) => SwarmConfig { identity: Identity::load_or_create(path)?, ..network },
            None => network,
        })
    }

    pub(super) fn join_timeout(&self) -> Duration {
        Duration::from_secs(self.join_timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_ranges() {
        assert_eq!(block_range("0:4"), Ok(0..4));
        for wrong in ["4", "4:4", "5:2", ":3", "a:b", "-1:3", "0:4:8"] {
            assert!(block_range(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("1500", 1_500),
            ("7b", 7),
            ("200GB", 200_000_000_000),
            ("200 gb", 200_000_000_000),
            ("50GiB", 50 << 30),
            ("1.5TiB", 3 << 39),
            ("2k", 2_000),
            ("2Ki", 2_048),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "GB", "1.5", "-1GB", "1XB", "1GiBs", "1..2GB", "9999999TB", "1 é", "ß"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn devices() {
        assert_eq!(device("cuda:1"), Ok(DeviceChoice::Cuda(1)));
        assert!(device("gpu").is_err());
        assert!(device("cuda:x").is_err());
    }
}
