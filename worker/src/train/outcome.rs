//! What a step came to, on its way from the device to the host: asked for when the step is given to the device, read
//! when it is there. So the host prepares the next step meanwhile.

use std::time::Instant;

use musher_nccl::TensorCollective;
use musher_proto::message::Activity;
use tch::{Device, Kind, Tensor};
use torch_ext::Mark;

use super::{ProgressBoard, TrainError};

/// Of one step, in memory that the device writes to.
pub struct Outcome {
    /// f64 [4], page-locked: complete, finite, ranks that want to stop, loss sum.
    record: Tensor,
    /// This rank has done its own part; what comes after waits for peers.
    own_part: Milestone,
    /// The record is there.
    written: Milestone,
}

/// A place in what the device has been given to do, and when it was first seen to have got there.
pub struct Milestone {
    mark: Mark,
    seen: Option<Instant>,
}

/// What the ranks agree on at a step's end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// On all ranks.
    pub complete: bool,
    /// The reduced gradient.
    pub finite: bool,
    /// Some rank wants this step to be the last.
    pub stop: bool,
    /// Over the ranks, in nats.
    pub loss_sum: f64,
}

impl Outcome {
    /// To be read behind all that this thread has given to the device. `complete` and `finite` are f64 scalars, `sums`
    /// the [control word's](super::control::Control).
    pub fn follow(
        own_part: Milestone,
        complete: &Tensor,
        finite: &Tensor,
        sums: &Tensor,
    ) -> Result<Self, TrainError> {
        let on_device =
            Tensor::f_cat(&[complete.f_view([1])?, finite.f_view([1])?, sums.f_narrow(0, 1, 2)?], 0)?;
        let device = on_device.device();
        let mut record = on_device;
        if device.is_cuda() {
            let host = Tensor::f_zeros([4], (Kind::Double, Device::Cpu))?;
            let mut host = torch_ext::pin(&host)?;
            torch_ext::copy_later(&mut host, &record)?;
            record = host;
        }
        Ok(Self { record, own_part, written: Milestone::set(device)? })
    }

    /// Whether it is there. Does not wait.
    pub fn is_there(&mut self) -> Result<bool, torch_ext::Error> {
        self.own_part.is_reached()?;
        self.written.is_reached()
    }

    /// Waits until it is there, or the exchange fails; shows meanwhile what it waits for.
    pub fn wait(
        &mut self,
        exchange: &mut dyn TensorCollective,
        board: &ProgressBoard,
    ) -> Result<Seen, TrainError> {
        if !self.is_there()? {
            let mut shown = None;
            exchange.wait_until(&mut || {
                let is_there = self.is_there()?;
                let waits_for = Some(self.waits_for());
                if shown != waits_for {
                    board.mark(self.waits_for());
                    shown = waits_for;
                }
                Ok(is_there)
            })?;
            board.mark(Activity::Working);
        }
        Ok(self.read())
    }

    /// What the device has written, which must be [there](Self::is_there).
    pub fn read(&self) -> Seen {
        let number = |index| self.record.double_value(&[index]);
        Seen {
            complete: number(0) == 1.0,
            finite: number(1) == 1.0,
            stop: number(2) > 0.0,
            loss_sum: number(3),
        }
    }

    /// When this rank was first seen to have done its own part.
    pub fn own_part_seen(&self) -> Option<Instant> {
        self.own_part.seen
    }

    /// When the record was first seen to be there.
    pub fn seen(&self) -> Option<Instant> {
        self.written.seen
    }

    fn waits_for(&self) -> Activity {
        match self.own_part.seen {
            Some(_) => Activity::WaitingForPeers,
            None => Activity::Working,
        }
    }
}

impl Milestone {
    /// Behind all that this thread has given to the device. On the CPU that is done already.
    pub fn set(device: Device) -> Result<Self, torch_ext::Error> {
        let mut milestone = Self { mark: Mark::set(device)?, seen: None };
        milestone.is_reached()?;
        Ok(milestone)
    }

    /// Does not wait.
    pub fn is_reached(&mut self) -> Result<bool, torch_ext::Error> {
        if self.seen.is_none() && self.mark.is_reached()? {
            self.seen = Some(Instant::now());
        }
        Ok(self.seen.is_some())
    }
}
