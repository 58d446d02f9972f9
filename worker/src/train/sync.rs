//! From several states to one: those behind take the donor's, and all end with its digest.

use std::sync::mpsc::Receiver;

use musher_collective::{Phase, Tag};
use musher_model::{Replica, StateStaging};
use musher_proto::{
    ids::{Generation, Rank},
    message::{Activity, Phase as WorkerPhase, Synced},
};

use super::{Membership, TrainError, Trainer, model_options};

/// Bytes of state in one broadcast: large enough for the ring's full rate, small enough to stage.
const CHUNK: usize = 8 << 20;

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
    /// Takes the donor's state, or gives it. Until a received state is complete and its digest is the
    /// donor's, the old one stands.
    pub fn sync(
        &mut self,
        member: &mut Membership,
        donor: Rank,
        broadcast: bool,
        source: Source,
    ) -> Result<Synced, TrainError> {
        self.board.enter(WorkerPhase::Syncing);
        self.board.connected(member.collective.meter());
        if member.rank() == donor {
            self.prepare_donor(source)?;
        }
        if broadcast {
            self.broadcast(member, donor)?;
        }
        self.lineage = member.generation;
        self.unpooled_samples = 0;
        self.bad_streak = 0;
        self.board.moved(self.position());
        Ok(Synced {
            held: self.label(),
            state_digest: self.replica.state_digest()?,
            state_bytes: self.replica.state_len(),
        })
    }

    fn prepare_donor(&mut self, source: Source) -> Result<(), TrainError> {
        match source {
            Source::Held => return Ok(()),
            Source::Seeded => {
                self.replica = Replica::new(&model_options(&self.job), self.job.seed, self.replica.device())?;
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

    fn broadcast(&mut self, member: &mut Membership, donor: Rank) -> Result<(), TrainError> {
        let mine = member.rank() == donor;
        let mut staging = (!mine).then(|| self.replica.staging());
        let total = self.replica.state_len();
        for (index, offset) in (0..total).step_by(CHUNK).enumerate() {
            let length = CHUNK.min((total - offset) as usize);
            let mut chunk = match mine {
                true => self.replica.read_state(offset, length)?,
                false => vec![0; length],
            };
            self.board.mark(Activity::WaitingForPeers);
            member.collective.broadcast(Tag::new(0, index as u32, Phase::State), donor.0, &mut chunk)?;
            self.board.mark(Activity::Working);
            if let Some(staging) = &mut staging {
                staging.receive(&chunk)?;
            }
        }
        let mut digest = self.replica.state_digest()?.to_le_bytes();
        self.board.mark(Activity::WaitingForPeers);
        member.collective.broadcast(Tag::new(0, 0, Phase::Digest), donor.0, &mut digest)?;
        self.board.mark(Activity::Working);
        match staging {
            Some(staging) => self.adopt(staging, u64::from_le_bytes(digest)),
            None => Ok(()),
        }
    }

    fn adopt(&mut self, staging: StateStaging, expected: u64) -> Result<(), TrainError> {
        let found = staging.digest();
        if found != expected {
            return Err(TrainError::TornSync { expected, found });
        }
        Ok(self.replica.adopt(staging)?)
    }
}
