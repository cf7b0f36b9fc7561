//! Which weight file holds which tensor.
//!
//! A checkpoint says so in one of three ways: it has one file, an index, or numbered shards whose headers have to be
//! read. A single file is fetched whole, also where only some of its blocks are wanted: ranges of it could be fetched, but a
//! file with holes has no hash to check, and other tools would take it for whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde::Deserialize;

use super::{HubError, headers::Header};
use crate::model::checkpoint::shard_number;

/// The file that says which shard a tensor is in.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The weights of a checkpoint in one file.
const SINGLE: &str = "model.safetensors";

/// How a checkpoint says where its tensors are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// By itself.
    Known(WeightMap),
    /// In the headers of these files.
    Headers(BTreeSet<String>),
}

/// Where a checkpoint's tensors are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WeightMap {
    /// All in one file.
    Single,
    /// Tensor name to file name.
    Sharded(BTreeMap<String, String>),
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Layout {
    /// The layout of a checkpoint that consists of the files `names` (`dir` holds its index, where there is one). Where a
    /// single file and an index are both there, the single file counts, as in transformers.
    pub(super) fn read(model: &str, dir: &Path, names: &BTreeSet<String>) -> Result<Self, HubError> {
        if names.contains(SINGLE) {
            return Ok(Self::Known(WeightMap::Single));
        }
        if names.contains(INDEX) {
            return read_index(&dir.join(INDEX)).map(|map| Self::Known(WeightMap::Sharded(map)));
        }
        let numbers: BTreeMap<&String, (u32, u32)> =
            names.iter().filter_map(|name| Some((name, shard_number(name)?))).collect();
        if let Some((first, (_, count))) = numbers.first_key_value() {
            let missing = (1..=*count).find(|number| !numbers.values().any(|found| found == &(*number, *count)));
            return match missing {
                Some(number) => {
                    let file = first.replacen(&format!("{:05}-of", numbers[*first].0), &format!("{number:05}-of"), 1);
                    Err(HubError::MissingFile { dir: dir.to_owned(), file })
                }
                None => Ok(Self::Headers(numbers.into_keys().cloned().collect())),
            };
        }
        let pickled = names.iter().find(|name| name.ends_with(".bin") || name.ends_with(".pth"));
        Err(match pickled {
            Some(file) => HubError::OnlyPickled { model: model.to_owned(), file: file.clone() },
            None => HubError::NoWeights { model: model.to_owned() },
        })
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, HubError> {
    let json = fs::read(path).map_err(|source| HubError::Io { path: path.to_owned(), source })?;
    let wrong = |reason: String| HubError::Index { path: path.to_owned(), reason };
    let index: Index = serde_json::from_slice(&json).map_err(|error| wrong(error.to_string()))?;
    // The names come from the hub and become paths here.
    let plain = |file: &String| file.ends_with(".safetensors") && !file.contains(['/', '\\', ':']);
    if let Some(file) = index.weight_map.values().find(|file| !plain(file)) {
        return Err(wrong(format!("{file:?} is not the name of a safetensors file")));
    }
    if index.weight_map.is_empty() {
        return Err(wrong("its weight_map is empty".to_owned()));
    }
    Ok(index.weight_map)
}

impl WeightMap {
    /// The map of files whose headers were read.
    pub(super) fn of_headers(headers: &BTreeMap<String, Header>) -> Self {
        let tensors = headers.iter().flat_map(|(file, header)| header.keys().map(move |tensor| (tensor, file)));
        Self::Sharded(tensors.map(|(tensor, file)| (tensor.clone(), file.clone())).collect())
    }

    /// The files that hold the tensors that `wanted` says yes to.
    pub(super) fn files_with(&self, wanted: &dyn Fn(&str) -> bool) -> BTreeSet<String> {
        match self {
            Self::Single => BTreeSet::from([SINGLE.to_owned()]),
            Self::Sharded(map) => {
                map.iter().filter(|(tensor, _)| wanted(tensor)).map(|(_, file)| file.clone()).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(names: &[&str], index: &str) -> Result<Layout, HubError> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(INDEX), index).unwrap();
        Layout::read("org/name", dir.path(), &names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn shards_are_chosen_by_their_tensors() {
        let index =
            r#"{"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}"#;
        let Layout::Known(map) = read(&[INDEX], index).unwrap() else { panic!("it has an index") };
        let files = |wanted: &dyn Fn(&str) -> bool| map.files_with(wanted).into_iter().collect::<Vec<_>>();
        assert_eq!(files(&|tensor| tensor == "b"), ["2.safetensors"]);
        assert_eq!(files(&|tensor| tensor != "b"), ["1.safetensors"]);
        assert_eq!(files(&|_| true).len(), 2);
        assert!(files(&|_| false).is_empty());
        assert_eq!(read(&[INDEX, SINGLE], index).unwrap(), Layout::Known(WeightMap::Single));
    }

    #[test]
    fn numbered_shards_need_no_index() {
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let layout = read(&[shards[0], shards[1], "config.json", "other.safetensors"], "").unwrap();
        assert_eq!(layout, Layout::Headers(shards.map(str::to_owned).into()));
        let error = read(&shards[1..], "").unwrap_err();
        assert!(matches!(&error, HubError::MissingFile { file, .. } if file == shards[0]), "{error}");
        let tensor = || super::super::headers::StoredTensor { dtype: "F32".to_owned(), shape: vec![], bytes: 4 };
        let header = |name: &str| Header::from([(name.to_owned(), tensor())]);
        let headers = BTreeMap::from([(shards[0].to_owned(), header("a")), (shards[1].to_owned(), header("b"))]);
        let map = WeightMap::of_headers(&headers);
        assert_eq!(map.files_with(&|tensor| tensor == "b"), [shards[1].to_owned()].into());
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let error = read(&["pytorch_model.bin", "config.json"], "").unwrap_err().to_string();
        assert!(error.contains("pytorch_model.bin") && error.contains("convert"), "{error}");
        assert!(matches!(read(&["config.json"], ""), Err(HubError::NoWeights { .. })));
        for bad in [
            "{",
            r#"{"weight_map": {}}"#,
            r#"{"weight_map": {"a": "../../evil.safetensors"}}"#,
            r#"{"weight_map": {"a": "C:evil.safetensors"}}"#,
            r#"{"weight_map": {"a": "model.bin"}}"#,
        ] {
            assert!(matches!(read(&[INDEX], bad), Err(HubError::Index { .. })), "{bad}");
        }
    }
}
