//! How many GPUs this machine has for workers, asked of the driver: nothing of CUDA is loaded for it.

use std::env;

use nvml_wrapper::Nvml;
use tracing::debug;

/// The GPUs that a process started here may use; 0 where there is no NVIDIA driver.
pub fn visible_gpus() -> u32 {
    let present = Nvml::init().and_then(|nvml| nvml.device_count()).unwrap_or_else(|error| {
        debug!(%error, "the driver shows no GPU");
        0
    });
    visible(present, env::var("CUDA_VISIBLE_DEVICES").ok().as_deref())
}

/// The NVIDIA driver's version, where there is one.
pub fn driver_version() -> Option<String> {
    Nvml::init().ok()?.sys_driver_version().ok()
}

/// As CUDA reads its list: up to the first entry that names no GPU.
fn visible(present: u32, list: Option<&str>) -> u32 {
    let Some(list) = list else { return present };
    let names_one = |entry: &&str| {
        let entry = entry.trim();
        let is_named = entry.starts_with("GPU-") || entry.starts_with("MIG-");
        entry.parse().map_or(is_named && present > 0, |index: u32| index < present)
    };
    list.split(',').take_while(names_one).count() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_counted_as_cuda_shows_them() {
        let of_four = |list| visible(4, Some(list));
        assert_eq!(visible(4, None), 4);
        assert_eq!((of_four("0,1"), of_four("3"), of_four("GPU-5f, GPU-6a")), (2, 1, 2));
        assert_eq!((of_four(""), of_four("-1"), of_four("1,-1,2"), of_four("0,7,1")), (0, 0, 1, 1));
        assert_eq!((visible(0, Some("0")), visible(0, Some("GPU-5f")), visible(0, None)), (0, 0, 0));
    }

    #[test]
    fn a_machine_without_a_driver_has_none() {
        if std::path::Path::new("/proc/driver/nvidia/version").exists() {
            return println!("skipped: there is a driver");
        }
        assert_eq!(visible_gpus(), 0);
    }
}
