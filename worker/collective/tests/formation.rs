//! Who gets into a ring, who does not, and how long anybody waits.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    io::Write,
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use common::{PATIENCE, addresses, each, form, listen, spec};
use musher_collective::{
    Aborter, Collective, CollectiveError, Neighbour, Phase, Ring, RingListener, RingSpec, Secret, Tag,
};

fn assert_works(rings: Vec<Ring>) {
    let world = rings.len() as f32;
    let sums = each(rings, |mut ring| {
        let mut data = [1.0; 10];
        ring.all_reduce(Tag::new(0, 0, Phase::Warmup), &mut data).unwrap();
        data
    });
    assert!(sums.iter().flatten().all(|&sum| sum == world));
}

/// Forms two ranks at `listeners` while whatever else happens to them.
fn form_pair(listeners: &[RingListener]) -> Vec<Ring> {
    let addresses = addresses(listeners);
    each(listeners.iter().zip(0..), |(listener, rank)| {
        form(listener, &spec(rank, &addresses), PATIENCE).unwrap()
    })
}

#[test]
fn the_same_listeners_form_generation_after_generation() {
    let listeners = [listen(), listen(), listen()];
    let all = addresses(&listeners);
    for generation in 1..=3 {
        // Membership and ranks change: 3, 2, 1 members.
        let world = 4 - generation as usize;
        let rings = each(listeners[..world].iter().zip(0..), |(listener, rank)| {
            form(listener, &RingSpec { generation, ..spec(rank, &all[..world]) }, PATIENCE).unwrap()
        });
        assert_works(rings);
    }
}

#[test]
fn garbage_and_silent_clients_disturb_nobody() {
    let listeners = [listen(), listen()];
    let started = Instant::now();
    let mut strangers = Vec::new();
    for address in addresses(&listeners) {
        for size in [0, 0, 0, 1, 63, 64, 65, 5000] {
            let mut stranger = TcpStream::connect(address).unwrap();
            stranger.write_all(&vec![b'G'; size]).unwrap();
            strangers.push(stranger);
        }
        drop(TcpStream::connect(address).unwrap());
    }
    let rings = form_pair(&listeners);
    // Less than a silent client is given: nobody waited for one.
    assert!(started.elapsed() < Duration::from_millis(1500), "{:?}", started.elapsed());
    assert_works(rings);
    drop(strangers);
}

#[test]
fn a_crowd_of_silent_clients_holds_no_formation_up() {
    let listeners = [listen(), listen()];
    let address = listeners[0].local_addr().unwrap();
    let crowd: Vec<_> = (0..400).map(|_| TcpStream::connect(address).unwrap()).collect();
    let started = Instant::now();
    assert_works(form_pair(&listeners));
    // Less than one of them is given.
    assert!(started.elapsed() < Duration::from_millis(1500), "{:?}", started.elapsed());
    drop(crowd);
}

#[test]
fn a_stale_generation_is_kept_out() {
    let listeners = [listen(), listen()];
    let all = addresses(&listeners);
    let stale = listen();
    thread::scope(|scope| {
        // Knows the secret even, but is a generation behind.
        let stale = scope.spawn(|| {
            let old = RingSpec { generation: 2, ..spec(0, &all) };
            form(&stale, &old, Duration::from_millis(400)).unwrap_err()
        });
        assert_works(form_pair(&listeners));
        assert!(matches!(stale.join().unwrap(), CollectiveError::NotFormed { generation: 2, .. }));
    });
}

#[test]
fn a_wrong_secret_never_forms_and_says_so() {
    let listeners = [listen(), listen()];
    let all = addresses(&listeners);
    let errors = each(listeners.iter().zip(0..), |(listener, rank)| {
        let secret = Secret([rank as u8; 32]);
        let within = Duration::from_millis(300);
        form(listener, &RingSpec { secret, ..spec(rank, &all) }, within).unwrap_err()
    });
    for error in errors {
        assert!(matches!(error, CollectiveError::NotFormed { .. }), "{error}");
    }
    // An impostor beside the right peers does not keep these from each other.
    thread::scope(|scope| {
        let impostor = scope.spawn(|| {
            let wrong = RingSpec { secret: Secret([0; 32]), ..spec(0, &all) };
            form(&listen(), &wrong, Duration::from_millis(300)).unwrap_err()
        });
        assert_works(form_pair(&listeners));
        let error = impostor.join().unwrap();
        assert!(matches!(&error, CollectiveError::NotFormed { waited, .. } if waited.rank == 1), "{error}");
    });
}

#[test]
fn a_peer_that_listens_later_is_waited_for() {
    let early = listen();
    // Nobody listens there yet, and no outgoing connection takes its port meanwhile: those leave
    // from 127.0.0.1.
    let late_address =
        RingListener::bind((Ipv4Addr::new(127, 0, 0, 2), 0).into()).unwrap().local_addr().unwrap();
    let all = [early.local_addr().unwrap(), late_address];
    let (refused, was_refused) = mpsc::sync_channel(1);
    thread::scope(|scope| {
        let first = scope.spawn(|| {
            let error = form(&early, &spec(0, &all), Duration::from_millis(100)).unwrap_err();
            refused.send(error).unwrap();
            form(&early, &spec(0, &all), PATIENCE).unwrap()
        });
        let error = was_refused.recv().unwrap();
        let successor = Neighbour::Successor;
        assert!(
            matches!(&error, CollectiveError::NotFormed { neighbour, waited, .. } if *neighbour == successor && waited.rank == 1),
            "{error}"
        );
        let late = RingListener::bind(late_address).unwrap();
        let second = form(&late, &spec(1, &all), PATIENCE).unwrap();
        assert_works(vec![first.join().unwrap(), second]);
    });
}

#[test]
fn a_successor_that_never_answers_is_named_at_the_deadline() {
    let own = listen();
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let all = [own.local_addr().unwrap(), mute.local_addr().unwrap()];
    let within = Duration::from_millis(200);
    let started = Instant::now();
    let error = form(&own, &spec(0, &all), within).unwrap_err();
    assert!(started.elapsed() >= within && started.elapsed() < Duration::from_secs(2));
    assert!(matches!(error, CollectiveError::NotFormed { .. }), "{error}");
    let waited = error.waited().unwrap();
    assert_eq!((waited.rank, waited.call, waited.received, waited.closed), (1, None, 0, false));
    assert!(waited.idle >= within);
}

#[test]
fn an_abort_ends_a_formation_at_once() {
    let own = listen();
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let all = [own.local_addr().unwrap(), mute.local_addr().unwrap()];
    let aborter = Aborter::new().unwrap();
    let started = Instant::now();
    thread::scope(|scope| {
        let forming = scope.spawn(|| own.form(&spec(0, &all), started + PATIENCE, &aborter).err());
        // Its call has come: the formation is under way.
        let _call = mute.accept().unwrap();
        aborter.abort();
        let error = forming.join().unwrap().unwrap();
        let CollectiveError::Aborted(Some(waited)) = error else { panic!("{error}") };
        assert_eq!((waited.rank, waited.call, waited.received, waited.closed), (1, None, 0, false));
    });
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_spec_that_contradicts_itself_is_refused() {
    let own = listen();
    let all = addresses(std::slice::from_ref(&own));
    for wrong in [spec(1, &all), spec(0, &[]), RingSpec { patience: Duration::ZERO, ..spec(0, &all) }] {
        let error = form(&own, &wrong, PATIENCE).unwrap_err();
        assert!(matches!(error, CollectiveError::Invalid(_)), "{error}");
    }
}

#[test]
fn a_secret_is_not_printed() {
    let printed = format!("{:?}", spec(0, &[]));
    assert!(printed.contains("Secret(..)") && !printed.contains("42"), "{printed}");
}
