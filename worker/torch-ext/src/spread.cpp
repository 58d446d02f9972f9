// ReLU and batch norm of an image that is the same everywhere but at its even pixels, at the cost of those alone.

#include "guarded.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Of each even pixel there are three others.
constexpr double OTHERS = 3;

float relu(float value) { return value > 0 ? value : 0; }

// Adds term(value) up over a channel of x [N, C, H, W].
template <typename Term> double sum(const Tensor &x, int64_t channel, Term term) {
  int64_t pixels = x.size(2) * x.size(3);
  const float *data = x.const_data_ptr<float>();
  double total = 0;
  for (int64_t n = 0; n < x.size(0); ++n) {
    const float *plane = data + (n * x.size(1) + channel) * pixels;
    // In sixteen running sums, which the compiler keeps in vector registers.
    float sums[16] = {};
    int64_t p = 0;
    for (; p + 16 <= pixels; p += 16) {
      for (int64_t lane = 0; lane < 16; ++lane) sums[lane] += term(plane[p + lane]);
    }
    for (; p < pixels; ++p) total += term(plane[p]);
    for (float lane : sums) total += lane;
  }
  return total;
}

// x [N, C, h, w] at the even pixels and background [C] elsewhere, to what `spread` in Rust describes.
//
// With y the normalised image, the results are y at the background and its difference at the even pixels, so its
// gradients are those of batch norm (Ioffe and Szegedy, 2015) over N * 4hw values, of which 3 in 4 are one.
struct Spread final : torch::autograd::Function<Spread> {
  static variable_list forward(AutogradContext *ctx, const Variable &x_, const Variable &background, const Variable &weight,
                               const Variable &bias, const Tensor &running_mean, const Tensor &running_var, bool by_batch,
                               double momentum, double eps) {
    auto x = x_.contiguous();
    int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
    auto sparse = at::empty(x.sizes(), x.options());
    auto constant = at::empty({channels}, x.options()), means = at::empty({channels}, x.options()),
         inverses = at::empty({channels}, x.options());
    const float *from = x.const_data_ptr<float>(), *grounds = background.const_data_ptr<float>(),
                *weights = weight.const_data_ptr<float>(), *biases = bias.const_data_ptr<float>();
    float *to = sparse.mutable_data_ptr<float>(), *constants = constant.mutable_data_ptr<float>(),
          *mean = means.mutable_data_ptr<float>(), *inverse = inverses.mutable_data_ptr<float>(),
          *moved_mean = running_mean.mutable_data_ptr<float>(), *moved_var = running_var.mutable_data_ptr<float>();
    double even = x.size(0) * pixels, all = (1 + OTHERS) * even;
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        float ground = relu(grounds[c]);
        double center = moved_mean[c], var = moved_var[c];
        if (by_batch) {
          center = (sum(x, c, relu) + OTHERS * even * ground) / all;
          float around = center;
          auto square = [around](float value) { return (relu(value) - around) * (relu(value) - around); };
          var = (sum(x, c, square) + OTHERS * even * (ground - center) * (ground - center)) / all;
          moved_mean[c] = (1 - momentum) * moved_mean[c] + momentum * center;
          moved_var[c] = (1 - momentum) * moved_var[c] + momentum * var * all / (all - 1);
        }
        mean[c] = center, inverse[c] = 1 / std::sqrt(var + eps);
        float scale = weights[c] * inverse[c];
        constants[c] = biases[c] + scale * (ground - mean[c]);
        for (int64_t n = 0; n < x.size(0); ++n) {
          const float *source = from + (n * channels + c) * pixels;
          float *target = to + (n * channels + c) * pixels;
          for (int64_t p = 0; p < pixels; ++p) target[p] = scale * (relu(source[p]) - ground);
        }
      }
    });
    ctx->save_for_backward({x, background, weight, means, inverses});
    ctx->saved_data["by_batch"] = by_batch;
    return {sparse, constant};
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    auto saved = ctx->get_saved_variables();
    auto &x = saved[0], &background = saved[1], &weight = saved[2], &means = saved[3], &inverses = saved[4];
    bool by_batch = ctx->saved_data["by_batch"].toBool();
    auto of_sparse = grads[0].contiguous(), of_constant = grads[1].contiguous();
    int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
    auto of_x = at::empty(x.sizes(), x.options());
    auto of_background = at::empty({channels}, x.options()), of_weight = at::empty({channels}, x.options());
    const float *values = x.const_data_ptr<float>(), *grounds = background.const_data_ptr<float>(),
                *weights = weight.const_data_ptr<float>(), *mean = means.const_data_ptr<float>(),
                *inverse = inverses.const_data_ptr<float>(), *from = of_sparse.const_data_ptr<float>(),
                *sums = of_constant.const_data_ptr<float>();
    float *to = of_x.mutable_data_ptr<float>(), *to_background = of_background.mutable_data_ptr<float>(),
          *to_weight = of_weight.mutable_data_ptr<float>();
    double even = x.size(0) * pixels, all = (1 + OTHERS) * even;
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        float center = mean[c], ground = relu(grounds[c]);
        // The gradient of y at the even pixels is that of `sparse`; at all others together, what is left of the sum.
        double at_even = 0, along = 0;
        for (int64_t n = 0; n < x.size(0); ++n) {
          const float *gradient = from + (n * channels + c) * pixels, *value = values + (n * channels + c) * pixels;
          float plain = 0, weighed = 0;
          for (int64_t p = 0; p < pixels; ++p) {
            plain += gradient[p];
            weighed += gradient[p] * (relu(value[p]) - center);
          }
          at_even += plain, along += weighed;
        }
        double at_others = sums[c] - at_even, ground_hat = (ground - center) * inverse[c];
        double of_scale = along * inverse[c] + at_others * ground_hat;
        to_weight[c] = of_scale;
        double scale = weights[c] * inverse[c];
        // By the batch, each value also moves mean and variance.
        double by_mean = by_batch ? sums[c] / all : 0, by_var = by_batch ? of_scale / all : 0;
        double background_sum = scale * (at_others - OTHERS * even * (by_mean + ground_hat * by_var));
        to_background[c] = grounds[c] > 0 ? background_sum : 0;
        float a = scale, b = -scale * by_mean, d = -scale * by_var * inverse[c];
        for (int64_t n = 0; n < x.size(0); ++n) {
          const float *gradient = from + (n * channels + c) * pixels, *value = values + (n * channels + c) * pixels;
          float *target = to + (n * channels + c) * pixels;
          for (int64_t p = 0; p < pixels; ++p) {
            target[p] = value[p] > 0 ? a * gradient[p] + b + d * (value[p] - center) : 0;
          }
        }
      }
    });
    return {of_x, of_background, of_weight, of_constant, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

} // namespace

extern "C" char *torch_ext_spread(at::Tensor *x, at::Tensor *background, at::Tensor *weight, at::Tensor *bias,
                                  at::Tensor *running_mean, at::Tensor *running_var, bool by_batch, double momentum, double eps,
                                  at::Tensor **sparse, at::Tensor **constant) {
  return guarded([&] {
    auto results = Spread::apply(*x, *background, *weight, *bias, *running_mean, *running_var, by_batch, momentum, eps);
    *sparse = new Tensor(results[0]);
    *constant = new Tensor(results[1]);
  });
}
