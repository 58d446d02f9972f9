//! Whole teams in one process: each rank is a thread with a replica of its own, joined to the others by
//! real rings over loopback. What is tested is the step and everything between two steps; there is no
//! coordinator here, and the tests decide in its place.

#![allow(clippy::unwrap_used)]

mod fault;
mod harness;
mod late;
mod start;

mod agreement;
mod compression;
mod device_data;
mod loss_of_a_peer;
mod marks;
mod overlap;
mod pause;
mod precision;
mod reference;
mod skipped;
mod sync;
mod sync_batch_norm;
mod validation;
mod world_size;
