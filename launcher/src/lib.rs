//! Worker processes on one machine: started, watched, and started again when they die.
//!
//! `musher launch` and `musher-worker join --workers-per-node` share it. It knows processes and exit
//! codes; what a worker does, and when a run is over, is not its business.

mod policy;
mod team;

pub use policy::{RestartPolicy, Verdict};
pub use team::{Ending, Team, WorkerCommand};
