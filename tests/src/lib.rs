//! What the end-to-end tests are told with: data sets, jobs, processes, and the events of a run as it goes;
//! and [`sim`], the simulation of the whole protocol without processes.
//!
//! The end-to-end tests run the binaries that were built beside them, as a user would, and know nothing of
//! their inside. What cannot be set up panics with a sentence; every wait has a deadline.

pub mod binaries;
pub mod chaos;
pub mod checkpoints;
pub mod cluster;
pub mod crowd;
pub mod data;
pub mod faults;
pub mod history;
pub mod http;
pub mod job;
pub mod network;
pub mod process;
pub mod run;
pub mod scene;
pub mod sim;

pub use data::DataSet;
pub use history::History;
pub use job::Job;
pub use process::{End, Process};
pub use run::{Event, Run};
pub use scene::Scene;
