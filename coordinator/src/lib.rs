//! Musher's coordinator: it forms a team of workers, gives each its shard, decides on validation,
//! checkpoints and early stopping, and tells people what happens. It never links libtorch.

pub mod announce;
pub mod cli;
pub mod compare;
pub mod core;
pub mod fetch;
pub mod http;
pub mod kube;
mod outlook;
pub mod run_dir;
pub mod service;
pub mod store;
pub mod telemetry;
pub mod traces;
