//! Worker processes on one machine: started, watched, and started again when they die.
//!
//! `musher launch` and `musher-worker join --workers-per-node` share it. It knows processes, exit codes and
//! how many GPUs there are; what a worker does, and when a run is over, is not its business.

mod gpus;
mod policy;
mod team;

pub use gpus::visible_gpus;
pub use policy::{FUTILE, RestartPolicy, Verdict};
pub use team::{Ender, Ending, Team, WorkerCommand};
