// Convolutions on a CPU as matrix products that take the weights as they lie: row-major [outputs, taps, inputs], which
// torch calls channels-last. oneDNN's kernels are faster per multiplication, but rearrange all weights thrice a step,
// which costs more where a layer has many weights and few pixels.
//
// Pixels are columns: `columns` is [inputs, samples * pixels]. The product with the weights has a row for each output
// and tap, which is then added up where that tap falls.

#include "guarded.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// A square kernel of 1 or 3 taps a side, centred, over an input of `height` x `width`.
//
// `spread` of 1: an ordinary convolution, 'same' padded. Of 2: the input lies at the even pixels of an image twice as
// high and wide, with zeros between.
struct Geometry {

  int64_t samples, outputs, taps, height, width, spread;

  int64_t rows() const { return height * spread; }
  int64_t cols() const { return width * spread; }
  int64_t pixels() const { return height * width; }
};

// The inputs i of 0..count whose tap falls on a pixel of 0..count * spread, and the first one's pixel.
struct Span {
  int64_t first, last, pixel;
};

Span span(int64_t tap, int64_t taps, int64_t count, int64_t spread) {
  int64_t shift = taps / 2 - tap; // input i contributes to pixel spread * i + shift
  int64_t first = shift < 0 ? 1 : 0;
  int64_t last = spread * (count - 1) + shift < spread * count ? count : count - 1;
  return {first, last, spread * first + shift};
}

// Calls visit(plane's offset in a row of products, image's offset, how many, image's stride) for each run of inputs
// whose tap falls inside.
template <typename Visit> void runs(const Geometry &g, int64_t tap, Visit visit) {
  auto down = span(tap / g.taps, g.taps, g.height, g.spread), across = span(tap % g.taps, g.taps, g.width, g.spread);
  for (int64_t i = down.first; i < down.last; ++i) {
    int64_t row = down.pixel + g.spread * (i - down.first);
    visit(i * g.width + across.first, row * g.cols() + across.pixel, across.last - across.first, g.spread);
  }
}

// [samples, channels, h, w] to [channels, samples * h * w], and, if asked, one column more.
Tensor to_columns(const Tensor &x, int64_t extra) {
  int64_t samples = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  if (samples == 1 && extra == 0) return x.view({channels, pixels});
  auto columns = at::empty({channels, samples * pixels + extra}, x.options());
  const float *from = x.const_data_ptr<float>();
  float *to = columns.mutable_data_ptr<float>();
  at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      float *row = to + c * (samples * pixels + extra);
      for (int64_t n = 0; n < samples; ++n) {
        std::copy_n(from + (n * channels + c) * pixels, pixels, row + n * pixels);
      }
    }
  });
  return columns;
}

// The other way; surplus columns are left out.
Tensor from_columns(const Tensor &columns, int64_t samples, int64_t height, int64_t width) {
  int64_t channels = columns.size(0), pixels = height * width, stride = columns.size(1);
  if (samples == 1 && stride == pixels) return columns.view({1, channels, height, width});
  auto x = at::empty({samples, channels, height, width}, columns.options());
  const float *from = columns.const_data_ptr<float>();
  float *to = x.mutable_data_ptr<float>();
  at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t n = 0; n < samples; ++n) {
        std::copy_n(from + c * stride + n * pixels, pixels, to + (n * channels + c) * pixels);
      }
    }
  });
  return x;
}

// Adds the products [outputs * taps^2, samples * pixels (+ 1)] up where they fall in y [samples, outputs, rows, cols].
// Where there is one column more, it is what each tap brings of an image that is the same everywhere, and counts
// where the tap falls inside the whole image. With `overwrite`, y held nothing.
void scatter(const Geometry &g, const Tensor &products, const std::optional<Tensor> &bias, bool constant, bool overwrite,
             Tensor &y) {
  int64_t taps = g.taps * g.taps, stride = g.samples * g.pixels() + (constant ? 1 : 0), area = g.rows() * g.cols();
  const float *from = products.const_data_ptr<float>();
  const float *biases = bias ? bias->const_data_ptr<float>() : nullptr;
  float *to = y.mutable_data_ptr<float>();
  at::parallel_for(0, g.outputs, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> background(area);
    for (int64_t o = begin; o < end; ++o) {
      const float *rows = from + o * taps * stride;
      std::fill(background.begin(), background.end(), biases ? biases[o] : 0.0f);
      for (int64_t tap = 0; constant && tap < taps; ++tap) {
        float value = rows[tap * stride + stride - 1];
        // A tap reads the pixel `tap - centre` away, which must be inside.
        int64_t dy = tap / g.taps - g.taps / 2, dx = tap % g.taps - g.taps / 2;
        for (int64_t r = std::max<int64_t>(0, -dy); r < g.rows() - std::max<int64_t>(0, dy); ++r) {
          for (int64_t c = std::max<int64_t>(0, -dx); c < g.cols() - std::max<int64_t>(0, dx); ++c) {
            background[r * g.cols() + c] += value;
          }
        }
      }
      for (int64_t n = 0; n < g.samples; ++n) {
        float *plane = to + (n * g.outputs + o) * area;
        if (overwrite) {
          std::copy(background.begin(), background.end(), plane);
        } else {
          for (int64_t p = 0; p < area; ++p) plane[p] += background[p];
        }
        for (int64_t tap = 0; tap < taps; ++tap) {
          const float *products = rows + tap * stride + n * g.pixels();
          runs(g, tap, [&](int64_t input, int64_t pixel, int64_t count, int64_t step) {
            for (int64_t j = 0; j < count; ++j) plane[pixel + step * j] += products[input + j];
          });
        }
      }
    }
  });
}

// The gradient of the products of scatter, from that of y.
Tensor gather(const Geometry &g, const Tensor &grad, bool constant) {
  int64_t taps = g.taps * g.taps, stride = g.samples * g.pixels() + (constant ? 1 : 0), area = g.rows() * g.cols();
  auto products = at::empty({g.outputs * taps, stride}, grad.options());
  const float *from = grad.const_data_ptr<float>();
  float *to = products.mutable_data_ptr<float>();
  at::parallel_for(0, g.outputs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      float *rows = to + o * taps * stride;
      for (int64_t tap = 0; tap < taps; ++tap) {
        float *row = rows + tap * stride;
        for (int64_t n = 0; n < g.samples; ++n) {
          const float *plane = from + (n * g.outputs + o) * area;
          float *products = row + n * g.pixels();
          std::fill_n(products, g.pixels(), 0.0f);
          runs(g, tap, [&](int64_t input, int64_t pixel, int64_t count, int64_t step) {
            for (int64_t j = 0; j < count; ++j) products[input + j] = plane[pixel + step * j];
          });
        }
      }
      if (!constant) continue;
      // Sums over the pixels that each tap's neighbour is inside of: all but an edge, or two.
      double all = 0, top = 0, bottom = 0, left = 0, right = 0, corners[4] = {0, 0, 0, 0};
      for (int64_t n = 0; n < g.samples; ++n) {
        const float *plane = from + (n * g.outputs + o) * area;
        const float *last = plane + (g.rows() - 1) * g.cols();
        for (int64_t r = 0; r < g.rows(); ++r) {
          const float *row = plane + r * g.cols();
          float sum = 0;
          for (int64_t c = 0; c < g.cols(); ++c) sum += row[c];
          all += sum, left += row[0], right += row[g.cols() - 1];
          if (r == 0) top += sum;
          if (r == g.rows() - 1) bottom += sum;
        }
        corners[0] += plane[0], corners[1] += plane[g.cols() - 1], corners[2] += last[0], corners[3] += last[g.cols() - 1];
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        int64_t down = tap / g.taps - g.taps / 2, across = tap % g.taps - g.taps / 2;
        double sum = all;
        if (down) sum -= down < 0 ? top : bottom;
        if (across) sum -= across < 0 ? left : right;
        if (down && across) sum += corners[(down < 0 ? 0 : 2) + (across < 0 ? 0 : 1)];
        rows[tap * stride + stride - 1] = static_cast<float>(sum);
      }
    }
  });
  return products;
}

// Weights [outputs, inputs, taps, taps], or some inputs of them, as a matrix [outputs * taps^2, inputs]: no copy.
Tensor as_matrix(const Tensor &weight) {
  return weight.permute({0, 2, 3, 1}).view({weight.size(0) * weight.size(2) * weight.size(3), weight.size(1)});
}

// The gradient of weights, made where it belongs. If they are a leaf that has a gradient already, it is added to that in
// place: no temporary of the weights' size, and no pass over both. Else it is returned as any other.
class Delivery {
public:
  explicit Delivery(const Tensor &weight) {
    const auto &held = weight.is_leaf() ? weight.grad() : Tensor();
    in_place = held.defined() && held.strides() == weight.strides() && held.scalar_type() == weight.scalar_type();
    target = in_place ? held : at::empty_strided(weight.sizes(), weight.strides(), weight.options()).zero_();
  }

  // What to return to the engine: nothing to add where it is added already. The engine calls the leaf's hook all the same.
  Tensor finish() const { return in_place ? Tensor() : target; }

  // What the gradient is to be added to.
  Tensor target;

private:
  bool in_place;
};

// From how many pixels on a 1x1 kernel goes sample by sample, so that nothing is rearranged: below, the matrices are so
// narrow that taking the weights up anew for each sample costs more.
constexpr int64_t WIDE = 48;

Tensor flat_pixels(const Tensor &x) { return x.view({x.size(0), x.size(1), x.size(2) * x.size(3)}); }

// x [N, C, H, W], weight [O, C, k, k], or [C, O, 1, 1] if it is transposed, perhaps a bias [O], to [N, O, H, W].
struct Product final : torch::autograd::Function<Product> {
  static Tensor matrix_of(const Tensor &weight, bool transposed) {
    return transposed ? weight.view({weight.size(0), weight.size(1)}).t() : as_matrix(weight);
  }

  static Variable forward(AutogradContext *ctx, const Variable &x, const Variable &weight, const std::optional<Tensor> &bias,
                          bool transposed) {
    Geometry g{x.size(0), weight.size(transposed ? 1 : 0), weight.size(2), x.size(2), x.size(3), 1};
    bool wide = g.taps == 1 && g.pixels() >= WIDE;
    auto columns = wide ? x.contiguous() : to_columns(x.contiguous(), 0);
    ctx->save_for_backward({columns, weight});
    ctx->saved_data["wide"] = wide, ctx->saved_data["bias"] = bias.has_value(), ctx->saved_data["transposed"] = transposed;
    auto matrix = matrix_of(weight, transposed);
    if (wide) {
      auto y = at::empty({g.samples, g.outputs, g.height, g.width}, x.options());
      auto from = flat_pixels(columns), to = flat_pixels(y);
      for (int64_t n = 0; n < g.samples; ++n) {
        auto target = to[n];
        if (bias) at::addmm_out(target, bias->view({-1, 1}), matrix, from[n]);
        else at::mm_out(target, matrix, from[n]);
      }
      return y;
    }
    auto products = at::mm(matrix, columns);
    if (g.taps == 1 && !bias) return from_columns(products, g.samples, g.height, g.width);
    auto y = at::empty({g.samples, g.outputs, g.height, g.width}, x.options());
    scatter(g, products, bias, false, true, y);
    return y;
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    auto saved = ctx->get_saved_variables();
    auto &columns = saved[0], &weight = saved[1];
    bool transposed = ctx->saved_data["transposed"].toBool(), wide = ctx->saved_data["wide"].toBool();
    auto grad = grads[0].contiguous();
    Geometry g{grad.size(0), grad.size(1), weight.size(2), grad.size(2), grad.size(3), 1};
    auto matrix = matrix_of(weight, transposed);
    Tensor of_x, of_weight, of_bias;
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)) of_bias = grad.sum({0, 2, 3});
    Tensor products = wide ? flat_pixels(grad) : g.taps == 1 ? to_columns(grad, 0) : gather(g, grad, false);
    if (ctx->needs_input_grad(1)) {
      Delivery delivery(weight);
      auto target = matrix_of(delivery.target, transposed);
      if (wide) {
        auto seen = flat_pixels(columns);
        for (int64_t n = 0; n < g.samples; ++n) target.addmm_(products[n], seen[n].t());
      } else {
        target.addmm_(products, columns.t());
      }
      of_weight = delivery.finish();
    }
    if (ctx->needs_input_grad(0) && wide) {
      of_x = at::empty(columns.sizes(), columns.options());
      auto to = flat_pixels(of_x);
      for (int64_t n = 0; n < g.samples; ++n) {
        auto target = to[n];
        at::mm_out(target, matrix.t(), products[n]);
      }
    } else if (ctx->needs_input_grad(0)) {
      of_x = from_columns(at::mm(matrix.t(), products), g.samples, g.height, g.width);
    }
    return {of_x, of_weight, of_bias, Tensor()};
  }
};

// The 3x3 convolution of [up, skip], where `up` is `constant` [C] but at its even pixels, where `sparse` [N, C, h, w] is
// added; skip [N, S, 2h, 2w], weight [O, C + S, 3, 3], bias [O], to [N, O, 2h, 2w].
struct Join final : torch::autograd::Function<Join> {
  static Variable forward(AutogradContext *ctx, const Variable &sparse, const Variable &constant, const Variable &skip_,
                          const Variable &weight, const Variable &bias, bool skip_by_product) {
    Geometry g{sparse.size(0), weight.size(0), weight.size(2), sparse.size(2), sparse.size(3), 2};
    auto skip = skip_.contiguous();
    int64_t inputs = sparse.size(1);
    auto columns = to_columns(sparse.contiguous(), 1);
    columns.select(1, columns.size(1) - 1).copy_(constant);
    auto skip_columns = skip_by_product ? to_columns(skip, 0) : skip;
    ctx->save_for_backward({columns, skip_columns, weight});
    ctx->saved_data["by_product"] = skip_by_product;
    auto of_up = weight.narrow(1, 0, inputs), of_skip = weight.narrow(1, inputs, weight.size(1) - inputs);
    Tensor y;
    if (skip_by_product) {
      Geometry whole{g.samples, g.outputs, g.taps, g.rows(), g.cols(), 1};
      y = at::empty({g.samples, g.outputs, g.rows(), g.cols()}, skip.options());
      scatter(whole, at::mm(as_matrix(of_skip), skip_columns), std::nullopt, false, true, y);
    } else {
      y = at::conv2d(skip, of_skip.contiguous(), {}, 1, 1);
    }
    scatter(g, at::mm(as_matrix(of_up), columns), bias, true, false, y);
    return y;
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    auto saved = ctx->get_saved_variables();
    auto &columns = saved[0], &skip = saved[1], &weight = saved[2];
    int64_t inputs = columns.size(0), skips = weight.size(1) - inputs;
    auto grad = grads[0].contiguous();
    Geometry g{grad.size(0), weight.size(0), weight.size(2), grad.size(2) / 2, grad.size(3) / 2, 2};
    Delivery delivery(weight);
    auto of_up = delivery.target.narrow(1, 0, inputs), of_skip = delivery.target.narrow(1, inputs, skips);
    auto weight_up = weight.narrow(1, 0, inputs), weight_skip = weight.narrow(1, inputs, skips);

    auto products = gather(g, grad, true);
    as_matrix(of_up).addmm_(products, columns.t());
    auto of_columns = at::mm(as_matrix(weight_up).t(), products);
    auto of_sparse = from_columns(of_columns, g.samples, g.height, g.width);
    auto of_constant = of_columns.select(1, of_columns.size(1) - 1).contiguous();

    Tensor skip_grad;
    bool further = ctx->needs_input_grad(2);
    if (ctx->saved_data["by_product"].toBool()) {
      Geometry whole{g.samples, g.outputs, g.taps, g.rows(), g.cols(), 1};
      auto skip_products = gather(whole, grad, false);
      as_matrix(of_skip).addmm_(skip_products, skip.t());
      if (further) skip_grad = from_columns(at::mm(as_matrix(weight_skip).t(), skip_products), g.samples, g.rows(), g.cols());
    } else {
      auto both = at::convolution_backward(grad, skip, weight_skip.contiguous(), at::OptionalIntArrayRef(), {1, 1}, {1, 1},
                                           {1, 1}, false, {0, 0}, 1, {further, true, false});
      skip_grad = std::get<0>(both);
      of_skip.add_(std::get<1>(both));
    }
    return {of_sparse, of_constant, skip_grad, delivery.finish(), grad.sum({0, 2, 3}), Tensor()};
  }
};

// Weights [O, C, k, k] that lie channels-last, row-major, as oneDNN's kernels take them; and their gradient back.
struct RowMajor final : torch::autograd::Function<RowMajor> {
  static Variable forward(AutogradContext *ctx, const Variable &weight) {
    ctx->save_for_backward({weight});
    auto y = at::empty(weight.sizes(), weight.options());
    const float *from = weight.const_data_ptr<float>();
    float *to = y.mutable_data_ptr<float>();
    each(weight, [&](int64_t last, int64_t major) { to[major] = from[last]; });
    return y;
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    auto grad = grads[0].contiguous();
    Delivery delivery(ctx->get_saved_variables()[0]);
    const float *from = grad.const_data_ptr<float>();
    float *to = delivery.target.mutable_data_ptr<float>();
    each(grad, [&](int64_t last, int64_t major) { to[last] += from[major]; });
    return {delivery.finish()};
  }

  // Calls visit(index channels-last, index row-major) for each weight, in blocks that stay in the cache.
  template <typename Visit> static void each(const Tensor &weight, Visit visit) {
    int64_t inputs = weight.size(1), taps = weight.size(2) * weight.size(3), block = inputs * taps;
    at::parallel_for(0, weight.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t c = 0; c < inputs; ++c) {
          for (int64_t k = 0; k < taps; ++k) visit(o * block + k * inputs + c, o * block + c * taps + k);
        }
      }
    });
  }
};

} // namespace

extern "C" {

char *torch_ext_row_major(at::Tensor *weight, at::Tensor **y) {
  return guarded([&] {
    TORCH_CHECK(weight->is_contiguous(at::MemoryFormat::ChannelsLast), "the weights must lie channels-last");
    *y = new Tensor(RowMajor::apply(*weight));
  });
}

char *torch_ext_conv_as_product(at::Tensor *x, at::Tensor *weight, at::Tensor *bias, bool transposed, at::Tensor **y) {
  return guarded([&] {
    auto biases = bias ? std::optional<Tensor>(*bias) : std::nullopt;
    *y = new Tensor(Product::apply(*x, *weight, biases, transposed));
  });
}

char *torch_ext_conv_of_join(at::Tensor *sparse, at::Tensor *constant, at::Tensor *skip, at::Tensor *weight, at::Tensor *bias,
                             bool skip_by_product, at::Tensor **y) {
  return guarded([&] { *y = new Tensor(Join::apply(*sparse, *constant, *skip, *weight, *bias, skip_by_product)); });
}

} // extern "C"
