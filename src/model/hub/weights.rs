//! Which weight file holds which tensor.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde::Deserialize;

use super::HubError;

/// The file that says which shard a tensor is in.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The weights of a checkpoint in one file.
const SINGLE: &str = "model.safetensors";

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

impl WeightMap {
    /// The map of a checkpoint that consists of the files `names` (`dir` holds its index, where there is one). Where a
    /// single file and an index are both there, the single file counts, as in transformers.
    pub(super) fn read(model: &str, dir: &Path, names: &BTreeSet<String>) -> Result<Self, HubError> {
        if names.contains(SINGLE) {
            return Ok(Self::Single);
        }
        if !names.contains(INDEX) {
            let pickled = names.iter().find(|name| name.ends_with(".bin") || name.ends_with(".pth"));
            return Err(match pickled {
                Some(file) => HubError::OnlyPickled { model: model.to_owned(), file: file.clone() },
                None => HubError::NoWeights { model: model.to_owned() },
            });
        }
        let path = dir.join(INDEX);
        let json = fs::read(&path).map_err(|source| HubError::Io { path: path.clone(), source })?;
        let wrong = |reason: String| HubError::Index { path: path.clone(), reason };
        let index: Index = serde_json::from_slice(&json).map_err(|error| wrong(error.to_string()))?;
        // The names come from the hub and become paths here.
        let plain = |file: &String| file.ends_with(".safetensors") && !file.contains(['/', '\\', ':']);
        if let Some(file) = index.weight_map.values().find(|file| !plain(file)) {
            return Err(wrong(format!("{file:?} is not the name of a safetensors file")));
        }
        if index.weight_map.is_empty() {
            return Err(wrong("its weight_map is empty".to_owned()));
        }
        Ok(Self::Sharded(index.weight_map))
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

    fn read(names: &[&str], index: &str) -> Result<WeightMap, HubError> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(INDEX), index).unwrap();
        WeightMap::read("org/name", dir.path(), &names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn shards_are_chosen_by_their_tensors() {
        let index =
            r#"{"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}"#;
        let map = read(&[INDEX], index).unwrap();
        let files = |wanted: &dyn Fn(&str) -> bool| map.files_with(wanted).into_iter().collect::<Vec<_>>();
        assert_eq!(files(&|tensor| tensor == "b"), ["2.safetensors"]);
        assert_eq!(files(&|tensor| tensor != "b"), ["1.safetensors"]);
        assert_eq!(files(&|_| true).len(), 2);
        assert!(files(&|_| false).is_empty());
        assert_eq!(read(&[INDEX, SINGLE], index).unwrap(), WeightMap::Single);
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
