//! The exchange that goes on while backward computes changes no bit, and ends with what it is about.

use std::{sync::Arc, thread};

use musher_collective::{Aborter, Collective, CollectiveError, Meter, Phase, Tag};
use musher_proto::message::Activity;
use musher_worker::train::ProgressBoard;

use crate::harness::{Pets, Team, Worker, bits, job_with_batch_norm};

/// Three ranks, as the order in which two are added is no matter.
#[test]
fn the_sums_are_those_of_an_exchange_after_backward() {
    let pets = Pets::drawn();
    let run = |sequential: bool| {
        let mut team = Team::seeded(&pets, &job_with_batch_norm(), 3);
        assert!(team.0[0].trainer.replica().buckets().len() > 3);
        if sequential {
            team.0.iter_mut().for_each(hold_back);
        }
        let losses = team.train_epochs(&pets, 1..=2);
        (team.0[0].digest(), bits(&losses))
    };
    assert_eq!(run(false), run(true));
}

/// Lets no sum of gradients begin before the rank's own backward pass is over.
fn hold_back(worker: &mut Worker) {
    let board = worker.trainer.board.clone();
    let mut member = worker.member.take().unwrap();
    member.hosts.0 = Box::new(Sequential { inner: member.hosts.0, board });
    worker.member = Some(member);
}

struct Sequential {
    inner: Box<dyn Collective>,
    board: Arc<ProgressBoard>,
}

impl Collective for Sequential {
    fn rank(&self) -> u32 {
        self.inner.rank()
    }

    fn world(&self) -> u32 {
        self.inner.world()
    }

    fn all_reduce(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        assert_eq!(tag.phase, Phase::Gradients);
        while self.board.read().activity != Activity::WaitingForPeers {
            thread::yield_now();
        }
        self.inner.all_reduce(tag, data)
    }

    fn all_reduce_bf16(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.inner.all_reduce_bf16(tag, data)
    }

    fn all_reduce_f64(&mut self, tag: Tag, data: &mut [f64]) -> Result<(), CollectiveError> {
        self.inner.all_reduce_f64(tag, data)
    }

    fn broadcast(&mut self, tag: Tag, root: u32, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.inner.broadcast(tag, root, data)
    }

    fn aborter(&self) -> Aborter {
        self.inner.aborter()
    }

    fn meter(&self) -> Meter {
        self.inner.meter()
    }
}
