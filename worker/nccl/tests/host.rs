//! Two ranks over the TCP ring, with tensors of every dtype that is exchanged.
#![allow(clippy::unwrap_used)]

use std::{
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use musher_collective::{Aborter, Phase, Ring, RingListener, RingSpec, Secret, Tag};
use musher_nccl::{ExchangeError, OnHost, TensorCollective};
use tch::{Device, Kind, Tensor};

const PATIENCE: Duration = Duration::from_secs(60);

/// What each of two ranks returns.
fn team<R: Send>(work: impl Fn(OnHost<Ring>) -> R + Sync) -> [R; 2] {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listeners = [0, 1].map(|_| RingListener::bind(any).unwrap());
    let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    thread::scope(|scope| {
        let (addresses, work) = (&addresses, &work);
        let ranks = listeners.map(|listener| {
            let rank =
                addresses.iter().position(|&address| address == listener.local_addr().unwrap()).unwrap()
                    as u32;
            scope.spawn(move || {
                let spec = RingSpec {
                    generation: 1,
                    rank,
                    world: 2,
                    successor: addresses[1 - rank as usize],
                    purpose: musher_collective::Purpose::Steps,
                    secret: Secret([7; 32]),
                    patience: PATIENCE,
                };
                let ring = listener.form(&spec, Instant::now() + PATIENCE, &Aborter::new().unwrap()).unwrap();
                work(OnHost(ring))
            })
        });
        ranks.map(|rank| rank.join().unwrap())
    })
}

fn tag(bucket: u32) -> Tag {
    Tag::new(1, bucket, Phase::Gradients)
}

#[test]
fn sums_are_those_of_the_ranks_whatever_the_dtype_and_layout() {
    let sums = team(|mut exchange| {
        let mine = f64::from(exchange.rank() + 1);
        [Kind::Float, Kind::Double, Kind::BFloat16].map(|kind| {
            let flat = Tensor::arange(12, (kind, Device::Cpu)) * mine;
            let part = flat.view([3, 4]).narrow(1, 1, 2);
            exchange.all_reduce(tag(kind as u32), &part).unwrap();
            exchange.fence().unwrap();
            exchange.wait().unwrap();
            Vec::<f64>::try_from(flat.to_kind(Kind::Double)).unwrap()
        })
    });
    for (rank, sums) in sums.iter().enumerate() {
        let expected: Vec<_> = (0..12)
            .map(|i| f64::from(i) * if [1, 2].contains(&(i % 4)) { 3.0 } else { (rank + 1) as f64 })
            .collect();
        for sum in sums {
            assert_eq!(*sum, expected, "rank {rank}: only the view is summed");
        }
    }
}

#[test]
fn a_broadcast_carries_the_root_s_bits() {
    let received = team(|mut exchange| {
        let mine = f64::from(exchange.rank()) + 0.5;
        [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Uint8].map(|kind| {
            let tensor = Tensor::full([5], mine, (Kind::Double, Device::Cpu)).to_kind(kind);
            exchange.broadcast(tag(kind as u32), 1, &tensor).unwrap();
            Vec::<f64>::try_from(tensor.to_kind(Kind::Double)).unwrap()
        })
    });
    for rank in received {
        assert_eq!(rank, [vec![1.5; 5], vec![1.5; 5], vec![1.5; 5], vec![1.0; 5]]);
    }
}

#[test]
fn what_can_t_be_exchanged_is_refused_and_a_lost_peer_is_an_error() {
    team(|mut exchange| {
        let halves = Tensor::zeros([3], (Kind::Half, Device::Cpu));
        let error = exchange.all_reduce(tag(0), &halves).unwrap_err();
        assert!(matches!(error, ExchangeError::Unfit { .. }), "{error}");
        if exchange.rank() == 0 {
            return;
        }
        let floats = Tensor::zeros([3], (Kind::Float, Device::Cpu));
        assert!(matches!(exchange.all_reduce(tag(0), &floats), Err(ExchangeError::Host(_))));
    });
}
