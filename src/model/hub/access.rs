//! Talking to the hub: who asks, where, and the one question about a model.
//!
//! Files come through the client library. The file list is asked for here, as version 1.0 of the library leaves out the
//! SHA-256 of large files (it reads a field that the hub's answer doesn't have).

use std::{env, fs, path::Path, time::Duration};

use hf_hub::HFClient;
use serde::Deserialize;

use super::{
    HubError, HubOptions,
    error::{self, Refusal},
    listing::{self, Listing},
};

/// How long a connection may take to come up.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// How long the hub may be silent within an answer.
const READ_WITHIN: Duration = Duration::from_secs(30);

/// How often a question is put, where it got no answer or one of a server in trouble.
const ATTEMPTS: u32 = 3;

/// The pause before the second attempt; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// A way to the hub.
pub(super) struct Access {
    pub(super) client: HFClient,
    http: reqwest::Client,
    token: Option<String>,
}

/// The hub's answer about a model.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    sha256: String,
}

impl Access {
    pub(super) fn new(options: &HubOptions) -> Result<Self, HubError> {
        let agent = concat!("helion/", env!("CARGO_PKG_VERSION"));
        let http =
            reqwest::Client::builder().user_agent(agent).connect_timeout(CONNECT_WITHIN).read_timeout(READ_WITHIN);
        let http = http.build().map_err(|error| HubError::Hub { reason: error::with_causes(&error) })?;
        let token = options.token.clone().or_else(stored_token);
        let mut builder = HFClient::builder().user_agent(agent).client(http.clone());
        if let Some(token) = &token {
            builder = builder.token(token.clone());
        }
        if let Some(dir) = &options.cache_dir {
            builder = builder.cache_dir(dir.clone());
        }
        if let Some(endpoint) = &options.endpoint {
            builder = builder.endpoint(endpoint.clone());
        }
        let client = builder.build().map_err(|error| HubError::Hub { reason: error::with_causes(&error) })?;
        Ok(Self { client, http, token })
    }

    pub(super) fn cache_dir(&self) -> &Path {
        self.client.cache_dir()
    }

    /// The commit that a revision is now, and the files of it.
    pub(super) async fn ask(&self, model: &str, revision: &str) -> Result<(String, Listing), HubError> {
        let endpoint = self.client.endpoint();
        let encoded = revision.replace('/', "%2F");
        let url = format!("{endpoint}/api/models/{model}/revision/{encoded}?blobs=true");
        let unreachable = |error: reqwest::Error| HubError::Unreachable {
            endpoint: endpoint.to_owned(),
            reason: error::with_causes(&error),
        };
        let response = self.get(&url).await.map_err(unreachable)?;
        if !response.status().is_success() {
            let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            let refusal = Refusal {
                status: response.status().as_u16(),
                code: header("x-error-code"),
                retry_after_s: header("retry-after").and_then(|seconds| seconds.parse().ok()),
            };
            return Err(error::refused(&refusal, model, Some(revision), endpoint));
        }
        let answer = response.bytes().await.map_err(unreachable)?;
        let strange =
            |reason: String| HubError::Hub { reason: format!("{endpoint} describes {model} strangely: {reason}") };
        let info: Info = serde_json::from_slice(&answer).map_err(|error| strange(error.to_string()))?;
        if !listing::is_commit(&info.sha) {
            return Err(strange(format!("{:?} is no commit", info.sha)));
        }
        let files = info.siblings.into_iter().filter(|file| !file.rfilename.contains('/')).map(|file| {
            let sha256 = file.lfs.map(|large| large.sha256);
            listing::File { name: file.rfilename, size: file.size, sha256 }
        });
        Ok((info.sha, Listing::new(files.collect())))
    }

    async fn get(&self, url: &str) -> Result<reqwest::Response, reqwest::Error> {
        let mut pause = FIRST_PAUSE;
        for _ in 1..ATTEMPTS {
            match self.get_once(url).await {
                Ok(response) if !response.status().is_server_error() => return Ok(response),
                Ok(response) => tracing::debug!(url, status = %response.status(), "asking the hub again"),
                Err(error) => tracing::debug!(url, %error, "asking the hub again"),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        self.get_once(url).await
    }

    async fn get_once(&self, url: &str) -> Result<reqwest::Response, reqwest::Error> {
        let request = self.http.get(url);
        let request = match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        request.send().await
    }
}

/// The token of Hugging Face's own tools, in their order: `HF_TOKEN`, the file `HF_TOKEN_PATH`, and what
/// `hf auth login` stored; none where `HF_HUB_DISABLE_IMPLICIT_TOKEN` is set.
fn stored_token() -> Option<String> {
    let set = |name: &str| env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    if set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some() {
        return None;
    }
    let in_file = |path: &Path| {
        let token = fs::read_to_string(path).ok()?.trim().to_owned();
        (!token.is_empty()).then_some(token)
    };
    set("HF_TOKEN")
        .or_else(|| in_file(Path::new(&set("HF_TOKEN_PATH")?)))
        .or_else(|| in_file(&hf_hub::hf_home().join("token")))
}
