// A residual connection in one pass over its rows: dropout of the branch, sum, layer norm. mtmoe/kernels/residual.py
// holds the contract and the same in plain torch.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "rows.h"

namespace {

using namespace mtmoe;
using c10::BFloat16;

constexpr int64_t kGrain = 16;
// Rows are summed in this many blocks, so that the bits of a parameter's gradient depend on no number of threads.
constexpr int64_t kBlocks = 16;

// sum = x + dropout(branch)
template <typename Branch>
MTMOE_INLINE void add_row_body(const float* x, const Branch* branch, float* sum, int64_t size, uint32_t key,
                               uint32_t threshold, float scale) {
  if (threshold == 0) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) sum[i] = x[i] + load(branch + i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i)
      sum[i] = x[i] + load(branch + i) * keep(key, static_cast<uint32_t>(i), threshold, scale);
  }
}

template <typename Out>
MTMOE_INLINE void norm_row_body(const float* x, const float* weight, const float* bias, Out* out, int64_t size,
                                float eps, float* mean_out, float* rstd_out) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < size; ++i) total += x[i];
  const float mean = total / static_cast<float>(size);
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) store(out + i, (x[i] - mean) * rstd * weight[i] + bias[i]);
  *mean_out = mean;
  *rstd_out = rstd;
}

// grad_x (+)= gradient of the norm; the parameters' gradients are added to their sums
template <typename Out>
MTMOE_INLINE void norm_backward_row_body(const Out* grad, const float* x, const float* weight, float mean, float rstd,
                                         const float* grad_sum, float* grad_x, float* grad_weight, float* grad_bias,
                                         int64_t size) {
  float a = 0.0f, b = 0.0f;
#pragma omp simd reduction(+ : a, b)
  for (int64_t i = 0; i < size; ++i) {
    const float g = load(grad + i), normal = (x[i] - mean) * rstd;
    grad_weight[i] += g * normal;
    grad_bias[i] += g;
    a += g * weight[i];
    b += g * weight[i] * normal;
  }
  a /= static_cast<float>(size);
  b /= static_cast<float>(size);
  if (grad_sum != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i)
      grad_x[i] = grad_sum[i] + rstd * (load(grad + i) * weight[i] - a - (x[i] - mean) * rstd * b);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i)
      grad_x[i] = rstd * (load(grad + i) * weight[i] - a - (x[i] - mean) * rstd * b);
  }
}

template <typename Branch>
MTMOE_INLINE void branch_backward_row_body(const float* grad, Branch* out, int64_t size, uint32_t key,
                                           uint32_t threshold, float scale) {
  if (threshold == 0) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) store(out + i, grad[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i)
      store(out + i, grad[i] * keep(key, static_cast<uint32_t>(i), threshold, scale));
  }
}

// Compiled for several sets of instructions; a function template cannot be, so each type has its own.
#define MTMOE_ROWS(T, name)                                                                                            \
  MTMOE_CLONES void add_row_##name(const float* x, const T* branch, float* sum, int64_t size, uint32_t key,            \
                                   uint32_t threshold, float scale) {                                                  \
    add_row_body(x, branch, sum, size, key, threshold, scale);                                                         \
  }                                                                                                                    \
  MTMOE_CLONES void norm_row_##name(const float* x, const float* weight, const float* bias, T* out, int64_t size,      \
                                    float eps, float* mean, float* rstd) {                                             \
    norm_row_body(x, weight, bias, out, size, eps, mean, rstd);                                                        \
  }                                                                                                                    \
  MTMOE_CLONES void norm_backward_row_##name(const T* grad, const float* x, const float* weight, float mean,           \
                                             float rstd, const float* grad_sum, float* grad_x, float* grad_weight,     \
                                             float* grad_bias, int64_t size) {                                         \
    norm_backward_row_body(grad, x, weight, mean, rstd, grad_sum, grad_x, grad_weight, grad_bias, size);               \
  }                                                                                                                    \
  MTMOE_CLONES void branch_backward_row_##name(const float* grad, T* out, int64_t size, uint32_t key,                  \
                                               uint32_t threshold, float scale) {                                      \
    branch_backward_row_body(grad, out, size, key, threshold, scale);                                                  \
  }                                                                                                                    \
  void add_row(const float* x, const T* b, float* s, int64_t n, uint32_t k, uint32_t t, float c) {                     \
    add_row_##name(x, b, s, n, k, t, c);                                                                               \
  }                                                                                                                    \
  void norm_row(const float* x, const float* w, const float* b, T* o, int64_t n, float e, float* m, float* r) {        \
    norm_row_##name(x, w, b, o, n, e, m, r);                                                                           \
  }                                                                                                                    \
  void norm_backward_row(const T* g, const float* x, const float* w, float m, float r, const float* s, float* gx,      \
                         float* gw, float* gb, int64_t n) {                                                            \
    norm_backward_row_##name(g, x, w, m, r, s, gx, gw, gb, n);                                                         \
  }                                                                                                                    \
  void branch_backward_row(const float* g, T* o, int64_t n, uint32_t k, uint32_t t, float c) {                         \
    branch_backward_row_##name(g, o, n, k, t, c);                                                                      \
  }

MTMOE_ROWS(float, float)
MTMOE_ROWS(BFloat16, bfloat16)
#undef MTMOE_ROWS

template <typename Function>
void by_type(at::ScalarType type, const Function& function) {
  if (type == at::kBFloat16) {
    function(BFloat16{});
  } else {
    TORCH_CHECK(type == at::kFloat, "residual_norm takes float32 and bfloat16, not ", type);
    function(float{});
  }
}

at::Tensor residual_add(const at::Tensor& x, const at::Tensor& branch, double p, int64_t seed) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  const Dropout dropout(p, seed);
  at::Tensor sum = at::empty_like(x);
  by_type(branch.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const float* from = x.const_data_ptr<float>();
    const T* with = branch.const_data_ptr<T>();
    float* to = sum.mutable_data_ptr<float>();
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        add_row(from + row * size, with + row * size, to + row * size, size, row_key(dropout.seed, row),
                dropout.threshold, dropout.scale);
    });
  });
  return sum;
}

// (normalised, mean, 1 / standard deviation)
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm(const at::Tensor& x, const at::Tensor& weight,
                                                          const at::Tensor& bias, double eps, at::ScalarType dtype) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(dtype));
  at::Tensor mean = at::empty({rows}, x.options()), rstd = at::empty({rows}, x.options());
  by_type(dtype, [&](auto type) {
    using T = decltype(type);
    const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>(),
                *b = bias.const_data_ptr<float>();
    T* to = out.mutable_data_ptr<T>();
    float *m = mean.mutable_data_ptr<float>(), *r = rstd.mutable_data_ptr<float>();
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        norm_row(from + row * size, w, b, to + row * size, size, static_cast<float>(eps), m + row, r + row);
    });
  });
  return {out, mean, rstd};
}

// Gradients of x, weight and bias; `grad_sum` is what else flows into x.
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(const at::Tensor& grad,
                                                                   const std::optional<at::Tensor>& grad_sum,
                                                                   const at::Tensor& x, const at::Tensor& weight,
                                                                   const at::Tensor& mean, const at::Tensor& rstd) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  at::Tensor grad_x = at::empty_like(x);
  at::Tensor sums = at::zeros({2, kBlocks, size}, x.options());
  by_type(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* g = grad.const_data_ptr<T>();
    const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>(),
                *m = mean.const_data_ptr<float>(), *r = rstd.const_data_ptr<float>(),
                *extra = grad_sum.has_value() ? grad_sum->const_data_ptr<float>() : nullptr;
    float *to = grad_x.mutable_data_ptr<float>(), *total = sums.mutable_data_ptr<float>();
    at::parallel_for(0, kBlocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        for (int64_t row = rows * block / kBlocks; row < rows * (block + 1) / kBlocks; ++row)
          norm_backward_row(g + row * size, from + row * size, w, m[row], r[row],
                            extra == nullptr ? nullptr : extra + row * size, to + row * size, total + block * size,
                            total + (kBlocks + block) * size, size);
    });
  });
  at::Tensor parameters = sums.sum(1);
  return {grad_x, parameters[0], parameters[1]};
}

at::Tensor residual_add_backward(const at::Tensor& grad, at::ScalarType dtype, double p, int64_t seed) {
  const int64_t size = grad.size(-1), rows = grad.numel() / size;
  const Dropout dropout(p, seed);
  at::Tensor out = at::empty(grad.sizes(), grad.options().dtype(dtype));
  by_type(dtype, [&](auto type) {
    using T = decltype(type);
    const float* from = grad.const_data_ptr<float>();
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        branch_backward_row(from + row * size, to + row * size, size, row_key(dropout.seed, row), dropout.threshold,
                            dropout.scale);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mtmoe, m) {
  m.def("residual_add(Tensor x, Tensor branch, float p, int seed) -> Tensor", &residual_add);
  m.def("residual_add_backward(Tensor grad, ScalarType dtype, float p, int seed) -> Tensor", &residual_add_backward);
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
        &layer_norm);
  m.def("layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor mean, Tensor rstd) "
        "-> (Tensor, Tensor, Tensor)", &layer_norm_backward);
}
