//! The connecting side of a formation: tries again until the successor accepts, or somebody stops
//! asking. It has no deadline of its own, so a successor may listen long before it answers.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    RingSpec, Secret,
    message::{Inbox, say},
};
use crate::{
    handshake::{CHALLENGE_BYTES, HELLO_BYTES, Introduction, NONCE_BYTES, PROOF_BYTES, Proofs, Role},
    ring::Membership,
};

/// Between attempts to reach the successor: it may start a little later.
const RETRY_FIRST: Duration = Duration::from_millis(10);
const RETRY_MOST: Duration = Duration::from_millis(250);

/// The attempt to reach the successor.
pub(super) struct Dial<'a> {
    secret: &'a Secret,
    introduction: Introduction,
    address: SocketAddr,
    progress: Progress,
    backoff: Duration,
    last_failure: String,
}

enum Progress {
    Idle { retry_at: Instant },
    Connecting(Socket),
    Greeted { stream: TcpStream, hello: [u8; HELLO_BYTES], inbox: Inbox<CHALLENGE_BYTES> },
    Proved { stream: TcpStream, proofs: Proofs, inbox: Inbox<PROOF_BYTES> },
    Connected(Arc<TcpStream>),
}

impl<'a> Dial<'a> {
    pub fn new(spec: &'a RingSpec, member: &Membership, now: Instant) -> Self {
        let introduction = Introduction {
            generation: member.generation,
            world: member.world,
            from: member.rank,
            to: member.successor(),
            purpose: spec.purpose,
        };
        Self {
            secret: &spec.secret,
            introduction,
            address: spec.successor,
            progress: Progress::Idle { retry_at: now },
            backoff: RETRY_FIRST,
            last_failure: "it did not answer".into(),
        }
    }

    /// The successor, once it has accepted.
    pub fn connected(&self) -> Option<&Arc<TcpStream>> {
        match &self.progress {
            Progress::Connected(stream) => Some(stream),
            _ => None,
        }
    }

    /// Why the last attempt failed.
    pub fn last_failure(&self) -> &str {
        &self.last_failure
    }

    /// What a [`step`](Self::step) waits for.
    pub fn awaited(&self) -> Option<PollFd<'_>> {
        match &self.progress {
            Progress::Idle { .. } | Progress::Connected(_) => None,
            Progress::Connecting(socket) => Some(PollFd::new(socket, PollFlags::OUT)),
            Progress::Greeted { stream, .. } | Progress::Proved { stream, .. } => {
                Some(PollFd::new(stream, PollFlags::IN))
            }
        }
    }

    /// When to try again.
    pub fn wake(&self) -> Option<Instant> {
        match self.progress {
            Progress::Idle { retry_at } => Some(retry_at),
            _ => None,
        }
    }

    /// Goes as far as it can without waiting.
    pub fn step(&mut self, now: Instant) {
        loop {
            let idle = Progress::Idle { retry_at: now + self.backoff };
            let before = std::mem::replace(&mut self.progress, idle);
            match self.advance(before, now) {
                Ok(Moved::On(next)) => self.progress = next,
                Ok(Moved::Not(same)) => {
                    self.progress = same;
                    return;
                }
                // Refused, unreachable, another generation still: all pass, or the deadline does.
                Err(error) => {
                    self.last_failure = error.to_string();
                    self.backoff = (self.backoff * 2).min(RETRY_MOST);
                    return;
                }
            }
        }
    }

    fn advance(&self, progress: Progress, now: Instant) -> io::Result<Moved> {
        Ok(match progress {
            Progress::Idle { retry_at } if now >= retry_at => {
                Moved::On(Progress::Connecting(connect(self.address)?))
            }
            Progress::Connecting(socket) if is_connected(&socket)? => {
                let mut stream = TcpStream::from(socket);
                let hello = self.introduction.hello(&rand::random());
                say(&mut stream, &hello)?;
                Moved::On(Progress::Greeted { stream, hello, inbox: Inbox::new() })
            }
            Progress::Greeted { mut stream, hello, mut inbox } => match inbox.fill(&mut stream)? {
                None => Moved::Not(Progress::Greeted { stream, hello, inbox }),
                Some(challenge) => {
                    let (nonce, proof) = challenge.split_at(NONCE_BYTES);
                    let nonce = nonce.try_into().expect("the split is at a nonce's length");
                    let proofs = Proofs::new(&self.secret.0, &hello, nonce);
                    if !proofs.verify(Role::Responder, proof) {
                        return Err(wrong("it does not know the generation's secret"));
                    }
                    say(&mut stream, &proofs.make(Role::Initiator))?;
                    Moved::On(Progress::Proved { stream, proofs, inbox: Inbox::new() })
                }
            },
            Progress::Proved { mut stream, proofs, mut inbox } => match inbox.fill(&mut stream)? {
                None => Moved::Not(Progress::Proved { stream, proofs, inbox }),
                Some(proof) if proofs.verify(Role::Accepted, &proof) => {
                    Moved::On(Progress::Connected(Arc::new(stream)))
                }
                Some(_) => return Err(wrong("it did not accept this rank")),
            },
            waiting @ (Progress::Idle { .. } | Progress::Connecting(_) | Progress::Connected(_)) => {
                Moved::Not(waiting)
            }
        })
    }
}

enum Moved {
    On(Progress),
    Not(Progress),
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Starts to connect, without waiting.
fn connect(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Err(e) if e.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => Err(e),
        _ => Ok(socket),
    }
}

fn is_connected(socket: &Socket) -> io::Result<bool> {
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    match socket.peer_addr() {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(e) => Err(e),
    }
}
