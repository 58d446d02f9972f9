//! Where the files of a data set are: the split lists, the image and the trimap of each name, and
//! a digest by which workers tell whether they hold the same data. No file's content is decoded.
//! A root is a directory as below, or one that `packed` knows.
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

use crate::packed::{DiskCacheOptions, Packed, Store};
use crate::{DatasetError, HeldOut, Sample};

/// Where a data set is and which of its lists are used; the lists' paths are relative to `root`.
#[derive(Clone, Debug, Default)]
pub struct Source {
    pub root: PathBuf,
    pub train_split: String,
    pub val_split: String,
    /// Validation is held out of the training list, and `val_split` is left alone.
    pub held_out: Option<HeldOut>,
    /// Where a packed data set's files are, if not in the directory `root`.
    pub store: Option<Arc<dyn Store>>,
    /// Where what is read of a packed data set's shards is kept.
    pub disk_cache: Option<DiskCacheOptions>,
}

impl Source {
    /// The data set in that directory, by the lists that it comes with.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            train_split: "annotations/trainval.txt".into(),
            val_split: "annotations/test.txt".into(),
            ..Self::default()
        }
    }
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
    /// What the list says, columns and comments included.
    pub text: String,
    pub samples: Vec<Sample>,
}

impl Dataset {
    /// Reads both lists and makes sure that each listed image and mask exists.
    ///
    /// # Errors
    /// Names the first thing that is missing and what to do about it.
    pub fn open(source: &Source) -> Result<Self, DatasetError> {
        let root = Root::open(source)?;
        let train = Located::find(&root, &source.train_split)?;
        let (train, val) = match source.held_out {
            None => (train, Located::find(&root, &source.val_split)?),
            Some(held_out) => train.hold_out(held_out)?,
        };
        let mut hasher = Sha256::new();
        for split in [&train, &val] {
            hash_split(&mut hasher, &split.samples);
        }
        let digest = hex::encode(hasher.finalize());
        Ok(Self { train: Arc::new(train.split()), val: Arc::new(val.split()), digest })
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

/// Where the lists and samples of a data set are found.
pub(crate) enum Root {
    Unpacked(PathBuf),
    Packed(Arc<Packed>),
}

impl Root {
    /// # Errors
    /// If there is nothing that may be a data set.
    pub(crate) fn open(source: &Source) -> Result<Self, DatasetError> {
        let (root, cache) = (&source.root, source.disk_cache.as_ref());
        if let Some(store) = &source.store {
            return Ok(Self::Packed(Arc::new(Packed::open(root, store.clone(), cache)?)));
        }
        if let Some(packed) = Packed::find(root, cache)? {
            return Ok(Self::Packed(Arc::new(packed)));
        }
        check_folders(root)?;
        Ok(Self::Unpacked(root.clone()))
    }

    /// How messages name a list.
    fn shown(&self, list: &str) -> PathBuf {
        match self {
            Self::Unpacked(root) => root.join(list),
            Self::Packed(packed) => packed.root().join(list),
        }
    }

    fn read_list(&self, list: &str) -> Result<String, DatasetError> {
        match self {
            Self::Unpacked(_) => read_list(&self.shown(list)),
            Self::Packed(packed) => packed.read_text(list),
        }
    }

    /// The names of a list, each a plain file name, each once, at least one.
    pub(crate) fn names(&self, list: &str) -> Result<Vec<String>, DatasetError> {
        let entries = names_of(&self.shown(list), &self.read_list(list)?)?;
        Ok(entries.into_iter().map(|entry| entry.name).collect())
    }

    fn locate(&self, list: PathBuf, entries: Vec<Entry>) -> Result<Vec<(Sample, FileSizes)>, DatasetError> {
        match self {
            Self::Unpacked(root) => locate_files(root, list, entries),
            Self::Packed(packed) => locate_packed(packed, list, entries),
        }
    }
}

/// The samples of a list, in its order.
pub(crate) struct Located {
    list: String,
    text: String,
    samples: Vec<(Sample, FileSizes)>,
}

impl Located {
    pub(crate) fn find(root: &Root, list: &str) -> Result<Self, DatasetError> {
        let text = root.read_list(list)?;
        let shown = root.shown(list);
        let entries = names_of(&shown, &text)?;
        let samples = root.locate(shown, entries)?;
        Ok(Self { list: list.to_owned(), text, samples })
    }

    pub(crate) fn split(self) -> Split {
        let Self { list, text, samples } = self;
        Split { list, text, samples: samples.into_iter().map(|(sample, _)| sample).collect() }
    }

    /// What is trained on, and what is validated on.
    fn hold_out(self, held_out: HeldOut) -> Result<(Self, Self), DatasetError> {
        let names: Vec<_> = self.samples.iter().map(|(sample, _)| sample.name.as_str()).collect();
        let parts = held_out.part(&names).ok_or_else(|| DatasetError::NothingHeldOut {
            list: self.list.clone(),
            fraction: held_out.fraction,
            len: names.len(),
        })?;
        let part = |places: Vec<usize>| Self {
            list: self.list.clone(),
            text: self.text.clone(),
            samples: places.into_iter().map(|at| self.samples[at].clone()).collect(),
        };
        Ok((part(parts.train), part(parts.val)))
    }
}

/// A name and the line it stands on, from 1.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) line: usize,
}

/// Sizes in bytes.
#[derive(Clone, Copy)]
pub(crate) struct FileSizes {
    image: u64,
    mask: u64,
}

fn check_folders(root: &Path) -> Result<(), DatasetError> {
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

fn read_list(path: &Path) -> Result<String, DatasetError> {
    let text = fs::read(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => DatasetError::NoList { list: path.into() },
        _ => DatasetError::read(path)(error),
    })?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The names of a list, each a plain file name, each once, at least one.
fn names_of(path: &Path, text: &str) -> Result<Vec<Entry>, DatasetError> {
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

fn locate_files(
    root: &Path,
    list: PathBuf,
    entries: Vec<Entry>,
) -> Result<Vec<(Sample, FileSizes)>, DatasetError> {
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
            let sizes = FileSizes { image: image_bytes, mask: mask_bytes? };
            Some((Sample::of_files(entry.name, image, mask), sizes))
        })
        .collect())
}

fn locate_packed(
    packed: &Arc<Packed>,
    list: PathBuf,
    entries: Vec<Entry>,
) -> Result<Vec<(Sample, FileSizes)>, DatasetError> {
    let located = |entry: &Entry| packed.find_sample(&entry.name);
    if let Some(first) = entries.iter().find(|entry| located(entry).is_none()) {
        return Err(DatasetError::NotPacked {
            list,
            line: first.line,
            name: first.name.clone(),
            count: entries.iter().filter(|entry| located(entry).is_none()).count(),
        });
    }
    let sample = |at| {
        let entry = packed.entry(at);
        (Sample::of_shard(packed, at), FileSizes { image: entry.image.bytes, mask: entry.mask.bytes })
    };
    Ok(entries.iter().filter_map(located).map(sample).collect())
}

/// Every field is of fixed length or preceded by its length, so that no two splits hash alike.
fn hash_split(hasher: &mut Sha256, samples: &[(Sample, FileSizes)]) {
    hasher.update((samples.len() as u64).to_le_bytes());
    for (sample, sizes) in samples {
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
        let source = Source::at(root.path());
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
