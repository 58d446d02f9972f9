//! ReLU and batch norm of an image of which three pixels in four are alike.

use std::ptr;

use tch::{Device, Kind, Tensor};

use crate::ffi::{self, Error};

/// A batch norm: all tensors are [C], f32.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
    pub running_mean: &'a Tensor,
    pub running_var: &'a Tensor,
    /// The new value's weight in a running statistic.
    pub momentum: f64,
    pub eps: f64,
}

/// ReLU, then batch norm, of an image [N, C, 2H, 2W] that holds `x` [N, C, H, W] at its even rows and columns and
/// `background` [C] everywhere else, f32 on the CPU, without making that image. `by_batch` normalises by the batch and
/// moves the running statistics; else it is by them.
///
/// Returns the result's difference from its background at the even pixels, [N, C, H, W], and that background, [C].
pub fn spread(
    x: &Tensor,
    background: &Tensor,
    norm: Norm,
    by_batch: bool,
) -> Result<(Tensor, Tensor), Error> {
    let size = x.size();
    let [_, channels, _, _] = *size.as_slice() else {
        return Err(Error(format!("an image to spread has four dimensions, not {size:?}")));
    };
    let Norm { weight, bias, running_mean, running_var, momentum, eps } = norm;
    let vectors = [background, weight, bias, running_mean, running_var];
    for vector in vectors {
        if vector.size() != [channels] || !vector.is_contiguous() {
            return Err(Error(format!("of {channels} channels there can't be {:?} values", vector.size())));
        }
    }
    if vectors.iter().chain([&x]).any(|t| t.kind() != Kind::Float || t.device() != Device::Cpu) {
        return Err(Error("an image to spread must be f32 on the CPU".into()));
    }
    let pointer = |tensor: &Tensor| tensor.as_ptr().cast_mut();
    let [background, weight, bias, running_mean, running_var] = vectors.map(pointer);
    let (mut sparse, mut constant) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: live tensors, borrowed for the call, of the shapes, dtype and device that the shim relies on.
    let message = unsafe {
        ffi::torch_ext_spread(
            pointer(x),
            background,
            weight,
            bias,
            running_mean,
            running_var,
            by_batch,
            momentum,
            eps,
            &mut sparse,
            &mut constant,
        )
    };
    ffi::check(message)?;
    // SAFETY: without a message the shim has made both tensors and gives them away.
    Ok(unsafe { (Tensor::from_ptr(sparse), Tensor::from_ptr(constant)) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const EPS: f64 = 1e-3;
    const MOMENTUM: f64 = 0.1;

    fn some(size: &[i64], phase: f32) -> Tensor {
        let len: i64 = size.iter().product();
        let values: Vec<f32> = (0..len).map(|i| (i as f32 * 0.731 + phase).sin()).collect();
        Tensor::from_slice(&values).view(size)
    }

    /// The image itself, through libtorch's own ReLU and batch norm, against its two parts.
    #[track_caller]
    fn check([n, c, h, w]: [i64; 4], by_batch: bool) {
        let leaf = |tensor: Tensor| tensor.set_requires_grad(true);
        let x = leaf(some(&[n, c, h, w], 0.1));
        let background = leaf(some(&[c], 0.5));
        let (weight, bias) = (leaf(some(&[c], 1.0) + 1.5), leaf(some(&[c], 2.0)));
        let statistics = || (some(&[c], 3.0), some(&[c], 4.0) + 1.5);
        let leaves = [&x, &background, &weight, &bias];
        let gradient = some(&[n, c, 2 * h, 2 * w], 5.0);

        let (mean, var) = statistics();
        let one = Tensor::ones([c, 1, 1, 1], (Kind::Float, Device::Cpu));
        let spread_out = |sparse: &Tensor, ground: &Tensor| {
            sparse.conv_transpose2d(&one, None::<&Tensor>, 2, 0, 1, c, 1) + ground.view([1, c, 1, 1])
        };
        let image = spread_out(&(&x - background.view([1, c, 1, 1])), &background).relu();
        let whole = image.batch_norm(
            Some(&weight),
            Some(&bias),
            Some(&mean),
            Some(&var),
            by_batch,
            MOMENTUM,
            EPS,
            false,
        );
        let expected = Tensor::run_backward(&[(&whole * &gradient).sum(Kind::Float)], &leaves, false, false);

        let (moved_mean, moved_var) = statistics();
        let norm = Norm {
            weight: &weight,
            bias: &bias,
            running_mean: &moved_mean,
            running_var: &moved_var,
            momentum: MOMENTUM,
            eps: EPS,
        };
        let (sparse, constant) = spread(&x, &background, norm, by_batch).unwrap();
        let found = spread_out(&sparse, &constant);
        let gradients = Tensor::run_backward(&[(&found * &gradient).sum(Kind::Float)], &leaves, false, false);

        let pairs = [(&found, &whole), (&moved_mean, &mean), (&moved_var, &var)];
        for (index, (found, expected)) in pairs.into_iter().chain(gradients.iter().zip(&expected)).enumerate()
        {
            let error = (found - expected).abs().max() / expected.abs().max();
            assert!(error.double_value(&[]) < 1e-5, "tensor {index} of {n} x {c} x {h} x {w}: {error:?}");
        }
    }

    #[test]
    fn its_parts_are_those_of_the_whole_image() {
        for by_batch in [true, false] {
            for size in [[2, 3, 4, 5], [1, 4, 1, 1], [3, 2, 7, 6], [2, 1, 1, 3]] {
                check(size, by_batch);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (x, three, two) = (some(&[1, 3, 2, 2], 0.0), some(&[3], 0.0), some(&[2], 0.0));
        let norm = |bias| Norm {
            weight: &three,
            bias,
            running_mean: &three,
            running_var: &three,
            momentum: MOMENTUM,
            eps: EPS,
        };
        for (background, bias) in [(&two, &three), (&three, &two)] {
            let Error(message) = spread(&x, background, norm(bias), true).unwrap_err();
            assert!(message.contains("3 channels") && message.contains("[2]"), "{message}");
        }
        assert!(spread(&three, &three, norm(&three), true).is_err());
    }
}
