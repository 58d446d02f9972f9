//! What Musher's coordinator and workers share: the wire protocol, ids, the job's configuration, and
//! the pure functions that both sides must compute alike.

pub mod causes;
pub mod codec;
pub mod convert;
pub mod digest;
pub mod ids;
pub mod job;
pub mod message;
pub mod patience;
pub mod scores;
pub mod shard;
pub mod size;

/// The generated types and services of `musher.v1`. They stop at [`convert`].
pub mod wire {
    #![allow(clippy::all)]

    tonic::include_proto!("musher.v1");

    /// The services' descriptors, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/musher.v1.bin"));
}
