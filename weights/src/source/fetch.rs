//! A file over HTTP, into a place where it appears whole and verified, or not at all.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use sha2::Digest;
use tempfile::NamedTempFile;

use super::{CHUNK, Sha256, SourceError};

/// For a connection, and for more of an answer to come.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest file that is fetched; ResNet50s have 100 MB.
const MOST_BYTES: u64 = 4 << 30;

/// Returns the file's SHA-256 in hex.
pub(super) fn fetch(
    url: &str,
    expected: &Sha256,
    place: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<String, SourceError> {
    let failed = |reason: String| SourceError::Fetch { url: url.into(), reason };
    let io = |file: &Path| {
        let file = file.to_owned();
        move |source| SourceError::Io { file, source }
    };
    let directory = place.parent().unwrap_or(place);
    fs::create_dir_all(directory).map_err(io(directory))?;
    let mut file = NamedTempFile::new_in(directory).map_err(io(directory))?;

    let response = agent().get(url).call().map_err(|error| match error {
        ureq::Error::StatusCode(status) => SourceError::Status { url: url.into(), status },
        other => failed(other.to_string()),
    })?;
    let claimed = response.body().content_length();
    let mut reader = response.into_body().into_with_config().limit(MOST_BYTES).reader();
    let mut digest = sha2::Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let mut received = 0u64;
    loop {
        let read = reader.read(&mut chunk).map_err(|error| failed(error.to_string()))?;
        if read == 0 {
            break;
        }
        received += read as u64;
        digest.update(&chunk[..read]);
        file.write_all(&chunk[..read]).map_err(io(place))?;
        progress(received);
    }
    if let Some(claimed) = claimed.filter(|&claimed| claimed != received) {
        return Err(failed(format!("the connection ended after {received} of {claimed} bytes")));
    }
    let found = hex::encode(digest.finalize());
    if !expected.fits(&found) {
        return Err(SourceError::OtherDigest { url: url.into(), found, expected: expected.clone() });
    }
    file.as_file().sync_all().map_err(io(place))?;
    file.persist(place).map_err(|error| io(place)(error.error))?;
    Ok(found)
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .timeout_resolve(Some(PATIENCE))
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .user_agent(concat!("musher/", env!("CARGO_PKG_VERSION")));
    config.build().into()
}
