//! Tensors over an exchange between hosts: at once for the CPU's, with a copy each way for a GPU's.

use std::{thread, time::Duration};

use bytemuck::Pod;
use musher_collective::{Aborter, Collective, CollectiveError, Meter, Tag};
use tch::{Device, Kind, Tensor};

use crate::{ExchangeError, IsReached, TensorCollective};

/// Between two looks at what the host can only look at.
const PAUSE: Duration = Duration::from_micros(50);

/// Any [`Collective`], for tensors. A launched call is complete when it returns.
pub struct OnHost<C>(pub C);

impl<C: Collective> TensorCollective for OnHost<C> {
    fn rank(&self) -> u32 {
        self.0.rank()
    }

    fn world(&self) -> u32 {
        self.0.world()
    }

    /// bf16 is summed in f32 and rounded once.
    fn all_reduce(&mut self, tag: Tag, tensor: &Tensor) -> Result<(), ExchangeError> {
        if self.is_alone(tensor) {
            return Ok(());
        }
        let exchange = &mut self.0;
        match tensor.kind() {
            Kind::Float => with_floats(tensor, |slice| exchange.all_reduce(tag, slice)),
            Kind::BFloat16 => through_host(tensor, Kind::Float, |slice| exchange.all_reduce(tag, slice)),
            Kind::Double => through_host(tensor, Kind::Double, |slice| exchange.all_reduce_f64(tag, slice)),
            _ => Err(unfit("f32, bf16 or f64 to be summed", tensor)),
        }
    }

    fn all_reduce_bf16(&mut self, tag: Tag, tensor: &Tensor) -> Result<(), ExchangeError> {
        if self.is_alone(tensor) {
            let rounded = tensor.f_to_kind(Kind::BFloat16)?;
            tensor.shallow_clone().f_copy_(&rounded)?;
            return Ok(());
        }
        match tensor.kind() {
            Kind::Float => with_floats(tensor, |slice| self.0.all_reduce_bf16(tag, slice)),
            _ => Err(unfit("f32 to be summed in bf16", tensor)),
        }
    }

    fn broadcast(&mut self, tag: Tag, root: u32, tensor: &Tensor) -> Result<(), ExchangeError> {
        if self.is_alone(tensor) {
            return Ok(());
        }
        let mut pass = |bytes: &mut [u8]| self.0.broadcast(tag, root, bytes);
        match tensor.kind() {
            Kind::Float => with_floats(tensor, |slice| pass(bytemuck::cast_slice_mut(slice))),
            Kind::BFloat16 => {
                through_host(tensor, Kind::Float, |slice: &mut [f32]| pass(bytemuck::cast_slice_mut(slice)))
            }
            Kind::Double => {
                through_host(tensor, Kind::Double, |slice: &mut [f64]| pass(bytemuck::cast_slice_mut(slice)))
            }
            Kind::Uint8 => through_host(tensor, Kind::Uint8, |slice: &mut [u8]| pass(slice)),
            _ => Err(unfit("f32, bf16, f64 or u8", tensor)),
        }
    }

    fn fence(&mut self) -> Result<(), ExchangeError> {
        Ok(())
    }

    fn wait(&mut self) -> Result<(), ExchangeError> {
        Ok(())
    }

    fn wait_until(&mut self, is_reached: &mut IsReached) -> Result<(), ExchangeError> {
        let aborter = self.0.aborter();
        while !is_reached()? {
            if aborter.is_aborted() {
                return Err(ExchangeError::Aborted(None));
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn abort_word(&self) -> Option<Tensor> {
        None
    }

    fn leave(&mut self) -> Result<(), ExchangeError> {
        self.0.aborter().abort();
        Ok(())
    }

    fn aborter(&self) -> Aborter {
        self.0.aborter()
    }

    fn meter(&self) -> Meter {
        self.0.meter()
    }
}

impl<C: Collective> OnHost<C> {
    /// Nothing has to leave the device then. On the CPU, where nothing has to be copied, the ring decides.
    fn is_alone(&self, tensor: &Tensor) -> bool {
        self.0.world() == 1 && tensor.device() != Device::Cpu
    }
}

/// In place where the memory is the host's.
fn with_floats(
    tensor: &Tensor,
    exchange: impl FnOnce(&mut [f32]) -> Result<(), CollectiveError>,
) -> Result<(), ExchangeError> {
    match tensor.device() {
        Device::Cpu if tensor.is_contiguous() => {
            Ok(torch_ext::with_f32_mut(&mut tensor.shallow_clone(), exchange)??)
        }
        _ => through_host(tensor, Kind::Float, exchange),
    }
}

/// By a copy of `kind` in host memory.
fn through_host<T: Pod + tch::kind::Element>(
    tensor: &Tensor,
    kind: Kind,
    exchange: impl FnOnce(&mut [T]) -> Result<(), CollectiveError>,
) -> Result<(), ExchangeError> {
    let mut values = vec![T::zeroed(); tensor.numel()];
    let host = tensor.f_to_device(Device::Cpu)?.f_to_kind(kind)?.f_contiguous()?;
    host.f_copy_data(&mut values, tensor.numel())?;
    exchange(&mut values)?;
    let result = Tensor::f_from_slice(&values)?.f_view(tensor.size().as_slice())?;
    tensor.shallow_clone().f_copy_(&result)?;
    Ok(())
}

fn unfit(expected: &'static str, tensor: &Tensor) -> ExchangeError {
    ExchangeError::Unfit { expected, found: format!("{:?} on {:?}", tensor.kind(), tensor.device()) }
}
