//! One communicator, from its connection to its end: performs on the library and the device what
//! [`life`](crate::life) allows, polls instead of blocking, and has a deadline for everything.
//!
//! It knows buffers, not tensors, and nothing of who is a member or what the sums are for.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use musher_collective::{Aborter, Tag};
use tracing::{debug, warn};

use crate::{
    CallError, ExchangeError, IsReached,
    api::{Buffer, Comm, Nccl, Status, Stream, UniqueId},
    error::{Wait, What},
    life::{Intent, Life, Permit, Phase, Refusal},
};

/// What a revoked communicator gets to come to rest before it is aborted all the same.
const REVOKE_GRACE: Duration = Duration::from_secs(1);

/// The device that a communicator works on. One serves all generations of a process.
pub(crate) trait Device: Send + Sync + 'static {
    /// A point in the device's own stream.
    type Mark;

    /// Makes it this thread's current device.
    fn bind(&self) -> Result<(), ExchangeError>;
    /// The stream that exchanges run on.
    fn stream(&self) -> Stream;
    /// What the exchange's stream does from here on waits for what the tensors' stream has so far.
    fn follow_tensors(&self) -> Result<(), ExchangeError>;
    /// What the tensors' stream does from here on waits for what the exchange's stream has so far.
    fn lead_tensors(&self) -> Result<(), ExchangeError>;
    /// The exchange's stream as it stands.
    fn mark(&self) -> Result<Self::Mark, ExchangeError>;
    /// Whether the device has come so far. Does not block.
    fn has_reached(&self, mark: &Self::Mark) -> Result<bool, ExchangeError>;
    /// Tells kernels that read it whether the generation is being aborted.
    fn set_abort_word(&self, aborted: bool);
}

/// A rank's place in a communicator, and how long it waits there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub rank: u32,
    pub world: u32,
    /// For the ranks to connect.
    pub connect_timeout: Duration,
    /// For one call, or one wait.
    pub patience: Duration,
    /// For NCCL to end an aborted communicator.
    pub abort_timeout: Duration,
}

/// The owner's end; dropped before it is [finished](Self::finish), it aborts.
pub(crate) struct Communicator<D: Device> {
    shared: Arc<Shared<D>>,
    place: Place,
}

struct Shared<D> {
    nccl: Arc<dyn Nccl>,
    device: Arc<D>,
    comm: Comm,
    life: Mutex<Life>,
    changed: Condvar,
}

impl<D: Device> Communicator<D> {
    /// Connects this rank with the others of `id`; from now on `aborter` breaks it off.
    pub fn connect(
        nccl: Arc<dyn Nccl>,
        device: Arc<D>,
        id: &UniqueId,
        place: Place,
        aborter: &Aborter,
    ) -> Result<Self, ExchangeError> {
        let Place { rank, world, connect_timeout, .. } = place;
        let waiting = Waiting::new(What::Init { rank, world }, connect_timeout);
        device.bind()?;
        device.set_abort_word(false);
        let comm = nccl
            .init_rank(id, rank, world)
            .map_err(|error| ExchangeError::Failed { wait: waiting.so_far(), error })?;
        let (life, changed) = (Mutex::new(Life::begin()), Condvar::new());
        let shared = Arc::new(Shared { nccl, device, comm, life, changed });
        let communicator = Self { shared, place };
        let weak = Arc::downgrade(&communicator.shared);
        aborter.on_abort(move || {
            if let Some(shared) = weak.upgrade() {
                shared.abort();
            }
        });
        communicator.settle(waiting)?;
        communicator.shared.life().connected();
        Ok(communicator)
    }

    /// Enqueues the sum over all ranks behind what the tensors' stream has so far.
    ///
    /// # Safety
    /// The buffer is memory of the device that stays until a [fence](Self::fence) has been passed, or the communicator
    /// is gone.
    pub unsafe fn all_reduce(&self, tag: Tag, buffer: Buffer) -> Result<(), ExchangeError> {
        // SAFETY: `launch` calls this with the live handle while no other thread is in a call; the caller answers
        // for the buffer.
        self.launch(tag, |nccl, comm, stream| unsafe { nccl.all_reduce(comm, buffer, stream) })
    }

    /// Enqueues the copy from `root` to all.
    ///
    /// # Safety
    /// As [`all_reduce`](Self::all_reduce).
    pub unsafe fn broadcast(&self, tag: Tag, root: u32, buffer: Buffer) -> Result<(), ExchangeError> {
        // SAFETY: as in `all_reduce`.
        self.launch(tag, |nccl, comm, stream| unsafe { nccl.broadcast(comm, buffer, root, stream) })
    }

    /// Lets the tensors' stream go on only behind everything launched so far. The host does not wait.
    pub fn fence(&self) -> Result<(), ExchangeError> {
        self.shared.device.bind()?;
        self.shared.device.lead_tensors()
    }

    /// Waits until the device is done with everything launched, of which `tag` is the last.
    pub fn wait(&self, tag: Tag) -> Result<(), ExchangeError> {
        let waiting = Waiting::new(What::Completion(tag), self.place.patience);
        let device = &self.shared.device;
        device.bind()?;
        let mark = device.mark()?;
        self.poll(waiting, |_| device.has_reached(&mark))
    }

    /// Waits until `is_reached`, for which `tag`, launched last, is the name, or the communicator fails.
    pub fn wait_until(&self, tag: Tag, is_reached: &mut IsReached) -> Result<(), ExchangeError> {
        self.shared.device.bind()?;
        self.poll(Waiting::new(What::Completion(tag), self.place.patience), |_| is_reached())
    }

    /// Lets go of the peers, who do the same, and frees the communicator.
    pub fn finish(self) -> Result<(), ExchangeError> {
        let waiting = Waiting::new(What::Finalize, self.place.patience);
        self.shared.device.bind()?;
        // SAFETY: `call` holds other threads off, and the handle is live as long as it grants entry.
        self.call(&waiting, Intent::Finalize, |nccl, comm| unsafe { nccl.finalize(comm) })?;
        self.shared.life().finalizing();
        let what = waiting.what;
        self.settle(waiting)?;
        let waiting = Waiting::new(what, self.place.patience);
        // SAFETY: as above; leaving a destruction, granted once, ends the life.
        self.call(&waiting, Intent::Destroy, |nccl, comm| unsafe { nccl.destroy(comm) })
    }

    /// Aborts, and waits for the communicator's end.
    ///
    /// # Errors
    /// [`ExchangeError::Stuck`]: this process should end.
    pub fn abort(&self) -> Result<(), ExchangeError> {
        self.shared.abort();
        self.shared.wait_freed(self.place.abort_timeout)
    }

    fn launch(
        &self,
        tag: Tag,
        enqueue: impl FnOnce(&dyn Nccl, Comm, Stream) -> Result<Status, CallError>,
    ) -> Result<(), ExchangeError> {
        let waiting = Waiting::new(What::Launch(tag), self.place.patience);
        let device = &self.shared.device;
        device.bind()?;
        device.follow_tensors()?;
        let stream = device.stream();
        match self.call(&waiting, Intent::Launch, |nccl, comm| enqueue(nccl, comm, stream))? {
            Status::Done => Ok(()),
            // Until it is enqueued, nothing else may go into the stream.
            Status::InProgress => self.settle(waiting),
        }
    }

    /// Waits until what goes on in the background is done.
    fn settle(&self, waiting: Waiting) -> Result<(), ExchangeError> {
        self.poll(waiting, |status| Ok(status == Status::Done))
    }

    /// Asks the communicator how it is until `is_over`, it fails, or the time is up.
    fn poll(
        &self,
        waiting: Waiting,
        mut is_over: impl FnMut(Status) -> Result<bool, ExchangeError>,
    ) -> Result<(), ExchangeError> {
        let mut pause = Pause::default();
        loop {
            // SAFETY: `call` holds other threads off, and the handle is live as long as it grants entry.
            let status = self.call(&waiting, Intent::Poll, |nccl, comm| unsafe { nccl.async_error(comm) })?;
            if is_over(status).inspect_err(|_| self.give_up())? {
                return Ok(());
            }
            if waiting.is_over() {
                self.give_up();
                return Err(ExchangeError::TimedOut { wait: waiting.so_far() });
            }
            pause.rest();
        }
    }

    /// One call, if it is in order and nobody has aborted.
    fn call<R>(
        &self,
        waiting: &Waiting,
        intent: Intent,
        call: impl FnOnce(&dyn Nccl, Comm) -> Result<R, CallError>,
    ) -> Result<R, ExchangeError> {
        let entered = self.shared.life().enter(intent);
        match entered {
            Ok(()) => {}
            Err(Refusal::Over) => return Err(ExchangeError::Aborted(Some(waiting.so_far()))),
            Err(Refusal::OutOfOrder(phase)) => {
                unreachable!("{intent:?} while {phase:?}: the methods are in order")
            }
        }
        let result = call(&*self.shared.nccl, self.shared.comm);
        self.shared.life().leave();
        self.shared.changed.notify_all();
        result.map_err(|error| {
            self.give_up();
            ExchangeError::Failed { wait: waiting.so_far(), error }
        })
    }

    /// Nothing more can come of it: the peers are to notice soon.
    fn give_up(&self) {
        self.shared.life().broke();
        self.shared.abort();
    }
}

impl<D: Device> Drop for Communicator<D> {
    fn drop(&mut self) {
        if let Err(error) = self.abort() {
            warn!(%error, "a communicator was left behind");
        }
    }
}

impl<D: Device> Shared<D> {
    fn life(&self) -> MutexGuard<'_, Life> {
        // Its transitions are single assignments: a panic leaves none half done.
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From any thread; returns at once.
    fn abort(self: &Arc<Self>) {
        let Some(permit) = self.life().abort() else { return };
        // Before NCCL is touched: an aborted kernel may hand stale numbers on, which this word makes worthless.
        self.device.set_abort_word(true);
        let shared = self.clone();
        let helper = thread::Builder::new().name("nccl-abort".into()).spawn(move || shared.free(permit));
        if let Err(error) = helper {
            warn!(%error, "no thread to abort a communicator with");
        }
    }

    fn free(&self, permit: Permit) {
        // At once: a driver whose queue is full may hold up whoever asks it for anything, until the kernels that wait
        // for a dead peer are told to end.
        let revoked = match permit.revocable {
            // SAFETY: the permit's holder alone frees the handle, which is below.
            true => unsafe { self.nccl.revoke(self.comm) },
            false => None,
        };
        if let Err(error) = self.device.bind() {
            debug!(%error, "aborting without a device");
        }
        if !self.wait_vacated() {
            return;
        }
        if let Some(Ok(Status::InProgress)) = revoked {
            self.wait_revoked();
        }
        // SAFETY: the life grants no entry since it was aborted, and the last one inside has left.
        if let Err(error) = unsafe { self.nccl.abort(self.comm) } {
            debug!(%error, "the aborted communicator was not well");
        }
        self.life().freed();
        self.changed.notify_all();
    }

    /// False if the owner was too long inside; then the process is about to end.
    fn wait_vacated(&self) -> bool {
        let life = self.life();
        let occupied = |life: &mut Life| life.phase() == Phase::Aborting && !life.is_vacated();
        let life = self.changed.wait_while(life, occupied).unwrap_or_else(PoisonError::into_inner);
        life.is_vacated()
    }

    fn wait_revoked(&self) {
        let (start, mut pause) = (Instant::now(), Pause::default());
        while start.elapsed() < REVOKE_GRACE {
            // SAFETY: the life grants nobody else entry, and the handle is freed after this.
            match unsafe { self.nccl.async_error(self.comm) } {
                Ok(Status::InProgress) => pause.rest(),
                _ => return,
            }
        }
    }

    fn wait_freed(&self, limit: Duration) -> Result<(), ExchangeError> {
        let life = self.life();
        let going_on = |life: &mut Life| life.phase() == Phase::Aborting;
        let (mut life, _) =
            self.changed.wait_timeout_while(life, limit, going_on).unwrap_or_else(PoisonError::into_inner);
        life.stuck();
        let stuck = life.phase() == Phase::Stuck;
        drop(life);
        self.changed.notify_all();
        if stuck { Err(ExchangeError::Stuck { waited: limit }) } else { Ok(()) }
    }
}

/// What is waited for, since when, and until when.
struct Waiting {
    what: What,
    since: Instant,
    limit: Duration,
}

impl Waiting {
    fn new(what: What, limit: Duration) -> Self {
        Self { what, since: Instant::now(), limit }
    }

    fn is_over(&self) -> bool {
        self.since.elapsed() >= self.limit
    }

    fn so_far(&self) -> Wait {
        Wait { what: self.what, waited: self.since.elapsed() }
    }
}

/// Between two looks: quick at first, as most waits are short, then easy on the core.
#[derive(Default)]
struct Pause {
    rests: u32,
}

impl Pause {
    const QUICK: u32 = 200;
    const EASY: Duration = Duration::from_micros(50);

    fn rest(&mut self) {
        self.rests += 1;
        if self.rests < Self::QUICK { thread::yield_now() } else { thread::sleep(Self::EASY) }
    }
}

#[cfg(test)]
mod tests;
