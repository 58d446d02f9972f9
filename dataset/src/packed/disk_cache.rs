//! What was read of a packed data set's shards, kept on a local disk within a byte budget: an epoch after the first
//! reads it there. The first to come stay, as in the cache of decoded pairs.
//!
//! Workers of one machine may share a directory: a copy appears whole, by a rename, and whoever reads it checks it.
//! A disk that takes no more ends the keeping, not the training.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::DataWarning;

/// Where copies are kept, and how much of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskCacheOptions {
    pub directory: PathBuf,
    /// Of each data set, over all workers that share the directory.
    pub budget_bytes: u64,
}

/// Begins the names of copies that are not whole yet.
const UNFINISHED: &str = ".unfinished-";
/// Nobody is that long at writing one.
const ABANDONED: Duration = Duration::from_secs(600);

pub(super) struct DiskCache {
    /// This data set's own.
    directory: PathBuf,
    budget_bytes: u64,
    used: Mutex<Used>,
    /// The disk took no more.
    is_given_up: AtomicBool,
}

/// What the directory holds: as it was last counted, and what this process has added since.
#[derive(Default)]
struct Used {
    counted: u64,
    added: u64,
}

impl DiskCache {
    /// `id` tells data sets apart.
    pub fn new(options: &DiskCacheOptions, id: &str) -> Self {
        let directory = options.directory.join(id);
        sweep(&directory);
        let used = Used { counted: bytes_in(&directory), added: 0 };
        Self {
            directory,
            budget_bytes: options.budget_bytes,
            used: Mutex::new(used),
            is_given_up: AtomicBool::new(false),
        }
    }

    /// What was kept under that name, unchecked.
    pub fn get(&self, name: &str) -> Option<Vec<u8>> {
        fs::read(self.directory.join(name)).ok()
    }

    pub fn remove(&self, name: &str) {
        // If it stays, it is found out again.
        let _ = fs::remove_file(self.directory.join(name));
    }

    pub fn put(&self, name: &str, bytes: &[u8], warn: &mut dyn FnMut(DataWarning)) {
        if self.is_given_up.load(Ordering::Relaxed) || !self.reserve(bytes.len() as u64) {
            return;
        }
        if let Err(error) = self.write(name, bytes)
            && !self.is_given_up.swap(true, Ordering::Relaxed)
        {
            let problem =
                format!("keeps no more copies of the data set ({error}); what it has not is read again");
            warn(DataWarning { file: self.directory.clone(), problem });
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.directory)?;
        file.write_all(bytes)?;
        file.persist(self.directory.join(name))?;
        Ok(())
    }

    /// Whether so many bytes are within the budget; they count from now on.
    fn reserve(&self, bytes: u64) -> bool {
        let mut used = self.used.lock().expect("whoever holds it only adds");
        // Others write there too: what they added shows when it is counted again, every sixteenth of the budget.
        if used.added > self.budget_bytes / 16 {
            *used = Used { counted: bytes_in(&self.directory), added: 0 };
        }
        let fits = used.counted + used.added + bytes <= self.budget_bytes;
        if fits {
            used.added += bytes;
        }
        fits
    }
}

/// Removes what processes that were killed have left half-written.
fn sweep(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let is_unfinished = entry.file_name().to_string_lossy().starts_with(UNFINISHED);
        let age = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
        if is_unfinished && age().is_some_and(|age| age > ABANDONED) {
            let _ = fs::remove_file(entry.path()); // or another worker has
        }
    }
}

/// What cannot be looked at counts as nothing.
fn bytes_in(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    entries.flatten().filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn cache(directory: &Path, budget_bytes: u64) -> DiskCache {
        DiskCache::new(&DiskCacheOptions { directory: directory.into(), budget_bytes }, "set")
    }

    #[test]
    fn what_a_killed_process_left_is_removed_in_time() {
        let directory = tempfile::tempdir().unwrap();
        let set = directory.path().join("set");
        fs::create_dir(&set).unwrap();
        let old = std::time::SystemTime::now() - 2 * ABANDONED;
        for (name, at) in [(".unfinished-a", Some(old)), (".unfinished-b", None), ("whole", Some(old))] {
            fs::write(set.join(name), [0; 100]).unwrap();
            let file = fs::File::options().append(true).open(set.join(name)).unwrap();
            at.iter().for_each(|&at| file.set_modified(at).unwrap());
        }
        cache(directory.path(), 1000);
        let mut left: Vec<_> = fs::read_dir(&set).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".unfinished-b", "whole"]);
    }

    #[test]
    fn the_first_to_come_stay_within_the_budget() {
        let directory = tempfile::tempdir().unwrap();
        let mut warn = |warning| panic!("{warning}");
        let first = cache(directory.path(), 1000);
        for index in 0..8 {
            first.put(&index.to_string(), &[index; 300], &mut warn);
        }
        assert_eq!(first.get("2"), Some(vec![2; 300]));
        assert_eq!(first.get("3"), None);
        // Another process finds them, and what they take.
        let second = cache(directory.path(), 1000);
        assert_eq!(second.get("1"), Some(vec![1; 300]));
        second.put("9", &[9; 300], &mut warn);
        assert_eq!(second.get("9"), None);
        assert_eq!(bytes_in(&directory.path().join("set")), 900);
    }

    #[test]
    fn those_who_share_a_directory_see_each_others_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let both = [cache(directory.path(), 16_000), cache(directory.path(), 16_000)];
        for index in 0..200 {
            both[index % 2].put(&index.to_string(), &[0; 400], &mut |warning| panic!("{warning}"));
        }
        let used = bytes_in(&directory.path().join("set"));
        assert!((15_000..=18_000).contains(&used), "{used}");
    }

    #[test]
    fn a_place_that_cannot_be_written_is_told_once() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("set"), "a file where the directory is to be").unwrap();
        let cache = cache(directory.path(), 1000);
        let mut told = Vec::new();
        for name in ["a", "b"] {
            cache.put(name, &[1; 10], &mut |warning| told.push(warning.to_string()));
            assert_eq!(cache.get(name), None);
        }
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains("keeps no more copies"), "{told:?}");
    }
}
