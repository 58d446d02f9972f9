//! Steps computed in bf16: the ranks hold the same bits, and the losses are those of f32 but for rounding.

use musher_proto::job::{JobConfig, Precision};

use crate::harness::{Pets, Team, can_sum_in_backward, job, job_with_batch_norm};

fn losses(pets: &Pets, mut job: JobConfig, precision: Precision) -> Vec<f64> {
    job.train.precision = precision;
    Team::started(pets, &job, 2).train_epochs(pets, 1..3)
}

#[test]
fn bf16_learns_as_f32_does() {
    let pets = Pets::drawn();
    let over_ranks = || {
        let mut job = job_with_batch_norm();
        job.model.sync_batch_norm = can_sum_in_backward();
        job
    };
    for job in [job, job_with_batch_norm, over_ranks] {
        let (exact, rounded) = (losses(&pets, job(), Precision::Fp32), losses(&pets, job(), Precision::Bf16));
        assert_ne!(exact, rounded);
        for (step, (exact, rounded)) in exact.iter().zip(&rounded).enumerate() {
            assert!((rounded / exact - 1.0).abs() < 3e-2, "step {step}: {rounded} is far from {exact}");
        }
    }
}

/// What TF32 rounds, a GPU computes.
#[test]
fn tf32_is_f32_on_the_cpu() {
    let pets = Pets::drawn();
    assert_eq!(losses(&pets, job(), Precision::Tf32), losses(&pets, job(), Precision::Fp32));
}
