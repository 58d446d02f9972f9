//! Where the product is.

use std::{env, path::PathBuf};

pub fn musher() -> PathBuf {
    find("musher")
}

pub fn musher_worker() -> PathBuf {
    find("musher-worker")
}

fn find(name: &str) -> PathBuf {
    let path = directory().join(name);
    assert!(path.is_file(), "{} is not there: run `make build` first", path.display());
    path
}

/// Test binaries lie in `deps/` below the product's.
pub(crate) fn directory() -> PathBuf {
    let this = env::current_exe().expect("the system knows the running program");
    this.ancestors().nth(2).expect("cargo puts test binaries into target/PROFILE/deps").to_owned()
}
