//! This rank's membership of one generation: the exchanges that it has with its peers.

use std::time::{Duration, Instant};

use musher_collective::{Aborter, Collective};
use musher_nccl::{ExchangeError, GpuCollective, OnHost, TensorCollective};
use musher_proto::ids::{Generation, Rank};
use tch::Device;
use torch_ext::Mark;

use super::{SyncBatchNorm, TrainError, control::Control};

/// For a device to do what was given to it before the exchange was broken off.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_micros(200);

pub struct Membership {
    pub generation: Generation,
    /// Between the hosts: a team's words, and all of its tensors where it has no GPUs.
    pub hosts: OnHost<Box<dyn Collective>>,
    /// Between the GPUs, where each rank has one.
    pub gpus: Option<GpuCollective>,
    /// Where batch norm is over the batches of all ranks.
    pub batch_norm: Option<SyncBatchNorm>,
    pub(super) control: Control,
    device: Device,
}

impl Membership {
    pub fn new(
        generation: Generation,
        hosts: Box<dyn Collective>,
        gpus: Option<GpuCollective>,
        batch_norm: Option<SyncBatchNorm>,
        device: Device,
    ) -> Result<Self, TrainError> {
        let abort_word = gpus.as_ref().and_then(TensorCollective::abort_word);
        let control = Control::new(generation, hosts.world(), device, abort_word)?;
        Ok(Self { generation, hosts: OnHost(hosts), gpus, batch_norm, control, device })
    }

    pub fn rank(&self) -> Rank {
        Rank(self.hosts.rank())
    }

    pub fn world(&self) -> u32 {
        self.hosts.world()
    }

    pub fn aborter(&self) -> Aborter {
        self.hosts.aborter()
    }

    /// What tensors are exchanged by.
    pub fn tensors(&mut self) -> &mut dyn TensorCollective {
        tensors(&mut self.hosts, &mut self.gpus)
    }

    /// Breaks all exchanges off. Afterwards nothing of them touches a tensor, and the device has done all that was given
    /// to it.
    ///
    /// # Errors
    /// [`ExchangeError::Stuck`]: this process should end.
    pub fn leave(&mut self) -> Result<(), TrainError> {
        self.aborter().abort();
        if let Some(gpus) = &mut self.gpus {
            gpus.leave()?;
        }
        if let Some(batch_norm) = &self.batch_norm {
            batch_norm.leave()?;
        }
        self.hosts.leave()?;
        self.drain()
    }

    /// By looking: a wait on the device has no end if the device has none.
    fn drain(&self) -> Result<(), TrainError> {
        let (end, started) = (Mark::set(self.device)?, Instant::now());
        while !end.is_reached()? {
            if started.elapsed() > DRAIN_TIMEOUT {
                return Err(ExchangeError::Stuck { waited: DRAIN_TIMEOUT }.into());
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}

/// See [`Membership::tensors`], for one whose other parts are in use.
pub(super) fn tensors<'a>(
    hosts: &'a mut OnHost<Box<dyn Collective>>,
    gpus: &'a mut Option<GpuCollective>,
) -> &'a mut dyn TensorCollective {
    match gpus {
        Some(gpus) => gpus,
        None => hosts,
    }
}
