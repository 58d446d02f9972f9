// What tch lacks, in terms of C: each function returns null, or a message for torch_ext_free.

#include "guarded.h"

#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/ConvUtils.h>
#include <c10/core/Event.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace {

// Owns the Rust closure behind `context`.
struct RustHook final : torch::autograd::PostAccumulateGradHook {
  void *context;
  bool (*call)(void *);
  void (*drop)(void *);

  RustHook(void *context, bool (*call)(void *), void (*drop)(void *)) : context(context), call(call), drop(drop) {}
  ~RustHook() override { drop(context); }

  // Runs inside the autograd engine, which hands the exception to the caller of backward.
  void operator()(const at::Tensor &) override {
    if (!call(context)) throw std::runtime_error("a gradient hook panicked");
  }
};

c10::Device cuda(int index) { return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index)); }

} // namespace

extern "C" {

void torch_ext_free(char *message) { std::free(message); }

[[noreturn]] void torch_ext_exit(int code) { _exit(code); }

char *torch_ext_fused_adam(at::Tensor *params, at::Tensor *grads, at::Tensor *exp_avg, at::Tensor *exp_avg_sq, double lr,
                           double beta1, double beta2, double eps, double step, at::Tensor *grad_scale,
                           at::Tensor *found_inf) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    auto given = [](at::Tensor *tensor) { return tensor ? std::optional<at::Tensor>(*tensor) : std::nullopt; };
    auto steps = at::full({}, step, params->options().dtype(at::kFloat));
    at::_fused_adam_({*params}, {*grads}, {*exp_avg}, {*exp_avg_sq}, {}, {steps}, lr, beta1, beta2, /*weight_decay=*/0.0,
                     eps, /*amsgrad=*/false, /*maximize=*/false, given(grad_scale), given(found_inf));
  });
}

char *torch_ext_set_grad(at::Tensor *param, at::Tensor *grad) {
  return guarded([&] {
    TORCH_CHECK(param->is_leaf() && param->requires_grad(), "only a leaf that requires a gradient can be given one");
    TORCH_CHECK(param->sizes() == grad->sizes(), "a parameter of shape ", param->sizes(), " cannot have a gradient of shape ",
                grad->sizes());
    TORCH_CHECK(param->scalar_type() == grad->scalar_type() && param->device() == grad->device(),
                "a parameter and its gradient must agree in dtype and device");
    param->mutable_grad() = *grad;
  });
}

// Each place takes its parameter's gradient, which the parameter then has no more. Kernels for lists take tensors of
// one dtype a list; the places are all of one.
char *torch_ext_gather(at::Tensor *const *params, at::Tensor *const *places, size_t count, bool add) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    std::map<at::ScalarType, std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>>> lists;
    for (size_t i = 0; i < count; i++) {
      auto &grad = params[i]->mutable_grad();
      if (grad.defined()) {
        TORCH_CHECK(grad.sizes() == places[i]->sizes(), "a gradient of shape ", grad.sizes(), " has no place of shape ",
                    places[i]->sizes());
        auto &[to, from] = lists[grad.scalar_type()];
        to.push_back(*places[i]);
        from.push_back(std::move(grad));
        grad.reset();
      } else if (!add) {
        places[i]->zero_();
      }
    }
    for (auto &[dtype, list] : lists) {
      if (add) {
        at::_foreach_add_(list.first, list.second);
      } else {
        at::_foreach_copy_(list.first, list.second);
      }
    }
  });
}

char *torch_ext_drop_grad(at::Tensor *param) {
  return guarded([&] { param->mutable_grad().reset(); });
}

// Takes `context` over, whatever happens. `call` borrows its tensor, and gives a new one away, or null.
char *torch_ext_on_gradient(at::Tensor *tensor, void *context, at::Tensor *(*call)(void *, const at::Tensor *),
                            void (*drop)(void *)) {
  return guarded([&] {
    auto closure = std::shared_ptr<void>(context, drop);
    TORCH_CHECK(tensor->requires_grad() && !tensor->is_leaf(), "only what is computed from parameters has a gradient to change");
    tensor->register_hook([closure, call](const at::Tensor &grad) {
      auto changed = std::unique_ptr<at::Tensor>(call(closure.get(), &grad));
      if (!changed) throw std::runtime_error("a gradient hook failed");
      return *changed;
    });
  });
}

// Takes `context` over, whatever happens.
char *torch_ext_on_gradient_accumulated(at::Tensor *param, void *context, bool (*call)(void *), void (*drop)(void *)) {
  return guarded([&] {
    auto hook = std::make_unique<RustHook>(context, call, drop);
    TORCH_CHECK(param->is_leaf() && param->requires_grad(), "only a leaf that requires a gradient accumulates one");
    torch::autograd::impl::set_post_acc_grad_hooks(*param, std::move(hook));
  });
}

// Streams and events by the interface that every device implements, so that nothing of CUDA is linked.

char *torch_ext_side_stream(int cuda_index, int64_t *id) {
  return guarded([&] { *id = c10::impl::VirtualGuardImpl(c10::kCUDA).getStreamFromGlobalPool(cuda(cuda_index)).id(); });
}

char *torch_ext_enter_stream(int cuda_index, int64_t id) {
  return guarded([&] {
    c10::impl::VirtualGuardImpl(c10::kCUDA).exchangeStream(c10::Stream(c10::Stream::UNSAFE, cuda(cuda_index), id));
  });
}

char *torch_ext_mark(int cuda_index, c10::Event **mark) {
  return guarded([&] {
    auto event = std::make_unique<c10::Event>(c10::kCUDA);
    event->record(c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(cuda(cuda_index)));
    *mark = event.release();
  });
}

char *torch_ext_wait_for(c10::Event *mark) {
  return guarded([&] { mark->block(c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(mark->device())); });
}

char *torch_ext_is_reached(c10::Event *mark, bool *is_reached) {
  return guarded([&] { *is_reached = mark->query(); });
}

void torch_ext_drop_mark(c10::Event *mark) { delete mark; }

// The allocator gives the memory to nobody else before what this thread's stream has been given so far is done.
char *torch_ext_used_here(at::Tensor *tensor) {
  return guarded([&] {
    auto device = tensor->device();
    tensor->record_stream(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  });
}

char *torch_ext_pin(at::Tensor *tensor) {
  return guarded([&] { *tensor = tensor->pin_memory(); });
}

char *torch_ext_copy_later(at::Tensor *target, at::Tensor *source) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    target->copy_(*source, /*non_blocking=*/true);
  });
}

// Through the device-generic interface: nothing of CUDA is included or linked.
char *torch_ext_current_stream(int8_t device_index, void **stream) {
  return guarded([&] {
    c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
    *stream = cuda.getStreamNativeHandle(cuda.getStream(c10::Device(c10::DeviceType::CUDA, device_index)));
  });
}

// Autocast to bf16 of what this thread computes on a kind of device, until it is switched off again.
char *torch_ext_autocast_bf16(int8_t device_type, bool on) {
  return guarded([&] {
    auto device = static_cast<c10::DeviceType>(device_type);
    if (on) {
      at::autocast::set_autocast_dtype(device, at::kBFloat16);
      at::autocast::increment_nesting();
    } else if (at::autocast::decrement_nesting() == 0) {
      at::autocast::clear_cache();
    }
    at::autocast::set_autocast_enabled(device, on);
  });
}

// Stays valid for ever.
const char *torch_ext_cpu_capability() {
  static const std::string capability = at::get_cpu_capability();
  return capability.c_str();
}

char *torch_ext_try_kernels(bool on) {
  return guarded([&] {
    at::globalContext().setBenchmarkCuDNN(on);
    at::globalContext().setBenchmarkLimitCuDNN(3);
    at::native::_cudnn_set_conv_benchmark_empty_cache(false);
  });
}

char *torch_ext_repeatable_kernels() {
  return guarded([&] { at::globalContext().setDeterministicCuDNN(true); });
}

char *torch_ext_allow_tf32(bool allow) {
  return guarded([&] {
    at::globalContext().setAllowTF32CuBLAS(allow);
    at::globalContext().setAllowTF32CuDNN(allow);
  });
}

} // extern "C"
