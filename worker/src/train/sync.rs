//! From several states to one: those behind take the donor's, and all end with its digest.

use std::sync::mpsc::Receiver;

use musher_collective::{Phase, Tag};
use musher_proto::{
    ids::{Generation, Rank},
    message::{Activity, Form, Phase as WorkerPhase, Pretrained, Synced},
};

use super::{Membership, TrainError, Trainer, pretrained, seeded_replica};

/// Bytes of state in one broadcast: large enough for the ring's full rate, small enough for the caches.
const CHUNK: usize = 1 << 20;

/// What the donor's state is.
pub enum Source {
    /// Initialised from the job's seed, the encoder from its pretrained weights.
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
        let pretrained = if gives { self.prepare_donor(source)? } else { None };
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
        let (held, state_bytes) = (self.label(), self.replica.state_len());
        Ok(Synced { held, state_digest, state_bytes, pretrained })
    }

    fn prepare_donor(&mut self, source: Source) -> Result<Option<Pretrained>, TrainError> {
        let pretrained = match source {
            Source::Held => return Ok(None),
            Source::Seeded => {
                self.replica = seeded_replica(&self.job, self.replica.device())?;
                pretrained::load(&self.job, &mut self.replica, &self.board)?
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
                None
            }
        };
        // Until the sync is complete, it is a state of no lineage.
        self.lineage = Generation(0);
        Ok(pretrained)
    }

    fn give(&mut self, member: &mut Membership) -> Result<u64, TrainError> {
        let donor = member.rank();
        let mut buffer = vec![0; CHUNK];
        for (index, offset, length) in self.chunks() {
            self.replica.copy_state(offset, &mut buffer[..length])?;
            self.pass(member, donor, index, &mut buffer[..length])?;
        }
        let digest = self.replica.state_digest()?;
        self.pass_digest(member, donor, digest)?;
        Ok(digest)
    }

    /// It holds the donor's state already, and only passes it on.
    fn relay(&mut self, member: &mut Membership, donor: Rank) -> Result<u64, TrainError> {
        let mut buffer = vec![0; CHUNK];
        for (index, _, length) in self.chunks() {
            self.pass(member, donor, index, &mut buffer[..length])?;
        }
        let held = self.replica.state_digest()?;
        let expected = self.pass_digest(member, donor, 0)?;
        match held == expected {
            true => Ok(held),
            false => Err(TrainError::TornSync { expected, found: held }),
        }
    }

    fn take(&mut self, member: &mut Membership, donor: Rank) -> Result<u64, TrainError> {
        let mut staging = self.replica.staging();
        for (index, _, length) in self.chunks() {
            self.pass(member, donor, index, staging.room(length)?)?;
        }
        let found = staging.digest();
        let expected = self.pass_digest(member, donor, 0)?;
        if found != expected {
            return Err(TrainError::TornSync { expected, found });
        }
        self.replica.adopt(staging)?;
        Ok(found)
    }

    /// Of the state: number, offset and length.
    fn chunks(&self) -> impl Iterator<Item = (u32, u64, usize)> + use<> {
        let total = self.replica.state_len();
        let length = move |offset| CHUNK.min((total - offset) as usize);
        (0..total).step_by(CHUNK).enumerate().map(move |(i, offset)| (i as u32, offset, length(offset)))
    }

    fn pass(
        &self,
        member: &mut Membership,
        donor: Rank,
        index: u32,
        chunk: &mut [u8],
    ) -> Result<(), TrainError> {
        self.board.mark(Activity::WaitingForPeers);
        member.hosts.0.broadcast(Tag::new(0, index, Phase::State), donor.0, chunk)?;
        self.board.mark(Activity::Working);
        Ok(())
    }

    /// The donor's digest, to all.
    fn pass_digest(&self, member: &mut Membership, donor: Rank, digest: u64) -> Result<u64, TrainError> {
        let mut bytes = digest.to_le_bytes();
        self.board.mark(Activity::WaitingForPeers);
        member.hosts.0.broadcast(Tag::new(0, 0, Phase::Digest), donor.0, &mut bytes)?;
        self.board.mark(Activity::Working);
        Ok(u64::from_le_bytes(bytes))
    }
}
