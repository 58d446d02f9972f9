//! A run's checkpoints on disk, as someone sees them who meddles.

use std::{fs, path::Path};

/// The id of one that is being written, and that nobody may see yet.
pub fn pending(store: &Path) -> Option<String> {
    names(store).iter().find_map(|name| {
        let (id, _attempt) = name.strip_prefix(".pending-")?.rsplit_once('.')?;
        Some(id.to_owned())
    })
}

/// Changes a byte of the newest checkpoint's state, if there is an older one to fall back to. Returns its
/// id.
pub fn damage_the_newest(store: &Path) -> Option<String> {
    let step = |name: &String| name.split("-s").nth(1)?.get(..8)?.parse::<u64>().ok();
    let mut complete: Vec<_> = names(store).into_iter().filter(|name| !name.starts_with('.')).collect();
    complete.sort_by_key(step);
    let newest = complete.pop().filter(|_| !complete.is_empty())?;
    let part = store.join(&newest).join("part-0.bin");
    let mut bytes = fs::read(&part).expect("each checkpoint has a first part");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&part, bytes).expect("the run is this test's");
    Some(newest)
}

fn names(store: &Path) -> Vec<String> {
    let entries = fs::read_dir(store).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
