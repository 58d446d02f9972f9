//! Small data sets for single tests, which may damage them.
//!
//! Their samples are links to the real pets (`MUSHER_PETS`, or `shared/pets` beside the workspace), or
//! where those are absent to a drawn set, so that no test needs the real files.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::OnceLock,
};

use crate::binaries;

const TRAIN: &str = "annotations/trainval.txt";
const VAL: &str = "annotations/test.txt";

/// As many training and validation samples are drawn as any test links.
const DRAWN: [usize; 2] = [230, 160];

/// A data set in the Oxford-IIIT Pet layout whose lists and files are the test's own.
#[derive(Debug)]
pub struct DataSet {
    root: PathBuf,
    pub train: Vec<String>,
    pub val: Vec<String>,
}

impl DataSet {
    /// The first `train` and `val` samples of the source, linked into `root`.
    pub fn link(root: PathBuf, train: usize, val: usize) -> Self {
        let source = source();
        let data =
            Self { train: first(&source.join(TRAIN), train), val: first(&source.join(VAL), val), root };
        for folder in ["images", "annotations/trimaps"] {
            fs::create_dir_all(data.root.join(folder)).expect("the scene's directory is writable");
        }
        for name in data.train.iter().chain(&data.val) {
            for file in [image_file(source, name), format!("annotations/trimaps/{name}.png")] {
                symlink(source.join(&file), data.root.join(&file)).expect("each sample is linked once");
            }
        }
        data.write_list(TRAIN, &data.train);
        data.write_list(VAL, &data.val);
        data
    }

    /// One that is there, with all its samples. It is only read.
    pub fn open(root: PathBuf) -> Self {
        let root = root.canonicalize().unwrap_or_else(|error| panic!("{}: {error}", root.display()));
        let all = |list| names(&root.join(list)).collect();
        Self { train: all(TRAIN), val: all(VAL), root }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn image(&self, name: &str) -> PathBuf {
        self.root.join(image_file(&self.root, name))
    }

    pub fn mask(&self, name: &str) -> PathBuf {
        self.root.join(format!("annotations/trimaps/{name}.png"))
    }

    pub fn train_list(&self) -> PathBuf {
        self.root.join(TRAIN)
    }

    pub fn write_list(&self, list: &str, names: &[String]) {
        let lines: String = names.iter().map(|name| format!("{name} 1 1 1\n")).collect();
        fs::write(self.root.join(list), lines).expect("the scene's directory is writable");
    }

    /// Puts a file of the test's own in a link's place; the source is left alone.
    pub fn replace(file: &Path, bytes: &[u8]) {
        fs::remove_file(file).expect("the file to replace is there");
        fs::write(file, bytes).expect("the scene's directory is writable");
    }
}

fn image_file(root: &Path, name: &str) -> String {
    let files = ["jpg", "png", "jpeg"].map(|extension| format!("images/{name}.{extension}"));
    let found = files.into_iter().find(|file| root.join(file).exists());
    found.unwrap_or_else(|| panic!("{} has no image {name}", root.display()))
}

fn first(list: &Path, count: usize) -> Vec<String> {
    let first: Vec<_> = names(list).take(count).collect();
    assert_eq!(first.len(), count, "{} is too short for this test", list.display());
    first
}

fn names(list: &Path) -> impl Iterator<Item = String> {
    let text = fs::read_to_string(list).unwrap_or_else(|error| panic!("{}: {error}", list.display()));
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let names: Vec<_> = lines.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    names.into_iter()
}

/// The real pets, or a set that is drawn once and kept beside the build.
fn source() -> &'static Path {
    static SOURCE: OnceLock<PathBuf> = OnceLock::new();
    SOURCE.get_or_init(|| real_pets().unwrap_or_else(drawn))
}

/// The real data, where there is some.
pub fn real_pets() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/pets");
    let root = env::var_os("MUSHER_PETS").map_or_else(beside, PathBuf::from);
    root.join(TRAIN).exists().then(|| root.canonicalize().expect("it was found just now"))
}

fn drawn() -> PathBuf {
    let [train, val] = DRAWN.map(|count| count.to_string());
    let kept = binaries::directory().join(format!("drawn-pets-{train}-{val}"));
    if !kept.exists() {
        let aside = kept.with_extension(process::id().to_string());
        let drawing = Command::new(binaries::musher())
            .args(["data", "synth"])
            .arg(&aside)
            .args(["--train", &train, "--val", &val])
            .output()
            .expect("musher can be started");
        assert!(drawing.status.success(), "{}", String::from_utf8_lossy(&drawing.stderr));
        // Where another process was faster, its set is as good.
        let _ = fs::rename(&aside, &kept);
    }
    kept
}
