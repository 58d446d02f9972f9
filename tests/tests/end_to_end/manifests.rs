//! The manifests against schemas: Kubernetes' own, and those of the projects whose kinds are used.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use musher_tests::binaries;

#[test]
fn manifests_are_what_the_schemas_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is in the workspace");
    let Some(python) = python(root) else {
        eprintln!(
            "SKIPPED: no Python here has PyYAML and jsonschema (pip install kubernetes-validate pyyaml)"
        );
        return;
    };
    let release = binaries::musher().parent().map(Path::to_owned).expect("a program is in a directory");
    let checked = Command::new(python).arg("tools/manifests.py").arg(release).current_dir(root).output();
    let checked = checked.expect("Python ran just now");
    let (said, errors) = (String::from_utf8_lossy(&checked.stdout), String::from_utf8_lossy(&checked.stderr));
    // What it skipped is to be read.
    eprint!("{said}");
    assert!(checked.status.success(), "{said}{errors}");
}

/// The one that can check most.
fn python(root: &Path) -> Option<PathBuf> {
    let given = env::var_os("MUSHER_EXTRA_PYTHON").map(PathBuf::from);
    let known: Vec<_> = given.into_iter().chain([root.join(".extra/bin/python"), "python3".into()]).collect();
    let has = |python: &Path, modules: &str| {
        let tried = Command::new(python).args(["-c", &format!("import {modules}")]).output();
        tried.is_ok_and(|tried| tried.status.success())
    };
    ["yaml, jsonschema, kubernetes_validate", "yaml, jsonschema"]
        .into_iter()
        .find_map(|modules| known.iter().find(|python| has(python, modules)))
        .cloned()
}
