//! Musher's coordinator: it forms a team of workers, gives each its shard, decides on validation,
//! checkpoints and early stopping, and tells people what happens. It never links libtorch.

pub mod core;
pub mod store;
pub mod run_dir;
pub mod telemetry;
pub mod announce;
pub mod service;
pub mod cli;
