//! What the environment says about the hub, read as Hugging Face's own tools read it, so that one login and one cache
//! serve them all.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use super::HubOptions;

/// The hub that is meant where no other is named.
const ENDPOINT: &str = "https://huggingface.co";

/// The hub, the cache and the token in use.
pub(super) struct Settings {
    /// Without a slash at its end.
    pub(super) endpoint: String,
    pub(super) cache_dir: PathBuf,
    pub(super) token: Option<String>,
    pub(super) offline: bool,
}

impl Settings {
    /// What `options` say, completed from the environment.
    pub(super) fn of(options: &HubOptions) -> Self {
        Self::from(options, &|name| env::var(name).ok(), env::home_dir())
    }

    fn from(options: &HubOptions, variable: &dyn Fn(&str) -> Option<String>, user: Option<PathBuf>) -> Self {
        let set = |names: &[&str]| {
            let values = names.iter().filter_map(|name| variable(name));
            values.map(|value| value.trim().to_owned()).find(|value| !value.is_empty())
        };
        let path = |names: &[&str]| set(names).map(|value| at_home(&value, user.as_deref()));
        let home = path(&["HF_HOME"]).unwrap_or_else(|| {
            let cache = path(&["XDG_CACHE_HOME"]);
            cache.or_else(|| Some(user.clone()?.join(".cache"))).unwrap_or_else(env::temp_dir).join("huggingface")
        });
        let implicit = || {
            if set(&["HF_HUB_DISABLE_IMPLICIT_TOKEN"]).is_some_and(|value| is_true(&value)) {
                return None;
            }
            // The stored login is a file; `hf auth login` writes it.
            let stored = || path(&["HF_TOKEN_PATH"]).unwrap_or_else(|| home.join("token"));
            set(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"]).or_else(|| token_in(&stored()))
        };
        let given = options.token.as_ref().map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let endpoint = options.endpoint.clone().or_else(|| set(&["HF_ENDPOINT"]));
        let cache_dir = options.cache_dir.clone().or_else(|| path(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]));
        let offline = set(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]).is_some_and(|value| is_true(&value));
        Self {
            endpoint: endpoint.unwrap_or_else(|| ENDPOINT.to_owned()).trim_end_matches('/').to_owned(),
            token: given.or_else(implicit),
            cache_dir: cache_dir.unwrap_or_else(|| home.join("hub")),
            offline: options.offline || offline,
        }
    }
}

/// Hugging Face's reading of a switch in the environment.
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str())
}

/// The path, with the user's home for a `~` in front.
fn at_home(path: &str, user: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~/"), user) {
        (Some(rest), Some(user)) => user.join(rest),
        _ => PathBuf::from(path),
    }
}

fn token_in(path: &Path) -> Option<String> {
    let token = fs::read_to_string(path).ok()?.trim().to_owned();
    (!token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(options: &HubOptions, variables: &[(&str, &str)]) -> Settings {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Settings::from(options, &variable, Some(PathBuf::from("/home/ada")))
    }

    #[test]
    fn the_cache_is_where_hugging_face_has_it() {
        let cache = |variables: &[(&str, &str)]| settings(&HubOptions::default(), variables).cache_dir;
        assert_eq!(cache(&[]), Path::new("/home/ada/.cache/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("HF_HOME", "~/hf"), ("XDG_CACHE_HOME", "/x")]), Path::new("/home/ada/hf/hub"));
        assert_eq!(cache(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")]), Path::new("/c"));
        assert_eq!(cache(&[("HF_HUB_CACHE", " "), ("HUGGINGFACE_HUB_CACHE", "/d")]), Path::new("/d"));
        let options = HubOptions { cache_dir: Some(PathBuf::from("/flag")), ..HubOptions::default() };
        assert_eq!(settings(&options, &[("HF_HUB_CACHE", "/c")]).cache_dir, Path::new("/flag"));
    }

    #[test]
    fn tokens_are_found_in_the_order_of_hugging_faces_tools() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        let (stored, other) = (dir.path().join("token"), dir.path().join("other"));
        fs::write(&stored, "hf_stored\n").unwrap();
        fs::write(&other, " hf_other ").unwrap();
        let token = |variables: &[(&str, &str)]| {
            let all = [&[("HF_HOME", home)], variables].concat();
            settings(&HubOptions::default(), &all).token
        };
        assert_eq!(token(&[]).as_deref(), Some("hf_stored"));
        assert_eq!(token(&[("HF_TOKEN_PATH", other.to_str().unwrap())]).as_deref(), Some("hf_other"));
        assert_eq!(token(&[("HF_TOKEN", "hf_a"), ("HUGGING_FACE_HUB_TOKEN", "hf_b")]).as_deref(), Some("hf_a"));
        assert_eq!(token(&[("HUGGING_FACE_HUB_TOKEN", "hf_b")]).as_deref(), Some("hf_b"));
        assert_eq!(token(&[("HUGGINGFACE_HUB_TOKEN", "hf_c"), ("HF_TOKEN", "")]).as_deref(), Some("hf_c"));
        let disabled = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
        assert_eq!(token(&[disabled, ("HF_TOKEN", "hf_a")]), None);
        let options = HubOptions { token: Some("hf_flag".to_owned()), ..HubOptions::default() };
        assert_eq!(settings(&options, &[disabled]).token.as_deref(), Some("hf_flag"));
    }

    #[test]
    fn switches_and_addresses() {
        assert!(["1", "ON", "yes", "True"].into_iter().all(is_true));
        assert!(!["0", "", "no", "false", "2"].into_iter().any(is_true));
        let offline = |variables: &[(&str, &str)]| settings(&HubOptions::default(), variables).offline;
        assert!(offline(&[("HF_HUB_OFFLINE", "1")]) && offline(&[("TRANSFORMERS_OFFLINE", "yes")]) && !offline(&[]));
        let endpoint = |variables: &[(&str, &str)]| settings(&HubOptions::default(), variables).endpoint;
        assert_eq!(endpoint(&[]), "https://huggingface.co");
        assert_eq!(endpoint(&[("HF_ENDPOINT", "https://mirror.example/hf/")]), "https://mirror.example/hf");
    }
}
