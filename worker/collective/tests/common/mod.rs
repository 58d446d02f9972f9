//! Teams of ranks for tests: threads of one process over loopback.
#![allow(dead_code)] // no test binary uses all of it

use std::{
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use musher_collective::{Aborter, CollectiveError, Purpose, Ring, RingListener, RingSpec, Secret};

/// Far longer than anything that works takes, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn listen() -> RingListener {
    RingListener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap()
}

pub fn addresses(listeners: &[RingListener]) -> Vec<SocketAddr> {
    listeners.iter().map(|listener| listener.local_addr().unwrap()).collect()
}

/// Of a team that listens at these addresses.
pub fn spec(rank: u32, addresses: &[SocketAddr]) -> RingSpec {
    let successor = addresses.iter().cycle().nth(rank as usize + 1);
    RingSpec {
        generation: 3,
        purpose: Purpose::Steps,
        rank,
        world: addresses.len() as u32,
        successor: *successor.unwrap_or(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
        secret: Secret([42; 32]),
        patience: PATIENCE,
    }
}

/// Forms `spec` with an aborter of its own.
pub fn form(listener: &RingListener, spec: &RingSpec, within: Duration) -> Result<Ring, CollectiveError> {
    listener.form(spec, Instant::now() + within, &Aborter::new().unwrap())
}

/// The rings of a whole team, in rank order.
pub fn team(world: u32, patience: Duration) -> Vec<Ring> {
    let listeners: Vec<_> = (0..world).map(|_| listen()).collect();
    let addresses = addresses(&listeners);
    each(listeners.into_iter().zip(0..), |(listener, rank)| {
        let spec = RingSpec { patience, ..spec(rank, &addresses) };
        form(&listener, &spec, PATIENCE).unwrap()
    })
}

/// Runs `act` on each item in a thread of its own, and returns the results in order.
pub fn each<I: Send, T: Send>(items: impl IntoIterator<Item = I>, act: impl Fn(I) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let act = &act;
        let threads: Vec<_> = items.into_iter().map(|item| scope.spawn(move || act(item))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
