//! Gradients that travel as bf16.

use musher_proto::job::Compression;

use crate::harness::{Pets, Team, deviation, job};

/// The curve stays close, at every size of the team; and all ranks stay equal to the bit, as
/// [`Team::train`] sees to.
#[test]
fn learning_with_compressed_gradients_is_nearly_the_same() {
    let pets = Pets::drawn();
    let mut compressed = job();
    compressed.train.compress_gradients = Compression::Bf16;
    for world in [1, 2, 3] {
        let exact = Team::started(&pets, &job(), world).train_epochs(&pets, 1..=4);
        let found = Team::started(&pets, &compressed, world).train_epochs(&pets, 1..=4);
        let deviation = deviation(&found, &exact);
        println!("{world} workers, {} steps: losses deviate by {deviation:.1e}", found.len());
        assert!(deviation > 1e-7, "nothing was rounded");
        assert!(deviation < 0.02, "{found:?} is far from {exact:?}");
    }
}
