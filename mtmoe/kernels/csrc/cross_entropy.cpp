// Softmax, loss and gradient of rows of logits in one visit; mtmoe/training/cross_entropy.py holds the contract and the
// same in plain torch.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "rows.h"

namespace {

using namespace mtmoe;
using c10::BFloat16;

struct RowLoss {
  float nll, smooth;
};

// `scratch` holds a row of fp32; `grad` may be the logits themselves, or null.
template <typename T>
MTMOE_INLINE RowLoss row_body(const T* logits, T* grad, float* scratch, int64_t size, int64_t target, float on_target,
                              float eps) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < size; ++i) {
    const float value = load(logits + i);
    top = value > top ? value : top;
  }
  float total = 0.0f, linear = 0.0f;
#pragma omp simd reduction(+ : total, linear)
  for (int64_t i = 0; i < size; ++i) {
    const float value = load(logits + i) - top;
    const float e = exp_negative(value);
    scratch[i] = e;
    total += e;
    linear += value;
  }
  const float log_total = std::log(total);
  const RowLoss loss{log_total - (load(logits + target) - top), static_cast<float>(size) * log_total - linear};
  if (grad != nullptr) {
    const float inverse = 1.0f / total;
    const float at_target = scratch[target] * inverse - eps - on_target;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) store(grad + i, scratch[i] * inverse - eps);
    store(grad + target, at_target);
  }
  return loss;
}

MTMOE_CLONES RowLoss row_float(const float* logits, float* grad, float* scratch, int64_t size, int64_t target,
                               float on_target, float eps) {
  return row_body(logits, grad, scratch, size, target, on_target, eps);
}

MTMOE_CLONES RowLoss row_bfloat16(const BFloat16* logits, BFloat16* grad, float* scratch, int64_t size, int64_t target,
                                  float on_target, float eps) {
  return row_body(logits, grad, scratch, size, target, on_target, eps);
}

RowLoss row(const float* l, float* g, float* s, int64_t n, int64_t t, float o, float e) {
  return row_float(l, g, s, n, t, o, e);
}
RowLoss row(const BFloat16* l, BFloat16* g, float* s, int64_t n, int64_t t, float o, float e) {
  return row_bfloat16(l, g, s, n, t, o, e);
}

template <typename T>
void rows(const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index, float on_target, float eps,
          const std::optional<at::Tensor>& grad, float* nll, float* smooth) {
  const int64_t tokens = logits.size(0), size = logits.size(1);
  const T* from = logits.const_data_ptr<T>();
  T* to = grad.has_value() ? grad->mutable_data_ptr<T>() : nullptr;
  const int64_t* wanted = target.const_data_ptr<int64_t>();
  at::parallel_for(0, tokens, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(size);
    for (int64_t i = begin; i < end; ++i) {
      T* g = to == nullptr ? nullptr : to + i * size;
      if (wanted[i] == ignore_index) {
        nll[i] = smooth[i] = 0.0f;
        if (g != nullptr) std::memset(static_cast<void*>(g), 0, size * sizeof(T));
        continue;
      }
      TORCH_CHECK_INDEX(0 <= wanted[i] && wanted[i] < size, "target ", wanted[i], " is outside of ", size, " words");
      const RowLoss loss = row(from + i * size, g, scratch.data(), size, wanted[i], on_target, eps);
      nll[i] = loss.nll;
      smooth[i] = loss.smooth;
    }
  });
}

// (nll, smooth) of each row; the gradient goes into `grad`.
std::tuple<at::Tensor, at::Tensor> cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                                                 int64_t ignore_index, double on_target, double eps,
                                                 const std::optional<at::Tensor>& grad) {
  TORCH_CHECK(logits.is_contiguous() && target.is_contiguous(), "cross_entropy needs contiguous tensors");
  TORCH_CHECK(!grad.has_value() || (grad->is_contiguous() && grad->scalar_type() == logits.scalar_type()),
              "the gradient must be contiguous and of the logits' type");
  const at::Tensor nll = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat)), smooth = at::empty_like(nll);
  const auto o = static_cast<float>(on_target), e = static_cast<float>(eps);
  float *n = nll.mutable_data_ptr<float>(), *s = smooth.mutable_data_ptr<float>();
  if (logits.scalar_type() == at::kBFloat16) {
    rows<BFloat16>(logits, target, ignore_index, o, e, grad, n, s);
  } else {
    TORCH_CHECK(logits.scalar_type() == at::kFloat, "cross_entropy takes float32 and bfloat16");
    rows<float>(logits, target, ignore_index, o, e, grad, n, s);
  }
  return {nll, smooth};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mtmoe, m) {
  m.def("cross_entropy(Tensor logits, Tensor target, int ignore_index, float on_target, float eps, Tensor(a!)? grad) "
        "-> (Tensor, Tensor)", &cross_entropy);
}
