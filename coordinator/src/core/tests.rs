//! Scenarios and properties of the core, on a virtual clock.

#![allow(clippy::unwrap_used)]

mod chaos;
mod crowd;
mod ending;
mod failures;
mod invariants;
mod joining;
mod restart;
mod saving;
pub mod sim;
mod training;
