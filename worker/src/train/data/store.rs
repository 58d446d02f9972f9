//! Decoded samples kept near where they are used: on the device within one budget, else in host memory
//! within another. The first to come stay, as an epoch visits each sample once in random order; what falls
//! outside of both is decoded at each use.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use musher_dataset::{Raster, Sample};
use tch::{Device, Kind, TchError, Tensor};

use super::torch;

/// Outlives the batches' makers, which come and go with the team's segments.
pub(super) struct SampleStore {
    device: Device,
    budgets: Budgets,
    kept: Mutex<Kept>,
}

/// In bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budgets {
    pub device: usize,
    pub host: usize,
}

/// A sample's pixels: [H * W] i32 of four bytes each.
pub(super) struct Pixels {
    pub pixels: Tensor,
    /// Width and height.
    pub size: (u32, u32),
}

/// Bytes of the samples kept, each within its budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeptBytes {
    pub device: usize,
    pub host: usize,
}

#[derive(Default)]
struct Kept {
    samples: HashMap<PathBuf, Pixels>,
    bytes: KeptBytes,
}

impl SampleStore {
    pub fn new(device: Device, budgets: Budgets) -> Self {
        Self { device, budgets, kept: Mutex::default() }
    }

    /// Whether the sample is kept; it stays for good then.
    pub fn holds(&self, sample: &Sample) -> bool {
        self.kept().samples.contains_key(&sample.image)
    }

    /// A sample that is kept, on the device.
    pub fn get(&self, sample: &Sample) -> Result<Option<Pixels>, TchError> {
        let kept = self.kept();
        let Some(found) = kept.samples.get(&sample.image) else { return Ok(None) };
        let (pixels, size) = (found.pixels.shallow_clone(), found.size);
        drop(kept);
        // From pinned memory there is no need to wait for the copy: what uses it follows on the same stream.
        Ok(Some(Pixels { pixels: pixels.f_to_device_(self.device, Kind::Int, true, false)?, size }))
    }

    /// Puts a decoded sample on the device, and keeps it there or in host memory if there is room.
    ///
    /// Returns when it has arrived, so that any stream may use it.
    pub fn put(&self, sample: &Sample, raster: &Raster<4>) -> Result<Pixels, TchError> {
        let size = raster.size();
        let on_host = Tensor::f_from_data_size(&raster.data, &[raster.data.len() as i64 / 4], Kind::Int)?;
        let on_device = on_host.f_to_device(self.device)?;

        let mut kept = self.kept();
        let bytes = raster.data.len();
        // A maker that was given up may have put it there meanwhile.
        if !kept.samples.contains_key(&sample.image) {
            let home = if kept.bytes.device + bytes <= self.budgets.device {
                kept.bytes.device += bytes;
                Some(on_device.shallow_clone())
            } else if kept.bytes.host + bytes <= self.budgets.host {
                kept.bytes.host += bytes;
                Some(self.for_upload(on_host)?)
            } else {
                None
            };
            if let Some(pixels) = home {
                kept.samples.insert(sample.image.clone(), Pixels { pixels, size });
            }
        }
        Ok(Pixels { pixels: on_device, size })
    }

    pub fn kept_bytes(&self) -> KeptBytes {
        self.kept().bytes
    }

    fn for_upload(&self, on_host: Tensor) -> Result<Tensor, TchError> {
        if self.device.is_cuda() { torch_ext::pin(&on_host).map_err(torch) } else { Ok(on_host) }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample(index: usize) -> Sample {
        Sample::of_files("", format!("{index}.jpg"), "")
    }

    fn raster(index: usize) -> Raster<4> {
        Raster::from_fn(index as u32 + 1, 5, |x, y| [index as u8, x as u8, y as u8, 200])
    }

    #[test]
    fn the_first_to_come_stay_within_both_budgets() {
        // Of 20, 40, 60, ... bytes.
        let store = SampleStore::new(Device::Cpu, Budgets { device: 90, host: 150 });
        for _ in 0..2 {
            for index in 0..6 {
                let pixels = store.put(&sample(index), &raster(index)).unwrap();
                assert_eq!(pixels.size, raster(index).size());
                assert_eq!(pixels.pixels.size(), [5 * (index as i64 + 1)]);
            }
        }
        assert_eq!((0..6).filter(|&index| store.holds(&sample(index))).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(store.kept_bytes(), KeptBytes { device: 20 + 40, host: 60 + 80 });
        for index in 0..6 {
            let found = store.get(&sample(index)).unwrap();
            let bytes = found.map(|kept| Vec::<u8>::try_from(kept.pixels.view_dtype(Kind::Uint8)).unwrap());
            assert_eq!(bytes, (index < 4).then(|| raster(index).data));
        }
    }
}
