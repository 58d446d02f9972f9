//! A simulation of the whole protocol on a virtual clock: the real core of the coordinator
//! (`musher_coordinator::core`) and the real sessions of the workers (`musher_session`), joined by models
//! of what is between and around them: streams over links that are slow or cut, processes that die, stop
//! and come back, training threads, the ring, the checkpoint store.
//!
//! A seed makes a [`Scenario`]: a tiny job and a list of faults. After each event the nine invariants of
//! ARCHITECTURE.md are asked ([`invariants`]). What fails is shrunk and kept as a file that repeats it.

mod clock;
mod coordinator;
mod coverage;
mod exchange;
mod invariants;
mod network;
mod process;
mod replica;
pub mod run;
pub mod scenario;
mod store;
mod trainer;
mod world;

pub use coverage::Coverage;
pub use invariants::Violation;
pub use run::{Failure, Tally, seeds, simulate};
pub use scenario::Scenario;
pub use world::Report;
