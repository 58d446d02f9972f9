//! The accepting side of a formation: strangers come in, one leaves as the predecessor.
//!
//! Whoever else connects (a stale generation, a port scanner, a silent client) is dropped, and
//! costs a slot among [`MAX_PENDING`] for at most [`HANDSHAKE_LIMIT`]. When all slots are taken, whoever has been
//! silent longest makes room: the predecessor says at once who it is.

use std::{
    io,
    net::{TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags};
use tracing::debug;

use super::{
    RingSpec, Secret,
    message::{Inbox, say},
};
use crate::{
    CollectiveError,
    handshake::{CHALLENGE_BYTES, HELLO_BYTES, Introduction, NONCE_BYTES, Nonce, PROOF_BYTES, Proofs, Role},
    ring::Membership,
};

/// How long an accepted connection may take for its part of the handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(2);

/// Handshakes in progress at once.
const MAX_PENDING: usize = 64;

/// Connections that are taken in a row, before those that are here are heard again.
const ADMITTED_AT_ONCE: usize = MAX_PENDING / 2;

/// The listener and whoever is in its doorway.
pub(super) struct Door<'a> {
    listener: &'a TcpListener,
    secret: &'a Secret,
    expected: Introduction,
    pending: Vec<Pending>,
    accepted: Option<Arc<TcpStream>>,
    last_refusal: &'static str,
}

/// A connection that has not proved itself yet.
struct Pending {
    stream: TcpStream,
    until: Instant,
    awaited: Awaited,
}

enum Awaited {
    Hello(Inbox<HELLO_BYTES>),
    Proof(Proofs, Inbox<PROOF_BYTES>),
}

/// What became of a connection's turn.
enum Turn {
    Waiting(Awaited),
    Accepted,
    Refused(&'static str),
}

impl<'a> Door<'a> {
    pub fn new(listener: &'a TcpListener, spec: &'a RingSpec, member: &Membership) -> Self {
        let expected = Introduction {
            generation: member.generation,
            world: member.world,
            from: member.predecessor(),
            to: member.rank,
            purpose: spec.purpose,
        };
        Self {
            listener,
            secret: &spec.secret,
            expected,
            pending: Vec::with_capacity(MAX_PENDING),
            accepted: None,
            last_refusal: "nobody connected",
        }
    }

    /// The predecessor, once it has proved itself.
    pub fn accepted(&self) -> Option<&Arc<TcpStream>> {
        self.accepted.as_ref()
    }

    /// Why the last connection was not accepted.
    pub fn last_refusal(&self) -> &str {
        self.last_refusal
    }

    /// What a [`step`](Self::step) waits for.
    pub fn awaited(&self) -> impl Iterator<Item = PollFd<'_>> {
        let listener = self.accepted.is_none().then(|| PollFd::new(self.listener, PollFlags::IN));
        listener.into_iter().chain(self.pending.iter().map(|p| PollFd::new(&p.stream, PollFlags::IN)))
    }

    /// When the next silent client is to be dropped.
    pub fn wake(&self) -> Option<Instant> {
        self.pending.iter().map(|p| p.until).min()
    }

    /// Admits, hears and refuses as far as it can without waiting.
    pub fn step(&mut self, now: Instant) -> Result<(), CollectiveError> {
        if self.accepted.is_some() {
            return Ok(());
        }
        self.admit(now)?;
        for mut pending in std::mem::take(&mut self.pending) {
            match self.turn(&mut pending.stream, pending.awaited) {
                Turn::Waiting(_) if now >= pending.until => {
                    self.refuse("a client did not finish its handshake in time");
                }
                Turn::Waiting(awaited) => self.pending.push(Pending { awaited, ..pending }),
                Turn::Refused(reason) => self.refuse(reason),
                Turn::Accepted => {
                    self.accepted = Some(Arc::new(pending.stream));
                    self.pending.clear();
                    break;
                }
            }
        }
        Ok(())
    }

    fn refuse(&mut self, reason: &'static str) {
        debug!(generation = self.expected.generation, reason, "ring connection refused");
        self.last_refusal = reason;
    }

    fn admit(&mut self, now: Instant) -> Result<(), CollectiveError> {
        for _ in 0..ADMITTED_AT_ONCE {
            match self.listener.accept() {
                Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => {
                    self.make_room();
                    let awaited = Awaited::Hello(Inbox::new());
                    self.pending.push(Pending { stream, until: now + HANDSHAKE_LIMIT, awaited });
                }
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if is_transient(&e) => {}
                Err(e) => return Err(CollectiveError::io("accept ring connections", e)),
            }
        }
        Ok(())
    }

    /// They lie in the order they came.
    fn make_room(&mut self) {
        if self.pending.len() < MAX_PENDING {
            return;
        }
        let silent = self.pending.iter().position(|pending| matches!(pending.awaited, Awaited::Hello(_)));
        self.pending.remove(silent.unwrap_or(0));
        self.refuse("too many clients called, and one had not said who it is");
    }

    /// Answers as many messages as have arrived.
    fn turn(&self, stream: &mut TcpStream, awaited: Awaited) -> Turn {
        match awaited {
            Awaited::Hello(mut inbox) => match inbox.fill(stream) {
                Ok(None) => Turn::Waiting(Awaited::Hello(inbox)),
                Ok(Some(hello)) if self.expected.matches(&hello) => {
                    let nonce: Nonce = rand::random();
                    let proofs = Proofs::new(&self.secret.0, &hello, &nonce);
                    let mut challenge = [0; CHALLENGE_BYTES];
                    challenge[..NONCE_BYTES].copy_from_slice(&nonce);
                    challenge[NONCE_BYTES..].copy_from_slice(&proofs.make(Role::Responder));
                    match say(stream, &challenge) {
                        Ok(()) => self.turn(stream, Awaited::Proof(proofs, Inbox::new())),
                        Err(_) => Turn::Refused("a client hung up"),
                    }
                }
                Ok(Some(_)) => Turn::Refused("a client of another generation or rank called"),
                Err(_) => Turn::Refused("a client hung up"),
            },
            Awaited::Proof(proofs, mut inbox) => match inbox.fill(stream) {
                Ok(None) => Turn::Waiting(Awaited::Proof(proofs, inbox)),
                Ok(Some(proof)) if proofs.verify(Role::Initiator, &proof) => {
                    match say(stream, &proofs.make(Role::Accepted)) {
                        Ok(()) => Turn::Accepted,
                        Err(_) => Turn::Refused("a client hung up"),
                    }
                }
                Ok(Some(_)) => Turn::Refused("a client did not know the generation's secret"),
                Err(_) => Turn::Refused("a client hung up"),
            },
        }
    }
}

/// Whether `accept` failed for one client alone, or for a signal.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    matches!(
        error.kind(),
        ConnectionAborted
            | ConnectionReset
            | Interrupted
            | HostUnreachable
            | NetworkDown
            | NetworkUnreachable
    )
}
