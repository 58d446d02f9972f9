//! The Oxford-IIIT Pet data set's archives: downloaded, verified, and unpacked into a directory. An interrupted
//! download goes on where it was; a folder appears whole or not at all.

mod download;
mod unpack;

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use md5::{Digest, Md5};

/// Where the archives come from unless another place is named.
pub const ORIGIN: &str = "https://www.robots.ox.ac.uk/~vgg/data/pets/data";

/// The data set, as its authors publish it.
pub const ARCHIVES: [Archive<'static>; 2] = [
    Archive { file: "images.tar.gz", folder: "images", md5: "5c4f3ee8e5d25df40f4fd59a7f44e54c" },
    Archive { file: "annotations.tar.gz", folder: "annotations", md5: "95a8c909bbe2e81eed6a22bccdf3f68f" },
];

/// One file of a data set that is published in several.
#[derive(Clone, Copy, Debug)]
pub struct Archive<'a> {
    pub file: &'a str,
    /// The one folder that is in it.
    pub folder: &'a str,
    /// In lower-case hex.
    pub md5: &'a str,
}

/// Where archives are, by their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mirror {
    /// Without a slash at its end.
    Url(String),
    Directory(PathBuf),
}

/// What happens, for those who watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress<'a> {
    /// The archive's folder is there already.
    Present {
        folder: &'a str,
    },
    /// Of how many bytes, if the server says so.
    Receiving {
        file: &'a str,
        bytes: u64,
        total: Option<u64>,
    },
    /// A connection broke off.
    Retrying {
        reason: &'a str,
    },
    Verifying {
        file: &'a str,
    },
    Unpacking {
        folder: &'a str,
    },
}

/// Why a data set is not there.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("{} can't be used: {cause}", file.display())]
    Io { file: PathBuf, cause: io::Error },
    #[error("{url} answers with HTTP status {status}; name another place with --from")]
    Status { url: String, status: u16 },
    #[error(
        "{url} can't be fetched: {reason}; run this again later to go on behind the {received} bytes that are there, \
         or name another place with --from"
    )]
    Broken { url: String, reason: String, received: u64 },
    #[error("{place} has MD5 {found}, but {expected} is expected: it is not the file{what_now}")]
    OtherDigest { place: String, found: String, expected: String, what_now: &'static str },
    #[error("{archive} is not unpacked: {reason}")]
    Archive { archive: String, reason: String },
}

impl Mirror {
    pub fn parse(text: &str) -> Self {
        match text.starts_with("https://") || text.starts_with("http://") {
            true => Self::Url(text.trim_end_matches('/').to_owned()),
            false => Self::Directory(text.strip_prefix("file://").unwrap_or(text).into()),
        }
    }
}

impl fmt::Display for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => f.write_str(url),
            Self::Directory(directory) => directory.display().fmt(f),
        }
    }
}

/// Brings each archive's folder into `directory`, which need not exist; one that is there is left alone.
///
/// # Errors
/// The first archive's that is not to be had. What was received stays for the next try, unless it is wrong.
pub fn fetch(
    archives: &[Archive],
    from: &Mirror,
    directory: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FetchError> {
    fs::create_dir_all(directory).map_err(unusable(directory))?;
    for archive in archives {
        if directory.join(archive.folder).exists() {
            progress(Progress::Present { folder: archive.folder });
            continue;
        }
        match from {
            Mirror::Directory(mirror) => {
                let file = mirror.join(archive.file);
                verify(&file, &file.display().to_string(), archive, "", progress)?;
                unpack::unpack(&file, archive, directory, progress)?;
            }
            Mirror::Url(base) => {
                let url = format!("{base}/{}", archive.file);
                let part = directory.join(format!("{}.part", archive.file));
                download::download(&url, &part, archive.file, progress)?;
                let verified =
                    verify(&part, &format!("what {url} sent"), archive, ", and was not kept", progress);
                if let Err(error @ FetchError::OtherDigest { .. }) = verified {
                    fs::remove_file(&part).map_err(unusable(&part))?;
                    return Err(error);
                }
                verified?;
                unpack::unpack(&part, archive, directory, progress)?;
                fs::remove_file(&part).map_err(unusable(&part))?;
            }
        }
    }
    Ok(())
}

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 18;

fn verify(
    file: &Path,
    place: &str,
    archive: &Archive,
    what_now: &'static str,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FetchError> {
    progress(Progress::Verifying { file: archive.file });
    let found = File::open(file).and_then(md5_of).map_err(unusable(file))?;
    match found == archive.md5 {
        true => Ok(()),
        false => Err(FetchError::OtherDigest {
            place: place.to_owned(),
            found,
            expected: archive.md5.to_owned(),
            what_now,
        }),
    }
}

fn md5_of(mut file: File) -> io::Result<String> {
    let mut digest = Md5::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hex::encode(digest.finalize())),
            read => digest.update(&chunk[..read]),
        }
    }
}

fn unusable(file: &Path) -> impl FnOnce(io::Error) -> FetchError {
    move |cause| FetchError::Io { file: file.to_owned(), cause }
}
