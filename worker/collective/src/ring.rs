//! The ring at work: one call at a time over the two connections that its formation made, sending
//! to the successor while receiving from the predecessor.
//!
//! Neither direction ever waits for the other: both are non-blocking, and whatever arrives is taken
//! at once, so full socket buffers cannot deadlock. That also means that a rank whose buffers stay
//! full is not in the call, which is how a time-out finds whom to name.

use std::{
    io::{self, IoSlice, IoSliceMut, Read},
    mem,
    net::{Shutdown, TcpStream},
    ops::AddAssign,
    sync::Arc,
    time::{Duration, Instant},
};

use bytemuck::Pod;
use half::{bf16, slice::HalfFloatSliceExt};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{SendAncillaryBuffer, SendFlags, sendmsg},
};

use crate::{
    Aborter, Collective, CollectiveError, Frame, Meter, Operation, Tag, Waited,
    error::Break,
    frame::HEADER_BYTES,
    schedule::{Schedule, Shape, Walk},
};

/// Payload of a frame: small enough that the sum of one, still in the core's own cache, overlaps
/// the transfer of the next; large enough to make system calls rare.
const FRAME_BYTES: usize = 256 << 10;

/// A TCP ring over the members of one generation, from [`RingListener::form`].
///
/// [`RingListener::form`]: crate::RingListener::form
#[derive(Debug)]
pub struct Ring {
    membership: Membership,
    /// None in a world of one.
    links: Option<Links>,
    aborter: Aborter,
    meter: Meter,
    /// The frame that is being received, until it is added to the data. 64-bit words, because its
    /// bytes are read as floats.
    received: Vec<u64>,
    /// What travels of a call in bf16.
    rounded: Vec<bf16>,
    failure: Option<CollectiveError>,
}

/// A ring's place in its generation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Membership {
    pub generation: u64,
    pub rank: u32,
    pub world: u32,
    /// The longest wait without any progress.
    pub patience: Duration,
}

impl Membership {
    pub fn predecessor(&self) -> u32 {
        (self.rank + self.world - 1) % self.world
    }

    pub fn successor(&self) -> u32 {
        (self.rank + 1) % self.world
    }
}

/// Connected, authenticated, non-blocking.
#[derive(Debug)]
pub(crate) struct Links {
    pub predecessor: Arc<TcpStream>,
    pub successor: Arc<TcpStream>,
}

impl Collective for Ring {
    fn rank(&self) -> u32 {
        self.membership.rank
    }

    fn world(&self) -> u32 {
        self.membership.world
    }

    fn all_reduce(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.call(tag, Operation::AllReduceF32, bytemuck::cast_slice_mut(data))
    }

    fn all_reduce_bf16(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        let mut rounded = mem::take(&mut self.rounded);
        rounded.resize(data.len(), bf16::ZERO);
        rounded.convert_from_f32_slice(data);
        let result = self.call(tag, Operation::AllReduceBf16, bytemuck::cast_slice_mut(&mut rounded));
        rounded.convert_to_f32_slice(data);
        self.rounded = rounded;
        result
    }

    fn all_reduce_f64(&mut self, tag: Tag, data: &mut [f64]) -> Result<(), CollectiveError> {
        self.call(tag, Operation::AllReduceF64, bytemuck::cast_slice_mut(data))
    }

    fn broadcast(&mut self, tag: Tag, root: u32, data: &mut [u8]) -> Result<(), CollectiveError> {
        if root >= self.world() {
            let message = format!("root {root} is no rank of a world of {}", self.world());
            return Err(CollectiveError::Invalid(message));
        }
        self.call(tag, Operation::Broadcast { root }, data)
    }

    fn aborter(&self) -> Aborter {
        self.aborter.clone()
    }

    fn meter(&self) -> Meter {
        self.meter.clone()
    }
}

impl Ring {
    pub(crate) fn new(membership: Membership, links: Option<Links>, aborter: Aborter) -> Self {
        for link in links.iter().flat_map(|links| [&links.predecessor, &links.successor]) {
            aborter.attach(link);
        }
        let received = vec![0; FRAME_BYTES / size_of::<u64>()];
        let rounded = Vec::new();
        Self { membership, links, aborter, meter: Meter::new(), received, rounded, failure: None }
    }

    /// Remembers the first failure, and closes the connections on it, so that the neighbours do not
    /// wait out their time-outs.
    fn call(&mut self, tag: Tag, operation: Operation, data: &mut [u8]) -> Result<(), CollectiveError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        self.exchange(tag, operation, data).map_err(|error| {
            if let Some(links) = self.links.take() {
                // They fail only where the peer was quicker.
                let _ = links.predecessor.shutdown(Shutdown::Both);
                let _ = links.successor.shutdown(Shutdown::Both);
            }
            self.failure.insert(error).clone()
        })
    }

    fn exchange(&mut self, tag: Tag, operation: Operation, data: &mut [u8]) -> Result<(), CollectiveError> {
        if self.aborter.is_aborted() {
            return Err(CollectiveError::Aborted(None));
        }
        let Some(links) = &self.links else { return Ok(()) };
        let member = &self.membership;
        let schedule = schedule(member, operation, data.len());
        let frame = Frame::new(member.generation, tag, operation);
        let before = self.meter.received();
        let then = before + schedule.bytes();
        let mut exchange = Exchange {
            incoming: Incoming {
                rank: member.predecessor(),
                link: &links.predecessor,
                walk: schedule.receive,
                adding_rounds: schedule.adding_rounds,
                add: adder(operation),
                payload: bytemuck::cast_slice_mut(&mut self.received),
                header: [0; HEADER_BYTES],
                frame,
                moved: 0,
            },
            outgoing: Outgoing {
                rank: member.successor(),
                link: &links.successor,
                walk: schedule.send,
                lead: schedule.lead,
                frame,
                moved: 0,
            },
            aborter: &self.aborter,
            meter: &self.meter,
            before,
            then,
            round_bytes: schedule.round_bytes,
            last_progress: Instant::now(),
        };
        exchange.run(member.patience, data).map_err(|broken| {
            // An abort shuts the sockets, which the thread inside may notice first.
            let broken = self.aborter.check().err().unwrap_or(broken);
            broken.with(Waited {
                rank: exchange.awaited(),
                call: Some(tag),
                idle: exchange.last_progress.elapsed(),
                received: exchange.received(),
                sent: exchange.sent(),
                closed: false,
            })
        })
    }
}

/// One call, both directions.
struct Exchange<'a> {
    incoming: Incoming<'a>,
    outgoing: Outgoing<'a>,
    aborter: &'a Aborter,
    meter: &'a Meter,
    /// What counts as sent and received before the call, and after it.
    before: u64,
    then: u64,
    round_bytes: u64,
    last_progress: Instant,
}

impl Exchange<'_> {
    fn run(&mut self, patience: Duration, data: &mut [u8]) -> Result<(), Break> {
        self.meter.receive(self.received());
        while !(self.outgoing.walk.is_done() && self.incoming.walk.is_done()) {
            self.aborter.check()?;
            let sent = self.outgoing.send(self.incoming.walk.chunk(), data)?;
            let received = self.incoming.receive(data)?;
            if sent || received {
                self.last_progress = Instant::now();
                self.meter.moved(self.last_progress);
                self.meter.receive(self.received());
                continue;
            }
            self.wait(patience.saturating_sub(self.last_progress.elapsed()))?;
        }
        Ok(())
    }

    fn received(&self) -> u64 {
        self.count(&self.incoming.walk, self.incoming.moved)
    }

    fn sent(&self) -> u64 {
        self.count(&self.outgoing.walk, self.outgoing.moved)
    }

    /// How far a walk is, of whose current frame so many bytes have `moved`.
    fn count(&self, walk: &Walk, moved: usize) -> u64 {
        if walk.is_done() {
            return self.then;
        }
        let of_part = walk.done() + moved.saturating_sub(HEADER_BYTES);
        self.before + u64::from(walk.round()) * self.round_bytes + of_part as u64
    }

    fn is_sending(&self) -> bool {
        self.outgoing.is_ready(self.incoming.walk.chunk())
    }

    /// Whom this rank waits for. A peer inside the call always receives, so one that does not is not
    /// inside; one that does not send may itself be waiting.
    fn awaited(&self) -> u32 {
        if self.is_sending() { self.outgoing.rank } else { self.incoming.rank }
    }

    /// Waits until one of the connections can go on.
    fn wait(&self, patience: Duration) -> Result<(), Break> {
        let Self { incoming, outgoing, .. } = self;
        // A neighbour that this call no longer needs may close: it is left out by waiting for the
        // abort twice. One that is still to be sent to may not, even while nothing is ready for it.
        let abort = || PollFd::from_borrowed_fd(self.aborter.signal(), PollFlags::IN);
        let mut fds = [
            abort(),
            if incoming.walk.is_done() { abort() } else { PollFd::new(incoming.link, PollFlags::IN) },
            match (outgoing.walk.is_done(), self.is_sending()) {
                (true, _) => abort(),
                (false, true) => PollFd::new(outgoing.link, PollFlags::OUT | PollFlags::RDHUP),
                (false, false) => PollFd::new(outgoing.link, PollFlags::RDHUP),
            },
        ];
        let timeout = Timespec::try_from(patience).ok();
        match poll(&mut fds, timeout.as_ref()) {
            Err(Errno::INTR) => Ok(()),
            Err(e) => Err(CollectiveError::io("poll the ring's sockets", e).into()),
            Ok(0) => Err(Break::TimedOut),
            Ok(_) => {
                let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
                // What the predecessor has sent comes first: it may say what is wrong.
                if fds[1].revents().is_empty() && fds[2].revents().intersects(gone) {
                    self.aborter.check()?;
                    return Err(outgoing.end());
                }
                Ok(())
            }
        }
    }
}

fn schedule(member: &Membership, operation: Operation, bytes: usize) -> Schedule {
    let shape = |element| Shape { bytes, element, frame: FRAME_BYTES };
    let all_reduce = |element| Schedule::all_reduce(member.rank, member.world, shape(element));
    match operation {
        Operation::AllReduceF32 => all_reduce(size_of::<f32>()),
        Operation::AllReduceF64 => all_reduce(size_of::<f64>()),
        Operation::AllReduceBf16 => all_reduce(size_of::<bf16>()),
        Operation::Broadcast { root } => Schedule::broadcast(member.rank, member.world, root, shape(1)),
    }
}

/// Adds the second slice to the first, both read as elements of the operation's type.
type Add = fn(&mut [u8], &[u8]);

fn adder(operation: Operation) -> Add {
    match operation {
        Operation::AllReduceF32 => add::<f32>,
        Operation::AllReduceF64 => add::<f64>,
        Operation::AllReduceBf16 => add_bf16,
        // Its schedule has no round that adds.
        Operation::Broadcast { .. } => |_, _| {},
    }
}

fn add<T: Pod + AddAssign>(sums: &mut [u8], terms: &[u8]) {
    let sums: &mut [T] = bytemuck::cast_slice_mut(sums);
    let terms: &[T] = bytemuck::cast_slice(terms);
    for (sum, term) in sums.iter_mut().zip(terms) {
        *sum += *term;
    }
}

fn add_bf16(sums: &mut [u8], terms: &[u8]) {
    let sums: &mut [bf16] = bytemuck::cast_slice_mut(sums);
    let terms: &[bf16] = bytemuck::cast_slice(terms);
    for (sum, term) in sums.iter_mut().zip(terms) {
        *sum = bf16::from_f32(sum.to_f32() + term.to_f32());
    }
}

/// The frames on their way to the successor.
struct Outgoing<'a> {
    rank: u32,
    link: &'a TcpStream,
    walk: Walk,
    lead: u32,
    frame: Frame,
    /// Bytes of the current frame, header included, that are sent.
    moved: usize,
}

impl Outgoing<'_> {
    /// Whether the current frame is complete here, after `received` frames.
    fn is_ready(&self, received: u32) -> bool {
        !self.walk.is_done() && self.walk.chunk() < self.lead + received
    }

    /// Sends what the socket takes of the current frame; false if that is nothing.
    fn send(&mut self, received: u32, data: &[u8]) -> Result<bool, Break> {
        if !self.is_ready(received) {
            return Ok(false);
        }
        let payload = &data[self.walk.range()];
        let header = self.frame.chunk(self.walk.chunk(), payload.len()).encode();
        let rest = [
            IoSlice::new(&header[self.moved.min(HEADER_BYTES)..]),
            IoSlice::new(&payload[self.moved.saturating_sub(HEADER_BYTES)..]),
        ];
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(self.link, &rest, &mut SendAncillaryBuffer::default(), flags) {
            Ok(bytes) => self.moved += bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(e) => return Err(Break::link(self.rank, "send to a peer", e.into())),
        }
        if self.moved == HEADER_BYTES + payload.len() {
            self.walk.advance();
            self.moved = 0;
        }
        Ok(true)
    }

    /// How a connection ended that the system says is over.
    fn end(&self) -> Break {
        match self.link.take_error() {
            Ok(Some(error)) | Err(error) => Break::link(self.rank, "send to a peer", error),
            Ok(None) => Break::Closed { rank: self.rank },
        }
    }
}

/// The frames on their way from the predecessor.
struct Incoming<'a> {
    rank: u32,
    link: &'a TcpStream,
    walk: Walk,
    adding_rounds: u32,
    add: Add,
    /// Where the frames to add arrive; the others go straight into the data.
    payload: &'a mut [u8],
    header: [u8; HEADER_BYTES],
    frame: Frame,
    /// Bytes of the current frame, header included, that have arrived.
    moved: usize,
}

impl Incoming<'_> {
    /// Takes what has arrived of the current frame, and puts a complete one where it belongs; false
    /// if nothing has arrived.
    fn receive(&mut self, data: &mut [u8]) -> Result<bool, Break> {
        if self.walk.is_done() {
            return Ok(false);
        }
        let place = &mut data[self.walk.range()];
        let length = place.len();
        let adding = self.walk.round() < self.adding_rounds;
        let target = if adding { &mut self.payload[..length] } else { &mut *place };
        let mut rest = [
            IoSliceMut::new(&mut self.header[self.moved.min(HEADER_BYTES)..]),
            IoSliceMut::new(&mut target[self.moved.saturating_sub(HEADER_BYTES)..]),
        ];
        match self.link.read_vectored(&mut rest) {
            Ok(0) => return Err(Break::Closed { rank: self.rank }),
            Ok(bytes) => self.moved += bytes,
            Err(e) if is_not_now(&e) => return Ok(false),
            Err(e) => return Err(Break::link(self.rank, "receive from a peer", e)),
        }
        if self.moved >= HEADER_BYTES {
            self.compare_header(length)?;
        }
        if self.moved == HEADER_BYTES + length {
            if adding {
                (self.add)(place, &self.payload[..length]);
            }
            self.walk.advance();
            self.moved = 0;
        }
        Ok(true)
    }

    fn compare_header(&self, length: usize) -> Result<(), CollectiveError> {
        let expected = self.frame.chunk(self.walk.chunk(), length);
        if self.header == expected.encode() {
            return Ok(());
        }
        let found = Frame::decode(&self.header);
        Err(CollectiveError::Protocol { rank: self.rank, expected, found })
    }
}

fn is_not_now(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
