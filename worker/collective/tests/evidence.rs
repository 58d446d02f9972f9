//! What a rank says of an exchange that did not complete, and what it shows of one that goes on.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use common::{PATIENCE, addresses, each, form, listen, spec, team};
use musher_collective::{Aborter, Collective, CollectiveError, Phase, Ring, RingSpec, Tag, Waited};

const GRADIENTS: Tag = Tag { step: 10, bucket: 2, phase: Phase::Gradients };
const STATE: Tag = Tag { step: 0, bucket: 1, phase: Phase::State };
/// More than the sockets' buffers hold.
const LARGE: usize = 40 << 20;

fn reduce(ring: &mut Ring, data: &mut [f32]) -> Result<(), CollectiveError> {
    ring.all_reduce(GRADIENTS, data)
}

fn ones(bytes: usize) -> Vec<f32> {
    vec![1.0; bytes / 4]
}

/// Waits until nothing has moved for a while: all that can be sent is sent.
fn stands_still(last_moved: impl Fn() -> Instant) {
    while last_moved().elapsed() < Duration::from_millis(400) {
        thread::yield_now();
    }
}

/// Runs `call` with `data` on each ring, aborts them once all stand still, and returns what each waited for.
fn broken_off<T: Clone + Sync>(
    rings: &mut [Ring],
    data: &[T],
    call: impl Fn(&mut Ring, &mut [T]) -> Result<(), CollectiveError> + Sync,
) -> Vec<Waited> {
    broken_off_after(|| {}, rings, data, call)
}

/// As [`broken_off`]; that nothing moves counts only once all ranks are at it and `event` has come about.
fn broken_off_after<T: Clone + Sync>(
    event: impl FnOnce() + Send,
    rings: &mut [Ring],
    data: &[T],
    call: impl Fn(&mut Ring, &mut [T]) -> Result<(), CollectiveError> + Sync,
) -> Vec<Waited> {
    let meters: Vec<_> = rings.iter().map(Collective::meter).collect();
    let aborters: Vec<Aborter> = rings.iter().map(Collective::aborter).collect();
    let begun = Barrier::new(rings.len() + 1);
    thread::scope(|scope| {
        scope.spawn(|| {
            begun.wait();
            event();
            let since = Instant::now();
            meters.iter().for_each(|meter| stands_still(|| meter.last_moved().max(since)));
            aborters.iter().for_each(Aborter::abort);
        });
        each(rings, |ring| {
            let mut data = data.to_vec();
            begun.wait();
            match call(ring, &mut data).unwrap_err() {
                CollectiveError::Aborted(Some(waited)) => waited,
                // A neighbour's abort was noticed before one's own: no evidence is lost.
                CollectiveError::PeerClosed { waited, .. } => waited,
                other => panic!("{other}"),
            }
        })
    })
}

/// The rank behind the one that stands still has the fewest bytes, and names it.
#[test]
fn a_peer_that_does_not_read_is_named_by_those_next_to_it() {
    for bytes in [LARGE, 64] {
        let mut rings = team(4, PATIENCE);
        let stuck = rings.remove(1);
        let waited = broken_off(&mut rings, &ones(bytes), reduce);
        assert!(waited.iter().all(|waited| waited.call == Some(GRADIENTS)), "{waited:?}");
        let fewest = waited.iter().min_by_key(|waited| waited.received).unwrap();
        assert_eq!((fewest.rank, fewest.closed), (1, false), "{waited:?}");
        assert_eq!(&waited[1], fewest, "{waited:?}");
        assert!(waited[1].idle >= Duration::from_millis(150), "{waited:?}");
        drop(stuck);
    }
}

#[test]
fn a_peer_that_is_gone_is_closed_and_one_that_is_aborted_here_is_not() {
    let mut rings = team(2, PATIENCE);
    drop(rings.pop());
    let error = reduce(&mut rings[0], &mut ones(64)).unwrap_err();
    let CollectiveError::PeerClosed { rank: 1, waited } = &error else { panic!("{error}") };
    assert_eq!((waited.rank, waited.call, waited.closed), (1, Some(GRADIENTS), true));
    assert_eq!(error.waited(), Some(waited));

    let mut rings = team(2, PATIENCE);
    let _stuck = rings.pop();
    let waited = broken_off(&mut rings, &ones(64), reduce).remove(0);
    assert_eq!((waited.rank, waited.closed), (1, false));
}

#[test]
fn an_abort_between_two_calls_finds_nobody_waiting() {
    let mut rings = team(2, PATIENCE);
    rings[0].aborter().abort();
    assert_eq!(reduce(&mut rings[0], &mut ones(64)).unwrap_err(), CollectiveError::Aborted(None));
}

#[test]
fn the_root_of_a_broadcast_never_has_the_fewest_bytes() {
    for root in 0..3 {
        let mut rings = team(3, PATIENCE);
        let stuck = rings.remove((root as usize + 1) % 3);
        let mut waited =
            broken_off(&mut rings, &vec![0; LARGE], |ring, data| ring.broadcast(STATE, root, data));
        let of_root = rings.iter().position(|ring| ring.rank() == root).unwrap();
        let of_root = waited.remove(of_root);
        assert_eq!(of_root.rank, stuck.rank());
        assert!(of_root.received > waited[0].received, "{of_root:?}, {waited:?}");
        assert_eq!(waited[0].received, 0);
    }
}

/// Whatever the lengths and their remainders: else who is ahead would depend on where parts are cut.
#[test]
fn all_ranks_count_alike_between_two_calls() {
    for world in 1..=4 {
        let mut rings = team(world, PATIENCE);
        let mut before = 0;
        for length in [0, 1, 3, 5, 1_000_003] {
            let received = each(&mut rings, |ring| {
                ring.all_reduce(GRADIENTS, &mut vec![1.0; length]).unwrap();
                ring.broadcast(STATE, world / 2, &mut vec![0; length]).unwrap();
                ring.meter().received()
            });
            assert!(received.iter().all(|&bytes| bytes == received[0]), "{received:?}");
            assert!(received[0] > before || world == 1);
            before = received[0];
        }
    }
}

#[test]
fn the_meter_moves_while_a_long_call_goes_on() {
    let mut rings = team(2, PATIENCE);
    let meter = rings[0].meter();
    let (sender, sums) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            each(&mut rings, |ring| reduce(ring, &mut ones(LARGE)).unwrap());
            drop(sender);
        });
        let mut seen = vec![meter.received()];
        while let Err(mpsc::TryRecvError::Empty) = sums.try_recv() {
            let now = meter.received();
            assert!(now >= seen[seen.len() - 1], "{now} after {seen:?}");
            seen.push(now);
            assert!(meter.last_moved() <= Instant::now());
        }
        let _: Result<(), _> = sums.recv();
        seen.dedup();
        assert!(seen.len() > 2, "{seen:?}");
    });
}

/// Who is starved of how much depends on what was under way; what a link did not carry does not.
#[test]
fn a_cut_link_is_one_that_does_not_carry_what_was_sent() {
    const WORLD: u32 = 4;
    // The links that are cut, each by the rank that it leads to.
    for (cut, bytes) in
        [(vec![2], LARGE), (vec![2, 3], LARGE), (vec![0, 1], LARGE), (vec![2], 64), (vec![1, 3], 64)]
    {
        let listeners: Vec<_> = (0..WORLD).map(|_| listen()).collect();
        let is_cut = Arc::new(AtomicBool::new(false));
        let links: Vec<_> = (0..)
            .zip(addresses(&listeners))
            .map(|(rank, address)| if cut.contains(&rank) { relay(address, is_cut.clone()) } else { address })
            .collect();
        let mut rings = each(listeners.iter().zip(0..), |(listener, rank)| {
            form(listener, &RingSpec { patience: PATIENCE, ..spec(rank, &links) }, PATIENCE).unwrap()
        });
        let meter = rings[0].meter();
        let cut_in_midst = || {
            while meter.received() < 2 * bytes as u64 {
                thread::yield_now();
            }
            is_cut.store(true, Ordering::Relaxed);
        };
        let waited = broken_off_after(cut_in_midst, &mut rings, &ones(bytes), |ring, data| {
            loop {
                reduce(ring, data)?;
            }
        });
        let lost = |rank: &u32| {
            let before = (rank + WORLD - 1) % WORLD;
            waited[before as usize].sent > waited[*rank as usize].received
        };
        let lost: Vec<_> = (0..WORLD).filter(lost).collect();
        // All may have come to a stand for one of the cuts before anything got lost at the other.
        assert!(!lost.is_empty() && lost.iter().all(|rank| cut.contains(rank)), "{lost:?}: {waited:#?}");
    }
}

/// An address that leads to `to`, until it is cut: then nothing passes any more, and nobody is told.
fn relay(to: SocketAddr, is_cut: Arc<AtomicBool>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for from in listener.incoming() {
            let (from, to) = (from.unwrap(), TcpStream::connect(to).unwrap());
            for (from, to) in [(from.try_clone().unwrap(), to.try_clone().unwrap()), (to, from)] {
                let is_cut = is_cut.clone();
                thread::spawn(move || pass(from, to, &is_cut));
            }
        }
    });
    address
}

fn pass(mut from: TcpStream, mut to: TcpStream, is_cut: &AtomicBool) -> io::Result<()> {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut bytes)?;
        if is_cut.load(Ordering::Relaxed) {
            thread::park_timeout(PATIENCE);
        }
        if length == 0 {
            return to.shutdown(Shutdown::Write);
        }
        to.write_all(&bytes[..length])?;
    }
}
