//! An exchange over a real ring that goes wrong at one call.

use musher_collective::{Aborter, Collective, CollectiveError, Meter, Phase, Tag};

use crate::harness::Worker;

/// What happens at the call that is meant.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// This rank is gone before it takes part.
    GoneBefore,
    /// This rank takes part, but breaks off before it sees the result.
    GoneAfter,
    /// This rank's gradient overflows.
    Overflow,
    /// What this rank receives is damaged.
    Damaged,
}

/// Which calls are meant: all of a phase with this step and bucket, of which each happens once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct At {
    pub phase: Phase,
    pub step: u64,
    pub bucket: u32,
}

impl Worker {
    pub fn goes_wrong(&mut self, at: At, fault: Fault) {
        let mut member = self.member.take().unwrap();
        member.hosts.0 = Box::new(Faulty { inner: member.hosts.0, at, fault });
        self.member = Some(member);
    }
}

pub struct Faulty {
    pub inner: Box<dyn Collective>,
    pub at: At,
    pub fault: Fault,
}

impl Faulty {
    fn call<T>(
        &mut self,
        tag: Tag,
        data: &mut [T],
        mut exchange: impl FnMut(&mut dyn Collective, &mut [T]) -> Result<(), CollectiveError>,
        overflow: impl FnOnce(&mut T),
        damage: impl FnOnce(&mut T),
    ) -> Result<(), CollectiveError> {
        let inner = self.inner.as_mut();
        if self.at != (At { phase: tag.phase, step: tag.step, bucket: tag.bucket }) {
            return exchange(inner, data);
        }
        match self.fault {
            Fault::GoneBefore => {
                inner.aborter().abort();
                exchange(inner, data)
            }
            Fault::GoneAfter => {
                exchange(inner, data)?;
                inner.aborter().abort();
                Err(CollectiveError::Aborted(None))
            }
            Fault::Overflow => {
                overflow(&mut data[0]);
                exchange(inner, data)
            }
            Fault::Damaged => {
                exchange(inner, data)?;
                damage(&mut data[0]);
                Ok(())
            }
        }
    }
}

impl Collective for Faulty {
    fn rank(&self) -> u32 {
        self.inner.rank()
    }

    fn world(&self) -> u32 {
        self.inner.world()
    }

    fn all_reduce(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        let exchange = |ring: &mut dyn Collective, data: &mut [f32]| ring.all_reduce(tag, data);
        self.call(tag, data, exchange, |x| *x = f32::INFINITY, |x| *x += 1.0)
    }

    fn all_reduce_bf16(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        let exchange = |ring: &mut dyn Collective, data: &mut [f32]| ring.all_reduce_bf16(tag, data);
        self.call(tag, data, exchange, |x| *x = f32::INFINITY, |x| *x += 1.0)
    }

    fn all_reduce_f64(&mut self, tag: Tag, data: &mut [f64]) -> Result<(), CollectiveError> {
        let exchange = |ring: &mut dyn Collective, data: &mut [f64]| ring.all_reduce_f64(tag, data);
        self.call(tag, data, exchange, |x| *x = f64::INFINITY, |x| *x += 1.0)
    }

    fn broadcast(&mut self, tag: Tag, root: u32, data: &mut [u8]) -> Result<(), CollectiveError> {
        let exchange = |ring: &mut dyn Collective, data: &mut [u8]| ring.broadcast(tag, root, data);
        self.call(tag, data, exchange, |_| (), |byte| *byte ^= 1)
    }

    fn aborter(&self) -> Aborter {
        self.inner.aborter()
    }

    fn meter(&self) -> Meter {
        self.inner.meter()
    }
}
