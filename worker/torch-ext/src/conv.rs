//! Convolutions on the CPU as matrix products, which take their weights as they lie in memory.

use std::ptr;

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::ffi::{self, Error};

/// In what the factors of a product are; its sums are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factors {
    F32,
    /// Rounded to bf16, 8 bits of mantissa, as are gradients on the way back. It pays on processors that multiply tiles
    /// of them (AMX): there a product is several times as fast.
    Bf16,
}

/// A convolution of stride 1 that keeps the image's size: x [N, C, H, W], weight [O, C, k, k] with k of 1 or 3, and
/// perhaps a bias [O], to [N, O, H, W]. All f32, on the CPU.
///
/// The weights lie channels-last, as rows of C for each output and tap, and so does their gradient. Nothing of them is
/// copied or rearranged, in neither direction: the backward pass adds to the gradient that a leaf [has](crate::set_grad)
/// where it lies. So ask for gradients by `backward`, not by name.
pub fn conv_as_product(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    factors: Factors,
) -> Result<Tensor, Error> {
    let [outputs, inputs, rows, taps] = sizes(weight)?;
    if rows != taps || ![1, 3].contains(&taps) {
        return Err(Error(format!("a product takes kernels of 1 or 3 taps a side, not {:?}", weight.size())));
    }
    product(x, weight, bias, [inputs, outputs], false, factors)
}

/// [`conv_as_product`] with a kernel that is stored as a transposed convolution's, [C, O, 1, 1], row-major.
pub fn conv_as_transposed_product(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    factors: Factors,
) -> Result<Tensor, Error> {
    let [inputs, outputs, 1, 1] = sizes(weight)? else {
        return Err(Error(format!("a transposed product takes kernels of one tap, not {:?}", weight.size())));
    };
    product(x, weight, bias, [inputs, outputs], true, factors)
}

fn product(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    [inputs, outputs]: [i64; 2],
    transposed: bool,
    factors: Factors,
) -> Result<Tensor, Error> {
    let [_, channels, ..] = sizes(x)?;
    if channels != inputs {
        return Err(Error(format!("a kernel of {inputs} channels can't be applied to {channels} channels")));
    }
    all_fit([x, weight].into_iter().chain(bias))?;
    vectors(bias.map(|bias| (bias, outputs)))?;
    let bias = bias.map_or(ptr::null_mut(), mut_ptr);
    let mut y = ptr::null_mut();
    // SAFETY: the pointers are null or those of live tensors, borrowed for the call, of the shapes, dtype and device
    // that the shim relies on.
    let message = unsafe {
        let bf16 = factors == Factors::Bf16;
        ffi::torch_ext_conv_as_product(mut_ptr(x), mut_ptr(weight), bias, transposed, bf16, &mut y)
    };
    ffi::check(message)?;
    // SAFETY: without a message the shim has made a tensor and gives it away.
    Ok(unsafe { Tensor::from_ptr(y) })
}

/// What [`conv_of_join`] convolves: an image of twice the height and width of `sparse`, which is `constant` everywhere,
/// with `sparse` added at the even pixels, and behind it, as more channels, `skip`.
#[derive(Debug, Clone, Copy)]
pub struct Join<'a> {
    /// [N, C, H, W].
    pub sparse: &'a Tensor,
    /// [C].
    pub constant: &'a Tensor,
    /// [N, S, 2H, 2W].
    pub skip: &'a Tensor,
}

/// The 3x3 convolution of a join that keeps its size: weight [O, C + S, 3, 3], bias [O], to [N, O, 2H, 2W]. All f32, on
/// the CPU.
///
/// What is the same everywhere costs a product with one column, and the rest a quarter of what it would as an image.
/// `skip_by_product`: whether the skip's part is a product too, which pays where there are many weights for few pixels.
pub fn conv_of_join(
    join: Join,
    weight: &Tensor,
    bias: &Tensor,
    skip_by_product: bool,
    factors: Factors,
) -> Result<Tensor, Error> {
    let Join { sparse, constant, skip } = join;
    let [samples, channels, height, width] = sizes(sparse)?;
    let [skip_samples, skips, skip_height, skip_width] = sizes(skip)?;
    let [outputs, inputs, ..] = sizes(weight)?;
    let fits = (skip_samples, skip_height, skip_width) == (samples, 2 * height, 2 * width);
    if !fits || weight.size() != [outputs, channels + skips, 3, 3] || inputs <= channels {
        return Err(Error(format!(
            "a join of {:?} and {:?} can't be convolved with {:?}",
            sparse.size(),
            skip.size(),
            weight.size()
        )));
    }
    all_fit([sparse, constant, skip, weight, bias].into_iter())?;
    vectors([(constant, channels), (bias, outputs)])?;
    let mut y = ptr::null_mut();
    // SAFETY: as in `conv_as_product`.
    let message = unsafe {
        ffi::torch_ext_conv_of_join(
            mut_ptr(sparse),
            mut_ptr(constant),
            mut_ptr(skip),
            mut_ptr(weight),
            mut_ptr(bias),
            skip_by_product,
            factors == Factors::Bf16,
            &mut y,
        )
    };
    ffi::check(message)?;
    // SAFETY: as in `conv_as_product`.
    Ok(unsafe { Tensor::from_ptr(y) })
}

/// Weights [O, C, k, k], f32 on the CPU, that lie channels-last, as a row-major copy; its gradient comes back
/// channels-last.
pub fn row_major(weight: &Tensor) -> Result<Tensor, Error> {
    sizes(weight)?;
    all_fit([weight].into_iter())?;
    let mut y = ptr::null_mut();
    // SAFETY: a live tensor, borrowed for the call, f32 in host memory; the shim checks how it lies.
    ffi::check(unsafe { ffi::torch_ext_row_major(mut_ptr(weight), &mut y) })?;
    // SAFETY: as in `conv_as_product`.
    Ok(unsafe { Tensor::from_ptr(y) })
}

fn mut_ptr(tensor: &Tensor) -> *mut C_tensor {
    tensor.as_ptr().cast_mut()
}

fn sizes(tensor: &Tensor) -> Result<[i64; 4], Error> {
    let size = tensor.size();
    let sizes = size.as_slice().try_into();
    sizes.map_err(|_| Error(format!("a convolution takes tensors of four dimensions, not {size:?}")))
}

fn vectors<'a>(tensors: impl IntoIterator<Item = (&'a Tensor, i64)>) -> Result<(), Error> {
    for (tensor, length) in tensors {
        if tensor.size() != [length] || !tensor.is_contiguous() {
            return Err(Error(format!("a convolution's vector must be [{length}], not {:?}", tensor.size())));
        }
    }
    Ok(())
}

fn all_fit<'a>(mut tensors: impl Iterator<Item = &'a Tensor>) -> Result<(), Error> {
    let fits = |tensor: &Tensor| tensor.kind() == Kind::Float && tensor.device() == Device::Cpu;
    match tensors.all(fits) {
        true => Ok(()),
        false => Err(Error("a convolution as a product takes f32 tensors on the CPU".into())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const ALL: [Factors; 2] = [Factors::F32, Factors::Bf16];

    /// Values in -1..1, in steps of 1/16: bf16 holds them, and sums of some, exactly.
    fn some(size: &[i64]) -> Tensor {
        let len: i64 = size.iter().product();
        let value = |i| (16.0 * (i as f32 * 0.731 + size.len() as f32).sin()).round() / 16.0;
        Tensor::from_slice(&(0..len).map(value).collect::<Vec<_>>()).view(size)
    }

    fn leaf(tensor: Tensor) -> Tensor {
        tensor.set_requires_grad(true)
    }

    /// [O, C, k, k] in memory as [O, k, k, C].
    fn weights(size: [i64; 4]) -> Tensor {
        let [o, c, k, _] = size;
        leaf(some(&[o, k, k, c]).permute([0, 3, 1, 2]))
    }

    /// The output and all gradients of `compute` and of `expected`, for the same gradient of the output.
    #[track_caller]
    fn agree(leaves: &[&Tensor], compute: impl Fn() -> Tensor, expected: impl Fn() -> Tensor) {
        let run = |forward: &dyn Fn() -> Tensor| {
            let y = forward();
            let gradient = some(&y.size());
            let gradients = Tensor::run_backward(&[(&y * gradient).sum(Kind::Float)], leaves, false, false);
            [y.detach()].into_iter().chain(gradients).collect::<Vec<_>>()
        };
        let (found, expected) = (run(&compute), run(&expected));
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.size(), expected.size());
            let error = (found - expected).abs().max() / expected.abs().max();
            assert!(error.double_value(&[]) < 1e-5, "tensor {index}: {error:?}");
        }
    }

    #[test]
    fn a_product_is_the_convolution() {
        for (k, padding) in [(1, 0), (3, 1)] {
            for (n, c, o, h, w) in [
                (2, 3, 5, 4, 4),
                (1, 7, 2, 1, 1),
                (3, 2, 4, 1, 5),
                (2, 4, 3, 6, 2),
                (2, 3, 4, 7, 9),
                (2, 3, 4, 23, 25),
                // So many channels that the image goes band by band, forward and back.
                (2, 260, 2, 23, 25),
                (2, 2, 260, 23, 25),
            ] {
                let (x, weight, bias) = (leaf(some(&[n, c, h, w])), weights([o, c, k, k]), leaf(some(&[o])));
                for factors in ALL {
                    for bias in [None, Some(&bias)] {
                        let leaves: Vec<_> = [&x, &weight].into_iter().chain(bias).collect();
                        agree(
                            &leaves,
                            || conv_as_product(&x, &weight, bias, factors).unwrap(),
                            || x.conv2d(&weight, bias, 1, padding, 1, 1),
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn factors_are_rounded_where_it_is_asked_for() {
        let (x, weight) = (some(&[2, 3, 4, 4]) / 3.0, some(&[5, 3, 3, 3]) / 7.0);
        let channels_last = |weight: &Tensor| weight.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
        let rounded = |x: &Tensor| x.to_kind(Kind::BFloat16).to_kind(Kind::Float);
        let product = |factors| conv_as_product(&x, &channels_last(&weight), None, factors).unwrap();
        let conv = |x: &Tensor, weight: &Tensor| x.conv2d(weight, None::<&Tensor>, 1, 1, 1, 1);
        let off = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
        assert!(off(&product(Factors::Bf16), &conv(&rounded(&x), &rounded(&weight))) < 1e-6);
        assert!(off(&product(Factors::F32), &conv(&x, &weight)) < 1e-6);
        assert!(off(&product(Factors::Bf16), &product(Factors::F32)) > 1e-4);
    }

    #[test]
    fn an_image_in_any_memory_order_and_a_transposed_kernel_will_do() {
        let x = leaf(some(&[2, 4, 4, 3]).permute([0, 3, 1, 2]));
        let (kernel, bias) = (leaf(some(&[3, 6, 1, 1])), leaf(some(&[6])));
        for x in [x, leaf(some(&[3, 3, 7, 8]))] {
            for factors in ALL {
                agree(
                    &[&x, &kernel, &bias],
                    || conv_as_transposed_product(&x, &kernel, Some(&bias), factors).unwrap(),
                    || x.conv2d(&kernel.transpose(0, 1), Some(&bias), 1, 0, 1, 1),
                );
            }
        }
    }

    /// For each way there is: what backward adds to a gradient in place, and that it calls the hook.
    #[test]
    fn gradients_are_added_where_they_lie_and_the_hook_is_called_once() {
        let (x, wide, skip) = (some(&[2, 3, 4, 4]), some(&[2, 3, 7, 8]), some(&[2, 2, 8, 8]));
        let (constant, bias) = (some(&[3]), some(&[5]));
        let join = Join { sparse: &x, constant: &constant, skip: &skip };
        type Way<'a> = &'a dyn Fn(&Tensor) -> Tensor;
        let product =
            |x: &Tensor, weight: &Tensor, factors| conv_as_product(x, weight, None, factors).unwrap();
        let joined = |weight: &Tensor, by_product, factors| {
            conv_of_join(join, weight, &bias, by_product, factors).unwrap()
        };
        let cases: [(Tensor, Way); 9] = [
            (weights([5, 3, 3, 3]), &|weight| product(&x, weight, Factors::F32)),
            (weights([5, 3, 3, 3]), &|weight| product(&x, weight, Factors::Bf16)),
            (weights([5, 3, 1, 1]), &|weight| product(&x, weight, Factors::F32)),
            (weights([5, 3, 1, 1]), &|weight| product(&wide, weight, Factors::F32)),
            (leaf(some(&[3, 5, 1, 1])), &|weight| {
                conv_as_transposed_product(&wide, weight, None, Factors::F32).unwrap()
            }),
            (weights([5, 3, 3, 3]), &|weight| row_major(weight).unwrap()),
            (weights([5, 5, 3, 3]), &|weight| joined(weight, true, Factors::F32)),
            (weights([5, 5, 3, 3]), &|weight| joined(weight, false, Factors::F32)),
            (weights([5, 5, 3, 3]), &|weight| joined(weight, true, Factors::Bf16)),
        ];
        for (index, (weight, compute)) in cases.iter().enumerate() {
            let y = compute(weight);
            (&y * some(&y.size())).sum(Kind::Float).backward();
            let expected = weight.grad().copy() + 1.0;
            let given = Tensor::empty_like(weight).fill_(1.0);
            crate::set_grad(weight, &given).unwrap();
            let calls = Arc::new(AtomicUsize::new(0));
            let counted = calls.clone();
            crate::on_gradient_accumulated(weight, move || {
                counted.fetch_add(1, Ordering::SeqCst);
            })
            .unwrap();
            let y = compute(weight);
            (&y * some(&y.size())).sum(Kind::Float).backward();
            assert_eq!(calls.load(Ordering::SeqCst), 1, "case {index}");
            let error = (given - expected).abs().max();
            assert!(error.double_value(&[]) < 1e-5, "case {index}: {error:?}");
        }
    }

    #[test]
    fn the_gradient_lies_as_the_weights_do() {
        let (x, weight) = (some(&[2, 3, 4, 4]), weights([5, 3, 3, 3]));
        conv_as_product(&x, &weight, None, Factors::F32).unwrap().sum(Kind::Float).backward();
        assert_eq!(weight.grad().stride(), weight.stride());
    }

    #[test]
    fn rows_become_major_and_gradients_channels_last() {
        let weight = weights([4, 5, 3, 3]);
        agree(&[&weight], || row_major(&weight).unwrap() * 2.0, || &weight * 2.0);
        let copy = row_major(&weight).unwrap();
        assert!(copy.is_contiguous());
        copy.sum(Kind::Float).backward();
        assert_eq!(weight.grad().stride(), weight.stride());
        assert!(row_major(&some(&[4, 5, 3, 3])).is_err());
    }

    #[test]
    fn a_join_is_the_convolution_of_what_it_stands_for() {
        for (n, c, s, o, h, w) in [
            (2, 3, 4, 5, 4, 4),
            (1, 2, 1, 3, 1, 1),
            (3, 4, 2, 2, 2, 5),
            (2, 1, 3, 2, 3, 1),
            (2, 2, 3, 2, 12, 13),
        ] {
            let (sparse, constant, skip) =
                (leaf(some(&[n, c, h, w])), leaf(some(&[c])), leaf(some(&[n, s, 2 * h, 2 * w])));
            let (weight, bias) = (weights([o, c + s, 3, 3]), leaf(some(&[o])));
            let joined = || {
                let one = Tensor::ones([c, 1, 1, 1], (Kind::Float, Device::Cpu));
                let spread = sparse.conv_transpose2d(&one, None::<&Tensor>, 2, 0, 1, c, 1);
                Tensor::cat(&[&(spread + constant.view([1, c, 1, 1])), &skip], 1)
            };
            let join = Join { sparse: &sparse, constant: &constant, skip: &skip };
            for by_product in [false, true] {
                for factors in ALL {
                    agree(
                        &[&sparse, &constant, &skip, &weight, &bias],
                        || conv_of_join(join, &weight, &bias, by_product, factors).unwrap(),
                        || joined().conv2d(&weight, Some(&bias), 1, 1, 1, 1),
                    );
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (x, bias) = (some(&[1, 3, 2, 2]), some(&[2]));
        for (weight, says) in [
            (weights([2, 4, 3, 3]), "4 channels can't be applied to 3"),
            (weights([2, 3, 5, 5]), "1 or 3 taps"),
            (some(&[2, 3]), "four dimensions"),
            (weights([5, 3, 3, 3]), "must be [5], not [2]"),
            (weights([2, 3, 3, 3]).to_kind(Kind::Double), "f32"),
        ] {
            let Error(message) = conv_as_product(&x, &weight, Some(&bias), Factors::F32).unwrap_err();
            assert!(message.contains(says), "{message}");
        }
        let constant = some(&[3]);
        let join = Join { sparse: &x, constant: &constant, skip: &some(&[1, 2, 3, 4]) };
        let Error(message) =
            conv_of_join(join, &weights([2, 5, 3, 3]), &bias, true, Factors::F32).unwrap_err();
        assert!(message.contains("[1, 2, 3, 4]"), "{message}");
    }
}
