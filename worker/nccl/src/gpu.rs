//! The exchange on CUDA tensors.

use std::{sync::Arc, time::Instant};

use musher_collective::{Aborter, Collective, Meter, Phase, Tag};
use tch::{Device, Kind, Tensor};

use crate::{
    ExchangeError, IsReached, Place, TensorCollective, Version,
    api::{Buffer, Element, Nccl, UniqueId},
    communicator::Communicator,
    cuda::CudaDevice,
    library::NcclLibrary,
};

/// NCCL and a device, opened once a process.
#[derive(Clone)]
pub struct NcclRuntime {
    nccl: Arc<dyn Nccl>,
    device: Arc<CudaDevice>,
    version: Version,
}

impl NcclRuntime {
    /// Libtorch's CUDA part is to be [open](torch_ext::open_cuda) already: its NCCL is used.
    ///
    /// # Errors
    /// If NCCL or CUDA is missing or too old.
    pub fn open(ordinal: usize) -> Result<Self, ExchangeError> {
        let device = CudaDevice::open(ordinal)?;
        let nccl = NcclLibrary::open()?;
        let version = nccl.version().map_err(|error| ExchangeError::Missing { reason: error.to_string() })?;
        Ok(Self { nccl: Arc::new(nccl), device, version })
    }

    pub fn version(&self) -> Version {
        self.version
    }

    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Rank 0's fresh id, on all ranks: it travels over an exchange between the hosts of this very generation, which
    /// is authenticated and knows who is a member.
    pub fn agree_on_id(&self, hosts: &mut dyn Collective) -> Result<UniqueId, ExchangeError> {
        let mut id = match hosts.rank() {
            0 => {
                self.nccl.unique_id().map_err(|error| ExchangeError::Missing { reason: error.to_string() })?
            }
            _ => UniqueId([0; UniqueId::BYTES]),
        };
        hosts.broadcast(Tag::new(0, 0, Phase::Warmup), 0, &mut id.0)?;
        Ok(id)
    }

    /// Connects this rank with the others that have `id`, which is good for this once; `aborter` breaks it off. Several
    /// exchanges may stand at once, each in a stream of its own; whatever aborts one of them sets the abort word of all.
    pub fn connect(
        &self,
        id: &UniqueId,
        place: Place,
        aborter: &Aborter,
    ) -> Result<GpuCollective, ExchangeError> {
        let device = self.device.with_another_stream()?;
        let communicator = Communicator::connect(self.nccl.clone(), device, id, place, aborter)?;
        Ok(GpuCollective {
            communicator,
            place,
            device: Device::Cuda(self.device.ordinal()),
            abort_word: self.device.abort_word(),
            in_flight: InFlight::default(),
            received: 0,
            aborter: aborter.clone(),
            meter: Meter::new(),
        })
    }
}

/// One rank of one generation.
///
/// May be moved between threads, and each call orders itself behind the calling thread's current stream: call it on
/// the thread that launched the tensor's kernels, or on any while all use the default stream.
pub struct GpuCollective {
    // Before `in_flight`: the fields are dropped in this order, and an aborted kernel may write until its end.
    communicator: Communicator<CudaDevice>,
    in_flight: InFlight,
    place: Place,
    device: Device,
    abort_word: Tensor,
    /// Bytes of completed calls.
    received: u64,
    aborter: Aborter,
    meter: Meter,
}

/// What was launched and not yet waited for.
#[derive(Default)]
struct InFlight {
    last: Option<Tag>,
    bytes: u64,
    /// libtorch may give freed memory to others, as it knows nothing of our stream.
    tensors: Vec<Tensor>,
    /// f32 tensors with the bf16 that is summed in their stead.
    rounded: Vec<(Tensor, Tensor)>,
}

impl GpuCollective {
    /// Lets go of the peers, who do the same, once all is done.
    pub fn finish(mut self) -> Result<(), ExchangeError> {
        self.wait()?;
        self.communicator.finish()
    }

    fn launched(&mut self, tag: Tag, buffer: Buffer, tensor: &Tensor) {
        self.in_flight.last = Some(tag);
        self.in_flight.bytes += (buffer.elements * buffer.element.bytes()) as u64;
        self.in_flight.tensors.push(tensor.shallow_clone());
    }

    /// The device is done with all that was launched.
    fn received(&mut self) {
        self.received += std::mem::take(&mut self.in_flight.bytes);
        self.in_flight.last = None;
        self.meter.receive(self.received);
        self.meter.moved(Instant::now());
    }
}

impl TensorCollective for GpuCollective {
    fn rank(&self) -> u32 {
        self.place.rank
    }

    fn world(&self) -> u32 {
        self.place.world
    }

    fn all_reduce(&mut self, tag: Tag, tensor: &Tensor) -> Result<(), ExchangeError> {
        let buffer = buffer(tensor, self.device)?;
        if buffer.element == Element::U8 {
            return Err(unfit("f32, bf16 or f64 to be summed", tensor));
        }
        // SAFETY: the tensor's storage is kept in `in_flight` until the stream has passed a fence or a wait.
        unsafe { self.communicator.all_reduce(tag, buffer)? };
        self.launched(tag, buffer, tensor);
        Ok(())
    }

    fn all_reduce_bf16(&mut self, tag: Tag, tensor: &Tensor) -> Result<(), ExchangeError> {
        if tensor.kind() != Kind::Float {
            return Err(unfit("f32 to be summed in bf16", tensor));
        }
        let rounded = tensor.f_to_kind(Kind::BFloat16)?;
        self.all_reduce(tag, &rounded)?;
        self.in_flight.rounded.push((tensor.shallow_clone(), rounded));
        Ok(())
    }

    fn broadcast(&mut self, tag: Tag, root: u32, tensor: &Tensor) -> Result<(), ExchangeError> {
        let buffer = buffer(tensor, self.device)?;
        // SAFETY: as in `all_reduce`.
        unsafe { self.communicator.broadcast(tag, root, buffer)? };
        self.launched(tag, buffer, tensor);
        Ok(())
    }

    fn fence(&mut self) -> Result<(), ExchangeError> {
        self.communicator.fence()?;
        for (mut tensor, sum) in self.in_flight.rounded.drain(..) {
            tensor.f_copy_(&sum)?;
            torch_ext::used_here(&sum)?; // it is of the stream that rounded it
        }
        // Whoever gets their memory from libtorch now, uses it behind the fence.
        self.in_flight.tensors.clear();
        Ok(())
    }

    fn wait(&mut self) -> Result<(), ExchangeError> {
        let Some(last) = self.in_flight.last else { return Ok(()) };
        self.fence()?;
        self.communicator.wait(last)?;
        self.received();
        Ok(())
    }

    fn wait_until(&mut self, is_reached: &mut IsReached) -> Result<(), ExchangeError> {
        let nothing_yet = Tag::new(0, 0, Phase::Warmup);
        self.communicator.wait_until(self.in_flight.last.unwrap_or(nothing_yet), is_reached)?;
        self.received();
        Ok(())
    }

    fn abort_word(&self) -> Option<Tensor> {
        Some(self.abort_word.shallow_clone())
    }

    fn leave(&mut self) -> Result<(), ExchangeError> {
        self.communicator.abort()?;
        self.in_flight = InFlight::default();
        Ok(())
    }

    fn aborter(&self) -> Aborter {
        self.aborter.clone()
    }

    fn meter(&self) -> Meter {
        self.meter.clone()
    }
}

/// The tensor's memory, if NCCL can take it.
fn buffer(tensor: &Tensor, device: Device) -> Result<Buffer, ExchangeError> {
    let element = match tensor.kind() {
        Kind::Float => Element::F32,
        Kind::Double => Element::F64,
        Kind::BFloat16 => Element::Bf16,
        Kind::Uint8 => Element::U8,
        _ => return Err(unfit("f32, bf16, f64 or u8", tensor)),
    };
    if tensor.device() != device {
        return Err(unfit("on this rank's GPU", tensor));
    }
    if !tensor.is_contiguous() {
        return Err(unfit("contiguous", tensor));
    }
    Ok(Buffer { address: tensor.data_ptr(), elements: tensor.numel(), element })
}

fn unfit(expected: &'static str, tensor: &Tensor) -> ExchangeError {
    let layout = if tensor.is_contiguous() { "contiguous" } else { "strided" };
    let found = format!("{layout} {:?} on {:?}", tensor.kind(), tensor.device());
    ExchangeError::Unfit { expected, found }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nccl_can_take_is_handed_to_it() {
        let tensor = |kind| Tensor::zeros([4, 6], (kind, Device::Cpu));
        let said = |tensor: &Tensor, device| buffer(tensor, device).unwrap_err().to_string();
        let half = said(&tensor(Kind::Half), Device::Cpu);
        assert_eq!(
            half,
            "a tensor that is contiguous Half on Cpu can't be exchanged: it must be f32, bf16, f64 or u8"
        );
        assert!(said(&tensor(Kind::Float), Device::Cuda(0)).contains("must be on this rank's GPU"));
        assert!(said(&tensor(Kind::Float).transpose(0, 1), Device::Cpu).contains("must be contiguous"));

        let flat = tensor(Kind::BFloat16).view(-1);
        let part = buffer(&flat.narrow(0, 4, 7), Device::Cpu).unwrap();
        assert_eq!((part.elements, part.element), (7, Element::Bf16));
        assert_eq!(part.address as usize - flat.data_ptr() as usize, 8);
    }
}
