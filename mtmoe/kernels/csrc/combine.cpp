// A token's rows among those grouped by expert: their weighted sum, and its gradients. One pass, sums in fp32.

#include "parallel.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace mtmoe {
namespace {

using c10::BFloat16;

constexpr int64_t kStrip = 256;  // columns that are summed at once: 1 KiB of fp32

// sums += scale * row
template <typename T>
void add_scaled(const T* row, float scale, int64_t n, float* sums) {
  const Vec factor(scale);
  int64_t j = 0;
  for (; j + kPair <= n; j += kPair) {
    auto [a, b] = load_pair(row + j);
    store_pair(
        sums + j, at::vec::fmadd(a, factor, Vec::loadu(sums + j)),
        at::vec::fmadd(b, factor, Vec::loadu(sums + j + Vec::size())));
  }
  for (; j < n; ++j) sums[j] += scale * static_cast<float>(row[j]);
}

template <typename T>
void sum_rows(const T* y, const int64_t* slot, const float* weight, int64_t tokens, int64_t top_k, int64_t d, T* out) {
  at::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kStrip];
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t j = 0; j < d; j += kStrip) {
        const int64_t n = std::min(kStrip, d - j);
        std::fill(sums, sums + n, 0.0f);
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t row = slot[t * top_k + k];
          if (row >= 0) add_scaled(y + row * d + j, weight ? weight[t * top_k + k] : 1.0f, n, sums);
        }
        convert(sums, out + t * d + j, n);
      }
    }
  });
}

// grad_y = weight * grad[token] and grad_weight = <grad[token], y> of each grouped row.
template <typename T>
void row_gradients(
    const T* grad, const T* y, const float* weight, const int64_t* assignment, int64_t rows, int64_t top_k, int64_t d,
    T* grad_y, float* grad_weight) {
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t choice = assignment[r];
      const T *from = grad + choice / top_k * d, *output = y + r * d;
      T* to = grad_y + r * d;
      const float scale = weight[choice];
      const Vec factor(scale);
      Vec first(0.0f), second(0.0f);
      int64_t j = 0;
      for (; j + kPair <= d; j += kPair) {
        auto [a, b] = load_pair(from + j);
        auto [c, e] = load_pair(output + j);
        first = at::vec::fmadd(a, c, first);
        second = at::vec::fmadd(b, e, second);
        store_pair(to + j, a * factor, b * factor);
      }
      float sum = (first + second).reduce_add();
      for (; j < d; ++j) {
        sum += static_cast<float>(from[j]) * static_cast<float>(output[j]);
        to[j] = static_cast<T>(static_cast<float>(from[j]) * scale);
      }
      grad_weight[choice] = sum;
    }
  });
}

template <typename Function>
void with_type(at::ScalarType type, const Function& function) {
  if (type == at::kFloat) function(float());
  else if (type == at::kBFloat16) function(BFloat16());
  else TORCH_CHECK(false, "combine has no kernel for ", type);
}

at::Tensor sum_choices(const at::Tensor& y, const at::Tensor& slot, const std::optional<at::Tensor>& weight) {
  TORCH_CHECK(y.is_contiguous() && slot.is_contiguous(), "inputs must be contiguous");
  TORCH_CHECK(!weight || (weight->is_contiguous() && weight->scalar_type() == at::kFloat), "weight must be fp32");
  at::Tensor out = at::empty({slot.size(0), y.size(1)}, y.options());
  with_type(y.scalar_type(), [&](auto t) {
    using T = decltype(t);
    sum_rows<T>(
        y.const_data_ptr<T>(), slot.const_data_ptr<int64_t>(), weight ? weight->const_data_ptr<float>() : nullptr,
        slot.size(0), slot.size(1), y.size(1), out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> combine_backward(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& weight, const at::Tensor& assignment) {
  TORCH_CHECK(grad.is_contiguous() && y.is_contiguous() && assignment.is_contiguous(), "inputs must be contiguous");
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == at::kFloat, "weight must be fp32");
  at::Tensor grad_y = at::empty_like(y), grad_weight = at::zeros_like(weight);
  with_type(y.scalar_type(), [&](auto t) {
    using T = decltype(t);
    row_gradients<T>(
        grad.const_data_ptr<T>(), y.const_data_ptr<T>(), weight.const_data_ptr<float>(),
        assignment.const_data_ptr<int64_t>(), y.size(0), weight.size(1), y.size(1), grad_y.mutable_data_ptr<T>(),
        grad_weight.mutable_data_ptr<float>());
  });
  return {grad_y, grad_weight};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mtmoe, m) {
  m.def("sum_choices(Tensor y, Tensor slot, Tensor? weight) -> Tensor");
  m.def("combine_backward(Tensor grad, Tensor y, Tensor weight, Tensor assignment) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mtmoe, CPU, m) {
  m.impl("sum_choices", sum_choices);
  m.impl("combine_backward", combine_backward);
}

}  // namespace mtmoe
