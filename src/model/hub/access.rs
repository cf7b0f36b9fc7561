//! Talking to the hub over HTTP: who asks, where, and the one question about a model.
//!
//! `hf-hub` 1.0 is not what does it: it starts every interrupted file anew, leaves the SHA-256 of large files out of its
//! file list (it reads a field that the hub's answer doesn't have), and can't read a part of a file. What is left of it
//! beside these are paths and variables, and for those it would bring 58 crates.
//!
//! **The token goes to the hub alone.** Files of any size are redirected to another host, where the client library drops
//! the `Authorization` header; the addresses there are signed. A redirect from HTTPS to plain HTTP is refused.

use std::time::Duration;

use chrono::Utc;
use reqwest::{Response, StatusCode, Url, header, redirect};
use serde::Deserialize;

use super::{
    HubError,
    error::{self, Refusal},
    listing::{self, Listing},
    retry::{Failure, Retry, wait_of},
    settings::Settings,
};

/// How long a connection may take to come up.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// How long the hub may be silent within an answer.
const READ_WITHIN: Duration = Duration::from_secs(30);

/// Redirects that are followed: the hub needs two, for a model that was renamed and for the host that has the files.
const MAX_REDIRECTS: usize = 5;

/// The largest answer about a model: 20,000 files at 300 bytes each, several times over.
const MAX_INFO_BYTES: usize = 32 << 20;

/// A way to the hub.
pub(super) struct Access {
    endpoint: String,
    token: Option<String>,
    http: reqwest::Client,
}

/// A question.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ask<'a> {
    pub(super) model: &'a str,
    /// Where it may be what is missing.
    pub(super) revision: Option<&'a str>,
    pub(super) url: &'a str,
    /// From this byte on; 0 for all of it.
    pub(super) from: u64,
    /// Up to this byte and not including it, where not all is wanted.
    pub(super) to: Option<u64>,
}

/// The hub's answer about a model.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    blob_id: Option<String>,
    #[serde(default)]
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    sha256: String,
}

impl Access {
    pub(super) fn new(settings: &Settings) -> Result<Self, HubError> {
        let policy = redirect::Policy::custom(|attempt| {
            let was_secure = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
            match attempt.previous().len() {
                hops if hops > MAX_REDIRECTS => attempt.error(format!("more than {MAX_REDIRECTS} redirects")),
                _ if was_secure && attempt.url().scheme() != "https" => {
                    attempt.error("a redirect from HTTPS to an unencrypted address")
                }
                _ => attempt.follow(),
            }
        });
        let http = reqwest::Client::builder()
            .user_agent(concat!("helion/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_WITHIN)
            .read_timeout(READ_WITHIN)
            .redirect(policy)
            .build()
            .map_err(|error| HubError::Hub { reason: error::with_causes(&error) })?;
        let wrong = |reason: String| HubError::Hub {
            reason: format!("{:?} is no address of a hub (HF_ENDPOINT): {reason}", settings.endpoint),
        };
        let url = Url::parse(&settings.endpoint).map_err(|error| wrong(error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(wrong("it starts with https://".to_owned()));
        }
        Ok(Self { endpoint: settings.endpoint.clone(), token: settings.token.clone(), http })
    }

    /// Where a file is.
    pub(super) fn file_url(&self, model: &str, commit: &str, file: &str) -> String {
        format!("{}/{model}/resolve/{commit}/{}", self.endpoint, encoded(file))
    }

    /// The commit that a revision is now, and the files of it.
    pub(super) async fn ask(&self, model: &str, revision: &str) -> Result<(String, Listing), HubError> {
        let url = format!("{}/api/models/{model}/revision/{}?blobs=true", self.endpoint, encoded(revision));
        let ask = Ask { model, revision: Some(revision), url: &url, from: 0, to: None };
        let mut retry = Retry::default();
        let answer = loop {
            let response = self.get(&ask, &mut retry).await?;
            match whole(response).await {
                Ok(answer) => break answer,
                Err(failure) => self.pause(&ask, &failure, &mut retry).await?,
            }
        };
        let strange = |reason: String| HubError::Hub {
            reason: format!("{} describes {model} strangely: {reason}", self.endpoint),
        };
        let info: Info = serde_json::from_slice(&answer).map_err(|error| strange(error.to_string()))?;
        if !listing::is_commit(&info.sha) {
            return Err(strange(format!("{:?} is no commit", info.sha)));
        }
        let files = info.siblings.into_iter().filter(|file| listing::is_plain_name(&file.rfilename)).map(|file| {
            let sha256 = file.lfs.map(|large| large.sha256);
            listing::File { name: file.rfilename, size: file.size, sha256, git_id: file.blob_id }
        });
        Ok((info.sha, Listing::new(files.collect())))
    }

    /// Puts a question, again where that may help. That a range lies behind the file's end is an answer.
    pub(super) async fn get(&self, ask: &Ask<'_>, retry: &mut Retry) -> Result<Response, HubError> {
        loop {
            let failure = match self.once(ask).await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if response.status() == StatusCode::RANGE_NOT_SATISFIABLE => return Ok(response),
                Ok(response) => Failure::Refused(refusal(&response)),
                Err(error) => Failure::Connection(error::with_causes(&error.without_url())),
            };
            self.pause(ask, &failure, retry).await?;
        }
    }

    /// Waits before the next attempt, or says why there is none.
    pub(super) async fn pause(&self, ask: &Ask<'_>, failure: &Failure, retry: &mut Retry) -> Result<(), HubError> {
        match retry.pause_after(failure, rand::random()) {
            Some(pause) => {
                tracing::debug!(url = ask.url, ?failure, ?pause, "asking the hub again");
                tokio::time::sleep(pause).await;
                Ok(())
            }
            None => Err(match failure {
                Failure::Refused(refusal) => error::refused(refusal, ask.model, ask.revision, &self.endpoint),
                Failure::Connection(reason) => {
                    HubError::Unreachable { endpoint: self.endpoint.clone(), reason: reason.clone() }
                }
            }),
        }
    }

    async fn once(&self, ask: &Ask<'_>) -> Result<Response, reqwest::Error> {
        let mut request = self.http.get(ask.url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        match ask.to {
            Some(to) => request = request.header(header::RANGE, format!("bytes={}-{}", ask.from, to.saturating_sub(1))),
            None if ask.from > 0 => request = request.header(header::RANGE, format!("bytes={}-", ask.from)),
            None => {}
        }
        request.send().await
    }
}

/// The first byte that an answer begins with: what was asked for, or 0 where the server doesn't do ranges. `None` where
/// it sends another part than was asked for.
pub(super) fn first_byte(response: &Response, asked: u64) -> Option<u64> {
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return Some(0);
    }
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    let first = range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()?;
    (first == asked).then_some(first)
}

/// A piece of an answer's body; `None` at its end.
pub(super) async fn chunk(response: &mut Response) -> Result<Option<bytes::Bytes>, Failure> {
    response.chunk().await.map_err(|error| Failure::Connection(error::with_causes(&error.without_url())))
}

/// An answer's body, where it isn't absurdly large.
async fn whole(mut response: Response) -> Result<Vec<u8>, Failure> {
    let mut body = Vec::new();
    while let Some(piece) = chunk(&mut response).await? {
        if body.len() + piece.len() > MAX_INFO_BYTES {
            return Err(Failure::Connection(format!("an answer of more than {MAX_INFO_BYTES} bytes")));
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

fn refusal(response: &Response) -> Refusal {
    let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    Refusal {
        status: response.status().as_u16(),
        code: header("x-error-code").map(str::to_owned),
        retry_after: wait_of(header("retry-after"), header("ratelimit"), Utc::now()),
    }
}

/// The text as one part of an address.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::encoded;

    #[test]
    fn names_become_one_part_of_an_address() {
        assert_eq!(encoded("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors");
        assert_eq!(encoded("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(encoded("a b?c#d%é"), "a%20b%3Fc%23d%25%C3%A9");
    }
}
