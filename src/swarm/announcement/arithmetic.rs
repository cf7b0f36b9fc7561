//! Which peers compute alike, so that a block gives the same bits at any of them.
//!
//! Results depend on the dtype, on the kernels, and on what each matrix is kept in. The last follows from the checkpoint, which is
//! the same for all, and from a setting of `--quant`. The name of a format doesn't say it: a checkpoint of mostly q4_k has some
//! matrices in q6_k, and a node that was started with `--quant auto` keeps these, while one with `--quant q4_k` has rounded them
//! again; both are of q4_k. So a node announces the settings under each of which it would have all of its matrices just as it has them:
//! `auto` here, `q4_k` there, and both where the span has nothing but q4_k. Peers that have a setting in common
//! compute what that setting makes of the model, wherever it is cut between them.

use std::collections::BTreeSet;

use super::Announcement;
use crate::model::Dtype;

/// How peers compute: what all of them have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arithmetic {
    dtype: Dtype,
    kernel_path: String,
    settings: BTreeSet<String>,
}

impl Arithmetic {
    /// How a peer computes, by what it says.
    ///
    /// One of an older version doesn't name settings. Without packed matrices there is nothing to tell apart; with them, it computes
    /// like itself and, for all that is known, like nobody else.
    pub fn of(said: &Announcement) -> Self {
        let mut settings: BTreeSet<String> = said.quant_settings.iter().cloned().collect();
        if settings.is_empty() {
            settings.insert(if said.quant == "none" { said.quant.clone() } else { said.peer_id.to_base58() });
        }
        Self { dtype: said.dtype, kernel_path: said.kernel_path.clone(), settings }
    }

    /// How both compute; `None` where they may differ.
    pub fn with(mut self, other: &Self) -> Option<Self> {
        self.settings.retain(|setting| other.settings.contains(setting));
        let is_alike = (self.dtype, &self.kernel_path) == (other.dtype, &other.kernel_path);
        (is_alike && !self.settings.is_empty()).then_some(self)
    }

    /// All that it says, as words: the dtype, the kernels, and the settings.
    pub fn words(&self) -> impl Iterator<Item = String> {
        let first = [self.dtype.to_string(), self.kernel_path.clone(), self.settings.len().to_string()];
        first.into_iter().chain(self.settings.iter().cloned())
    }
}

/// Whether all of these compute in the same way.
pub fn compute_alike<'a>(all: impl IntoIterator<Item = &'a Announcement>) -> bool {
    let mut all = all.into_iter().map(Arithmetic::of);
    let Some(first) = all.next() else { return true };
    all.try_fold(first, |common, next| common.with(&next)).is_some()
}

#[cfg(test)]
mod tests {
    use libp2p::PeerId;

    use super::*;

    /// A peer whose matrices are of `quant`, and would be under each of these settings.
    fn peer(quant: &str, settings: &[&str]) -> Announcement {
        let quant_settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        Announcement { quant: quant.to_owned(), quant_settings, ..Announcement::blank(PeerId::random()) }
    }

    #[test]
    fn the_same_format_is_not_the_same_arithmetic() {
        // A checkpoint of q4_k and some q6_k: as it is, and with the q6_k rounded again.
        let (kept, rounded) = (peer("q4_k", &["auto"]), peer("q4_k", &["q4_k"]));
        assert!(!kept.computes_like(&rounded) && !rounded.computes_like(&kept));
        assert!(kept.computes_like(&peer("q4_k", &["auto"])));
        // A span of the same checkpoint that has nothing but q4_k goes with either, but not with both.
        let pure = peer("q4_k", &["auto", "q4_k"]);
        assert!(pure.computes_like(&kept) && rounded.computes_like(&pure));
        assert!(compute_alike([&kept, &pure, &kept]));
        assert!(!compute_alike([&kept, &pure, &rounded]) && !compute_alike([&pure, &kept, &rounded]));
    }

    #[test]
    fn dtype_and_kernels_count_too() {
        let one = peer("none", &["auto", "none"]);
        let narrow = Announcement { dtype: Dtype::Bf16, ..one.clone() };
        let elsewhere = Announcement { kernel_path: "cuda-sm90".to_owned(), ..one.clone() };
        assert!(!one.computes_like(&narrow) && !one.computes_like(&elsewhere));
        assert!(compute_alike([]) && compute_alike([&one]));
    }

    #[test]
    fn who_names_no_settings_is_alike_where_nothing_is_packed() {
        let (old, packed) = (peer("none", &[]), peer("q4_k", &[]));
        assert!(old.computes_like(&peer("none", &[])) && old.computes_like(&peer("none", &["auto", "none"])));
        assert!(!packed.computes_like(&peer("q4_k", &["auto"])) && !packed.computes_like(&peer("q4_k", &[])));
        assert!(packed.computes_like(&packed));
    }
}
