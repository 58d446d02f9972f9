//! What the ranks of a formed ring compute together, and how they fail.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use common::{PATIENCE, each, team};
use musher_collective::{Collective, CollectiveError, Phase, Ring, Tag};
use proptest::prelude::*;

const GRADIENTS: Tag = Tag { step: 10, bucket: 2, phase: Phase::Gradients };

/// Soon enough to be called at once, on a machine that does other things too.
const SOON: Duration = Duration::from_secs(5);

/// A value in -1..1 that looks random (SplitMix64), the same for the same arguments.
fn value(seed: u64, rank: u32, index: usize) -> f32 {
    let mut z = seed
        .wrapping_add(u64::from(rank) << 40)
        .wrapping_add(index as u64)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z >> 40) as f32) / (1 << 23) as f32 - 1.0
}

fn reduce(rings: &mut [Ring], length: usize, fill: impl Fn(u32, usize) -> f32 + Sync) -> Vec<Vec<f32>> {
    each(rings, |ring| {
        let mut data: Vec<f32> = (0..length).map(|i| fill(ring.rank(), i)).collect();
        ring.all_reduce(GRADIENTS, &mut data).unwrap();
        data
    })
}

fn bits(data: &[f32]) -> Vec<u32> {
    data.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn sums_of_integers_are_exact_at_every_world_size_and_length() {
    for world in 1..=5 {
        let mut rings = team(world, PATIENCE);
        for length in [0, 1, 2, 3, 4, 5, 7, 64, 1000, 65_535, 65_536, 65_537, 400_003] {
            let sums = reduce(&mut rings, length, |rank, i| (i % 1000) as f32 * (rank + 1) as f32);
            let factor = (world * (world + 1) / 2) as f32;
            for sum in sums {
                assert_eq!(sum.len(), length);
                assert!(sum.iter().enumerate().all(|(i, &x)| x == (i % 1000) as f32 * factor));
            }
        }
    }
}

#[test]
fn all_ranks_hold_identical_bits_and_a_repeat_gives_them_again() {
    let first = reduce(&mut team(4, PATIENCE), 300_007, |rank, i| value(1, rank, i));
    let again = reduce(&mut team(4, PATIENCE), 300_007, |rank, i| value(1, rank, i));
    for sum in first.iter().chain(&again) {
        assert_eq!(bits(sum), bits(&first[0]));
    }
}

/// Unit roundoff of bf16.
const ROUNDOFF: f64 = 1.0 / 256.0;

fn reduce_bf16(rings: &mut [Ring], length: usize, seed: u64) -> Vec<Vec<f32>> {
    each(rings, |ring| {
        let mut data: Vec<f32> = (0..length).map(|i| value(seed, ring.rank(), i)).collect();
        ring.all_reduce_bf16(GRADIENTS, &mut data).unwrap();
        data
    })
}

#[test]
fn compressed_sums_are_near_and_the_same_bits_on_all_ranks() {
    for world in 1..=5 {
        let mut rings = team(world, PATIENCE);
        for length in [0, 1, 3, 1000, 131_073, 300_007] {
            let sums = reduce_bf16(&mut rings, length, 9);
            assert!(sums.iter().all(|sum| bits(sum) == bits(&sums[0])));
            for (i, &sum) in sums[0].iter().enumerate() {
                assert_eq!(sum.to_bits() & 0xffff, 0, "{sum} is no bf16");
                let terms = || (0..world).map(|rank| f64::from(value(9, rank, i)));
                let bound = f64::from(world) * ROUNDOFF * terms().map(f64::abs).sum::<f64>();
                let error = (f64::from(sum) - terms().sum::<f64>()).abs();
                assert!(error <= bound, "element {i} of {world}: {error:e} is beyond {bound:e}");
            }
        }
    }
}

#[test]
fn a_compressed_sum_has_half_the_bytes() {
    for world in [2, 3] {
        let mut rings = team(world, PATIENCE);
        let length = 600_000;
        let received = |rings: &[Ring]| rings[0].meter().received();
        // Each of the 2 (W - 1) rounds counts for a byte of its own.
        let rounds = 2 * (u64::from(world) - 1);
        reduce(&mut rings, length, |_, _| 1.0);
        let full = received(&rings);
        assert_eq!(full - rounds, rounds * 4 * length as u64 / u64::from(world));
        reduce_bf16(&mut rings, length, 1);
        assert_eq!(2 * (received(&rings) - full - rounds), full - rounds);
    }
}

#[test]
fn a_compressed_sum_keeps_nan_and_infinity() {
    let sums = each(&mut team(3, PATIENCE), |ring| {
        let mut data = [1.0, f32::MAX, 1.0];
        if ring.rank() == 1 {
            data = [f32::NAN, f32::MAX, f32::NEG_INFINITY];
        }
        ring.all_reduce_bf16(GRADIENTS, &mut data).unwrap();
        data
    });
    assert!(sums[0][0].is_nan() && sums[0][1] == f32::INFINITY && sums[0][2] == f32::NEG_INFINITY);
    assert!(sums.iter().all(|sum| bits(sum) == bits(&sums[0])));
}

#[test]
fn nan_and_infinity_reach_every_rank_with_the_same_bits() {
    let sums = reduce(&mut team(3, PATIENCE), 9, |rank, i| match (rank, i) {
        (1, 4) => f32::from_bits(0x7fc0_1234),
        (2, 5) => f32::INFINITY,
        (_, 6) => -0.0,
        _ => 1.0,
    });
    assert!(sums[0][4].is_nan() && sums[0][5] == f32::INFINITY);
    assert!(sums[0][6].is_sign_negative());
    assert!(sums.iter().all(|sum| bits(sum) == bits(&sums[0])));
}

#[test]
fn double_precision_keeps_what_single_would_lose() {
    let sums = each(&mut team(3, PATIENCE), |ring| {
        let mut data = [1e15, f64::from(ring.rank()), 0.125];
        ring.all_reduce_f64(Tag::new(10, 0, Phase::Control), &mut data).unwrap();
        data
    });
    assert_eq!(sums, [[3e15, 3.0, 0.375]; 3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn sums_agree_with_double_precision(
        world in 1u32..6, lengths in prop::collection::vec(0usize..150_000, 1..4), seed: u64,
    ) {
        let mut rings = team(world, PATIENCE);
        for length in lengths {
            let sums = reduce(&mut rings, length, |rank, i| value(seed, rank, i));
            for (i, &sum) in sums[0].iter().enumerate() {
                let exact: f64 = (0..world).map(|rank| f64::from(value(seed, rank, i))).sum();
                prop_assert!((f64::from(sum) - exact).abs() < 1e-5, "element {i}: {sum}, not {exact}");
            }
            for sum in &sums {
                prop_assert_eq!(bits(sum), bits(&sums[0]));
            }
        }
    }
}

#[test]
fn a_broadcast_of_megabytes_arrives_from_every_root() {
    for world in 1..=4 {
        let mut rings = team(world, PATIENCE);
        for root in 0..world {
            for length in [0, 1, 5_000_011] {
                let byte = |i: usize| (i * 31 + root as usize) as u8;
                let copies = each(&mut rings, |ring| {
                    let mut data = vec![0xee; length];
                    if ring.rank() == root {
                        data.iter_mut().enumerate().for_each(|(i, slot)| *slot = byte(i));
                    }
                    ring.broadcast(Tag::new(0, root, Phase::State), root, &mut data).unwrap();
                    data
                });
                for copy in copies {
                    assert!(copy.iter().enumerate().all(|(i, &b)| b == byte(i)));
                }
            }
        }
    }
}

#[test]
fn a_rank_may_leave_as_soon_as_its_own_call_is_done() {
    for _ in 0..20 {
        let results = each(team(4, PATIENCE), |mut ring| {
            let mut data = vec![1.0; 200_000];
            ring.all_reduce(GRADIENTS, &mut data).map(|()| data[199_999])
        });
        assert_eq!(results, vec![Ok(4.0); 4]);
    }
}

#[test]
fn a_root_that_is_no_rank_is_refused_and_harms_nothing() {
    let mut rings = team(2, PATIENCE);
    let error = rings[0].broadcast(GRADIENTS, 2, &mut []).unwrap_err();
    assert!(matches!(error, CollectiveError::Invalid(_)), "{error}");
    assert_eq!(reduce(&mut rings, 1, |_, _| 1.0), [[2.0], [2.0]]);
}

#[test]
fn a_lost_peer_fails_all_others_within_bounds_and_for_good() {
    let started = Instant::now();
    let errors = each(team(4, PATIENCE), |mut ring| {
        let mut data = vec![1.0; 500_000];
        for step in 0.. {
            if ring.rank() == 2 && step == 3 {
                return None;
            }
            let tag = Tag::new(step, 0, Phase::Gradients);
            if let Err(error) = ring.all_reduce(tag, &mut data) {
                let later = ring.all_reduce_f64(GRADIENTS, &mut []).unwrap_err();
                assert_eq!(later, error, "a later call fails in the same way");
                return Some((step, error));
            }
        }
        unreachable!("the loop ends only by a return");
    });
    assert!(started.elapsed() < SOON);
    for (rank, error) in errors.into_iter().enumerate() {
        match error {
            None => assert_eq!(rank, 2),
            Some((step, CollectiveError::PeerClosed { rank: neighbour, waited })) => {
                assert_eq!((step, waited.call.unwrap().step), (3, 3));
                assert_eq!(waited.closed, waited.rank == neighbour);
                assert!([(rank + 1) % 4, (rank + 3) % 4].contains(&(neighbour as usize)));
            }
            Some((_, other)) => panic!("rank {rank}: {other}"),
        }
    }
}

#[test]
fn a_stalled_peer_is_named_after_the_time_out() {
    let patience = Duration::from_millis(300);
    for world in [2, 3] {
        let mut rings = team(world, patience);
        // Alive, connected, and never in the call.
        let _stalled = rings.remove(1);
        let started = Instant::now();
        let errors = each(&mut rings, |ring| {
            // More than the sockets' buffers hold, so that the one before it notices as well.
            ring.all_reduce(GRADIENTS, &mut vec![1.0; 30_000_000]).unwrap_err()
        });
        assert!(started.elapsed() >= patience && started.elapsed() < SOON);
        let mut named = false;
        for error in errors {
            match error {
                // The kernel loses its patience with a peer that does not read at about the same time.
                CollectiveError::Timeout(waited) | CollectiveError::Unreachable { waited, .. } => {
                    assert_eq!((waited.rank, waited.call, waited.closed), (1, Some(GRADIENTS), false));
                    assert!(waited.idle >= patience / 2, "{waited:?}");
                    named = true;
                }
                // The other's time-out closed the connection first.
                CollectiveError::PeerClosed { .. } => assert_eq!(world, 3),
                other => panic!("{other}"),
            }
        }
        assert!(named);
    }
}

#[test]
fn an_abort_from_another_thread_unblocks_the_call_and_the_neighbour() {
    for delay_ms in [0, 1, 5, 20, 50] {
        let mut rings = team(2, PATIENCE);
        let mut neighbour = rings.pop().unwrap();
        let mut ring = rings.pop().unwrap();
        let aborter = ring.aborter();
        let started = Instant::now();
        thread::scope(|scope| {
            let blocked = scope.spawn(move || {
                let error = ring.all_reduce(GRADIENTS, &mut [1.0; 100]).unwrap_err();
                // The ring lives on: it is the abort that the neighbour notices.
                (error, ring)
            });
            // Any moment will do: before the call, on its way, and in its wait.
            thread::sleep(Duration::from_millis(delay_ms));
            aborter.abort();
            let (error, mut ring) = blocked.join().unwrap();
            assert!(matches!(error, CollectiveError::Aborted(_)), "{error}");
            let later = ring.broadcast(GRADIENTS, 0, &mut []).unwrap_err();
            assert_eq!(later, error);
            let error = neighbour.all_reduce(GRADIENTS, &mut [1.0; 100]).unwrap_err();
            let CollectiveError::PeerClosed { rank: 0, waited } = error else { panic!("{error}") };
            assert_eq!((waited.rank, waited.closed), (0, true));
        });
        assert!(started.elapsed() < SOON);
    }
}

#[test]
fn an_abort_in_the_midst_of_a_stream_fails_every_rank() {
    let rings = team(3, PATIENCE);
    let aborter = rings[0].aborter();
    let (under_way, observed) = mpsc::sync_channel(64);
    let started = Instant::now();
    thread::scope(|scope| {
        scope.spawn(move || {
            observed.recv().unwrap();
            aborter.abort();
            // Dropping the receiver frees a rank that reports once more.
        });
        let errors = each(rings, |mut ring| {
            let mut data = vec![0.0; 2_000_000];
            for step in 0.. {
                if let Err(error) = ring.all_reduce(Tag::new(step, 0, Phase::Gradients), &mut data) {
                    return error;
                }
                let _ = under_way.send(step);
            }
            unreachable!("the loop ends only by a return");
        });
        assert!(matches!(errors[0], CollectiveError::Aborted(_)), "{}", errors[0]);
        assert!(matches!(errors[1], CollectiveError::PeerClosed { .. }), "{}", errors[1]);
        assert!(matches!(errors[2], CollectiveError::PeerClosed { .. }), "{}", errors[2]);
    });
    assert!(started.elapsed() < SOON);
}

#[test]
fn a_world_of_one_obeys_its_aborter_too() {
    let mut ring = team(1, PATIENCE).remove(0);
    let mut data = [1.5, -2.0];
    ring.all_reduce(GRADIENTS, &mut data).unwrap();
    assert_eq!(data, [1.5, -2.0]);
    ring.aborter().abort();
    assert_eq!(ring.all_reduce(GRADIENTS, &mut data).unwrap_err(), CollectiveError::Aborted(None));
}

/// Two ranks in different calls: at least one sees what the other sent, and neither succeeds.
fn disagree(
    one: impl FnOnce(&mut Ring) -> Result<(), CollectiveError> + Send,
    other: impl FnOnce(&mut Ring) -> Result<(), CollectiveError> + Send,
) -> String {
    let mut rings = team(2, PATIENCE);
    let (second, first) = (rings.pop().unwrap(), rings.pop().unwrap());
    type Call<'a> = Box<dyn FnOnce(&mut Ring) -> Result<(), CollectiveError> + Send + 'a>;
    let calls: [(Ring, Call); 2] = [(first, Box::new(one)), (second, Box::new(other))];
    let errors = each(calls, |(mut ring, call)| call(&mut ring).unwrap_err());
    let is_protocol = |e: &&CollectiveError| matches!(e, CollectiveError::Protocol { .. });
    for error in &errors {
        let is_closed = matches!(error, CollectiveError::PeerClosed { .. });
        assert!(is_protocol(&error) || is_closed, "{error}");
    }
    errors.iter().find(is_protocol).expect("one of them compared").to_string()
}

#[test]
fn ranks_out_of_step_are_detected_and_both_frames_named() {
    let message = disagree(
        |ring| ring.all_reduce(Tag::new(7, 41, Phase::Gradients), &mut [1.0; 8]),
        |ring| ring.all_reduce(Tag::new(7, 42, Phase::Gradients), &mut [1.0; 8]),
    );
    assert!(message.contains("bucket 41") && message.contains("bucket 42"), "{message}");

    let message = disagree(
        |ring| ring.all_reduce(Tag::new(7, 0, Phase::Gradients), &mut []),
        |ring| ring.all_reduce(Tag::new(8, 0, Phase::Gradients), &mut []),
    );
    assert!(message.contains("step 7") && message.contains("step 8"), "{message}");

    let message = disagree(
        |ring| ring.all_reduce(GRADIENTS, &mut [1.0; 8]),
        |ring| ring.all_reduce(GRADIENTS, &mut [1.0; 12]),
    );
    assert!(message.contains("16 bytes") && message.contains("24 bytes"), "{message}");

    let message = disagree(
        |ring| ring.all_reduce(GRADIENTS, &mut [1.0; 8]),
        |ring| ring.all_reduce_f64(GRADIENTS, &mut [1.0; 4]),
    );
    assert!(message.contains("of f32") && message.contains("of f64"), "{message}");

    let message = disagree(
        |ring| ring.all_reduce(GRADIENTS, &mut [1.0; 4]),
        |ring| ring.all_reduce_bf16(GRADIENTS, &mut [1.0; 8]),
    );
    assert!(message.contains("of f32") && message.contains("of bf16"), "{message}");
}
