//! Which files a GGUF model is made of, and what it is called.
//!
//! A large model is split into parts, `name-00001-of-00003.gguf` and so on. Any of them stands for all, and so does a
//! folder that holds one model and nothing else to load.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use super::GgufError;

const EXTENSION: &str = "gguf";
/// What the names of the files begin with that hold an image encoder for a model beside them.
const PROJECTOR: &str = "mmproj";
/// Weights that a folder is used for before its GGUF files are looked at.
const SAFETENSORS: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];
/// Far above any split; keeps a name from asking for a million files.
const MAX_PARTS: usize = 4096;

/// The GGUF file that `path` names: itself, or the one model in a folder that has no safetensors. `None` where it names
/// something else.
///
/// # Errors
/// A folder holds several models.
pub fn find(path: &Path) -> Result<Option<PathBuf>, GgufError> {
    if path.is_file() {
        return Ok((has_extension(path) || has_magic(path)).then(|| path.to_owned()));
    }
    if !path.is_dir() || SAFETENSORS.iter().any(|file| path.join(file).exists()) {
        return Ok(None);
    }
    let io_error = |source| GgufError::Io { path: path.to_owned(), source };
    let mut models: BTreeMap<String, PathBuf> = BTreeMap::new();
    for entry in fs::read_dir(path).map_err(io_error)? {
        let file = entry.map_err(io_error)?.path();
        match model_name(&file) {
            Some(name) if file.is_file() && !name.starts_with(PROJECTOR) => {
                let first = models.entry(name).or_insert_with(|| file.clone());
                if file < *first {
                    *first = file;
                }
            }
            _ => {}
        }
    }
    match models.len() {
        0 => Ok(None),
        1 => Ok(models.into_values().next()),
        _ => Err(GgufError::SeveralModels { dir: path.to_owned(), models: models.into_keys().collect() }),
    }
}

/// What the model in a GGUF file is called: the file's name without the extension and without the part's number. `None`
/// if the file isn't called so.
///
/// ```
/// use std::path::Path;
/// use helion::model::gguf::model_name;
///
/// assert_eq!(model_name(Path::new("/m/Qwen3-8B-Q4_K_M.gguf")).as_deref(), Some("Qwen3-8B-Q4_K_M"));
/// assert_eq!(model_name(Path::new("big-00002-of-00003.gguf")).as_deref(), Some("big"));
/// assert_eq!(model_name(Path::new("model.safetensors")), None);
/// ```
pub fn model_name(path: &Path) -> Option<String> {
    if !has_extension(path) {
        return None;
    }
    let stem = path.file_stem()?.to_string_lossy();
    Some(part_of(&stem).map_or(&*stem, |part| part.name).to_owned())
}

/// All parts of the model that the file belongs to, in their order; the file alone, if it isn't named as a part.
pub(super) fn parts(path: &Path) -> Result<Vec<PathBuf>, GgufError> {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy()).unwrap_or_default();
    let Some(part) = part_of(&stem).filter(|_| has_extension(path)) else { return Ok(vec![path.to_owned()]) };
    let names = (1..=part.count).map(|number| format!("{}-{number:05}-of-{:05}.{EXTENSION}", part.name, part.count));
    let (there, missing): (Vec<_>, Vec<_>) = names.partition(|name| path.with_file_name(name).is_file());
    if !missing.is_empty() {
        return Err(GgufError::MissingParts { path: path.to_owned(), count: part.count, missing });
    }
    Ok(there.into_iter().map(|name| path.with_file_name(name)).collect())
}

/// A name of the form `name-00001-of-00003`.
struct Part<'a> {
    name: &'a str,
    count: usize,
}

fn part_of(stem: &str) -> Option<Part<'_>> {
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| -> Option<usize> {
        if text.len() == 5 && text.bytes().all(|digit| digit.is_ascii_digit()) { text.parse().ok() } else { None }
    };
    let (number, count) = (digits(number)?, digits(count)?);
    ((1..=count).contains(&number) && count <= MAX_PARTS).then_some(Part { name, count })
}

fn has_extension(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(EXTENSION))
}

/// Files in the hub's cache are named by their hash.
fn has_magic(path: &Path) -> bool {
    let read = || -> io::Result<[u8; 4]> {
        let mut magic = [0; 4];
        File::open(path)?.read_exact(&mut magic)?;
        Ok(magic)
    };
    read().is_ok_and(|magic| magic == *b"GGUF")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            fs::write(dir.path().join(file), b"GGUF").unwrap();
        }
        dir
    }

    #[test]
    fn any_part_names_all_and_the_missing_ones_are_named() {
        let dir = dir(&["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"]);
        let error = parts(&dir.path().join("m-00003-of-00003.gguf")).unwrap_err().to_string();
        assert!(error.contains("m-00002-of-00003.gguf") && !error.contains("m-00001-of"), "{error}");
        fs::write(dir.path().join("m-00002-of-00003.gguf"), b"").unwrap();
        let all = parts(&dir.path().join("m-00002-of-00003.gguf")).unwrap();
        assert_eq!(all.len(), 3);
        assert!(all[0].ends_with("m-00001-of-00003.gguf"));
        for single in ["m.gguf", "m-0001-of-0003.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf"] {
            assert_eq!(parts(Path::new(single)).unwrap(), [Path::new(single)]);
        }
    }

    #[test]
    fn a_folder_stands_for_the_one_model_in_it() {
        let one = dir(&["a-00002-of-00002.gguf", "a-00001-of-00002.gguf", "mmproj-a.gguf", "README.md"]);
        assert_eq!(find(one.path()).unwrap(), Some(one.path().join("a-00001-of-00002.gguf")));
        assert_eq!(find(dir(&["README.md"]).path()).unwrap(), None);
        assert_eq!(find(dir(&["a.gguf", "model.safetensors"]).path()).unwrap(), None);
        let error = find(dir(&["a.gguf", "b.gguf"]).path()).unwrap_err().to_string();
        assert!(error.contains("(a, b)"), "{error}");
        let blob = dir(&["0123abcd"]);
        assert!(find(&blob.path().join("0123abcd")).unwrap().is_some());
        assert_eq!(find(Path::new("/nonexistent")).unwrap(), None);
    }
}
