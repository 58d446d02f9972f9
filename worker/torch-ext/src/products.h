// Products of matrices on the CPU, of factors in f32 or rounded to bf16, with sums in f32.

#pragma once

#include <ATen/ATen.h>
#include <dlfcn.h>

#include <algorithm>

namespace {

// Which values a product's factors have.
inline at::Tensor as_factor(const at::Tensor &x, bool bf16) { return bf16 ? x.to(at::kBFloat16) : x; }

// A matrix as BLAS takes it: row-major, or the transpose of one that is.
struct Operand {
  bool transposed;
  int stride;

  explicit Operand(const at::Tensor &matrix) : transposed(matrix.stride(1) != 1 && matrix.size(1) != 1) {
    int within = transposed ? 0 : 1, across = 1 - within;
    TORCH_CHECK(matrix.stride(within) == 1 || matrix.size(within) == 1, "a product's matrix must be row-major, or transposed");
    stride = std::max(matrix.stride(across), matrix.size(within));
  }
};

// oneMKL's cblas_gemm_bf16bf16f32, which libtorch's builds for x86 carry: factors in bf16, sums in f32, and where the
// processor has tiles (AMX) several times the speed of f32.
using Bf16Gemm = void (*)(int order, int a_transposed, int b_transposed, int rows, int cols, int inner, float alpha,
                          const void *a, int a_stride, const void *b, int b_stride, float beta, float *c, int c_stride);

inline Bf16Gemm bf16_gemm() {
  static const auto found = reinterpret_cast<Bf16Gemm>(dlsym(RTLD_DEFAULT, "cblas_gemm_bf16bf16f32"));
  return found;
}

// sum = a b, or with `add` sum + a b: sum [m, n] f32; a [m, k] and b [k, n] both f32 or both bf16. Each is row-major, or
// transposed.
inline void multiply(at::Tensor sum, const at::Tensor &a, const at::Tensor &b, bool add) {
  if (a.scalar_type() == at::kFloat) {
    if (add) sum.addmm_(a, b);
    else at::mm_out(sum, a, b);
  } else if (auto gemm = bf16_gemm()) {
    Operand left(a), right(b), target(sum);
    if (target.transposed) return multiply(sum.t(), b.t(), a.t(), add);
    constexpr int ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112;
    gemm(ROW_MAJOR, left.transposed ? TRANSPOSED : AS_IT_IS, right.transposed ? TRANSPOSED : AS_IT_IS, sum.size(0), sum.size(1),
         a.size(1), 1, a.const_data_ptr(), left.stride, b.const_data_ptr(), right.stride, add ? 1 : 0,
         sum.mutable_data_ptr<float>(), target.stride);
  } else {
    auto product = at::mm(a, b);
    if (add) sum.add_(product);
    else sum.copy_(product);
  }
}

} // namespace
