//! Worker processes on one machine: started, watched, and started again when they die.
//!
//! `musher launch` and `musher-worker join --workers-per-node` share it. It knows processes, exit codes and
//! how many GPUs there are, and how a look at the machine is told; what a worker does, and when a run is over, is not its business.

mod cores;
pub mod findings;
mod gpus;
mod policy;
mod team;

pub use cores::shared_cores;
pub use gpus::{driver_version, visible_gpus};
pub use policy::{FUTILE, RestartPolicy, UNFIT, Verdict};
pub use team::{Ender, Ending, Team, WorkerCommand};
