//! Where a weights file comes from: a path, a URL, or a known name. What is fetched is fetched once, verified by its
//! SHA-256, and kept in the user's cache.

mod cache;
mod fetch;

use std::fmt;
use std::path::{Path, PathBuf};

pub use cache::{Cache, user_cache};

/// Names for files whose digests are known: torchvision's ImageNet weights, which it calls `IMAGENET1K_V1` and `_V2`.
const KNOWN: [(&str, &str, &str); 2] = [
    (
        "torchvision:resnet50-v1",
        "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    ),
    (
        "torchvision:resnet50",
        "https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
        "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
    ),
];
/// Hexadecimal digits of a SHA-256, and of the part of it that PyTorch writes into file names.
const DIGITS: usize = 64;
const DIGITS_IN_NAMES: usize = 8;
/// Bytes that are read at a time.
const CHUNK: usize = 1 << 18;

/// Where a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    File(PathBuf),
    Remote { url: String, sha256: Sha256 },
}

/// The beginning of a SHA-256 in lower-case hex, or all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sha256(String);

/// A file at hand.
#[derive(Debug)]
pub struct Obtained {
    pub path: PathBuf,
    /// Of its content, in hex.
    pub sha256: String,
}

/// Why a file is not at hand.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("no weights have this name: use a file, a URL, or one of {}", known_names())]
    UnknownName,
    #[error(
        "its digest is not known: append #sha256= and the 64 hexadecimal digits of the file's SHA-256, or fetch it and name the file"
    )]
    NoDigest,
    #[error("{0:?} is no SHA-256: it has 64 hexadecimal digits")]
    BadDigest(String),
    #[error("there is no place to keep it: set XDG_CACHE_HOME or HOME, or fetch it and name the file")]
    NoCache,
    #[error("{} can't be used: {source}", file.display())]
    Io { file: PathBuf, source: std::io::Error },
    #[error("{url} answers with HTTP status {status}: correct the address, or fetch it and name the file")]
    Status { url: String, status: u16 },
    #[error("{url} can't be fetched: {reason}; try again, or fetch it and name the file")]
    Fetch { url: String, reason: String },
    #[error(
        "what {url} sent has SHA-256 {found}, but {expected} is expected: it is not the file, and was not kept"
    )]
    OtherDigest { url: String, found: String, expected: Sha256 },
}

impl Source {
    /// A path, a `file://` or `http(s)://` URL, or a known name. A URL's digest is behind `#sha256=`, or, in part, in
    /// the file's name as PyTorch writes it: `resnet50-0676ba61.pth`.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        if let Some(path) = text.strip_prefix("file://") {
            return Ok(Self::File(path.into()));
        }
        if text.starts_with("https://") || text.starts_with("http://") {
            let (url, fragment) = text.split_once('#').unwrap_or((text, ""));
            let sha256 = match fragment.strip_prefix("sha256=") {
                Some(digits) => Sha256::whole(digits)?,
                None => Sha256::in_name_of(url).ok_or(SourceError::NoDigest)?,
            };
            return Ok(Self::Remote { url: url.into(), sha256 });
        }
        if let Some((_, url, sha256)) = KNOWN.iter().find(|(name, ..)| *name == text) {
            return Ok(Self::Remote { url: (*url).into(), sha256: Sha256((*sha256).into()) });
        }
        let is_name = ["torchvision:", "timm:", "keras:"].iter().any(|family| text.starts_with(family));
        match is_name && !Path::new(text).exists() {
            true => Err(SourceError::UnknownName),
            false => Ok(Self::File(text.into())),
        }
    }

    /// The file, after fetching it if `cache` has it not. `progress` hears of bytes, now and then.
    pub fn obtain(&self, cache: &Cache, mut progress: impl FnMut(u64)) -> Result<Obtained, SourceError> {
        match self {
            Self::File(path) => Ok(Obtained { path: path.clone(), sha256: cache::sha256_of(path)? }),
            Self::Remote { url, sha256 } => {
                let place = cache.place(url, sha256)?;
                if let Some(sha256) = cache::verified(&place, sha256)? {
                    return Ok(Obtained { path: place, sha256 });
                }
                let found = fetch::fetch(url, sha256, &place, &mut progress)?;
                Ok(Obtained { path: place, sha256: found })
            }
        }
    }
}

impl Sha256 {
    fn whole(digits: &str) -> Result<Self, SourceError> {
        let is_digest = digits.len() == DIGITS && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        match is_digest {
            true => Ok(Self(digits.to_ascii_lowercase())),
            false => Err(SourceError::BadDigest(digits.into())),
        }
    }

    /// As `torch.hub` does: eight or more digits between the last `-` and the ending.
    fn in_name_of(url: &str) -> Option<Self> {
        let name = url.split('?').next()?.rsplit('/').next()?;
        let (_, digits) = name.rsplit_once('.')?.0.rsplit_once('-')?;
        let is_digest = (DIGITS_IN_NAMES..=DIGITS).contains(&digits.len())
            && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        is_digest.then(|| Self(digits.into()))
    }

    fn fits(&self, sha256: &str) -> bool {
        sha256.starts_with(&self.0)
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)?;
        if self.0.len() < DIGITS { f.write_str("...") } else { Ok(()) }
    }
}

fn known_names() -> String {
    KNOWN.map(|(name, ..)| name).join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn files_urls_and_names_are_told_apart() {
        let file = |path: &str| Source::File(path.into());
        assert_eq!(Source::parse("w.pth").unwrap(), file("w.pth"));
        assert_eq!(Source::parse("file:///w.h5").unwrap(), file("/w.h5"));
        let remote = |text: &str| match Source::parse(text).unwrap() {
            Source::Remote { url, sha256 } => (url, sha256.to_string()),
            Source::File(path) => panic!("{}", path.display()),
        };
        let digest = "0676BA61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a";
        assert_eq!(
            remote(&format!("http://h/w.bin#sha256={digest}")),
            ("http://h/w.bin".into(), digest.to_lowercase())
        );
        assert_eq!(remote("https://h/a-b/resnet50-0676ba61.pth?x=1-2.3").1, "0676ba61...");
        for (name, url, sha256) in KNOWN {
            assert_eq!(remote(name), (url.into(), sha256.into()));
            assert!(Sha256::in_name_of(url).unwrap().fits(sha256), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_verified_is_refused() {
        for (text, part) in [
            ("https://h/w.pth", "#sha256="),
            ("https://h/resnet-50.pth", "#sha256="),
            ("https://h/w.pth#sha256=12", "64"),
            ("torchvision:resnet18", "torchvision:resnet50-v1"),
        ] {
            let error = Source::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
