//! A gzipped tar with one folder in it, unpacked beside its place and then moved there. Nothing of an archive is
//! written anywhere else: paths that lead out, links and devices end the unpacking.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Component, Path};

use flate2::read::MultiGzDecoder;
use tar::EntryType;

use super::{Archive, FetchError, Progress, unusable};

/// Puts the archive's folder into `directory`.
pub(super) fn unpack(
    file: &Path,
    archive: &Archive,
    directory: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FetchError> {
    progress(Progress::Unpacking { folder: archive.folder });
    let scratch = tempfile::Builder::new().prefix(".unpacking-").tempdir_in(directory);
    let scratch = scratch.map_err(unusable(directory))?;
    unpack_into(scratch.path(), file, archive)?;
    let (from, to) = (scratch.path().join(archive.folder), directory.join(archive.folder));
    fs::rename(from, &to).map_err(unusable(&to))
}

fn unpack_into(scratch: &Path, file: &Path, archive: &Archive) -> Result<(), FetchError> {
    let refused = |reason: String| FetchError::Archive { archive: file.display().to_string(), reason };
    let opened = File::open(file).map_err(unusable(file))?;
    let mut tar = tar::Archive::new(MultiGzDecoder::new(BufReader::new(opened)));
    tar.set_preserve_permissions(false);
    tar.set_preserve_mtime(false);
    let mut has_folder = false;
    for entry in tar.entries().map_err(|error| refused(error.to_string()))? {
        let mut entry = entry.map_err(|error| refused(error.to_string()))?;
        let path = entry.path().map_err(|error| refused(error.to_string()))?.into_owned();
        if !stays_in(archive.folder, &path) {
            return Err(refused(format!("{} leads out of {}/", path.display(), archive.folder)));
        }
        if !matches!(entry.header().entry_type(), EntryType::Regular | EntryType::Directory) {
            return Err(refused(format!("{} is neither a file nor a folder", path.display())));
        }
        has_folder = true;
        entry.unpack_in(scratch).map_err(|error| refused(error.to_string()))?;
    }
    match has_folder {
        true => Ok(()),
        false => Err(refused(format!("it has no {}/", archive.folder))),
    }
}

fn stays_in(folder: &str, path: &Path) -> bool {
    let mut components = path.components().filter(|component| !matches!(component, Component::CurDir));
    components.next() == Some(Component::Normal(folder.as_ref()))
        && components.all(|component| matches!(component, Component::Normal(_)))
}
