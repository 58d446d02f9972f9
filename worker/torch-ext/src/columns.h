// Images as matrices whose columns are pixels: [channels, samples * pixels], and the same with a row for each tap of a
// kernel. Values are f32 or bf16.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace {

// Rows first..last of an input.
struct Band {
  int64_t first, last;
};

// A square kernel of 1 or 3 taps a side, centred, over an input of `height` x `width`; its output is an image of
// `channels`.
//
// `spread` of 1: an ordinary convolution, 'same' padded. Of 2: the input lies at the even pixels of an image twice as
// high and wide, with zeros between.
struct Geometry {
  int64_t samples, channels, taps, height, width, spread;

  int64_t rows() const { return height * spread; }
  int64_t cols() const { return width * spread; }
  int64_t area() const { return rows() * cols(); }
  int64_t pixels() const { return height * width; }
  Band whole() const { return {0, height}; }
};

// The inputs i of 0..count whose tap falls on a pixel of 0..count * spread, and the first one's pixel.
struct Span {
  int64_t first, last, pixel;
};

inline Span span(int64_t tap, int64_t taps, int64_t count, int64_t spread) {
  int64_t shift = taps / 2 - tap; // input i contributes to pixel spread * i + shift
  int64_t first = shift < 0 ? 1 : 0;
  int64_t last = spread * (count - 1) + shift < spread * count ? count : count - 1;
  return {first, last, spread * first + shift};
}

// Calls visit(input, counted from the band's first, pixel, how many, the pixels' stride) for each run of the band's inputs
// whose tap falls inside.
template <typename Visit> void runs(const Geometry &g, const Band &band, int64_t tap, Visit visit) {
  auto down = span(tap / g.taps, g.taps, g.height, g.spread), across = span(tap % g.taps, g.taps, g.width, g.spread);
  for (int64_t i = std::max(down.first, band.first); i < std::min(down.last, band.last); ++i) {
    int64_t row = down.pixel + g.spread * (i - down.first), input = (i - band.first) * g.width;
    visit(input + across.first, row * g.cols() + across.pixel, across.last - across.first, g.spread);
  }
}

// Calls body(x's values, y's values, channel) for each of so many channels, in parallel; both are of x's type.
template <typename Body> void each_channel(int64_t channels, const at::Tensor &x, at::Tensor &y, Body body) {
  auto over = [&](auto type) {
    using Value = decltype(type);
    const Value *from = x.const_data_ptr<Value>();
    Value *to = y.mutable_data_ptr<Value>();
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) body(from, to, c);
    });
  };
  if (x.scalar_type() == at::kBFloat16) over(at::BFloat16());
  else over(float());
}

// [samples, channels, h, w] to [channels, samples * h * w], and, if asked, more columns, which are not set.
inline at::Tensor to_columns(const at::Tensor &x, int64_t extra) {
  int64_t samples = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  if (samples == 1 && extra == 0) return x.view({channels, pixels});
  auto columns = at::empty({channels, samples * pixels + extra}, x.options());
  each_channel(channels, x, columns, [&](const auto *from, auto *to, int64_t c) {
    auto *row = to + c * (samples * pixels + extra);
    for (int64_t n = 0; n < samples; ++n) std::copy_n(from + (n * channels + c) * pixels, pixels, row + n * pixels);
  });
  return columns;
}

// f32 columns as images [samples, channels, height, width], with a bias [channels] added if there is one. Surplus columns
// are left out.
inline at::Tensor from_columns(const at::Tensor &columns, const std::optional<at::Tensor> &bias, int64_t samples,
                               int64_t height, int64_t width) {
  int64_t channels = columns.size(0), pixels = height * width, stride = columns.size(1);
  auto x = at::empty({samples, channels, height, width}, columns.options());
  const float *from = columns.const_data_ptr<float>(), *biases = bias ? bias->const_data_ptr<float>() : nullptr;
  float *to = x.mutable_data_ptr<float>();
  at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      float added = biases ? biases[c] : 0;
      for (int64_t n = 0; n < samples; ++n) {
        const float *source = from + c * stride + n * pixels;
        float *target = to + (n * channels + c) * pixels;
        for (int64_t p = 0; p < pixels; ++p) target[p] = source[p] + added;
      }
    }
  });
  return x;
}

// How the rows of taps follow each other, and what they hold.
enum class Rows {
  // [channels, taps^2]: for each input, the pixel that it contributes to by this tap.
  Reached,
  // [taps^2, channels]: for each pixel, the one that this tap reads for it. Not of a spread.
  Read,
};

// The image's pixels [samples, channels, rows, cols] by tap, as [channels * taps^2, samples * pixels of the band], and
// more columns if asked, which are not set; zero outside.
template <Rows ORDER> at::Tensor gather(const Geometry &g, const Band &band, const at::Tensor &image, int64_t extra) {
  int64_t taps = g.taps * g.taps, pixels = (band.last - band.first) * g.width, stride = g.samples * pixels + extra;
  auto columns = at::empty({g.channels * taps, stride}, image.options());
  each_channel(g.channels, image, columns, [&](const auto *from, auto *to, int64_t c) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      // A pixel is read by the tap that is opposite to the one by which it is reached.
      auto *row = to + (ORDER == Rows::Reached ? c * taps + tap : (taps - 1 - tap) * g.channels + c) * stride;
      for (int64_t n = 0; n < g.samples; ++n) {
        const auto *plane = from + (n * g.channels + c) * g.area();
        auto *inputs = row + n * pixels;
        std::fill_n(inputs, pixels, 0.0f);
        runs(g, band, tap, [&](int64_t input, int64_t pixel, int64_t count, int64_t step) {
          for (int64_t j = 0; j < count; ++j) inputs[input + j] = plane[pixel + step * j];
        });
      }
    }
  });
  return columns;
}

// Sets the last column of [channels * taps^2, ...]: for each channel and tap, the sum of the image's pixels
// [samples, channels, rows, cols] whose tap reads inside the image.
inline void gather_constant(const Geometry &g, const at::Tensor &image, at::Tensor &columns) {
  int64_t taps = g.taps * g.taps, stride = columns.size(1);
  each_channel(g.channels, image, columns, [&](const auto *from, auto *to, int64_t c) {
    // All but an edge, or two.
    double all = 0, top = 0, bottom = 0, left = 0, right = 0, corners[4] = {0, 0, 0, 0};
    for (int64_t n = 0; n < g.samples; ++n) {
      const auto *plane = from + (n * g.channels + c) * g.area(), *last = plane + (g.rows() - 1) * g.cols();
      for (int64_t r = 0; r < g.rows(); ++r) {
        const auto *row = plane + r * g.cols();
        float sum = 0;
        for (int64_t p = 0; p < g.cols(); ++p) sum += row[p];
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
      to[(c * taps + tap + 1) * stride - 1] = static_cast<float>(sum);
    }
  });
}

// Adds products [channels * taps^2, samples * pixels + 1], f32, up where they fall in y [samples, channels, rows, cols],
// and the bias [channels]. The last column is what each tap brings of an image that is the same everywhere, and counts
// where the tap reads inside the image.
inline void scatter(const Geometry &g, const at::Tensor &products, const at::Tensor &bias, at::Tensor &y) {
  int64_t taps = g.taps * g.taps, stride = products.size(1);
  const float *from = products.const_data_ptr<float>(), *biases = bias.const_data_ptr<float>();
  float *to = y.mutable_data_ptr<float>();
  at::parallel_for(0, g.channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> background(g.area());
    for (int64_t c = begin; c < end; ++c) {
      const float *rows = from + c * taps * stride;
      std::fill(background.begin(), background.end(), biases[c]);
      for (int64_t tap = 0; tap < taps; ++tap) {
        float value = rows[(tap + 1) * stride - 1];
        // A tap reads the pixel `tap - centre` away.
        int64_t down = tap / g.taps - g.taps / 2, across = tap % g.taps - g.taps / 2;
        for (int64_t r = std::max<int64_t>(0, -down); r < g.rows() - std::max<int64_t>(0, down); ++r) {
          float *row = background.data() + r * g.cols();
          for (int64_t p = std::max<int64_t>(0, -across); p < g.cols() - std::max<int64_t>(0, across); ++p) row[p] += value;
        }
      }
      for (int64_t n = 0; n < g.samples; ++n) {
        float *plane = to + (n * g.channels + c) * g.area();
        for (int64_t p = 0; p < g.area(); ++p) plane[p] += background[p];
        for (int64_t tap = 0; tap < taps; ++tap) {
          const float *inputs = rows + tap * stride + n * g.pixels();
          runs(g, g.whole(), tap, [&](int64_t input, int64_t pixel, int64_t count, int64_t step) {
            for (int64_t j = 0; j < count; ++j) plane[pixel + step * j] += inputs[input + j];
          });
        }
      }
    }
  });
}

} // namespace
