//! How the workers of one machine share its processor.

use std::thread;

/// The threads that each of `count` workers can have without getting in each other's way; at least 1.
pub fn shared_cores(count: u32) -> usize {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    (cores / count.max(1) as usize).max(1)
}
