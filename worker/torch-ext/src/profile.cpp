// libtorch's profiler. With its CUDA build it records kernels, too.

#include "guarded.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <set>

namespace {

using torch::profiler::impl::ActivityType;
using torch::profiler::impl::ProfilerConfig;
using torch::profiler::impl::ProfilerState;

} // namespace

extern "C" {

char *torch_ext_begin_profile(bool cuda) {
  return guarded([&] {
    auto activities = std::set<ActivityType>{ActivityType::CPU};
    if (cuda) activities.insert(ActivityType::CUDA);
    auto config = ProfilerConfig(ProfilerState::KINETO);
    torch::autograd::profiler::prepareProfiler(config, activities);
    torch::autograd::profiler::enableProfiler(config, activities);
  });
}

char *torch_ext_end_profile(const char *path) {
  return guarded([&] { torch::autograd::profiler::disableProfiler()->save(path); });
}

} // extern "C"
