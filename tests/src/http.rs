//! A client of the coordinator's HTTP side, as small as it gets.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
};

/// An answer, its body whole.
#[derive(Debug)]
pub struct Answer {
    pub code: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    #[track_caller]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("the body is text")
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{}: {error}", self.text()))
    }
}

/// `GET PATH` of `http://HOST:PORT`.
#[track_caller]
pub fn get(url: &str, path: &str) -> Answer {
    let mut whole = Vec::new();
    ask(url, path).read_to_end(&mut whole).expect("the answer comes to its end");
    let end = whole.windows(4).position(|four| four == b"\r\n\r\n").expect("the answer has a head");
    let head = String::from_utf8_lossy(&whole[..end]).into_owned();
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("the head has a code");
    let body = &whole[end + 4..];
    let body = if head.to_ascii_lowercase().contains("chunked") { dechunked(body) } else { body.to_vec() };
    Answer { code, head, body }
}

/// The lines of `GET PATH`, head included, as they come.
#[track_caller]
pub fn follow(url: &str, path: &str) -> impl Iterator<Item = String> {
    BufReader::new(ask(url, path)).lines().map_while(Result::ok)
}

#[track_caller]
fn ask(url: &str, path: &str) -> TcpStream {
    let host = url.strip_prefix("http://").unwrap_or(url);
    let mut stream = TcpStream::connect(host).expect("the server is there");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
        .expect("the server takes a request");
    stream
}

fn dechunked(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(end) = body.windows(2).position(|two| two == b"\r\n") {
        let size =
            std::str::from_utf8(&body[..end]).ok().and_then(|size| usize::from_str_radix(size, 16).ok());
        let Some(size @ 1..) = size else { break };
        whole.extend(&body[end + 2..end + 2 + size]);
        body = &body[end + 4 + size..];
    }
    whole
}
