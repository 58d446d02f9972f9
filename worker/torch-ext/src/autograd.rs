//! Gradients as views of somebody else's buffer, and the moment one is complete.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use tch::Tensor;
use torch_sys::C_tensor;

use crate::ffi::{self, Error};

/// Makes `grad` the gradient of the leaf `param`: backward passes then add to it in place.
///
/// It must have the parameter's shape, dtype and device. Give it the parameter's strides too: adding across two
/// layouts is slow. In place holds as long as nobody asks for the gradient's own graph.
pub fn set_grad(param: &Tensor, grad: &Tensor) -> Result<(), Error> {
    // SAFETY: both pointers are of live tensors, borrowed for the call; the shim takes its own handle to the gradient.
    let message = unsafe { ffi::torch_ext_set_grad(param.as_ptr().cast_mut(), grad.as_ptr().cast_mut()) };
    ffi::check(message)
}

/// Gives each place the gradient of its parameter, or adds it, by a few launches for all of them; the parameters then
/// have none, for the next backward pass to give them its own tensors, without a launch. Where a parameter has none,
/// its place is zero.
///
/// `pairs` are leaves and what their gradients go to: of one shape, a pair's strides had better agree too; places of one
/// dtype, gradients of any.
pub fn gather_gradients(pairs: &[(Tensor, Tensor)], add: bool) -> Result<(), Error> {
    let pointers = |of: fn(&(Tensor, Tensor)) -> &Tensor| -> Vec<*mut C_tensor> {
        pairs.iter().map(|pair| of(pair).as_ptr().cast_mut()).collect()
    };
    let (params, places) = (pointers(|(param, _)| param), pointers(|(_, place)| place));
    // SAFETY: as many pointers as said, of live tensors that are borrowed for the call; the shim writes to the places'
    // storage, and takes the parameters' gradients, alone.
    ffi::check(unsafe { ffi::torch_ext_gather(params.as_ptr(), places.as_ptr(), pairs.len(), add) })
}

/// Leaves the leaf without a gradient.
pub fn drop_grad(param: &Tensor) -> Result<(), Error> {
    // SAFETY: the tensor is live for the call.
    ffi::check(unsafe { ffi::torch_ext_drop_grad(param.as_ptr().cast_mut()) })
}

/// Calls `callback` each time a backward pass has added to the gradient of the leaf `param`, in place of any earlier
/// callback. It lives as long as the parameter does, so it must not own the parameter.
///
/// It runs on the thread that computes the gradient: on the CPU the one that called backward, on CUDA the engine's.
/// If it panics, the panic stops here and that backward pass returns an error, with the gradients left incomplete.
pub fn on_gradient_accumulated<F: FnMut() + Send + 'static>(
    param: &Tensor,
    callback: F,
) -> Result<(), Error> {
    let context = Box::into_raw(Box::new(callback)).cast::<c_void>();
    // SAFETY: the tensor is live for the call. `context` is a fresh box of F that only the shim holds from here on; it
    // calls `call::<F>` from one thread at a time (accumulation holds the node's mutex) and `release::<F>` once, last.
    let message = unsafe {
        ffi::torch_ext_on_gradient_accumulated(param.as_ptr().cast_mut(), context, call::<F>, release::<F>)
    };
    ffi::check(message)
}

/// Replaces the gradient of `tensor` by what `change` makes of it, on its way further back in each backward pass.
///
/// `tensor` must be computed from something that requires a gradient. The closure lives as long as the graph, which it
/// must not own: give it detached tensors. It runs where the gradient is computed, as in
/// [`on_gradient_accumulated`]; if it panics or returns `None`, that backward pass returns an error.
pub fn on_gradient<F>(tensor: &Tensor, change: F) -> Result<(), Error>
where
    F: FnMut(&Tensor) -> Option<Tensor> + Send + 'static,
{
    let context = Box::into_raw(Box::new(change)).cast::<c_void>();
    // SAFETY: the tensor is live for the call. `context` is a fresh box of F that only the shim holds from here on; it
    // calls `replace::<F>` from the one thread of a backward pass and `release::<F>` once, last.
    let message = unsafe {
        ffi::torch_ext_on_gradient(tensor.as_ptr().cast_mut(), context, replace::<F>, release::<F>)
    };
    ffi::check(message)
}

extern "C" fn replace<F>(context: *mut c_void, gradient: *mut C_tensor) -> *mut C_tensor
where
    F: FnMut(&Tensor) -> Option<Tensor>,
{
    // SAFETY: the shim hands back the box's pointer, not yet released, and never twice at a time.
    let change = unsafe { &mut *context.cast::<F>() };
    let call = AssertUnwindSafe(|| {
        // SAFETY: the shim lends a live tensor for the call; this is a handle of its own to it.
        let gradient = unsafe { Tensor::clone_from_ptr(gradient) };
        change(&gradient)
    });
    let Ok(Some(changed)) = catch_unwind(call) else { return ptr::null_mut() };
    // The shim owns it from here on.
    ManuallyDrop::new(changed).as_mut_ptr()
}

extern "C" fn call<F: FnMut()>(context: *mut c_void) -> bool {
    // SAFETY: the shim hands back the box's pointer, not yet released, and never twice at a time.
    let callback = unsafe { &mut *context.cast::<F>() };
    catch_unwind(AssertUnwindSafe(callback)).is_ok()
}

extern "C" fn release<F>(context: *mut c_void) {
    // SAFETY: the pointer came from `Box::into_raw` of a `Box<F>`, and the shim releases it once.
    let callback = unsafe { Box::from_raw(context.cast::<F>()) };
    // A destructor's panic must not unwind through C++ either; the panic hook has reported it.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(callback)));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tch::{Device, Kind};

    use super::*;

    fn leaf() -> Tensor {
        Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true)
    }

    #[test]
    fn gradients_add_up_in_the_view() {
        let flat = Tensor::zeros([10], (Kind::Float, Device::Cpu));
        let param = leaf();
        set_grad(&param, &flat.narrow(0, 4, 3)).unwrap();
        for _ in 0..2 {
            (&param * 2.0).sum(Kind::Float).backward();
        }
        assert_eq!(Vec::<f32>::try_from(&flat).unwrap(), [0., 0., 0., 0., 4., 4., 4., 0., 0., 0.]);
    }

    #[test]
    fn gradients_of_any_dtype_are_gathered_and_gone() {
        let flat = Tensor::full([8], 7.0, (Kind::Float, Device::Cpu));
        let low = Tensor::ones([2], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
        let pairs =
            [(leaf(), flat.narrow(0, 0, 3)), (low, flat.narrow(0, 4, 2)), (leaf(), flat.narrow(0, 6, 2))];
        let backward = || {
            (&pairs[0].0 * 2.0).sum(Kind::Float).backward();
            (&pairs[1].0 * 3.0).sum(Kind::Float).backward();
        };
        for (add, expected) in [(false, [2f32, 3.0]), (true, [4.0, 6.0]), (false, [2.0, 3.0])] {
            backward();
            gather_gradients(&pairs[..2], add).unwrap();
            assert!(pairs.iter().all(|(param, _)| !param.grad().defined()));
            let [a, b] = expected;
            assert_eq!(Vec::<f32>::try_from(&flat).unwrap(), [a, a, a, 7.0, b, b, 7.0, 7.0]);
        }
        gather_gradients(&pairs[1..2], false).unwrap();
        assert_eq!(flat.double_value(&[4]), 0.0, "without a gradient it is zero");
        backward();
        let misshapen = [(pairs[0].0.shallow_clone(), flat.narrow(0, 0, 4))];
        assert!(gather_gradients(&misshapen, false).is_err());
        drop_grad(&pairs[1].0).unwrap();
        assert!(!pairs[1].0.grad().defined());
    }

    #[test]
    fn a_misshapen_gradient_is_an_error() {
        let Error(message) = set_grad(&leaf(), &Tensor::zeros([4], (Kind::Float, Device::Cpu))).unwrap_err();
        assert!(message.contains("[3]") && message.contains("[4]"), "{message}");
    }

    #[test]
    fn the_callback_sees_the_gradient_and_is_released_with_the_parameter() {
        let calls = Arc::new(AtomicUsize::new(0));
        let param = leaf();
        let seen = calls.clone();
        on_gradient_accumulated(&param, move || {
            seen.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
        for _ in 0..3 {
            (&param * 2.0).sum(Kind::Float).backward();
        }
        assert_eq!(calls.load(Ordering::SeqCst), 3);
        drop(param);
        assert_eq!(Arc::strong_count(&calls), 1);
    }

    #[test]
    fn a_panicking_callback_fails_the_backward_pass_alone() {
        let param = leaf();
        on_gradient_accumulated(&param, || panic!("as asked by the test")).unwrap();
        let error = (&param * 2.0).sum(Kind::Float).f_backward().unwrap_err();
        assert!(error.to_string().contains("a gradient hook panicked"), "{error}");
        on_gradient_accumulated(&param, || ()).unwrap();
        (&param * 2.0).sum(Kind::Float).f_backward().unwrap();
    }

    #[test]
    fn a_gradient_is_changed_on_its_way_alone() {
        let released = Arc::new(());
        let held = released.clone();
        let param = leaf();
        let doubled = &param * 2.0;
        let change = move |gradient: &Tensor| Some(gradient * 10.0 + Arc::strong_count(&held) as f64);
        on_gradient(&doubled, change).unwrap();
        (&doubled + &param).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(&param.grad()).unwrap(), [25.0; 3], "twice 10 + 2, and 1");
        drop(doubled);
        assert_eq!(Arc::strong_count(&released), 1);
    }

    #[test]
    fn a_gradient_that_cannot_be_changed_fails_the_backward_pass_alone() {
        for panics in [false, true] {
            let param = leaf();
            let doubled = &param * 2.0;
            let change = move |_: &Tensor| if panics { panic!("as asked by the test") } else { None };
            on_gradient(&doubled, change).unwrap();
            let error = doubled.sum(Kind::Float).f_backward().unwrap_err();
            assert!(error.to_string().contains("a gradient hook failed"), "{error}");
            (&param * 2.0).sum(Kind::Float).f_backward().unwrap();
        }
        assert!(on_gradient(&leaf(), |_| None).is_err(), "a leaf's gradient is accumulated, not passed on");
    }

    #[test]
    fn only_leaves_have_hooks() {
        let mut released = Arc::new(());
        let held = released.clone();
        let constant = Tensor::ones([3], (Kind::Float, Device::Cpu));
        assert!(on_gradient_accumulated(&constant, move || drop(held.clone())).is_err());
        assert!(Arc::get_mut(&mut released).is_some(), "a refused callback is released");
    }
}
