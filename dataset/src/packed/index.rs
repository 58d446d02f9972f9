//! What is where in a packed data set, as `index.json` says it. Pure: it reads no shard.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Beside the shards.
pub const INDEX_FILE: &str = "index.json";

const FORMAT: &str = "musher-pack";
const VERSION: u32 = 1;

/// Bytes of a tar's block: a header is one, and contents are filled up to one.
pub(super) const BLOCK: u64 = 512;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Index {
    format: String,
    version: u32,
    pub shards: Vec<Shard>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Shard {
    pub file: String,
    /// Of the whole tar.
    pub bytes: u64,
    pub samples: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    pub name: String,
    pub image: Member,
    /// Behind the image.
    pub mask: Member,
    /// CRC-32C of the image's bytes, then the mask's.
    pub crc32c: u32,
}

/// A file in a tar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Member {
    pub file: String,
    /// Where its content begins.
    pub at: u64,
    pub bytes: u64,
}

/// A sample's place in the index: shard, then sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryIndex {
    pub shard: usize,
    pub sample: usize,
}

impl Index {
    pub fn new(shards: Vec<Shard>) -> Self {
        Self { format: FORMAT.to_owned(), version: VERSION, shards }
    }

    /// # Errors
    /// What is wrong with it, as the rest of a sentence.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        /// What any version has.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        if head.format != FORMAT {
            return Err(format!("its format is {:?}, not {FORMAT:?}", head.format));
        }
        if head.version != VERSION {
            return Err(format!("its version is {}, this program knows {VERSION}", head.version));
        }
        let index: Self = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        index.check()?;
        Ok(index)
    }

    pub fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec(self).expect("names and numbers are always JSON");
        json.push(b'\n');
        json
    }

    /// Where each name is.
    pub fn by_name(&self) -> HashMap<String, EntryIndex> {
        let entries = self.shards.iter().enumerate().flat_map(|(shard, content)| {
            let entries = content.samples.iter().enumerate();
            entries.map(move |(sample, entry)| (entry.name.clone(), EntryIndex { shard, sample }))
        });
        entries.collect()
    }

    /// So that whoever reads a span can trust it.
    fn check(&self) -> Result<(), String> {
        let (mut files, mut names) = (HashSet::new(), HashSet::new());
        for shard in &self.shards {
            if !is_plain(&shard.file) || !files.insert(&shard.file) {
                return Err(format!("the shard {:?} is no plain file name, or named twice", shard.file));
            }
            for entry in &shard.samples {
                if !is_plain(&entry.name) || !names.insert(&entry.name) {
                    return Err(format!("the sample {:?} is no plain name, or named twice", entry.name));
                }
                if !entry.fits(shard.bytes) {
                    return Err(format!("the sample {:?} lies outside of {}", entry.name, shard.file));
                }
            }
        }
        Ok(())
    }
}

impl Entry {
    /// The bytes of the tar that hold both files, and the header between them.
    pub fn span(&self) -> Range<u64> {
        self.image.at..self.mask.at + self.mask.bytes
    }

    fn fits(&self, shard_bytes: u64) -> bool {
        let end = |member: &Member| member.at.checked_add(member.bytes);
        let is_aligned = |member: &Member| member.at.is_multiple_of(BLOCK) && member.at > 0;
        is_aligned(&self.image)
            && is_aligned(&self.mask)
            && end(&self.image).is_some_and(|end| end <= self.mask.at)
            && end(&self.mask).is_some_and(|end| end <= shard_bytes)
    }
}

/// A name that stays in its directory.
pub(crate) fn is_plain(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn index() -> Index {
        let member = |file: &str, at, bytes| Member { file: file.into(), at, bytes };
        let entry = Entry {
            name: "a".into(),
            image: member("a.jpg", 512, 700),
            mask: member("a.png", 2048, 10),
            crc32c: 7,
        };
        Index::new(vec![Shard { file: "train-000000.tar".into(), bytes: 3584, samples: vec![entry] }])
    }

    fn reason(damage: impl FnOnce(&mut Index)) -> String {
        let mut index = index();
        damage(&mut index);
        Index::parse(&index.to_json()).expect_err("this index must be refused")
    }

    #[test]
    fn an_index_comes_back() {
        let json = index().to_json();
        assert_eq!(Index::parse(&json), Ok(index()));
        assert_eq!(index().by_name()["a"], EntryIndex { shard: 0, sample: 0 });
        assert_eq!(index().shards[0].samples[0].span(), 512..2058);
        for cut in [0, 1, json.len() / 2, json.len() - 2] {
            assert!(Index::parse(&json[..cut]).is_err());
        }
    }

    #[test]
    fn what_would_read_elsewhere_is_refused() {
        assert!(reason(|index| index.version = 2).contains("version is 2"));
        assert!(reason(|index| index.format = "tar".into()).contains("format"));
        assert!(reason(|index| index.shards[0].file = "../x.tar".into()).contains("plain"));
        assert!(reason(|index| index.shards.push(index.shards[0].clone())).contains("twice"));
        for damage in [
            |entry: &mut Entry| entry.mask.bytes = u64::MAX,
            |entry: &mut Entry| entry.mask.at = 512,
            |entry: &mut Entry| entry.image.at = 100,
            |entry: &mut Entry| entry.image.bytes = 4096,
        ] {
            assert!(reason(|index| damage(&mut index.shards[0].samples[0])).contains("outside"));
        }
    }
}
