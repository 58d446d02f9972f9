//! `index.json` of an object store: who may commit there, and what is committed.
//!
//! It is the one object that is ever overwritten, and each write of it is conditional on the version that
//! the writer saw last. So a checkpoint becomes visible, and vanishes, in one step; and a coordinator that
//! was paused while another took over finds that its version is gone: it can commit nothing any more, however
//! sure it is that it still may.

use musher_proto::ids::{CheckpointId, Term};
use serde::{Deserialize, Serialize};

use super::{StoreError, plain_name};

pub(super) const INDEX: &str = "index.json";
/// The form of index this version writes and reads.
const VERSION: u64 = 1;

/// Whose checkpoints they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The run's name.
    pub run: String,
    /// Tells this run from another of the same name.
    pub run_id: String,
    /// The coordinator's that may commit; grows with each.
    pub term: Term,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Index {
    version: u64,
    #[serde(flatten)]
    pub owner: Owner,
    /// Drawn by each process that takes over.
    pub writer: String,
    /// Drawn for each write: no two of them are the same bytes, so that one can be recognised.
    stamp: String,
    pub checkpoints: Vec<Committed>,
}

/// A visible checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Committed {
    pub id: CheckpointId,
    /// What its objects' keys begin with.
    pub folder: String,
}

impl Index {
    pub fn new(owner: Owner, writer: String, checkpoints: Vec<Committed>) -> Self {
        Self { version: VERSION, owner, writer, stamp: String::new(), checkpoints }
    }

    /// As it is written, under a `stamp` of its own.
    pub fn to_bytes(&self, stamp: String) -> Vec<u8> {
        let stamped = Self { stamp, ..self.clone() };
        serde_json::to_vec_pretty(&stamped).expect("an index is plain data")
    }

    /// `url` is where the text was found.
    pub fn parse(text: &[u8], url: &str) -> Result<Self, StoreError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }

        let damaged =
            |error: serde_json::Error| StoreError::Manifest { path: url.into(), reason: error.to_string() };
        let Versioned { version } = serde_json::from_slice(text).map_err(damaged)?;
        if version != VERSION {
            return Err(StoreError::Version { path: url.into(), found: version, known: VERSION });
        }
        let index: Self = serde_json::from_slice(text).map_err(damaged)?;
        for Committed { id, folder } in &index.checkpoints {
            plain_name(id.as_str())?;
            plain_name(folder)?;
        }
        Ok(index)
    }

    pub fn folder_of(&self, id: &CheckpointId) -> Option<&str> {
        self.checkpoints
            .iter()
            .find(|committed| committed.id == *id)
            .map(|committed| committed.folder.as_str())
    }
}

/// The folder of the `attempt`th checkpoint that a coordinator of `term` began: no two are ever the same, so
/// nobody's late part falls into another's checkpoint.
pub(super) fn folder(id: &CheckpointId, term: Term, attempt: u64) -> String {
    format!("{id}.t{term}-{attempt}")
}

/// Whether `name` is one that [`folder`] gives.
pub(super) fn is_folder(name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let parts = name.rsplit_once(".t").and_then(|(id, attempt)| Some((id, attempt.split_once('-')?)));
    parts.is_some_and(|(id, (term, attempt))| !id.is_empty() && number(term) && number(attempt))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_index_reads_back_and_no_two_writes_are_the_same() {
        let owner = Owner { run: "pets".into(), run_id: "ab".into(), term: Term(3) };
        let id = CheckpointId("e0001-s00000004".into());
        let folder = folder(&id, Term(3), 0);
        let index = Index::new(owner, "w".into(), vec![Committed { id: id.clone(), folder: folder.clone() }]);
        let read = Index::parse(&index.to_bytes("1".into()), "s3://b/index.json").unwrap();
        assert_eq!((&read.owner, &read.checkpoints), (&index.owner, &index.checkpoints));
        assert_eq!(read.folder_of(&id), Some(folder.as_str()));
        assert_ne!(index.to_bytes("1".into()), index.to_bytes("2".into()));
        assert!(is_folder(&folder));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (text, expected) in [
            (&b"{"[..], "torn or damaged"),
            (b"{\"version\": 9}", "version 9"),
            (
                br#"{"version":1,"run":"a","run_id":"b","term":1,"writer":"w","stamp":"s","checkpoints":[{"id":"../x","folder":"y"}]}"#,
                "cannot name a file",
            ),
        ] {
            let said = Index::parse(text, "s3://b/index.json").unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        }
    }

    #[test]
    fn only_our_own_folders_are_taken_for_ours() {
        for name in ["index.json", "e1", "e1.t3", "e1.t3-", "e1.tx-1", ".t1-1", "e1.t1-1.bin"] {
            assert!(!is_folder(name), "{name}");
        }
    }
}
