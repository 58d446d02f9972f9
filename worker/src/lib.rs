//! Musher's worker: one process, one device, one replica. It trains its shard, sums gradients with its
//! peers, and does what the coordinator decides.

pub mod cli;
mod connection;
mod device;
mod gpus;
mod job_data;
mod liveness;
mod node;
mod predict;
mod pretext;
mod probes;
mod shell;
pub mod trace;
pub mod train;
mod trained;
mod trainer;
mod transfer;
