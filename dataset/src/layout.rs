//! Where the files of a data set are: the split lists, the image and the trimap of each name, and
//! a digest by which workers tell whether they hold the same data. No file's content is decoded.
//!
//! ```text
//! images/NAME.jpg                   (or NAME.png)
//! annotations/trimaps/NAME.png
//! annotations/{trainval,test}.txt   a name in the first column, `#` starts a comment
//! ```

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::DatasetError;

/// Where a data set is and which of its lists are used; the lists' paths are relative to `root`.
#[derive(Clone, Debug)]
pub struct Source {
    pub root: PathBuf,
    pub train_split: String,
    pub val_split: String,
}

/// A data set whose lists are read and whose files are all there.
#[derive(Clone, Debug)]
pub struct Dataset {
    train: Arc<Split>,
    val: Arc<Split>,
    digest: String,
}

/// The samples of one list, in its order; a sample's id is its index here.
#[derive(Clone, Debug)]
pub struct Split {
    /// The list's path, as the config names it.
    pub list: String,
    pub samples: Vec<Sample>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pub name: String,
    pub image: PathBuf,
    pub mask: PathBuf,
}

impl Dataset {
    /// Reads both lists and makes sure that each listed image and mask exists.
    ///
    /// # Errors
    /// Names the first thing that is missing and what to do about it.
    pub fn open(source: &Source) -> Result<Self, DatasetError> {
        check_folders(&source.root)?;
        let mut hasher = Sha256::new();
        let mut open_split = |list: &String| {
            let (samples, sizes): (Vec<_>, Vec<_>) = locate_all(&source.root, list)?.into_iter().unzip();
            hash_split(&mut hasher, &samples, &sizes);
            Ok(Arc::new(Split { list: list.clone(), samples }))
        };
        Ok(Self {
            train: open_split(&source.train_split)?,
            val: open_split(&source.val_split)?,
            digest: hex::encode(hasher.finalize()),
        })
    }

    pub fn train(&self) -> Arc<Split> {
        self.train.clone()
    }

    pub fn val(&self) -> Arc<Split> {
        self.val.clone()
    }

    /// Hex SHA-256 over both lists' names in their order and the sizes of the named files; the
    /// same wherever the data set lies.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

impl Split {
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// # Errors
    /// If there is no sample of that id.
    pub fn sample(&self, id: u64) -> Result<&Sample, DatasetError> {
        usize::try_from(id)
            .ok()
            .and_then(|index| self.samples.get(index))
            .ok_or_else(|| DatasetError::UnknownSample { id, len: self.len(), list: self.list.clone() })
    }
}

/// A name and the line it stands on, from 1.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) line: usize,
}

/// Sizes in bytes.
struct FileSizes {
    image: u64,
    mask: u64,
}

pub(crate) fn check_folders(root: &Path) -> Result<(), DatasetError> {
    let mut entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(DatasetError::NoDirectory { root: root.into() });
        }
        Err(error) => return Err(DatasetError::read(root)(error)),
    };
    if entries.next().is_none() {
        return Err(DatasetError::EmptyDirectory { root: root.into() });
    }
    match [images_folder(root), masks_folder(root)].into_iter().find(|folder| !folder.is_dir()) {
        Some(folder) => Err(DatasetError::NoFolder { folder }),
        None => Ok(()),
    }
}

/// The names of a list, each a plain file name, each once, at least one.
pub(crate) fn read_list(path: &Path) -> Result<Vec<Entry>, DatasetError> {
    let text = fs::read(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => DatasetError::NoList { list: path.into() },
        _ => DatasetError::read(path)(error),
    })?;
    let text = String::from_utf8_lossy(&text);

    let mut line_of: HashMap<&str, usize> = HashMap::new();
    let mut entries = Vec::new();
    for (line, name) in (1..).zip(text.lines().map(first_column)) {
        let Some(name) = name else { continue };
        if name.contains(['/', '\\', '\0']) {
            return Err(DatasetError::BadName { list: path.into(), line, name: name.to_owned() });
        }
        if let Some(first_line) = line_of.insert(name, line) {
            return Err(DatasetError::DuplicateName {
                list: path.into(),
                line,
                name: name.to_owned(),
                first_line,
            });
        }
        entries.push(Entry { name: name.to_owned(), line });
    }
    if entries.is_empty() {
        return Err(DatasetError::EmptyList { list: path.into() });
    }
    Ok(entries)
}

pub(crate) fn images_folder(root: &Path) -> PathBuf {
    root.join("images")
}

pub(crate) fn masks_folder(root: &Path) -> PathBuf {
    root.join("annotations").join("trimaps")
}

/// The image of that name that exists, and its size in bytes.
pub(crate) fn find_image(root: &Path, name: &str) -> Option<(PathBuf, u64)> {
    IMAGE_EXTENSIONS.iter().find_map(|extension| {
        let path = images_folder(root).join(format!("{name}.{extension}"));
        Some((path.clone(), file_bytes(&path)?))
    })
}

/// Where the mask of that name must be, and its size in bytes if it is there.
pub(crate) fn find_mask(root: &Path, name: &str) -> (PathBuf, Option<u64>) {
    let path = masks_folder(root).join(format!("{name}.png"));
    let bytes = file_bytes(&path);
    (path, bytes)
}

/// The real data has `.jpg` only; the content decides how a file is decoded.
const IMAGE_EXTENSIONS: [&str; 3] = ["jpg", "png", "jpeg"];

fn first_column(line: &str) -> Option<&str> {
    line.split('#').next()?.split_whitespace().next()
}

fn file_bytes(path: &Path) -> Option<u64> {
    let metadata = fs::metadata(path).ok()?;
    metadata.is_file().then_some(metadata.len())
}

fn locate_all(root: &Path, list: &str) -> Result<Vec<(Sample, FileSizes)>, DatasetError> {
    let list = root.join(list);
    let entries = read_list(&list)?;
    // In parallel, as each look-up is a round trip when the root is a network file system.
    let images: Vec<_> = entries.par_iter().map(|entry| find_image(root, &entry.name)).collect();
    let masks: Vec<_> = entries.par_iter().map(|entry| find_mask(root, &entry.name)).collect();

    if let Some(first) = images.iter().position(Option::is_none) {
        return Err(DatasetError::AbsentImages {
            list,
            line: entries[first].line,
            name: entries[first].name.clone(),
            count: images.iter().filter(|image| image.is_none()).count(),
        });
    }
    if let Some(first) = masks.iter().position(|(_, bytes)| bytes.is_none()) {
        return Err(DatasetError::AbsentMasks {
            list,
            line: entries[first].line,
            name: entries[first].name.clone(),
            mask: masks[first].0.clone(),
            count: masks.iter().filter(|(_, bytes)| bytes.is_none()).count(),
        });
    }
    let located = entries.into_iter().zip(images).zip(masks);
    Ok(located
        .filter_map(|((entry, image), (mask, mask_bytes))| {
            let (image, image_bytes) = image?;
            let sample = Sample { name: entry.name, image, mask };
            let sizes = FileSizes { image: image_bytes, mask: mask_bytes? };
            Some((sample, sizes))
        })
        .collect())
}

/// Every field is of fixed length or preceded by its length, so that no two splits hash alike.
fn hash_split(hasher: &mut Sha256, samples: &[Sample], sizes: &[FileSizes]) {
    hasher.update((samples.len() as u64).to_le_bytes());
    for (sample, sizes) in samples.iter().zip(sizes) {
        hasher.update((sample.name.len() as u64).to_le_bytes());
        hasher.update(&sample.name);
        hasher.update(sizes.image.to_le_bytes());
        hasher.update(sizes.mask.to_le_bytes());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_list_line_is_a_name_columns_and_comments() {
        assert_eq!(first_column("Abyssinian_1 1 1 1"), Some("Abyssinian_1"));
        assert_eq!(first_column("  beagle_2\t# blurred"), Some("beagle_2"));
        assert_eq!(first_column("#Image CLASS-ID"), None);
        assert_eq!(first_column("   "), None);
    }

    fn with_files(names: &[&str], train: &str, val: &str) -> (tempfile::TempDir, Source) {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(images_folder(root.path())).unwrap();
        fs::create_dir_all(masks_folder(root.path())).unwrap();
        for name in names {
            let image = images_folder(root.path()).join(format!("{name}.jpg"));
            fs::write(image, "image").unwrap();
            fs::write(find_mask(root.path(), name).0, "mask").unwrap();
        }
        fs::write(root.path().join("annotations/trainval.txt"), train).unwrap();
        fs::write(root.path().join("annotations/test.txt"), val).unwrap();
        let source = Source {
            root: root.path().into(),
            train_split: "annotations/trainval.txt".into(),
            val_split: "annotations/test.txt".into(),
        };
        (root, source)
    }

    fn refusal(source: &Source) -> DatasetError {
        Dataset::open(source).expect_err("this data set must be refused")
    }

    #[test]
    fn opens_lists_in_order() {
        let (_root, source) = with_files(&["b", "a", "c"], "# names\nb 1\n\na 2\n", "c\n");
        let dataset = Dataset::open(&source).unwrap();
        let names: Vec<_> = dataset.train().samples.iter().map(|s| s.name.clone()).collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!(dataset.val().sample(0).unwrap().name, "c");
        assert!(matches!(dataset.val().sample(1), Err(DatasetError::UnknownSample { id: 1, len: 1, .. })));
    }

    #[test]
    fn each_refusal_names_its_place() {
        let (root, source) = with_files(&["a"], "a\n", "a\n");
        fs::remove_dir_all(images_folder(root.path())).unwrap();
        assert!(matches!(refusal(&source), DatasetError::NoFolder { .. }));
        fs::remove_dir_all(root.path().join("annotations")).unwrap();
        assert!(matches!(refusal(&source), DatasetError::EmptyDirectory { .. }));
        root.close().unwrap();
        assert!(matches!(refusal(&source), DatasetError::NoDirectory { .. }));

        let (root, source) = with_files(&["a"], "a\n", "# nothing\n");
        assert!(matches!(refusal(&source), DatasetError::EmptyList { .. }));
        fs::remove_file(root.path().join("annotations/test.txt")).unwrap();
        assert!(matches!(refusal(&source), DatasetError::NoList { .. }));

        let (_root, source) = with_files(&["a"], "a\n#\na\n", "a\n");
        let message = refusal(&source).to_string();
        assert!(message.contains("trainval.txt:3: `a` is already listed on line 1"), "{message}");

        let (_root, source) = with_files(&["a"], "a\nb\nc\n", "a\n");
        let message = refusal(&source).to_string();
        assert!(message.contains("trainval.txt:2: there is no image for `b` (2 of"), "{message}");

        let (root, source) = with_files(&["a"], "a\n", "a\n");
        fs::remove_file(find_mask(root.path(), "a").0).unwrap();
        assert!(matches!(refusal(&source), DatasetError::AbsentMasks { count: 1, .. }));

        let (_root, source) = with_files(&["a"], "../a\n", "a\n");
        assert!(matches!(refusal(&source), DatasetError::BadName { line: 1, .. }));
    }

    #[test]
    fn digest_tells_data_apart_but_not_places() {
        let digest = |source: &Source| Dataset::open(source).unwrap().digest().to_owned();
        let (_here, here) = with_files(&["a", "b"], "a\n", "b\n");
        let (there_root, there) = with_files(&["a", "b"], "# other comment\na 7\n", "b\n");
        let (_swapped, swapped) = with_files(&["a", "b"], "b\n", "a\n");
        assert_eq!(digest(&here), digest(&there));
        assert_ne!(digest(&here), digest(&swapped));

        fs::write(find_mask(there_root.path(), "b").0, "another mask").unwrap();
        assert_ne!(digest(&here), digest(&there));
    }
}
