// Convolutions on a CPU as matrix products that take the weights as they lie: row-major [outputs, taps, inputs], which
// torch calls channels-last. oneDNN's kernels for f32 are faster per multiplication, but rearrange all weights thrice a
// step, which costs more where a layer has many weights and few pixels. Factors may be rounded to bf16: then a product
// is the faster way for all layers, on a processor that multiplies tiles of them.
//
// Forward, an output is the product of its weights [taps * inputs] and the pixels that they read; backward, an input's
// gradient is that of its weights [outputs * taps] and the gradients that it reached, and these, times the input, are the
// weights' gradients.

#include "columns.h"
#include "guarded.h"
#include "products.h"

#include <torch/csrc/autograd/custom_function.h>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

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

// Whether to go sample by sample, so that pixels need not be brought side by side: not where the matrices would be so
// narrow that taking the weights up anew for each sample costs more.
bool by_sample(const Geometry &g) { return g.samples == 1 || g.pixels() >= (g.taps == 1 ? 48 : 512); }

// What is multiplied at once of an image: bands whose pixels, taken once for each tap, stay in a core's cache, but so high
// that going through `weights` values of a gradient once for each band costs little beside the product.
std::vector<Band> bands(const Geometry &g, int64_t weights) {
  if (g.taps == 1) return {g.whole()};
  constexpr int64_t CACHED = 1 << 19, PAYS = 4;
  int64_t taken = g.channels * g.taps * g.taps;
  int64_t pixels = std::max(CACHED / taken, PAYS * weights / taken), rows = std::max<int64_t>(1, pixels / g.width);
  std::vector<Band> bands;
  for (int64_t first = 0; first < g.height; first += rows) bands.push_back({first, std::min(first + rows, g.height)});
  return bands;
}

// The columns that are of a band of one of the images [N, channels, height, width], [channels, pixels]: no copy.
Tensor within(const Geometry &g, const Band &band, const Tensor &images, int64_t sample) {
  auto columns = images[sample].view({images.size(1), g.pixels()});
  return columns.narrow(1, band.first * g.width, (band.last - band.first) * g.width);
}

// By tap, the columns of all images, or of one's band.
template <Rows ORDER> Tensor by_tap(const Geometry &g, const Tensor &images) {
  return g.taps == 1 ? to_columns(images, 0) : gather<ORDER>(g, g.whole(), images, 0);
}
template <Rows ORDER> Tensor by_tap(Geometry g, const Band &band, const Tensor &images, int64_t sample) {
  if (g.taps == 1) return within(g, band, images, sample);
  g.samples = 1;
  return gather<ORDER>(g, band, images[sample], 0);
}

// A layer's weights [O, C, k, k] that lie channels-last as the two matrices that they are in memory; or of one tap,
// transposed, [C, O, 1, 1].
struct Weights {
  const Tensor &weight;
  bool transposed;

  int64_t outputs() const { return weight.size(transposed ? 1 : 0); }
  int64_t inputs() const { return weight.size(transposed ? 0 : 1); }
  int64_t taps() const { return weight.size(2); }
  Geometry over(const Tensor &x, int64_t channels) const { return {x.size(0), channels, taps(), x.size(2), x.size(3), 1}; }

  // [O, taps^2 * C]
  Tensor by_output() const {
    if (transposed) return by_output_and_tap();
    return weight.permute({0, 2, 3, 1}).view({outputs(), taps() * taps() * inputs()});
  }

  // [O * taps^2, C]: also of some inputs of such weights.
  Tensor by_output_and_tap() const {
    if (transposed) return weight.view({inputs(), outputs()}).t();
    return weight.permute({0, 2, 3, 1}).view({outputs() * taps() * taps(), inputs()});
  }
};

// x [N, C, H, W] contiguous, of the same type as the weights, to [N, O, H, W] f32.
Tensor convolve(const Tensor &x, const Weights &weights, const std::optional<Tensor> &bias) {
  auto g = weights.over(x, weights.inputs());
  auto matrix = weights.by_output();
  auto options = x.options().dtype(at::kFloat);
  if (!by_sample(g)) {
    auto columns = at::empty({weights.outputs(), g.samples * g.pixels()}, options);
    multiply(columns, matrix, by_tap<Rows::Read>(g, x), false);
    return from_columns(columns, bias, g.samples, g.height, g.width);
  }
  auto y = at::empty({g.samples, weights.outputs(), g.height, g.width}, options);
  if (bias) y.copy_(bias->view({1, -1, 1, 1}).expand_as(y));
  auto parts = bands(g, 0);
  for (int64_t n = 0; n < g.samples; ++n) {
    for (auto &band : parts) multiply(within(g, band, y, n), matrix, by_tap<Rows::Read>(g, band, x, n), bias.has_value());
  }
  return y;
}

// From the gradient [N, O, H, W] of such an output, that of its x, if asked, and the weights', which is added to
// `of_weights` f32.
Tensor convolve_backward(const Tensor &grad, const Tensor &x, const Weights &weights, const std::optional<Weights> &of_weights,
                         bool of_x) {
  auto g = weights.over(grad, weights.outputs());
  auto matrix = weights.by_output_and_tap().t();
  auto options = grad.options().dtype(at::kFloat);
  if (!by_sample(g)) {
    auto columns = by_tap<Rows::Reached>(g, grad);
    if (of_weights) multiply(of_weights->by_output_and_tap(), columns, to_columns(x, 0).t(), true);
    if (!of_x) return Tensor();
    auto y = at::empty({weights.inputs(), g.samples * g.pixels()}, options);
    multiply(y, matrix, columns, false);
    return from_columns(y, std::nullopt, g.samples, g.height, g.width);
  }
  auto y = of_x ? at::empty({g.samples, weights.inputs(), g.height, g.width}, options) : Tensor();
  auto parts = bands(g, weights.weight.numel());
  for (int64_t n = 0; n < g.samples; ++n) {
    for (auto &band : parts) {
      auto columns = by_tap<Rows::Reached>(g, band, grad, n);
      if (of_weights) multiply(of_weights->by_output_and_tap(), columns, within(g, band, x, n).t(), true);
      if (of_x) multiply(within(g, band, y, n), matrix, columns, false);
    }
  }
  return y;
}

// x [N, C, H, W], weight [O, C, k, k], or [C, O, 1, 1] if it is transposed, perhaps a bias [O], to [N, O, H, W].
struct Product final : torch::autograd::Function<Product> {
  static Variable forward(AutogradContext *ctx, const Variable &x, const Variable &weight, const std::optional<Tensor> &bias,
                          bool transposed, bool bf16) {
    auto image = as_factor(x.contiguous(), bf16), factor = as_factor(weight, bf16);
    ctx->save_for_backward({image, factor, weight});
    ctx->saved_data["bias"] = bias.has_value(), ctx->saved_data["transposed"] = transposed;
    return convolve(image, {factor, transposed}, bias);
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    auto saved = ctx->get_saved_variables();
    auto &image = saved[0], &factor = saved[1], &weight = saved[2];
    bool transposed = ctx->saved_data["transposed"].toBool();
    auto grad = grads[0].contiguous();
    Tensor of_weight, of_bias;
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)) of_bias = grad.sum({0, 2, 3});
    std::optional<Delivery> delivery;
    std::optional<Weights> of_weights;
    if (ctx->needs_input_grad(1)) of_weights.emplace(Weights{delivery.emplace(weight).target, transposed});
    grad = as_factor(grad, image.scalar_type() == at::kBFloat16);
    auto of_x = convolve_backward(grad, image, {factor, transposed}, of_weights, ctx->needs_input_grad(0));
    if (delivery) of_weight = delivery->finish();
    return {of_x, of_weight, of_bias, Tensor(), Tensor()};
  }
};

// The 3x3 convolution of [up, skip], where `up` is `constant` [C] but at its even pixels, where `sparse` [N, C, h, w] is
// added; skip [N, S, 2h, 2w], weight [O, C + S, 3, 3], bias [O], to [N, O, 2h, 2w].
struct Join final : torch::autograd::Function<Join> {
  static Variable forward(AutogradContext *ctx, const Variable &sparse, const Variable &constant, const Variable &skip_,
                          const Variable &weight, const Variable &bias, bool skip_by_product, bool bf16) {
    Geometry g{sparse.size(0), weight.size(0), weight.size(2), sparse.size(2), sparse.size(3), 2};
    int64_t inputs = sparse.size(1), skips = skip_.size(1);
    auto factor = as_factor(weight, bf16), skip = as_factor(skip_.contiguous(), bf16 && skip_by_product);
    auto columns = to_columns(as_factor(sparse.contiguous(), bf16), 1);
    columns.select(1, columns.size(1) - 1).copy_(constant);
    ctx->save_for_backward({columns, skip, factor, weight});
    ctx->saved_data["by_product"] = skip_by_product;

    Tensor y;
    if (skip_by_product) {
      auto of_skip = factor.narrow(1, inputs, skips).contiguous(at::MemoryFormat::ChannelsLast);
      y = convolve(skip, {of_skip, false}, std::nullopt);
    } else {
      y = at::conv2d(skip, weight.narrow(1, inputs, skips).contiguous(), {}, 1, 1);
    }
    auto products = at::empty({g.channels * g.taps * g.taps, columns.size(1)}, sparse.options());
    multiply(products, Weights{factor.narrow(1, 0, inputs), false}.by_output_and_tap(), columns, false);
    scatter(g, products, bias, y);
    return y;
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    auto saved = ctx->get_saved_variables();
    auto &columns = saved[0], &skip = saved[1], &factor = saved[2], &weight = saved[3];
    int64_t inputs = columns.size(0), skips = weight.size(1) - inputs;
    auto plain = grads[0].contiguous(), grad = as_factor(plain, columns.scalar_type() == at::kBFloat16);
    Geometry g{grad.size(0), weight.size(0), weight.size(2), grad.size(2) / 2, grad.size(3) / 2, 2};
    Delivery delivery(weight);
    auto of_up = delivery.target.narrow(1, 0, inputs), of_skip = delivery.target.narrow(1, inputs, skips);
    auto factor_up = factor.narrow(1, 0, inputs), factor_skip = factor.narrow(1, inputs, skips);

    auto reached = gather<Rows::Reached>(g, g.whole(), grad, 1);
    gather_constant(g, grad, reached);
    multiply(Weights{of_up, false}.by_output_and_tap(), reached, columns.t(), true);
    auto of_columns = at::empty(columns.sizes(), plain.options());
    multiply(of_columns, Weights{factor_up, false}.by_output_and_tap().t(), reached, false);
    auto of_sparse = from_columns(of_columns, std::nullopt, g.samples, g.height, g.width);
    auto of_constant = of_columns.select(1, of_columns.size(1) - 1).contiguous();

    Tensor skip_grad;
    bool further = ctx->needs_input_grad(2);
    if (ctx->saved_data["by_product"].toBool()) {
      skip_grad = convolve_backward(grad, skip, {factor_skip, false}, Weights{of_skip, false}, further);
    } else {
      auto weight_skip = weight.narrow(1, inputs, skips).contiguous();
      auto both = at::convolution_backward(plain, skip, weight_skip, at::OptionalIntArrayRef(), {1, 1}, {1, 1}, {1, 1}, false,
                                           {0, 0}, 1, {further, true, false});
      skip_grad = std::get<0>(both);
      of_skip.add_(std::get<1>(both));
    }
    return {of_sparse, of_constant, skip_grad, delivery.finish(), plain.sum({0, 2, 3}), Tensor(), Tensor()};
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

char *torch_ext_conv_as_product(at::Tensor *x, at::Tensor *weight, at::Tensor *bias, bool transposed, bool bf16,
                                at::Tensor **y) {
  return guarded([&] {
    auto biases = bias ? std::optional<Tensor>(*bias) : std::nullopt;
    *y = new Tensor(Product::apply(*x, *weight, biases, transposed, bf16));
  });
}

char *torch_ext_conv_of_join(at::Tensor *sparse, at::Tensor *constant, at::Tensor *skip, at::Tensor *weight, at::Tensor *bias,
                             bool skip_by_product, bool bf16, at::Tensor **y) {
  return guarded([&] { *y = new Tensor(Join::apply(*sparse, *constant, *skip, *weight, *bias, skip_by_product, bf16)); });
}

} // extern "C"
