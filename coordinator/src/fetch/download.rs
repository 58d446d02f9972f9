//! A file over HTTP into a place that grows: what is there is not asked for again, and a connection that breaks off is
//! taken up where it broke. Whether it is the right file is not decided here.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::{CHUNK, FetchError, Progress, unusable};

/// For a connection, and for more of an answer to come.
const PATIENCE: Duration = Duration::from_secs(60);
/// Tries in a row that bring nothing before it is given up.
const FRUITLESS_TRIES: u32 = 5;
/// Before the second try; twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// Returns once the server has no more to send.
pub(super) fn download(
    url: &str,
    part: &Path,
    name: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FetchError> {
    let agent = agent();
    let mut fruitless = 0;
    loop {
        let before = received(part);
        let reason = match receive(&agent, url, part, name, progress)? {
            Answer::Complete => return Ok(()),
            Answer::Broken { reason } => reason,
        };
        fruitless = if received(part) > before { 0 } else { fruitless + 1 };
        if fruitless == FRUITLESS_TRIES {
            return Err(FetchError::Broken { url: url.into(), reason, received: received(part) });
        }
        progress(Progress::Retrying { reason: &reason });
        thread::sleep(FIRST_PAUSE * (1 << fruitless));
    }
}

enum Answer {
    Complete,
    Broken { reason: String },
}

/// One request: for what follows the bytes at hand.
fn receive(
    agent: &ureq::Agent,
    url: &str,
    part: &Path,
    name: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<Answer, FetchError> {
    let at_hand = received(part);
    let request = agent.get(url);
    let request = if at_hand > 0 { request.header("Range", format!("bytes={at_hand}-")) } else { request };
    let response = match request.call() {
        Ok(response) => response,
        // Nothing follows them: it was complete, or is another file, which its digest will show.
        Err(ureq::Error::StatusCode(416)) if at_hand > 0 => return Ok(Answer::Complete),
        Err(ureq::Error::StatusCode(status)) if status < 500 => {
            return Err(FetchError::Status { url: url.into(), status });
        }
        Err(error) => return Ok(Answer::Broken { reason: error.to_string() }),
    };
    let follows = response.status() == 206 && begins_at(&response) == Some(at_hand);
    let mut file = if follows { OpenOptions::new().append(true).open(part) } else { File::create(part) }
        .map_err(unusable(part))?;
    let mut bytes = if follows { at_hand } else { 0 };
    let total = response.body().content_length().map(|more| bytes + more);

    let mut reader = response.into_body().into_reader();
    let mut chunk = vec![0; CHUNK];
    loop {
        progress(Progress::Receiving { file: name, bytes, total });
        match reader.read(&mut chunk) {
            Ok(0) if total.is_some_and(|total| bytes < total) => {
                return Ok(Answer::Broken { reason: "the connection ended early".into() });
            }
            Ok(0) => break,
            Ok(read) => {
                file.write_all(&chunk[..read]).map_err(unusable(part))?;
                bytes += read as u64;
            }
            Err(error) => return Ok(Answer::Broken { reason: error.to_string() }),
        }
    }
    file.sync_all().map_err(unusable(part))?;
    Ok(Answer::Complete)
}

/// Of `Content-Range: bytes 5-9/10` the 5.
fn begins_at<B>(response: &ureq::http::Response<B>) -> Option<u64> {
    let range = response.headers().get("Content-Range")?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

fn received(part: &Path) -> u64 {
    fs::metadata(part).map_or(0, |metadata| metadata.len())
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
