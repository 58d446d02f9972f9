//! A communicator's calls, recorded by a scripted library and device, against the order that NCCL asks for.
#![allow(clippy::unwrap_used)]

use std::{
    collections::VecDeque,
    ffi::c_void,
    ptr::NonNull,
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, channel},
    },
};

use musher_collective::Phase as Purpose;

use super::*;
use crate::{Version, api::Element};

/// Longer than any test, for waits that an event ends.
const LONG: Duration = Duration::from_secs(60);
/// For waits that nothing ends.
const SHORT: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    AbortWord(bool),
    Init { id: u8, rank: u32, world: u32 },
    Poll,
    FollowTensors,
    AllReduce,
    Broadcast { root: u32 },
    Mark,
    HasReached,
    LeadTensors,
    Revoke,
    Abort,
    Finalize,
    Destroy,
}

use Call::*;

type Reply = Result<Status, CallError>;

/// The library and the device in one, so that their calls have one order.
struct Script {
    calls: Mutex<Vec<Call>>,
    /// What undefined behaviour the caller would have met.
    misuse: Mutex<Vec<String>>,
    inside: AtomicUsize,
    is_freed: AtomicBool,
    /// Replies to polls, then `last_poll` for ever.
    polls: Mutex<VecDeque<Reply>>,
    last_poll: Mutex<Reply>,
    launch: Mutex<Reply>,
    /// The next sum returns when this tells it to.
    stays_inside: Mutex<Option<Receiver<()>>>,
    has_reached: AtomicBool,
    has_revoke: bool,
    on_call: Mutex<Option<OnCall>>,
}

type OnCall = Box<dyn FnMut(Call) + Send>;

impl Default for Script {
    fn default() -> Self {
        Self {
            calls: Mutex::default(),
            misuse: Mutex::default(),
            inside: AtomicUsize::new(0),
            is_freed: AtomicBool::new(true),
            polls: Mutex::default(),
            last_poll: Mutex::new(Ok(Status::Done)),
            launch: Mutex::new(Ok(Status::Done)),
            stays_inside: Mutex::default(),
            has_reached: AtomicBool::new(true),
            has_revoke: true,
            on_call: Mutex::default(),
        }
    }
}

impl Script {
    fn record(&self, call: Call) {
        self.calls.lock().unwrap().push(call);
        if let Some(on_call) = &mut *self.on_call.lock().unwrap() {
            on_call(call);
        }
    }

    /// A call on the communicator by its owner.
    fn inside<R>(&self, call: Call, reply: impl FnOnce() -> R) -> R {
        self.must(!self.is_freed.load(Ordering::SeqCst), call, "after the communicator was freed");
        self.must(self.inside.fetch_add(1, Ordering::SeqCst) == 0, call, "while a thread is inside");
        self.record(call);
        let reply = reply();
        self.inside.fetch_sub(1, Ordering::SeqCst);
        reply
    }

    /// A call that ends the communicator.
    fn free(&self, call: Call) {
        self.must(self.inside.load(Ordering::SeqCst) == 0, call, "while a thread is inside");
        self.must(!self.is_freed.swap(true, Ordering::SeqCst), call, "twice");
        self.record(call);
    }

    fn must(&self, holds: bool, call: Call, when: &str) {
        if !holds {
            self.misuse.lock().unwrap().push(format!("{call:?} {when}"));
        }
    }

    /// What was called so far, repeated polls as one.
    fn calls(&self) -> Vec<Call> {
        assert_eq!(*self.misuse.lock().unwrap(), [""; 0]);
        let mut calls = self.calls.lock().unwrap().clone();
        calls.dedup_by(|a, b| a == b && *a == Poll);
        calls
    }

    fn forget(&self) {
        self.calls.lock().unwrap().clear();
    }
}

impl Nccl for Script {
    fn version(&self) -> Result<Version, CallError> {
        Ok(Version(22_809))
    }

    fn unique_id(&self) -> Result<UniqueId, CallError> {
        Ok(UniqueId([0; UniqueId::BYTES]))
    }

    fn init_rank(&self, id: &UniqueId, rank: u32, world: u32) -> Result<Comm, CallError> {
        self.must(
            self.is_freed.swap(false, Ordering::SeqCst),
            Poll,
            "with the last generation's still there",
        );
        self.record(Init { id: id.0[0], rank, world });
        Ok(Comm(NonNull::<u8>::dangling().cast()))
    }

    unsafe fn async_error(&self, _: Comm) -> Reply {
        let next = || self.polls.lock().unwrap().pop_front();
        self.inside(Poll, || next().unwrap_or_else(|| self.last_poll.lock().unwrap().clone()))
    }

    unsafe fn all_reduce(&self, _: Comm, _: Buffer, _: Stream) -> Reply {
        let stay = self.stays_inside.lock().unwrap().take();
        self.inside(AllReduce, || {
            let _ = stay.map(|stay| stay.recv());
            self.launch.lock().unwrap().clone()
        })
    }

    unsafe fn broadcast(&self, _: Comm, _: Buffer, root: u32, _: Stream) -> Reply {
        self.inside(Broadcast { root }, || self.launch.lock().unwrap().clone())
    }

    unsafe fn revoke(&self, _: Comm) -> Option<Reply> {
        self.must(!self.is_freed.load(Ordering::SeqCst), Revoke, "after the communicator was freed");
        self.has_revoke.then(|| {
            self.record(Revoke);
            Ok(Status::Done)
        })
    }

    unsafe fn abort(&self, _: Comm) -> Result<(), CallError> {
        self.free(Abort);
        Ok(())
    }

    unsafe fn finalize(&self, _: Comm) -> Reply {
        self.inside(Finalize, || Ok(Status::InProgress))
    }

    unsafe fn destroy(&self, _: Comm) -> Result<(), CallError> {
        self.free(Destroy);
        Ok(())
    }
}

impl Device for Script {
    type Mark = ();

    fn bind(&self) -> Result<(), ExchangeError> {
        Ok(())
    }

    fn stream(&self) -> Stream {
        Stream(std::ptr::null_mut())
    }

    fn follow_tensors(&self) -> Result<(), ExchangeError> {
        self.record(FollowTensors);
        Ok(())
    }

    fn lead_tensors(&self) -> Result<(), ExchangeError> {
        self.record(LeadTensors);
        Ok(())
    }

    fn mark(&self) -> Result<(), ExchangeError> {
        self.record(Mark);
        Ok(())
    }

    fn has_reached(&self, (): &()) -> Result<bool, ExchangeError> {
        self.record(HasReached);
        Ok(self.has_reached.load(Ordering::SeqCst))
    }

    fn set_abort_word(&self, aborted: bool) {
        self.record(AbortWord(aborted));
    }
}

const PLACE: Place = Place { rank: 1, world: 2, connect_timeout: LONG, patience: LONG, abort_timeout: LONG };

fn connect(
    script: &Arc<Script>,
    place: Place,
    id: u8,
) -> Result<(Communicator<Script>, Aborter), ExchangeError> {
    let aborter = Aborter::new().unwrap();
    let id = UniqueId([id; UniqueId::BYTES]);
    Ok((Communicator::connect(script.clone(), script.clone(), &id, place, &aborter)?, aborter))
}

/// With the calls of the connection forgotten.
fn connected(script: Script, place: Place) -> (Arc<Script>, Communicator<Script>, Aborter) {
    let script = Arc::new(script);
    let (communicator, aborter) = connect(&script, place, 1).unwrap();
    script.forget();
    (script, communicator, aborter)
}

fn tag(bucket: u32) -> Tag {
    Tag::new(57, bucket, Purpose::Gradients)
}

fn sum(communicator: &Communicator<Script>, bucket: u32) -> Result<(), ExchangeError> {
    let buffer = Buffer { address: std::ptr::null_mut::<c_void>(), elements: 4, element: Element::F32 };
    // SAFETY: the script does not touch the buffer.
    unsafe { communicator.all_reduce(tag(bucket), buffer) }
}

/// Tells of each `call`.
fn tell_of(script: &Script, call: Call) -> Receiver<()> {
    let (sender, told) = channel();
    let on_call = move |seen| {
        if seen == call {
            let _ = sender.send(());
        }
    };
    *script.on_call.lock().unwrap() = Some(Box::new(on_call));
    told
}

fn broken_peer() -> CallError {
    CallError { call: "ncclCommGetAsyncError", code: 6, last_error: "socket closed by 10.0.0.7<41>".into() }
}

#[test]
fn it_is_polled_until_the_ranks_are_connected_before_it_is_used() {
    let script = Arc::new(Script::default());
    script.polls.lock().unwrap().extend([Ok(Status::InProgress), Ok(Status::InProgress), Ok(Status::Done)]);
    let (communicator, _aborter) = connect(&script, PLACE, 7).unwrap();
    assert_eq!(
        *script.calls.lock().unwrap(),
        [AbortWord(false), Init { id: 7, rank: 1, world: 2 }, Poll, Poll, Poll]
    );
    sum(&communicator, 0).unwrap();
    assert_eq!(script.calls()[3..], [FollowTensors, AllReduce]);
}

#[test]
fn a_call_that_goes_on_in_the_background_is_enqueued_before_anything_else() {
    let (script, communicator, _aborter) = connected(Script::default(), PLACE);
    *script.launch.lock().unwrap() = Ok(Status::InProgress);
    script.polls.lock().unwrap().extend([Ok(Status::InProgress), Ok(Status::Done)]);
    sum(&communicator, 0).unwrap();
    assert_eq!(*script.calls.lock().unwrap(), [FollowTensors, AllReduce, Poll, Poll]);
    script.forget();
    *script.launch.lock().unwrap() = Ok(Status::Done);
    sum(&communicator, 1).unwrap();
    communicator.fence().unwrap();
    communicator.wait(tag(1)).unwrap();
    assert_eq!(script.calls(), [FollowTensors, AllReduce, LeadTensors, Mark, Poll, HasReached]);
}

#[test]
fn ranks_that_never_connect_are_given_up_without_a_revoke() {
    let script = Arc::new(Script { last_poll: Mutex::new(Ok(Status::InProgress)), ..Script::default() });
    let Err(error) = connect(&script, Place { connect_timeout: SHORT, ..PLACE }, 1) else {
        panic!("it connected")
    };
    let ExchangeError::TimedOut { wait } = &error else { panic!("{error}") };
    assert_eq!(wait.what, What::Init { rank: 1, world: 2 });
    assert!(wait.waited >= SHORT);
    assert_eq!(error.to_string(), "nothing came of connecting as rank 1 of 2 for 0.0 s; report it");
    assert_eq!(script.calls()[2..], [Poll, AbortWord(true), Abort]);
}

#[test]
fn an_asynchronous_error_in_the_middle_of_a_bucket_is_told_in_its_own_words_and_aborts() {
    let (script, communicator, _aborter) = connected(Script::default(), PLACE);
    script.has_reached.store(false, Ordering::SeqCst);
    sum(&communicator, 3).unwrap();
    script.polls.lock().unwrap().extend([Ok(Status::Done), Ok(Status::Done), Err(broken_peer())]);
    let error = communicator.wait(tag(3)).unwrap_err();
    assert!(
        matches!(&error, ExchangeError::Failed { wait, .. } if wait.what == What::Completion(tag(3))),
        "{error}"
    );
    assert_eq!(
        error.to_string(),
        "NCCL failed waiting for bucket 3 of step 57 (gradients) for 0.0 s: ncclCommGetAsyncError says a remote error \
         (6) (socket closed by 10.0.0.7<41>)"
    );
    communicator.abort().unwrap();
    let calls = script.calls();
    assert_eq!(calls[calls.len() - 3..], [AbortWord(true), Revoke, Abort]);

    script.forget();
    assert!(matches!(sum(&communicator, 4), Err(ExchangeError::Aborted(Some(_)))));
    assert!(matches!(communicator.wait(tag(4)), Err(ExchangeError::Aborted(_))));
    assert!(
        !script.calls().iter().any(|call| matches!(call, AllReduce | Poll | Revoke | Abort)),
        "{:?}",
        script.calls()
    );
}

#[test]
fn a_bucket_that_never_completes_is_given_up() {
    let (script, communicator, _aborter) = connected(Script::default(), Place { patience: SHORT, ..PLACE });
    script.has_reached.store(false, Ordering::SeqCst);
    sum(&communicator, 2).unwrap();
    let error = communicator.wait(tag(2)).unwrap_err();
    let ExchangeError::TimedOut { wait } = &error else { panic!("{error}") };
    assert_eq!((wait.what, wait.waited >= SHORT), (What::Completion(tag(2)), true));
    communicator.abort().unwrap();
    let calls = script.calls();
    assert_eq!(calls[calls.len() - 3..], [AbortWord(true), Revoke, Abort]);
}

#[test]
fn an_abort_from_another_thread_ends_a_wait() {
    let (script, communicator, aborter) = connected(Script::default(), PLACE);
    script.has_reached.store(false, Ordering::SeqCst);
    sum(&communicator, 0).unwrap();
    let waits = tell_of(&script, HasReached);
    let error = thread::scope(|scope| {
        let waiting = scope.spawn(|| communicator.wait(tag(0)).unwrap_err());
        waits.recv().unwrap();
        aborter.abort();
        waiting.join().unwrap()
    });
    assert!(matches!(error, ExchangeError::Aborted(Some(Wait { what: What::Completion(_), .. }))), "{error}");
    communicator.abort().unwrap();
    let calls = script.calls();
    let place = |call| calls.iter().position(|&made| made == call).unwrap();
    assert!(place(AbortWord(true)) < place(Revoke) && place(Revoke) < place(Abort), "{calls:?}");
    aborter.abort();
    assert_eq!(script.calls().iter().filter(|&&call| call == Abort).count(), 1);
}

/// The call returns only because of the revoke, and the communicator is freed only once it has.
#[test]
fn a_thread_that_is_stuck_in_a_call_is_freed_by_the_revoke_before_the_abort() {
    let (script, communicator, aborter) = connected(Script::default(), PLACE);
    let (release, released) = channel();
    *script.stays_inside.lock().unwrap() = Some(released);
    let (entered, is_inside) = channel();
    *script.on_call.lock().unwrap() = Some(Box::new(move |call| match call {
        AllReduce => entered.send(()).unwrap(),
        Revoke => release.send(()).unwrap(),
        _ => {}
    }));
    thread::scope(|scope| {
        let stuck = scope.spawn(|| sum(&communicator, 0));
        is_inside.recv().unwrap();
        aborter.abort();
        stuck.join().unwrap().unwrap();
    });
    communicator.abort().unwrap();
    assert_eq!(script.calls(), [FollowTensors, AllReduce, AbortWord(true), Revoke, Abort]);
}

#[test]
fn an_older_library_is_aborted_without_a_revoke() {
    let (script, communicator, _aborter) =
        connected(Script { has_revoke: false, ..Script::default() }, PLACE);
    communicator.abort().unwrap();
    assert_eq!(script.calls(), [AbortWord(true), Abort]);
}

#[test]
fn an_abort_that_does_not_end_asks_for_the_process_to_end() {
    let (script, communicator, _aborter) =
        connected(Script::default(), Place { abort_timeout: SHORT, ..PLACE });
    let (release, released) = channel::<()>();
    let mut released = Some(released);
    let on_call = move |call| {
        if call == Abort {
            let _ = released.take().unwrap().recv();
        }
    };
    *script.on_call.lock().unwrap() = Some(Box::new(on_call));
    let error = communicator.abort().unwrap_err();
    assert!(matches!(error, ExchangeError::Stuck { waited } if waited == SHORT), "{error}");
    assert!(error.to_string().contains("end this process"), "{error}");
    assert!(matches!(sum_unrecorded(&communicator), Err(ExchangeError::Aborted(_))));
    drop(release);
}

/// The script's record is held by the call that is stuck.
fn sum_unrecorded(communicator: &Communicator<Script>) -> Result<(), ExchangeError> {
    let waiting = Waiting::new(What::Launch(tag(0)), LONG);
    communicator.call(&waiting, Intent::Launch, |_, _| Ok(()))
}

#[test]
fn every_survivor_aborts_its_own_once() {
    let ranks = [0, 1, 2].map(|rank| connected(Script::default(), Place { rank, world: 4, ..PLACE }));
    for (script, communicator, aborter) in &ranks {
        script.has_reached.store(false, Ordering::SeqCst);
        sum(communicator, 0).unwrap();
        // The coordinator tells each.
        aborter.abort();
        aborter.abort();
    }
    for (script, communicator, _) in ranks {
        drop(communicator);
        assert_eq!(script.calls(), [FollowTensors, AllReduce, AbortWord(true), Revoke, Abort]);
    }
}

#[test]
fn the_next_generation_connects_anew_under_a_new_id() {
    let (script, communicator, aborter) = connected(Script::default(), PLACE);
    aborter.abort();
    drop(communicator);
    let (communicator, _aborter) = connect(&script, Place { rank: 0, world: 1, ..PLACE }, 2).unwrap();
    assert_eq!(
        script.calls(),
        [AbortWord(true), Revoke, Abort, AbortWord(false), Init { id: 2, rank: 0, world: 1 }, Poll]
    );
    aborter.abort();
    sum(&communicator, 0).unwrap();
}

#[test]
fn an_abort_that_came_first_lets_nobody_connect() {
    let script = Arc::new(Script { last_poll: Mutex::new(Ok(Status::InProgress)), ..Script::default() });
    let aborter = Aborter::new().unwrap();
    aborter.abort();
    let id = UniqueId([1; UniqueId::BYTES]);
    let outcome = Communicator::connect(script.clone(), script.clone(), &id, PLACE, &aborter).map(drop);
    assert!(matches!(outcome, Err(ExchangeError::Aborted(Some(Wait { what: What::Init { .. }, .. })))));
    assert_eq!(script.calls(), [AbortWord(false), Init { id: 1, rank: 1, world: 2 }, AbortWord(true), Abort]);
}

#[test]
fn one_that_finished_lets_go_of_its_peers_and_is_not_aborted() {
    let (script, communicator, aborter) = connected(Script::default(), PLACE);
    script.polls.lock().unwrap().extend([Ok(Status::InProgress), Ok(Status::Done)]);
    communicator.finish().unwrap();
    aborter.abort();
    assert_eq!(*script.calls.lock().unwrap(), [Finalize, Poll, Poll, Destroy]);
}

/// Wherever the abort falls among the owner's calls, none comes after it and none is interrupted.
#[test]
fn an_abort_at_any_moment_is_in_order() {
    for round in 0..100 {
        let (script, communicator, aborter) = connected(Script::default(), PLACE);
        *script.launch.lock().unwrap() = Ok(Status::InProgress);
        thread::scope(|scope| {
            let working = scope.spawn(|| {
                let step = |bucket| {
                    sum(&communicator, bucket)?;
                    communicator.fence()?;
                    communicator.wait(tag(bucket))
                };
                (0..).map(step).find_map(Result::err).unwrap()
            });
            (0..round).for_each(|_| thread::yield_now());
            aborter.abort();
            let error = working.join().unwrap();
            assert!(matches!(error, ExchangeError::Aborted(Some(_))), "{error}");
        });
        drop(communicator);
        let calls = script.calls();
        assert_eq!(calls.iter().filter(|&&call| call == Abort).count(), 1);
    }
}
