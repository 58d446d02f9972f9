//! Making a ring: each rank connects to its successor and accepts its predecessor, in one thread
//! and one poll loop, until both have proved themselves or the deadline passes.

mod dial;
mod door;
mod message;

use std::{
    fmt, io,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use dial::Dial;
use door::Door;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use socket2::SockRef;

use crate::{
    Aborter, CollectiveError, Neighbour, Ring, Waited,
    error::Break,
    ring::{Links, Membership},
};

/// The address at which this process can be reached by its predecessors, in every generation.
#[derive(Debug)]
pub struct RingListener {
    listener: TcpListener,
}

/// The ring to form, as the coordinator announced it.
#[derive(Clone, Debug)]
pub struct RingSpec {
    pub generation: u64,
    pub purpose: Purpose,
    pub rank: u32,
    pub world: u32,
    /// Where the next rank listens; the first is the last one's.
    pub successor: SocketAddr,
    pub secret: Secret,
    /// How long a call waits without any progress before it fails by itself. Ample: who holds the team up
    /// is better judged from outside, sooner, and made known by an abort.
    pub patience: Duration,
}

/// Which of its generation's rings: they join the same ranks, and each has an order of calls of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// What steps sum, and what passes between two steps.
    Steps,
    /// What batch norm sums in the midst of forward and backward.
    BatchNorm,
}

/// A generation's shared secret; `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub [u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Connections that wait to be accepted, as far as the system allows it.
const BACKLOG: i32 = 4096;

impl RingListener {
    /// Listens at `address`; port 0 takes a free one.
    pub fn bind(address: SocketAddr) -> Result<Self, CollectiveError> {
        let bind = || -> io::Result<TcpListener> {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            // Nobody is accepted between formations: the predecessor must find room behind whoever came meanwhile.
            rustix::net::listen(&listener, BACKLOG)?;
            Ok(listener)
        };
        let listener = bind().map_err(|e| CollectiveError::io("listen for the ring", e))?;
        Ok(Self { listener })
    }

    pub fn local_addr(&self) -> Result<SocketAddr, CollectiveError> {
        self.listener.local_addr().map_err(|e| CollectiveError::io("read the ring listener's address", e))
    }

    /// Forms the ring of `spec`, waiting for the neighbours until `deadline`.
    ///
    /// # Errors
    /// [`NotFormed`](CollectiveError::NotFormed) at the deadline, naming a missing neighbour;
    /// [`Aborted`](CollectiveError::Aborted) as soon as `aborter` is; `Invalid` for a spec that
    /// contradicts itself; `PeerClosed` or `Unreachable` for a neighbour that left again; `Io` where
    /// the system refuses sockets.
    pub fn form(
        &self,
        spec: &RingSpec,
        deadline: Instant,
        aborter: &Aborter,
    ) -> Result<Ring, CollectiveError> {
        let member = spec.membership()?;
        if aborter.is_aborted() {
            return Err(CollectiveError::Aborted(None));
        }
        if member.world == 1 {
            return Ok(Ring::new(member, None, aborter.clone()));
        }
        let started = Instant::now();
        let mut door = Door::new(&self.listener, spec, &member);
        let mut dial = Dial::new(spec, &member, started);
        let links = meet(&member, &mut door, &mut dial, deadline, aborter).map_err(|broken| {
            let missing = Missing::of(&member, &door, &dial);
            let idle = started.elapsed();
            let waited = Waited { rank: missing.rank, call: None, idle, received: 0, sent: 0, closed: false };
            match broken {
                Break::TimedOut => missing.at_deadline(member.generation, waited),
                other => other.with(waited),
            }
        })?;
        Ok(Ring::new(member, Some(links), aborter.clone()))
    }
}

/// Waits until both neighbours are there.
fn meet(
    member: &Membership,
    door: &mut Door<'_>,
    dial: &mut Dial<'_>,
    deadline: Instant,
    aborter: &Aborter,
) -> Result<Links, Break> {
    loop {
        aborter.check()?;
        let now = Instant::now();
        door.step(now)?;
        dial.step(now);
        if let (Some(predecessor), Some(successor)) = (door.accepted(), dial.connected()) {
            let link = |rank: u32, stream: &Arc<TcpStream>| {
                configure(stream, member)
                    .map(|()| Arc::clone(stream))
                    .map_err(|e| Break::link(rank, "configure a ring socket", e))
            };
            return Ok(Links {
                predecessor: link(member.predecessor(), predecessor)?,
                successor: link(member.successor(), successor)?,
            });
        }
        if now >= deadline {
            return Err(Break::TimedOut);
        }
        let wake = [Some(deadline), door.wake(), dial.wake()].into_iter().flatten().min();
        wait(aborter, door, dial, wake.unwrap_or(deadline).saturating_duration_since(now))?;
    }
}

impl RingSpec {
    fn membership(&self) -> Result<Membership, CollectiveError> {
        let invalid = |message: String| Err(CollectiveError::Invalid(message));
        let &Self { rank, world, .. } = self;
        if rank >= world {
            return invalid(format!("rank {rank} is not in a world of {world}"));
        }
        if self.patience.is_zero() {
            return invalid("a call's patience is zero".into());
        }
        Ok(Membership { generation: self.generation, rank, world, patience: self.patience })
    }
}

/// A neighbour that is not there yet.
struct Missing {
    rank: u32,
    neighbour: Neighbour,
    reason: String,
}

impl Missing {
    fn of(member: &Membership, door: &Door<'_>, dial: &Dial<'_>) -> Self {
        let (rank, neighbour, reason) = match dial.connected() {
            Some(_) => (member.predecessor(), Neighbour::Predecessor, door.last_refusal()),
            None => (member.successor(), Neighbour::Successor, dial.last_failure()),
        };
        Self { rank, neighbour, reason: reason.to_owned() }
    }

    fn at_deadline(self, generation: u64, waited: Waited) -> CollectiveError {
        let Self { neighbour, reason, .. } = self;
        CollectiveError::NotFormed { generation, neighbour, waited, reason }
    }
}

/// Sleeps until a socket or the abort stirs, or for `patience`.
fn wait(
    aborter: &Aborter,
    door: &Door<'_>,
    dial: &Dial<'_>,
    patience: Duration,
) -> Result<(), CollectiveError> {
    let mut fds = vec![PollFd::from_borrowed_fd(aborter.signal(), PollFlags::IN)];
    fds.extend(door.awaited());
    fds.extend(dial.awaited());
    match poll(&mut fds, Timespec::try_from(patience).ok().as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(CollectiveError::io("poll for the ring's formation", e)),
    }
}

/// What a ring's connection needs beyond the defaults. Buffer sizes stay with the kernel: its
/// tuning grows them beyond what a process may ask for, and larger ones measured no faster.
fn configure(stream: &TcpStream, member: &Membership) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    // Acknowledgements that stay away mean that the peer's machine is gone, or the way to it. The
    // kernel also counts a peer that does not read, hence no less than a call's own patience.
    socket.set_tcp_user_timeout(Some(member.patience))?;
    if stream.peer_addr()?.ip().is_loopback() {
        // Nothing to pace here: where BBR is the default it costs a fifth of the throughput. A
        // kernel that refuses is merely slower.
        let _ = socket.set_tcp_congestion(b"reno");
    }
    Ok(())
}
