//! Batch norm over the batches of all ranks: one sum over the ranks in forward, one in backward. How ranks are
//! reached is the caller's; this knows tensors and the order of the sums.
//!
//! With the statistics of all values, forward is batch norm with given statistics. Backward through it gives
//! `g = w / std * dy`, the gradient for constant statistics, and this rank's part of the parameters' gradients. That
//! the statistics depend on the input takes from `g` its components along 1 and along the normalised input `x̂`,
//! channel by channel over the values of all ranks (Ioffe & Szegedy, "Batch Normalization", 2015):
//!
//! ```text
//! dx = g - mean(g) - x̂ mean(g x̂)
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Kind, TchError, Tensor, no_grad};
use torch_ext::Norm;

/// Adds up numbers over the ranks.
pub trait SumOverRanks: Send {
    /// Sums `numbers`, a contiguous f64 tensor, elementwise over all ranks, in place and in a fixed order; the result is
    /// there for what this thread gives to the device next. All ranks make the same calls in the same order; `call`
    /// tells those of one forward and backward pass apart. `None`: it failed, as will the pass; why is for the
    /// implementation to keep.
    fn sum(&mut self, call: u32, numbers: &Tensor) -> Option<()>;
}

/// This rank's part in a forward pass over the batches of all ranks, and in its backward pass.
#[derive(Clone)]
pub struct OverRanks {
    pub sums: Arc<Mutex<dyn SumOverRanks>>,
    /// False for one whose batch is none: it takes part, but what it computes counts for nothing.
    pub counts: bool,
}

impl OverRanks {
    fn sum(&self, call: u32, mut numbers: Tensor) -> Result<Tensor, TchError> {
        if !self.counts {
            let _ = numbers.f_zero_()?;
        }
        let failed = || TchError::Torch("the exchange of batch norm's sums failed".into());
        self.lock().sum(call, &numbers).map(|()| numbers).ok_or_else(failed)
    }

    fn lock(&self) -> MutexGuard<'_, dyn SumOverRanks + 'static> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Batch norm of `x` [N, C, H, W], f32 or bf16, in training, as if the batches of all ranks were one. `layer` numbers the
/// network's batch norms. All ranks move their running statistics alike, as PyTorch does.
pub fn batch_norm(x: &Tensor, layer: u32, norm: Norm, ranks: &OverRanks) -> Result<Tensor, TchError> {
    let statistics = no_grad(|| Statistics::new(x, layer, norm.eps, ranks))?;
    no_grad(|| statistics.move_running(norm))?;
    // An alias, for the hook to see what comes back through this layer alone.
    let input = x.f_alias()?;
    if input.requires_grad() {
        let (statistics, x, ranks) = (statistics.clone(), x.f_detach()?, ranks.clone());
        let project = move |gradient: &Tensor| statistics.project(gradient, &x, layer, &ranks).ok();
        torch_ext::on_gradient(&input, project).map_err(|error| TchError::Torch(error.to_string()))?;
    }
    statistics.normalise(&input, Some(norm.weight), Some(norm.bias))
}

/// Of the values of all ranks, each f32 [C].
struct Statistics {
    mean: Tensor,
    /// Biased.
    var: Tensor,
    eps: f64,
    /// In each channel, f64 [1].
    values: Tensor,
}

impl Clone for Statistics {
    fn clone(&self) -> Self {
        let Self { mean, var, eps, values } = self;
        Self {
            mean: mean.shallow_clone(),
            var: var.shallow_clone(),
            eps: *eps,
            values: values.shallow_clone(),
        }
    }
}

impl Statistics {
    /// Means and second moments add up where they weigh as their values are many; variances do not.
    fn new(x: &Tensor, layer: u32, eps: f64, ranks: &OverRanks) -> Result<Self, TchError> {
        let (var, mean) = x.f_to_kind(Kind::Float)?.f_var_mean_correction(&OVER_VALUES[..], 0, false)?;
        let (var, mean) = (var.f_to_kind(Kind::Double)?, mean.f_to_kind(Kind::Double)?);
        let channels = mean.size()[0];
        let own = (x.numel() as i64 / channels) as f64;
        let second = var.f_add(&mean.f_square()?)?.f_mul_scalar(own)?;
        let own = Tensor::f_full([1], own, (Kind::Double, x.device()))?;
        let sums = ranks.sum(2 * layer, Tensor::f_cat(&[&own, &mean.f_mul(&own)?, &second], 0)?)?;

        let values = sums.f_narrow(0, 0, 1)?;
        let of_all = |start| sums.f_narrow(0, start, channels)?.f_div(&values);
        let mean = of_all(1)?;
        let var = of_all(1 + channels)?.f_sub(&mean.f_square()?)?.f_clamp_min(0.0)?;
        Ok(Self { mean: mean.f_to_kind(Kind::Float)?, var: var.f_to_kind(Kind::Float)?, eps, values })
    }

    /// Running variances are unbiased.
    fn move_running(&self, norm: Norm) -> Result<(), TchError> {
        let correction = self.values.f_div(&self.values.f_sub_scalar(1.0)?)?.f_to_kind(Kind::Float)?;
        let unbiased = self.var.f_mul(&correction)?;
        for (running, new) in [(norm.running_mean, &self.mean), (norm.running_var, &unbiased)] {
            let _ = running.shallow_clone().f_lerp_(new, norm.momentum)?;
        }
        Ok(())
    }

    fn normalise(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Tensor, TchError> {
        x.f_batch_norm(weight, bias, Some(&self.mean), Some(&self.var), false, 0.0, self.eps, true)
    }

    /// From the gradient for constant statistics to the whole one.
    fn project(
        &self,
        gradient: &Tensor,
        x: &Tensor,
        layer: u32,
        ranks: &OverRanks,
    ) -> Result<Tensor, TchError> {
        let normalised = self.normalise(&x.f_to_kind(Kind::Float)?, None, None)?;
        let kind = gradient.kind();
        let gradient = gradient.f_to_kind(Kind::Float)?;
        let per_channel = |values: &Tensor| values.f_sum_dim_intlist(&OVER_VALUES[..], false, Kind::Float);
        let own = [per_channel(&gradient)?, per_channel(&gradient.f_mul(&normalised)?)?];
        let sums = ranks.sum(2 * layer + 1, Tensor::f_cat(&own, 0)?.f_to_kind(Kind::Double)?)?;
        if !ranks.counts {
            return gradient.f_zeros_like()?.f_to_kind(kind);
        }
        let means = sums.f_div(&self.values)?.f_to_kind(Kind::Float)?.f_view([2, -1, 1, 1])?;
        let along_one = gradient.f_sub(&means.f_get(0)?)?;
        along_one.f_addcmul(&normalised, &means.f_get(1)?.f_neg()?)?.f_to_kind(kind)
    }
}

/// All dimensions of [N, C, H, W] but the channels'.
const OVER_VALUES: [i64; 3] = [0, 2, 3];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use tch::Device;

    use super::*;

    const CHANNELS: i64 = 5;
    const SIDE: i64 = 4;
    const MOMENTUM: f64 = 0.1;
    const EPS: f64 = 1e-3;

    /// A team of threads that sum in the order of their ranks.
    struct Team {
        gathered: Mutex<Vec<Vec<f64>>>,
        met: Barrier,
    }

    struct Member {
        team: Arc<Team>,
        rank: usize,
    }

    impl SumOverRanks for Member {
        fn sum(&mut self, _call: u32, numbers: &Tensor) -> Option<()> {
            let Team { gathered, met } = &*self.team;
            gathered.lock().unwrap()[self.rank] = Vec::try_from(numbers).unwrap();
            met.wait();
            let mut sum = vec![0.0; numbers.numel()];
            for part in &*gathered.lock().unwrap() {
                sum.iter_mut().zip(part).for_each(|(sum, number)| *sum += number);
            }
            numbers.shallow_clone().copy_(&Tensor::from_slice(&sum));
            met.wait();
            Some(())
        }
    }

    /// What one pass over a batch leaves: outputs and gradients of inputs [N, C, H, W]; gradients of weight and
    /// bias, running mean and variance [C].
    type Pass = [Tensor; 6];

    fn tensor(shape: &[i64], step: f64) -> Tensor {
        let len: i64 = shape.iter().product();
        let wave = (Tensor::arange(len, (Kind::Double, Device::Cpu)) * step).sin() * 1.5 + 0.7;
        wave.to_kind(Kind::Float).view(shape)
    }

    fn pass(x: &Tensor, dy: &Tensor, norm: impl FnOnce(&Tensor, Norm) -> Tensor) -> Pass {
        let leaf = |tensor: &Tensor| tensor.copy().set_requires_grad(true);
        let x = leaf(x);
        let (weight, bias) = (leaf(&tensor(&[CHANNELS], 0.9)), leaf(&tensor(&[CHANNELS], 0.4)));
        let (running_mean, running_var) = (tensor(&[CHANNELS], 0.3), tensor(&[CHANNELS], 0.2).square() + 0.1);
        let parts = Norm {
            weight: &weight,
            bias: &bias,
            running_mean: &running_mean,
            running_var: &running_var,
            momentum: MOMENTUM,
            eps: EPS,
        };
        let y = norm(&x, parts);
        (&y * dy).sum(Kind::Float).backward();
        let gradients = [x.grad(), weight.grad(), bias.grad()];
        let [dx, dw, db] = gradients;
        [y.detach(), dx, dw, db, running_mean.detach(), running_var.detach()]
    }

    fn assert_close(found: &Tensor, expected: &Tensor, what: &str) {
        let error = (found - expected).abs().max().double_value(&[]);
        let scale = expected.abs().max().double_value(&[]);
        assert!(error <= 1e-5 * scale.max(1.0), "{what}: {error:e} of {scale}");
    }

    /// Shares of the batch for each rank; an empty one computes on samples of its own that count for nothing.
    fn assert_as_whole(shares: &[i64]) {
        let samples: i64 = shares.iter().sum();
        let shape = [samples, CHANNELS, SIDE, SIDE];
        let (x, dy) = (tensor(&shape, 0.731), tensor(&shape, 1.37));
        let [y, dx, dw, db, mean, var] = pass(&x, &dy, |x, norm| {
            let (weight, bias) = (Some(norm.weight), Some(norm.bias));
            let (mean, var) = (Some(norm.running_mean), Some(norm.running_var));
            x.batch_norm(weight, bias, mean, var, true, MOMENTUM, EPS, false)
        });

        let world = shares.len();
        let gathered = Mutex::new(vec![Vec::new(); world]);
        let team = Arc::new(Team { gathered, met: Barrier::new(world) });
        let mut start = 0;
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let (share, first) = (shares[rank], start);
                start += share;
                let part = |whole: &Tensor| match share {
                    0 => Tensor::full([1, CHANNELS, SIDE, SIDE], 9.0, (Kind::Float, Device::Cpu)),
                    _ => whole.narrow(0, first, share),
                };
                let (x, dy) = (part(&x), if share == 0 { part(&dy) * 0.0 } else { part(&dy) });
                let sums: Arc<Mutex<dyn SumOverRanks>> =
                    Arc::new(Mutex::new(Member { team: team.clone(), rank }));
                let ranks = OverRanks { sums, counts: share > 0 };
                thread::spawn(move || pass(&x, &dy, |x, norm| batch_norm(x, 0, norm, &ranks).unwrap()))
            })
            .collect();
        let ranks: Vec<Pass> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();

        let rows = |index: usize| {
            let rows = ranks.iter().zip(shares).filter(|(_, share)| **share > 0);
            Tensor::cat(&rows.map(|(pass, _)| pass[index].shallow_clone()).collect::<Vec<_>>(), 0)
        };
        let summed = |index: usize| ranks.iter().map(|pass| pass[index].shallow_clone()).sum::<Tensor>();
        assert_close(&rows(0), &y, "forward");
        assert_close(&rows(1), &dx, "gradient of the input");
        assert_close(&summed(2), &dw, "gradient of the weight");
        assert_close(&summed(3), &db, "gradient of the bias");
        for (pass, share) in ranks.iter().zip(shares) {
            assert_close(&pass[4], &mean, "running mean");
            assert_close(&pass[5], &var, "running variance");
            assert_eq!(pass[4], ranks[0][4], "the same bits on all ranks");
            assert_eq!(pass[5], ranks[0][5], "the same bits on all ranks");
            assert!(*share > 0 || pass[1].abs().max().double_value(&[]) == 0.0, "an empty share's gradient");
        }
    }

    #[test]
    fn any_shares_give_the_batch_norm_of_the_whole_batch() {
        for shares in [&[4][..], &[2, 2], &[1, 3], &[2, 1, 3], &[3, 0, 2], &[0, 1, 0]] {
            assert_as_whole(shares);
        }
    }

    struct Broken;

    impl SumOverRanks for Broken {
        fn sum(&mut self, call: u32, _numbers: &Tensor) -> Option<()> {
            // Forward's goes through.
            (call == 0).then_some(())
        }
    }

    #[test]
    fn an_exchange_that_breaks_in_backward_fails_the_pass() {
        let x = tensor(&[2, CHANNELS, SIDE, SIDE], 0.5).set_requires_grad(true);
        let own = [0.1, 0.2, 0.3, 0.4].map(|step| tensor(&[CHANNELS], step));
        let [weight, bias, running_mean, running_var] = &own;
        let norm = Norm { weight, bias, running_mean, running_var, momentum: MOMENTUM, eps: EPS };
        let ranks = OverRanks { sums: Arc::new(Mutex::new(Broken)), counts: true };
        let y = batch_norm(&x, 0, norm, &ranks).unwrap();
        assert!(y.sum(Kind::Float).f_backward().is_err());
        assert!(!x.grad().defined());
    }
}
