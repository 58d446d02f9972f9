//! Fetching, against a real server on the loopback interface.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use musher_weights::source::{Cache, Source};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const CONTENT: &[u8] = &[7; 300_000];

/// Answers each path in its own way.
struct Server {
    address: std::net::SocketAddr,
    requests: Arc<AtomicUsize>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(AtomicUsize::new(0));
        let counter = requests.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                counter.fetch_add(1, Ordering::SeqCst);
                answer(stream.unwrap());
            }
        });
        Self { address, requests }
    }

    fn source(&self, path: &str, content: &[u8]) -> Source {
        let digest = hex::encode(Sha256::digest(content));
        Source::parse(&format!("http://{}{path}#sha256={digest}", self.address)).unwrap()
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn answer(mut stream: TcpStream) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let request = lines.next().unwrap().unwrap();
    while lines.next().is_some_and(|line| !line.unwrap().is_empty()) {}
    let length = CONTENT.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    let write = |stream: &mut TcpStream, head: &str, body: &[u8]| {
        // The client may have hung up.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    };
    match request.split(' ').nth(1).unwrap() {
        "/whole.pth" => write(&mut stream, &head, CONTENT),
        "/cut.pth" => write(&mut stream, &head, &CONTENT[..length / 2]),
        "/moved.pth" => {
            write(
                &mut stream,
                "HTTP/1.1 302 Found\r\nLocation: /whole.pth\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
                &[],
            );
        }
        _ => write(&mut stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", &[]),
    }
}

fn sentence(source: &Source, cache: &TempDir) -> String {
    let error = source.obtain(&Cache::at(cache.path()), |_| ()).unwrap_err().to_string();
    assert!(!error.contains('\n') && !error.ends_with('.'), "{error}");
    error
}

fn files(cache: &TempDir) -> usize {
    let directories = fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().path());
    directories.map(|directory| fs::read_dir(directory).unwrap().count()).sum()
}

#[test]
fn a_file_is_fetched_once() {
    let (server, cache) = (Server::start(), TempDir::new().unwrap());
    let source = server.source("/whole.pth", CONTENT);
    let mut heard = 0;
    for _ in 0..2 {
        let found = source.obtain(&Cache::at(cache.path()), |received| heard = received).unwrap();
        assert_eq!(fs::read(&found.path).unwrap(), CONTENT);
        assert_eq!(found.sha256, hex::encode(Sha256::digest(CONTENT)));
        assert!(found.path.ends_with("whole.pth"));
    }
    assert_eq!((server.requests(), heard), (1, CONTENT.len() as u64));
}

#[test]
fn a_damaged_copy_is_fetched_again() {
    let (server, cache) = (Server::start(), TempDir::new().unwrap());
    let source = server.source("/whole.pth", CONTENT);
    let obtain = || source.obtain(&Cache::at(cache.path()), |_| ()).unwrap().path;
    fs::write(obtain(), b"short").unwrap();
    assert_eq!(fs::read(obtain()).unwrap(), CONTENT);
    assert_eq!((server.requests(), files(&cache)), (2, 1));
}

#[test]
fn a_redirection_is_followed() {
    let (server, cache) = (Server::start(), TempDir::new().unwrap());
    let source = server.source("/moved.pth", CONTENT);
    assert!(source.obtain(&Cache::at(cache.path()), |_| ()).is_ok());
}

#[test]
fn another_content_is_refused_and_not_kept() {
    let (server, cache) = (Server::start(), TempDir::new().unwrap());
    let error = sentence(&server.source("/whole.pth", b"other"), &cache);
    assert!(error.contains(&hex::encode(Sha256::digest(CONTENT))), "{error}");
    assert!(error.contains(&hex::encode(Sha256::digest(b"other"))), "{error}");
    assert_eq!(files(&cache), 0);
}

#[test]
fn a_cut_connection_leaves_nothing() {
    let (server, cache) = (Server::start(), TempDir::new().unwrap());
    let error = sentence(&server.source("/cut.pth", CONTENT), &cache);
    assert!(error.contains("can't be fetched"), "{error}");
    assert_eq!(files(&cache), 0);
}

#[test]
fn what_is_not_there_is_told() {
    let (server, cache) = (Server::start(), TempDir::new().unwrap());
    let error = sentence(&server.source("/none.pth", CONTENT), &cache);
    assert!(error.contains("404"), "{error}");
    // Nobody listens at a port that was just given back.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let source = Source::parse(&format!("http://{free}/resnet50-0676ba61.pth")).unwrap();
    assert!(sentence(&source, &cache).contains("refused"));
}
