//! The control word: how a step's end learns, on the device, whether all ranks were at this very step of this very
//! generation. The host waits for nothing here; see [`outcome`](super::outcome) for how it hears.
//!
//! Each rank adds a number that belongs to the step alone, a *nonce*, and the step is complete if the sum is as many
//! nonces as ranks. A constant would not do: a kernel of an aborted exchange can hand on what was in its buffers, and a
//! dead peer's part of an earlier step can be read again. For the same reason the abort word, which the aborting thread
//! sets before it touches the exchange, is looked at before the sum and after it, and what was not complete once never is
//! again.

use musher_proto::{
    ids::{Generation, Step},
    shard::scramble,
};
use tch::{Device, Kind, TchError, Tensor};

/// Of one generation, on this rank's device.
pub struct Control {
    generation: Generation,
    world: u32,
    device: Device,
    /// f64 [1]: 1.0 until a step was not complete.
    alive: Tensor,
    /// See [`TensorCollective::abort_word`](musher_nccl::TensorCollective::abort_word).
    abort_word: Option<Tensor>,
}

impl Control {
    pub fn new(
        generation: Generation,
        world: u32,
        device: Device,
        abort_word: Option<Tensor>,
    ) -> Result<Self, TchError> {
        let alive = Tensor::f_ones([1], (Kind::Double, device))?;
        Ok(Self { generation, world, device, alive, abort_word })
    }

    /// What this rank has to say at a step's end, f64 [3], to be summed over the ranks: its nonce; 1.0 if this is to be
    /// the last step; its loss, `loss_sum` f64 [].
    pub fn words(&self, step: Step, stop: bool, loss_sum: &Tensor) -> Result<Tensor, TchError> {
        // Filled in by kernels: a copy from the host would wait.
        let number = |value: f64| Tensor::f_full([1], value, (Kind::Double, self.device));
        let nonce = self.gate()?.f_mul_scalar(self.nonce(step))?;
        Tensor::f_cat(&[nonce, number(f64::from(u8::from(stop)))?, loss_sum.f_view([1])?], 0)
    }

    /// Whether the `sums` of all ranks' words make the step complete: f64 [1], 1.0 or 0.0.
    pub fn complete(&mut self, step: Step, sums: &Tensor) -> Result<Tensor, TchError> {
        let expected = self.nonce(step) * f64::from(self.world);
        let adds_up = sums.f_narrow(0, 0, 1)?.f_eq(expected)?.f_to_kind(Kind::Double)?;
        self.alive = adds_up.f_mul(&self.gate()?)?;
        Ok(self.alive.shallow_clone())
    }

    /// 1.0 as long as this rank takes part.
    fn gate(&self) -> Result<Tensor, TchError> {
        match &self.abort_word {
            Some(word) => self.alive.f_mul(&word.f_neg()?.f_add_scalar(1.0)?),
            None => Ok(self.alive.shallow_clone()),
        }
    }

    /// Small enough for its sums over any team to be exact in f64.
    fn nonce(&self, step: Step) -> f64 {
        let bits = scramble(scramble(self.generation.0) ^ step.0) >> 32;
        (bits | 1) as f64
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const WORLD: u32 = 3;

    struct Rank {
        control: Control,
        abort_word: Tensor,
    }

    impl Rank {
        fn new(generation: u64) -> Self {
            let abort_word = Tensor::zeros([1], (Kind::Double, Device::Cpu));
            let word = Some(abort_word.shallow_clone());
            Self {
                control: Control::new(Generation(generation), WORLD, Device::Cpu, word).unwrap(),
                abort_word,
            }
        }

        fn words(&self, step: u64) -> Tensor {
            self.control.words(Step(step), false, &Tensor::from(2.5)).unwrap()
        }

        fn completes(&mut self, step: u64, sums: &Tensor) -> bool {
            match self.control.complete(Step(step), sums).unwrap().double_value(&[0]) {
                1.0 => true,
                0.0 => false,
                other => panic!("{other}"),
            }
        }
    }

    fn sum(words: [&Tensor; 3]) -> Tensor {
        words[0] + words[1] + words[2]
    }

    #[test]
    fn a_step_is_complete_where_all_were_at_it() {
        let mut ranks = [1, 1, 1].map(Rank::new);
        for step in 4..8 {
            let words = ranks.each_ref().map(|rank| rank.words(step));
            let sums = sum(words.each_ref());
            assert!(ranks.iter_mut().all(|rank| rank.completes(step, &sums)));
            assert_eq!(sums.double_value(&[2]), 7.5);
        }
    }

    #[test]
    fn another_step_or_generation_or_a_stale_sum_is_none() {
        let others =
            [Rank::new(1).words(3), Rank::new(2).words(4), Tensor::zeros([3], (Kind::Double, Device::Cpu))];
        for other in others {
            let mut rank = Rank::new(1);
            let mine = rank.words(4);
            assert!(!rank.completes(4, &sum([&mine, &mine, &other])));
            assert!(!rank.completes(5, &sum([&rank.words(5), &mine, &mine])));
            assert_eq!(rank.words(5).double_value(&[0]), 0.0, "it takes no part any more");
        }
        let mut rank = Rank::new(1);
        let stale = sum([&rank.words(3), &rank.words(3), &rank.words(3)]);
        assert!(!rank.completes(4, &stale));
        let nan = Tensor::full([3], f64::NAN, (Kind::Double, Device::Cpu));
        assert!(!Rank::new(1).completes(4, &nan));
    }

    #[test]
    fn an_abort_before_the_sum_or_after_it_counts() {
        let mut ranks = [1, 1, 1].map(Rank::new);
        let _ = ranks[0].abort_word.fill_(1.0);
        let words = ranks.each_ref().map(|rank| rank.words(9));
        let sums = sum(words.each_ref());
        assert!(!ranks.iter_mut().any(|rank| rank.completes(9, &sums)));

        let mut ranks = [1, 1, 1].map(Rank::new);
        let words = ranks.each_ref().map(|rank| rank.words(9));
        let sums = sum(words.each_ref());
        let _ = ranks[0].abort_word.fill_(1.0);
        assert_eq!(ranks.each_mut().map(|rank| rank.completes(9, &sums)), [false, true, true]);
        let _ = ranks[0].abort_word.fill_(0.0);
        assert_eq!(ranks[0].words(10).double_value(&[0]), 0.0, "only a new generation brings it back");
    }
}
