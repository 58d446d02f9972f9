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

/// Commands of this crate lie beside the product's, test binaries in `deps/` below.
pub(crate) fn directory() -> PathBuf {
    let this = env::current_exe().expect("the system knows the running program");
    let beside = this.ancestors().skip(1).find(|dir| !dir.ends_with("deps"));
    beside.expect("a program is in a directory").to_owned()
}
