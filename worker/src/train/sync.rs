//! From several states to one: those behind take the donor's, and all end with its digest.

use std::sync::mpsc::Receiver;

use musher_collective::{Phase, Tag};
use musher_model::{CounterWords, StateTensors};
use musher_proto::{
    ids::{Generation, Rank},
    message::{Activity, Form, Phase as WorkerPhase, Synced},
};

use tch::Tensor;

use super::{Membership, TrainError, Trainer, seeded_replica};

/// Elements of state in one broadcast: between hosts, large enough for the ring's full rate and small enough for the
/// caches; between GPUs, large enough for launching to cost nothing.
const HOST_CHUNK: i64 = 1 << 18;
const GPU_CHUNK: i64 = 1 << 23;

/// What the donor's state is.
pub enum Source {
    /// Initialised from the job's seed.
    Seeded,
    /// What the donor holds.
    Held,
    /// A checkpoint's bytes, as they come.
    Checkpoint(Receiver<Result<Vec<u8>, String>>),
}

impl Trainer {
    /// Takes the donor's state, or gives it, as [`Form`] says. Until a received state is complete and its
    /// digest is the donor's, the old one stands.
    pub fn sync(
        &mut self,
        member: &mut Membership,
        form: &Form,
        source: Source,
    ) -> Result<Synced, TrainError> {
        self.board.enter(WorkerPhase::Syncing);
        self.board.connected(member.hosts.0.meter());
        let gives = member.rank() == form.donor;
        if gives {
            self.prepare_donor(source)?;
        }
        let state_digest = match form.broadcast {
            false => self.replica.state_digest()?,
            true if gives => self.give(member)?,
            true if form.holds_it => self.relay(member, form.donor)?,
            true => self.take(member, form.donor)?,
        };
        self.lineage = member.generation;
        self.unpooled_samples = 0;
        self.bad_streak = 0;
        self.board.moved(self.position());
        Ok(Synced { held: self.label(), state_digest, state_bytes: self.replica.state_len() })
    }

    fn prepare_donor(&mut self, source: Source) -> Result<(), TrainError> {
        match source {
            Source::Held => return Ok(()),
            Source::Seeded => {
                self.replica = seeded_replica(&self.job, self.replica.device())?;
            }
            Source::Checkpoint(chunks) => {
                let mut staging = self.replica.staging();
                self.board.mark(Activity::WaitingForData);
                for chunk in chunks {
                    staging.receive(&chunk.map_err(TrainError::Download)?)?;
                    self.board.mark(Activity::WaitingForData);
                }
                self.board.mark(Activity::Working);
                self.replica.adopt(staging)?;
            }
        }
        // Until the sync is complete, it is a state of no lineage.
        self.lineage = Generation(0);
        Ok(())
    }

    fn give(&mut self, member: &mut Membership) -> Result<u64, TrainError> {
        let (donor, state) = (member.rank(), self.replica.state_tensors());
        self.pass(member, donor, &state, None)?;
        let digest = self.replica.state_digest()?;
        self.pass_words(member, donor, state.counters, digest)?;
        Ok(digest)
    }

    /// It holds the donor's state already, and only passes it on.
    fn relay(&mut self, member: &mut Membership, donor: Rank) -> Result<u64, TrainError> {
        let state = self.replica.state_tensors();
        let scratch = state.tensors[0].f_narrow(0, 0, chunk(member).min(longest(&state)))?.f_empty_like()?;
        self.pass(member, donor, &state, Some(&scratch))?;
        let held = self.replica.state_digest()?;
        let (_, expected) = self.pass_words(member, donor, state.counters, 0)?;
        match held == expected {
            true => Ok(held),
            false => Err(TrainError::TornSync { expected, found: held }),
        }
    }

    fn take(&mut self, member: &mut Membership, donor: Rank) -> Result<u64, TrainError> {
        let mut state = self.replica.room_for_tensors()?;
        self.pass(member, donor, &state, None)?;
        let (counters, expected) = self.pass_words(member, donor, state.counters, 0)?;
        state.counters = counters;
        let found = self.replica.digest_of_tensors(&state)?;
        if found != expected {
            return Err(TrainError::TornSync { expected, found });
        }
        self.replica.adopt_tensors(&state)?;
        Ok(found)
    }

    /// The donor's tensors into those of `state`, or, where `scratch` is given, no further than there.
    fn pass(
        &self,
        member: &mut Membership,
        donor: Rank,
        state: &StateTensors,
        scratch: Option<&Tensor>,
    ) -> Result<(), TrainError> {
        let (chunk, exchange) = (chunk(member), member.tensors());
        let pieces = state.tensors.iter().flat_map(|tensor| {
            let len = tensor.size()[0];
            (0..len).step_by(chunk as usize).map(move |start| (tensor, start, chunk.min(len - start)))
        });
        for (index, (tensor, start, len)) in (0..).zip(pieces) {
            let piece = match scratch {
                Some(scratch) => scratch.f_narrow(0, 0, len)?,
                None => tensor.f_narrow(0, start, len)?,
            };
            self.board.mark(Activity::WaitingForPeers);
            exchange.broadcast(Tag::new(0, index, Phase::State), donor.0, &piece)?;
            self.board.mark(Activity::Working);
        }
        self.board.mark(Activity::WaitingForPeers);
        exchange.wait()?;
        self.board.mark(Activity::Working);
        Ok(())
    }

    /// The donor's counters and digest, to all.
    fn pass_words(
        &self,
        member: &mut Membership,
        donor: Rank,
        counters: CounterWords,
        digest: u64,
    ) -> Result<(CounterWords, u64), TrainError> {
        let mut words: Vec<u64> = counters.into_iter().chain([digest]).collect();
        self.board.mark(Activity::WaitingForPeers);
        let bytes = bytemuck::cast_slice_mut(&mut words);
        member.hosts.0.broadcast(Tag::new(0, 0, Phase::Digest), donor.0, bytes)?;
        self.board.mark(Activity::Working);
        Ok((std::array::from_fn(|i| words[i]), words[counters.len()]))
    }
}

fn chunk(member: &Membership) -> i64 {
    match member.gpus {
        Some(_) => GPU_CHUNK,
        None => HOST_CHUNK,
    }
}

/// Elements of the largest tensor, which is the first: nothing that trains is not a parameter.
fn longest(state: &StateTensors) -> i64 {
    state.tensors[0].size()[0]
}
