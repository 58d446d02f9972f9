//! Batch norm's running statistics of several replicas as those of one: arithmetic on slices, in f64.
//!
//! Replicas that saw different samples hold different means and variances. The pooled variance is that of the mixture,
//! so second moments are averaged, not variances; each replica weighs as the samples it saw since the last pooling.

/// A replica's contribution, for summing over replicas: `samples`, then `samples * mean` of each channel, then
/// `samples * (var + mean²)` of each channel.
pub fn moments(mean: &[f32], var: &[f32], samples: u64) -> Vec<f64> {
    let weight = samples as f64;
    let first = mean.iter().map(|&mean| weight * f64::from(mean));
    let second =
        mean.iter().zip(var).map(|(&mean, &var)| weight * (f64::from(var) + f64::from(mean).powi(2)));
    [weight].into_iter().chain(first).chain(second).collect()
}

/// Writes the pooled statistics of the summed contributions. Without any samples nothing changes.
pub fn pool(sums: &[f64], mean: &mut [f32], var: &mut [f32]) {
    let (weight, sums) = (sums[0], &sums[1..]);
    if weight == 0.0 {
        return;
    }
    let (first, second) = sums.split_at(mean.len());
    for (channel, (first, second)) in first.iter().zip(second).enumerate() {
        let pooled = first / weight;
        mean[channel] = pooled as f32;
        var[channel] = (second / weight - pooled * pooled).max(0.0) as f32;
    }
}

/// The length of a contribution over `channels`.
pub fn moments_len(channels: usize) -> usize {
    1 + 2 * channels
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Population mean and variance of samples, as a replica that saw just them would hold.
    fn statistics(samples: &[f64]) -> (f64, f64) {
        let n = samples.len() as f64;
        let mean = samples.iter().sum::<f64>() / n;
        (mean, samples.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n)
    }

    proptest! {
        #[test]
        fn pooling_two_replicas_gives_the_statistics_of_all_samples(
            left in prop::collection::vec(-10f64..10.0, 1..50),
            right in prop::collection::vec(-3f64..30.0, 1..50),
        ) {
            let contribution = |samples: &[f64]| {
                let (mean, var) = statistics(samples);
                moments(&[mean as f32], &[var as f32], samples.len() as u64)
            };
            let sums: Vec<_> = contribution(&left).iter().zip(contribution(&right)).map(|(l, r)| l + r).collect();
            let (mut mean, mut var) = ([0f32], [0f32]);
            pool(&sums, &mut mean, &mut var);
            let all: Vec<_> = left.iter().chain(&right).copied().collect();
            let (expected_mean, expected_var) = statistics(&all);
            prop_assert!((f64::from(mean[0]) - expected_mean).abs() < 1e-5);
            prop_assert!((f64::from(var[0]) - expected_var).abs() < 1e-4);
        }
    }

    #[test]
    fn without_samples_nothing_changes() {
        let (mut mean, mut var) = ([0.1f32], [0.3f32]);
        pool(&moments(&mean, &var, 0), &mut mean, &mut var);
        assert_eq!((mean, var), ([0.1], [0.3]));
    }
}
