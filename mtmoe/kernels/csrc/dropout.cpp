// Dropout whose mask is never stored: random numbers follow from a seed and an element's place, and backward draws them
// again. mtmoe/kernels/dropout.py holds the contract.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "rows.h"

namespace {

using namespace mtmoe;
using c10::BFloat16;

constexpr int64_t kBlock = 1024;  // elements that share a key
constexpr int64_t kGrain = 8;     // blocks that are worth a thread

template <typename T>
MTMOE_INLINE void block_body(const T* x, T* y, int64_t size, uint32_t key, uint32_t threshold, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i)
    store(y + i, load(x + i) * keep(key, static_cast<uint32_t>(i), threshold, scale));
}

MTMOE_CLONES void block(const float* x, float* y, int64_t size, uint32_t key, uint32_t threshold, float scale) {
  block_body(x, y, size, key, threshold, scale);
}
MTMOE_CLONES void block(const BFloat16* x, BFloat16* y, int64_t size, uint32_t key, uint32_t threshold, float scale) {
  block_body(x, y, size, key, threshold, scale);
}

template <typename T>
void blocks(const at::Tensor& x, at::Tensor& y, const Dropout& dropout) {
  const int64_t elements = x.numel();
  const T* from = x.const_data_ptr<T>();
  T* to = y.mutable_data_ptr<T>();
  at::parallel_for(0, (elements + kBlock - 1) / kBlock, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      block(from + i * kBlock, to + i * kBlock, std::min(kBlock, elements - i * kBlock), row_key(dropout.seed, i),
            dropout.threshold, dropout.scale);
  });
}

at::Tensor dropout(const at::Tensor& x, double p, int64_t seed) {
  TORCH_CHECK(x.is_contiguous(), "dropout needs a contiguous tensor");
  at::Tensor y = at::empty_like(x);
  if (x.scalar_type() == at::kBFloat16) {
    blocks<BFloat16>(x, y, Dropout(p, seed));
  } else {
    TORCH_CHECK(x.scalar_type() == at::kFloat, "dropout takes float32 and bfloat16, not ", x.scalar_type());
    blocks<float>(x, y, Dropout(p, seed));
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mtmoe, m) { m.def("dropout(Tensor x, float p, int seed) -> Tensor", &dropout); }
