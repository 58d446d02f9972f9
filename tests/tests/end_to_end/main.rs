//! Musher end to end: real processes, real data, from the command line to the files of a run.
//!
//! One binary, so that the turns its tests take on the machine's cores are shared.

mod checks;

mod chaos;
mod commands;
mod crowd;
mod data;
mod disk_full;
mod failures;
mod hangs;
mod http;
mod kube;
mod links;
mod manifests;
mod node;
mod object_store;
mod packed;
mod preemption;
mod pretrained;
mod refusals;
mod remote_data;
mod repeatability;
mod restart;
mod resume;
mod runs;
mod security;
mod serve;
mod traces;
mod weights;
