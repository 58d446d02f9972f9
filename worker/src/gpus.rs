//! Whether a team exchanges tensors between its GPUs: it does if each of its members can.

use musher_collective::{Collective, Phase, Tag};
use musher_nccl::{ExchangeError, NcclRuntime};
use tch::Device;
use tracing::{info, warn};

/// What this process has for it.
pub struct Gpus(Option<NcclRuntime>);

impl Gpus {
    /// Opens NCCL if the device is a GPU. One alone needs none, so that there is none is no error yet.
    pub fn of(device: Device) -> Self {
        let Device::Cuda(index) = device else { return Self(None) };
        match NcclRuntime::open(index) {
            Ok(runtime) => {
                info!(version = %runtime.version(), "NCCL is there");
                Self(Some(runtime))
            }
            Err(error) => {
                warn!(reason = %error, "this GPU can't exchange with others: a team of several goes by way of the hosts");
                Self(None)
            }
        }
    }

    /// What to connect the team of `hosts` with; `None`: its tensors go by way of the hosts. All ranks must ask, and
    /// have the same answer.
    pub fn for_team(&self, hosts: &mut dyn Collective) -> Result<Option<&NcclRuntime>, ExchangeError> {
        let mut able = [f64::from(u8::from(self.0.is_some()))];
        hosts.all_reduce_f64(Tag::new(0, 0, Phase::Warmup), &mut able)?;
        let (able, world) = (able[0] as u32, hosts.world());
        if world == 1 || able == 0 {
            return Ok(None);
        }
        if able < world {
            warn!(able, world, "not every worker of the team has NCCL and a GPU: gradients go over TCP");
            return Ok(None);
        }
        Ok(self.0.as_ref())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        net::Ipv4Addr,
        time::{Duration, Instant},
    };

    use musher_collective::{Aborter, Purpose, RingListener, RingSpec, Secret};

    use super::*;

    #[test]
    fn a_team_without_gpus_goes_by_the_hosts() {
        let listener = RingListener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let spec = RingSpec {
            generation: 1,
            purpose: Purpose::Steps,
            rank: 0,
            world: 1,
            successor: listener.local_addr().unwrap(),
            secret: Secret([0; 32]),
            patience: Duration::MAX,
        };
        let mut ring = listener.form(&spec, Instant::now(), &Aborter::new().unwrap()).unwrap();
        assert!(Gpus::of(Device::Cpu).for_team(&mut ring).unwrap().is_none());
    }

    #[test]
    fn a_gpu_without_nccl_is_no_error_yet() {
        if tch::Cuda::is_available() {
            return println!("skipped: there is a GPU");
        }
        assert!(Gpus::of(Device::Cuda(0)).0.is_none());
    }
}
