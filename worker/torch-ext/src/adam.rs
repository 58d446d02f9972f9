//! Adam's update as one fused call over flat buffers.

use std::ptr;

use tch::{Kind, Tensor};

use crate::ffi::{self, Error};

/// The scalars of one Adam update, without weight decay and without AMSGrad.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    /// Added to `sqrt(v / (1 - beta2^step))`, that is *after* bias correction.
    pub eps: f64,
    /// The count of updates, this one included: at least 1. The kernel holds it as f32, exact up to 2^24.
    pub step: f64,
}

/// What decides on the device how an update is made, and whether: f32 scalars on the tensors' device.
#[derive(Debug, Clone, Copy, Default)]
pub struct OnDevice<'a> {
    /// The gradients are divided by it first, in place.
    pub grad_scale: Option<&'a Tensor>,
    /// Skips the update when it is exactly 1.0 and lets it happen when it is exactly 0.0. Nothing else may be in it:
    /// 2.0 and NaN *apply*.
    pub found_inf: Option<&'a Tensor>,
}

/// Updates `params` and both moments in place from `grads`: flat f32 tensors of one length and device.
pub fn fused_adam(
    params: &Tensor,
    grads: &Tensor,
    exp_avg: &Tensor,
    exp_avg_sq: &Tensor,
    step: AdamStep,
    on_device: OnDevice,
) -> Result<(), Error> {
    let numel = params.numel();
    for tensor in [params, grads, exp_avg, exp_avg_sq] {
        if tensor.numel() != numel || tensor.kind() != Kind::Float || !tensor.is_contiguous() {
            return Err(Error("fused Adam takes contiguous f32 tensors of one length".into()));
        }
    }
    if step.step < 1.0 {
        return Err(Error(format!("Adam's step counts from 1, not {}", step.step)));
    }
    let AdamStep { lr, beta1, beta2, eps, step } = step;
    let given = |tensor: Option<&Tensor>| tensor.map_or(ptr::null_mut(), |tensor| tensor.as_ptr().cast_mut());
    // SAFETY: the pointers are those of live tensors, borrowed for the call; the shim writes to their storage alone.
    let message = unsafe {
        ffi::torch_ext_fused_adam(
            params.as_ptr().cast_mut(),
            grads.as_ptr().cast_mut(),
            exp_avg.as_ptr().cast_mut(),
            exp_avg_sq.as_ptr().cast_mut(),
            lr,
            beta1,
            beta2,
            eps,
            step,
            given(on_device.grad_scale),
            given(on_device.found_inf),
        )
    };
    ffi::check(message)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tch::Device;

    use super::*;

    const STEP: AdamStep = AdamStep { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-7, step: 1.0 };

    fn state() -> [Tensor; 4] {
        let flat = |value: f64| Tensor::full([5], value, (Kind::Float, Device::Cpu));
        [flat(1.0), flat(0.5), flat(0.0), flat(0.0)]
    }

    #[test]
    fn first_step_moves_by_the_learning_rate() {
        let [params, grads, m, v] = state();
        fused_adam(&params, &grads, &m, &v, STEP, OnDevice::default()).unwrap();
        assert!((params.double_value(&[4]) - 0.9).abs() < 1e-6);
        assert!((m.double_value(&[0]) - 0.05).abs() < 1e-7);
        assert!((v.double_value(&[0]) - 0.00025).abs() < 1e-9);
    }

    #[test]
    fn found_inf_of_one_changes_nothing_and_of_zero_applies() {
        for (found_inf, expected) in [(1.0, 1.0), (0.0, 0.9)] {
            let [params, grads, m, v] = state();
            let found_inf = Tensor::full([1], found_inf, (Kind::Float, Device::Cpu));
            let on_device = OnDevice { found_inf: Some(&found_inf), ..OnDevice::default() };
            fused_adam(&params, &grads, &m, &v, STEP, on_device).unwrap();
            assert!((params.double_value(&[0]) - expected).abs() < 1e-6);
            assert_eq!(m.double_value(&[0]) == 0.0, expected == 1.0);
        }
    }

    #[test]
    fn a_scale_divides_the_gradient() {
        for (scale, expected) in [(1.0, 0.05), (4.0, 0.0125)] {
            let [params, grads, m, v] = state();
            let scale = Tensor::full([1], scale, (Kind::Float, Device::Cpu));
            let on_device = OnDevice { grad_scale: Some(&scale), ..OnDevice::default() };
            fused_adam(&params, &grads, &m, &v, STEP, on_device).unwrap();
            assert!((m.double_value(&[4]) - expected).abs() < 1e-9);
        }
    }

    #[test]
    fn misfits_are_errors() {
        let [params, grads, m, v] = state();
        assert!(fused_adam(&params, &grads.narrow(0, 0, 3), &m, &v, STEP, OnDevice::default()).is_err());
        assert!(
            fused_adam(&params, &grads, &m, &v, AdamStep { step: 0.0, ..STEP }, OnDevice::default()).is_err()
        );
    }
}
