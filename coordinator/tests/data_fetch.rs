//! The fetching of a data set's archives, against a real server on the loopback interface that cuts connections, knows
//! ranges or not, and has wrong files; and archives that would write where they may not.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use flate2::Compression;
use flate2::write::GzEncoder;
use md5::{Digest, Md5};
use musher_coordinator::fetch::{Archive, FetchError, Mirror, Progress, fetch};
use tempfile::TempDir;

/// Bytes that a file of the archive has; they do not compress.
const CONTENT_BYTES: usize = 300_000;

/// How a server treats one request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Manner {
    Whole,
    /// The connection ends after so many bytes of the body.
    CutAfter(usize),
    /// As one that has never heard of ranges.
    Rangeless,
    Status(u16),
}

struct Server {
    address: SocketAddr,
    /// The first byte that each request asked for.
    asked: Arc<Mutex<Vec<usize>>>,
}

impl Server {
    /// Treats its requests in these manners, in turn, and the last one for ever.
    fn start(content: Vec<u8>, manners: &[Manner]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<usize>>> = Arc::default();
        let (manners, log) = (manners.to_vec(), asked.clone());
        thread::spawn(move || {
            for (at, stream) in listener.incoming().enumerate() {
                let manner = manners[at.min(manners.len() - 1)];
                log.lock().unwrap().push(answer(stream.unwrap(), &content, manner));
            }
        });
        Self { address, asked }
    }

    fn mirror(&self) -> Mirror {
        Mirror::parse(&format!("http://{}/pets/", self.address))
    }

    fn asked(&self) -> Vec<usize> {
        self.asked.lock().unwrap().clone()
    }
}

fn answer(mut stream: TcpStream, content: &[u8], manner: Manner) -> usize {
    let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
    let head: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
    let range = head.iter().find_map(|line| {
        let line = line.to_ascii_lowercase();
        line.strip_prefix("range: bytes=")?.strip_suffix('-')?.parse().ok()
    });
    assert!(head[0].starts_with("GET /pets/set.tar.gz "), "{}", head[0]);
    let from = range.filter(|_| manner != Manner::Rangeless).unwrap_or(0);
    let (status, body) = match manner {
        Manner::Status(status) => (status.to_string(), &[][..]),
        _ if from >= content.len() => ("416".into(), &[][..]),
        _ if range.is_some() && manner != Manner::Rangeless => ("206".into(), &content[from..]),
        _ => ("200".into(), content),
    };
    let mut text = format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    if status == "206" {
        text += &format!("Content-Range: bytes {from}-{}/{}\r\n", content.len() - 1, content.len());
    }
    text += "\r\n";
    let sent = match manner {
        Manner::CutAfter(bytes) => &body[..bytes.min(body.len())],
        _ => body,
    };
    // The client may have hung up.
    let _ = stream.write_all(text.as_bytes()).and_then(|()| stream.write_all(sent));
    range.unwrap_or(0)
}

fn noise() -> Vec<u8> {
    let mut state = 7u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(CONTENT_BYTES).collect()
}

/// A gzipped tar of files by their paths, which are written as they are.
fn archive(files: &[(&str, tar::EntryType)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for &(path, kind) in files {
        let content = if kind == tar::EntryType::Regular { noise() } else { Vec::new() };
        let mut header = tar::Header::new_ustar();
        // `set_path` would refuse what the tests are after.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        if kind == tar::EntryType::Symlink {
            header.set_link_name("/etc").unwrap();
        }
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append(&header, content.as_slice()).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

fn good() -> Vec<u8> {
    archive(&[("images/", tar::EntryType::Directory), ("images/a.jpg", tar::EntryType::Regular)])
}

fn md5_of(content: &[u8]) -> String {
    hex::encode(Md5::digest(content))
}

fn fetch_set(from: &Mirror, md5: &str, directory: &Path) -> (Result<(), FetchError>, Vec<String>) {
    let mut told = Vec::new();
    let archives = [Archive { file: "set.tar.gz", folder: "images", md5 }];
    let fetched = fetch(&archives, from, directory, &mut |progress: Progress| {
        if !matches!(progress, Progress::Receiving { .. }) {
            told.push(format!("{progress:?}"));
        }
    });
    (fetched, told)
}

fn sentence(fetched: Result<(), FetchError>) -> String {
    let text = fetched.unwrap_err().to_string();
    assert!(!text.contains('\n') && !text.ends_with('.'), "{text}");
    text
}

fn names(directory: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(directory.path()).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_archive_is_fetched_once_and_unpacked() {
    let (content, directory) = (good(), TempDir::new().unwrap());
    let server = Server::start(content.clone(), &[Manner::Whole]);
    for _ in 0..2 {
        fetch_set(&server.mirror(), &md5_of(&content), directory.path()).0.unwrap();
        assert_eq!(names(&directory), ["images"]);
        assert_eq!(fs::read(directory.path().join("images/a.jpg")).unwrap(), noise());
    }
    assert_eq!(server.asked(), [0]);
}

#[test]
fn a_cut_connection_is_taken_up_where_it_broke() {
    let (content, directory) = (good(), TempDir::new().unwrap());
    let manners = [Manner::CutAfter(1000), Manner::Status(503), Manner::CutAfter(200_000), Manner::Whole];
    let server = Server::start(content.clone(), &manners);
    let (fetched, told) = fetch_set(&server.mirror(), &md5_of(&content), directory.path());
    fetched.unwrap();
    assert_eq!(server.asked(), [0, 1000, 1000, 201_000]);
    assert_eq!(told.iter().filter(|told| told.contains("Retrying")).count(), 3, "{told:?}");
    assert_eq!(fs::read(directory.path().join("images/a.jpg")).unwrap(), noise());
}

#[test]
fn what_was_received_before_serves_again() {
    let (content, directory) = (good(), TempDir::new().unwrap());
    // A line that gives nothing any more is given up.
    let server = Server::start(content.clone(), &[Manner::CutAfter(5000), Manner::CutAfter(0)]);
    let text = sentence(fetch_set(&server.mirror(), &md5_of(&content), directory.path()).0);
    assert!(text.contains("behind the 5000 bytes"), "{text}");
    assert_eq!(names(&directory), ["set.tar.gz.part"]);

    let server = Server::start(content.clone(), &[Manner::Whole]);
    fetch_set(&server.mirror(), &md5_of(&content), directory.path()).0.unwrap();
    assert_eq!((server.asked(), names(&directory)), (vec![5000], vec!["images".to_owned()]));
}

#[test]
fn a_whole_download_that_was_not_unpacked_is_not_asked_for_again() {
    let (content, directory) = (good(), TempDir::new().unwrap());
    fs::write(directory.path().join("set.tar.gz.part"), &content).unwrap();
    let server = Server::start(content.clone(), &[Manner::Whole]);
    fetch_set(&server.mirror(), &md5_of(&content), directory.path()).0.unwrap();
    assert_eq!((server.asked(), names(&directory)), (vec![content.len()], vec!["images".to_owned()]));
}

#[test]
fn a_server_without_ranges_sends_it_anew() {
    let (content, directory) = (good(), TempDir::new().unwrap());
    let server = Server::start(content.clone(), &[Manner::CutAfter(1000), Manner::Rangeless]);
    fetch_set(&server.mirror(), &md5_of(&content), directory.path()).0.unwrap();
    assert_eq!((server.asked(), names(&directory)), (vec![0, 1000], vec!["images".to_owned()]));
}

#[test]
fn another_file_is_refused_and_not_kept() {
    let (content, directory) = (good(), TempDir::new().unwrap());
    let server = Server::start(content.clone(), &[Manner::Whole]);
    let text = sentence(fetch_set(&server.mirror(), &md5_of(b"other"), directory.path()).0);
    assert!(text.contains(&md5_of(&content)) && text.contains(&md5_of(b"other")), "{text}");
    assert!(names(&directory).is_empty());
    let server = Server::start(content, &[Manner::Status(404)]);
    let text = sentence(fetch_set(&server.mirror(), "", directory.path()).0);
    assert!(text.contains("HTTP status 404") && text.contains("--from"), "{text}");
    assert_eq!(server.asked().len(), 1);
}

#[test]
fn a_directory_serves_as_well() {
    let (content, mirror, directory) = (good(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let from = Mirror::parse(&format!("file://{}", mirror.path().display()));
    let text = sentence(fetch_set(&from, &md5_of(&content), directory.path()).0);
    assert!(text.contains("set.tar.gz can't be used"), "{text}");
    fs::write(mirror.path().join("set.tar.gz"), &content).unwrap();
    assert!(sentence(fetch_set(&from, &md5_of(b"x"), directory.path()).0).contains("it is not the file"));
    fetch_set(&from, &md5_of(&content), directory.path()).0.unwrap();
    assert_eq!((names(&directory), names(&mirror)), (vec!["images".into()], vec!["set.tar.gz".into()]));
}

#[test]
fn nothing_is_written_outside_of_the_folder() {
    use tar::EntryType::{Char, Regular, Symlink};
    let cases = [
        ("images/../../evil.jpg", Regular, "leads out of images/"),
        ("/images/evil.jpg", Regular, "leads out of images/"),
        ("annotations/evil.png", Regular, "leads out of images/"),
        ("images/evil", Symlink, "neither a file nor a folder"),
        ("images/evil", Char, "neither a file nor a folder"),
    ];
    for (path, kind, expected) in cases {
        let (mirror, directory) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let content = archive(&[("images/a.jpg", Regular), (path, kind)]);
        fs::write(mirror.path().join("set.tar.gz"), &content).unwrap();
        let from = Mirror::Directory(mirror.path().into());
        let text = sentence(fetch_set(&from, &md5_of(&content), directory.path()).0);
        assert!(text.contains(expected), "{path}: {text}");
        assert!(names(&directory).is_empty(), "{path}: {:?}", names(&directory));
    }
    // Cut, empty, and no archive at all.
    let whole = good();
    for content in [&whole[..whole.len() / 2], &archive(&[])[..], b"<html>"] {
        let (mirror, directory) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        fs::write(mirror.path().join("set.tar.gz"), content).unwrap();
        let from = Mirror::Directory(mirror.path().into());
        assert!(sentence(fetch_set(&from, &md5_of(content), directory.path()).0).contains("is not unpacked"));
        assert!(names(&directory).is_empty());
    }
}
