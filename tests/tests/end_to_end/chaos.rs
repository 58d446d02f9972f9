//! A real run under one fault after another. Longer ones: the command `chaos` of this crate.

use std::time::Duration;

use musher_tests::chaos::{self, Options};

#[test]
fn half_a_minute_of_chaos_ends_well() {
    let options =
        Options { seed: 1, length: Duration::from_secs(25), workers: 3, data: None, verbose: false };
    let summary = chaos::run(&options);
    println!("{summary}");
    assert_eq!(summary.violations, [""; 0]);
}
