//! Damaged and hostile files: whatever the bytes, a file opens or is refused by one sentence, without a panic, a hang
//! or more memory than a small file can be worth.
//!
//! `MUSHER_FUZZ_CASES` asks for more cases a file than those of a usual test run.

#![allow(clippy::unwrap_used)]

use std::io::Cursor;
use std::path::PathBuf;
use std::sync::Once;

use musher_weights::resnet50::Encoder;
use musher_weights::{Dtype, WeightsFile};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use rustix::process::{Resource, Rlimit, setrlimit};

/// The process's address space: who believes an enormous claim dies of it.
const MOST_BYTES: u64 = 2 << 30;

/// Numbers at which lengths and offsets break.
const ODD_NUMBERS: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff, u32::MAX as u64, i64::MAX as u64, u64::MAX];

#[derive(Debug, Clone)]
enum Damage {
    Cut(Index),
    Byte(Index, u8),
    /// So many bytes of a number.
    Number(Index, u64, usize),
    Remove(Index, usize),
    /// A piece is copied from one place to another.
    Copy(Index, Index, usize),
}

impl Damage {
    fn any() -> impl Strategy<Value = Self> {
        prop_oneof![
            1 => any::<Index>().prop_map(Self::Cut),
            4 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Self::Byte(at, byte)),
            4 => (any::<Index>(), select(&ODD_NUMBERS[..]), select(&[1, 2, 4, 8][..]))
                .prop_map(|(at, number, bytes)| Self::Number(at, number, bytes)),
            1 => (any::<Index>(), 1..64usize).prop_map(|(at, bytes)| Self::Remove(at, bytes)),
            2 => (any::<Index>(), any::<Index>(), 1..64usize)
                .prop_map(|(from, to, bytes)| Self::Copy(from, to, bytes)),
        ]
    }

    fn apply(&self, file: &mut Vec<u8>) {
        if file.is_empty() {
            return;
        }
        let len = file.len();
        match *self {
            Self::Cut(at) => file.truncate(at.index(len)),
            Self::Byte(at, byte) => file[at.index(len)] = byte,
            Self::Number(at, number, bytes) => {
                let at = at.index(len);
                let end = (at + bytes).min(len);
                file[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
            Self::Remove(at, bytes) => {
                let at = at.index(len);
                file.drain(at..(at + bytes).min(len));
            }
            Self::Copy(from, to, bytes) => {
                let (from, to) = (from.index(len), to.index(len));
                let bytes = bytes.min(len - from.max(to));
                file.copy_within(from..from + bytes, to);
            }
        }
    }
}

/// Opens a file and reads all of it, or is refused.
fn use_up(file: Vec<u8>) {
    static LIMITED: Once = Once::new();
    LIMITED.call_once(|| {
        let limit = Rlimit { current: Some(MOST_BYTES), maximum: Some(MOST_BYTES) };
        setrlimit(Resource::As, limit).unwrap();
    });
    let len = file.len();
    let mut file = match WeightsFile::new(Cursor::new(file)) {
        Ok(file) => file,
        Err(error) => {
            let error = error.to_string();
            assert!(!error.contains('\n') && error.len() < 1000, "{error}");
            return;
        }
    };
    let _ = Encoder::of(&file);
    for (name, stored) in file.tensors().clone() {
        if let Dtype::Other(_) = stored.dtype() {
            continue;
        }
        let elements = file.read(&stored).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(elements.len(), stored.shape().iter().product::<usize>());
        assert!(elements.len() * 2 <= len, "{name} has more elements than the file has room for");
    }
}

fn damaged(name: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name);
    let whole = std::fs::read(path).unwrap();
    use_up(whole.clone());
    let cases = std::env::var("MUSHER_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok());
    let config =
        ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases.unwrap_or(20_000)) };
    proptest!(config, |(damages in proptest::collection::vec(Damage::any(), 1..6))| {
        let mut file = whole.clone();
        damages.iter().for_each(|damage| damage.apply(&mut file));
        use_up(file);
    });
}

#[test]
fn damaged_zip_archives_are_survived() {
    damaged("tiny.pth");
    damaged("tiny_wrapped.pth");
}

#[test]
fn damaged_legacy_files_are_survived() {
    damaged("tiny_legacy.pth");
}

#[test]
fn damaged_safetensors_are_survived() {
    damaged("tiny.safetensors");
}

#[test]
fn damaged_hdf5_is_survived() {
    damaged("tiny.h5");
    damaged("tiny_chunked.h5");
}

#[test]
fn every_truncation_is_survived() {
    for name in ["tiny.pth", "tiny_legacy.pth", "tiny.safetensors", "tiny.h5", "hostile.pth"] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name);
        let whole = std::fs::read(path).unwrap();
        for len in 0..whole.len() {
            use_up(whole[..len].to_vec());
        }
    }
}

/// A pickle of random opcodes behind the legacy container's first pickles.
#[test]
fn random_pickles_are_survived() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tiny_legacy.pth");
    let whole = std::fs::read(path).unwrap();
    // The fourth pickle begins behind the third's end.
    let ends: Vec<_> = whole.windows(3).enumerate().filter(|(_, w)| *w == b".\x80\x02").collect();
    let head = &whole[..ends[2].0 + 1];
    let opcodes = b"\x80(0N\x88\x89KMJ\x8aX\x8cTU)\x85\x86\x87t]lae}dsuqr\x94hjc\x93R\x81bQ.";
    proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(20_000) }, |(program in proptest::collection::vec(
        prop_oneof![4 => select(&opcodes[..]), 1 => any::<u8>(), 1 => 0..4u8], 0..200))| {
        use_up([head, &program].concat());
    });
}
