// Attention of short sentences: a head of a sentence stays in the cache from its scores to its output, and backward
// computes the weights again. mtmoe/kernels/attention.py holds the contract and the same in plain torch.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"

namespace {

using namespace mtmoe;
using c10::BFloat16;

constexpr int64_t kLanes = 16;
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

MTMOE_INLINE int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// R rows and V * kLanes columns of c = a b. Element (i, k) of a lies at a[i * a_row + k * a_column].
template <int R, int V>
MTMOE_INLINE void tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                       int64_t c_row, int64_t depth) {
  Lanes sums[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Lanes right[V];
    for (int v = 0; v < V; ++v) right[v] = *reinterpret_cast<const Lanes*>(b + k * b_row + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const float left = a[r * a_row + k * a_column];
      for (int v = 0; v < V; ++v) sums[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) *reinterpret_cast<Lanes*>(c + r * c_row + v * kLanes) = sums[r][v];
}

template <int V>
MTMOE_INLINE void tiles(int64_t rows, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                        float* c, int64_t c_row, int64_t depth) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) tile<4, V>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, depth);
  for (; i < rows; ++i) tile<1, V>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, depth);
}

// c = a b for b and c whose rows are filled up with columns to a multiple of kLanes.
MTMOE_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                           int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    tiles<2>(rows, a, a_row, a_column, b + j, b_row, c + j, c_row, depth);
  for (; j < columns; j += kLanes) tiles<1>(rows, a, a_row, a_column, b + j, b_row, c + j, c_row, depth);
}

// A (time, width) slice in memory, as fp32: rows of `stride`, filled up with zeros to a multiple of kLanes.
template <typename T>
MTMOE_INLINE void read(const T* from, int64_t step, int64_t length, int64_t width, float* to, float scale) {
  const int64_t stride = padded(width);
  for (int64_t t = 0; t < length; ++t) {
#pragma omp simd
    for (int64_t w = 0; w < width; ++w) to[t * stride + w] = load(from + t * step + w) * scale;
    for (int64_t w = width; w < stride; ++w) to[t * stride + w] = 0.0f;
  }
}

template <typename T>
MTMOE_INLINE void write(const float* from, int64_t length, int64_t width, T* to, int64_t step, float scale) {
  const int64_t stride = padded(width);
  for (int64_t t = 0; t < length; ++t) {
#pragma omp simd
    for (int64_t w = 0; w < width; ++w) store(to + t * step + w, from[t * stride + w] * scale);
  }
}

using Places = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

// Swaps the blocks beside the diagonal of a 16 x 16 matrix cut into blocks of `kStep`.
template <int kStep>
MTMOE_INLINE void swap_blocks(Lanes* rows) {
  Places upper, lower;
  for (int i = 0; i < kLanes; ++i) {
    upper[i] = (i & kStep) ? kLanes + i - kStep : i;
    lower[i] = (i & kStep) ? kLanes + i : i + kStep;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Lanes a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kStep] = __builtin_shuffle(a, b, lower);
  }
}

// (length, width) -> (width, padded length), zeros behind
MTMOE_INLINE void transpose(const float* from, int64_t length, int64_t width, float* to) {
  const int64_t stride = padded(width), out = padded(length);
  for (int64_t t = 0; t < length; t += kLanes) {
    for (int64_t w = 0; w < stride; w += kLanes) {
      Lanes rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        rows[i] = t + i < length ? *reinterpret_cast<const Lanes*>(from + (t + i) * stride + w) : Lanes{};
      swap_blocks<1>(rows);
      swap_blocks<2>(rows);
      swap_blocks<4>(rows);
      swap_blocks<8>(rows);
      for (int64_t i = 0; i < kLanes; ++i) *reinterpret_cast<Lanes*>(to + (w + i) * out + t) = rows[i];
    }
  }
}

// One head of one sentence.
struct Head {
  int64_t length, keys, width;
  int64_t q_step, k_step, v_step, out_step;  // elements from a time step to the next
  const float* mask;                         // (length, keys) added to the scores, or null
  const bool* padding;                       // (keys,), or null
  uint64_t row;                              // number of the head's first row among all
  float scale;
  Dropout dropout;
};

// Adds the masks to a row of scores, and -inf behind its end, so that whole vectors can be worked on.
MTMOE_INLINE void add_masks(const Head& head, int64_t t, float* scores) {
  constexpr float kLowest = -1e30f;  // not -inf: a row that is masked whole would become NaN
  for (int64_t s = head.keys; s < padded(head.keys); ++s) scores[s] = -INFINITY;
  if (head.mask != nullptr) {
    const float* mask = head.mask + t * head.keys;
#pragma omp simd
    for (int64_t s = 0; s < head.keys; ++s) scores[s] += mask[s] > kLowest ? mask[s] : kLowest;
  }
  if (head.padding != nullptr) {
    for (int64_t s = 0; s < head.keys; ++s) scores[s] = head.padding[s] ? kLowest : scores[s];
  }
}

// Floats of working memory: for q, k, v, a transposed matrix, the output, and up to three matrices of scores.
int64_t forward_memory(int64_t length, int64_t keys, int64_t width) {
  const int64_t w = padded(width);
  return 2 * length * w + 2 * keys * w + w * padded(keys) + length * padded(keys) + 8 * kLanes;
}
int64_t backward_memory(int64_t length, int64_t keys, int64_t width) {
  const int64_t w = padded(width);
  return 3 * length * w + 4 * keys * w + w * padded(keys) + 2 * length * padded(keys) + 12 * kLanes;
}

MTMOE_INLINE float* take(float*& memory, int64_t size) {
  float* taken = memory;
  memory += padded(size);
  return taken;
}

template <typename T>
MTMOE_INLINE void forward_body(const Head& head, const T* q, const T* k, const T* v, T* out, float* lse,
                               float* memory) {
  const int64_t length = head.length, keys = head.keys, width = head.width;
  const int64_t w = padded(width), across = padded(keys);
  float *Q = take(memory, length * w), *K = take(memory, keys * w), *V = take(memory, keys * w),
        *Kt = take(memory, w * across), *P = take(memory, length * across), *O = take(memory, length * w);
  read(q, head.q_step, length, width, Q, head.scale);
  read(k, head.k_step, keys, width, K, 1.0f);
  read(v, head.v_step, keys, width, V, 1.0f);
  transpose(K, keys, width, Kt);
  multiply(length, across, width, Q, w, 1, Kt, across, P, across);
  for (int64_t t = 0; t < length; ++t) {
    float* p = P + t * across;
    add_masks(head, t, p);
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t s = 0; s < across; ++s) top = p[s] > top ? p[s] : top;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t s = 0; s < across; ++s) {
      p[s] = exp_negative(p[s] - top);
      total += p[s];
    }
    const float inverse = 1.0f / total;
    lse[t] = top + std::log(total);
    if (head.dropout.threshold != 0) {
      const uint32_t key = row_key(head.dropout.seed, head.row + t);
#pragma omp simd
      for (int64_t s = 0; s < across; ++s)
        p[s] *= inverse * keep(key, static_cast<uint32_t>(s), head.dropout.threshold, head.dropout.scale);
    } else {
#pragma omp simd
      for (int64_t s = 0; s < across; ++s) p[s] *= inverse;
    }
  }
  multiply(length, w, keys, P, across, 1, V, w, O, w);
  write(O, length, width, out, head.out_step, 1.0f);
}

template <typename T>
MTMOE_INLINE void backward_body(const Head& head, const T* grad, const T* q, const T* k, const T* v, const float* lse,
                                T* grad_q, T* grad_k, T* grad_v, float* memory) {
  const int64_t length = head.length, keys = head.keys, width = head.width;
  const int64_t w = padded(width), across = padded(keys);
  float *Q = take(memory, length * w), *G = take(memory, length * w), *K = take(memory, keys * w),
        *V = take(memory, keys * w), *Kt = take(memory, w * across), *P = take(memory, length * across),
        *D = take(memory, length * across), *dQ = take(memory, length * w), *dK = take(memory, keys * w),
        *dV = take(memory, keys * w);
  read(q, head.q_step, length, width, Q, head.scale);
  read(grad, head.out_step, length, width, G, 1.0f);
  read(k, head.k_step, keys, width, K, 1.0f);
  read(v, head.v_step, keys, width, V, 1.0f);
  transpose(K, keys, width, Kt);
  multiply(length, across, width, Q, w, 1, Kt, across, P, across);
  transpose(V, keys, width, Kt);
  multiply(length, across, width, G, w, 1, Kt, across, D, across);
  for (int64_t t = 0; t < length; ++t) {
    float *p = P + t * across, *d = D + t * across;
    add_masks(head, t, p);
    const float shift = lse[t];
    float sum = 0.0f;
    if (head.dropout.threshold != 0) {
      const uint32_t key = row_key(head.dropout.seed, head.row + t);
#pragma omp simd reduction(+ : sum)
      for (int64_t s = 0; s < across; ++s) {
        const float weight = exp_negative(p[s] - shift);
        const float kept = keep(key, static_cast<uint32_t>(s), head.dropout.threshold, head.dropout.scale);
        sum += weight * kept * d[s];
        d[s] = kept * d[s];
        p[s] = weight;
      }
      // d becomes the gradient of the scores, p the weights as they were used.
#pragma omp simd
      for (int64_t s = 0; s < across; ++s) {
        d[s] = p[s] * (d[s] - sum);
        p[s] *= keep(key, static_cast<uint32_t>(s), head.dropout.threshold, head.dropout.scale);
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t s = 0; s < across; ++s) {
        p[s] = exp_negative(p[s] - shift);
        sum += p[s] * d[s];
      }
#pragma omp simd
      for (int64_t s = 0; s < across; ++s) d[s] = p[s] * (d[s] - sum);
    }
  }
  multiply(keys, w, length, P, 1, across, G, w, dV, w);
  multiply(length, w, keys, D, across, 1, K, w, dQ, w);
  multiply(keys, w, length, D, 1, across, Q, w, dK, w);
  write(dQ, length, width, grad_q, head.q_step, head.scale);
  write(dK, keys, width, grad_k, head.k_step, 1.0f);
  write(dV, keys, width, grad_v, head.v_step, 1.0f);
}

// Compiled for several sets of instructions; a function template cannot be, so each type has its own.
#define MTMOE_HEADS(T, name)                                                                                           \
  MTMOE_CLONES void forward_##name(const Head& h, const T* q, const T* k, const T* v, T* out, float* lse,              \
                                   float* memory) {                                                                    \
    forward_body(h, q, k, v, out, lse, memory);                                                                        \
  }                                                                                                                    \
  MTMOE_CLONES void backward_##name(const Head& h, const T* grad, const T* q, const T* k, const T* v,                  \
                                    const float* lse, T* gq, T* gk, T* gv, float* memory) {                            \
    backward_body(h, grad, q, k, v, lse, gq, gk, gv, memory);                                                          \
  }                                                                                                                    \
  void forward_head(const Head& h, const T* q, const T* k, const T* v, T* out, float* lse, float* memory) {            \
    forward_##name(h, q, k, v, out, lse, memory);                                                                      \
  }                                                                                                                    \
  void backward_head(const Head& h, const T* grad, const T* q, const T* k, const T* v, const float* lse, T* gq,        \
                     T* gk, T* gv, float* memory) {                                                                    \
    backward_##name(h, grad, q, k, v, lse, gq, gk, gv, memory);                                                        \
  }

MTMOE_HEADS(float, float)
MTMOE_HEADS(BFloat16, bfloat16)
#undef MTMOE_HEADS

void check(const at::Tensor& x, const at::Tensor& like) {
  TORCH_CHECK(x.dim() == 4 && x.stride(3) == 1 && x.stride(2) == x.size(3), "need (time, batch, heads, width)");
  TORCH_CHECK(x.scalar_type() == like.scalar_type(), "queries, keys and values must be of one type");
}

// Calls function(head, offsets of q, k, v, out, row of lse, thread's memory) for each head of each sentence.
template <typename Function>
void for_each_head(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                   const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& padding, double p,
                   int64_t seed, int64_t memory, const Function& function) {
  check(q, q), check(k, q), check(v, q), check(out, q);
  const int64_t length = q.size(0), batch = q.size(1), heads = q.size(2), width = q.size(3), keys = k.size(0);
  TORCH_CHECK(!mask.has_value() || (mask->is_contiguous() && mask->scalar_type() == at::kFloat &&
                                    mask->numel() == length * keys), "mask must be (length, keys) of float32");
  TORCH_CHECK(!padding.has_value() || (padding->is_contiguous() && padding->scalar_type() == at::kBool &&
                                       padding->numel() == batch * keys), "padding must be (batch, keys) of bool");
  const float* m = mask.has_value() ? mask->const_data_ptr<float>() : nullptr;
  const bool* pad = padding.has_value() ? padding->const_data_ptr<bool>() : nullptr;
  const Dropout dropout(p, seed);
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(width)));
  at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(memory);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = i % heads;
      const Head head{length, keys, width, q.stride(0), k.stride(0), v.stride(0), out.stride(0), m,
                      pad == nullptr ? nullptr : pad + b * keys, static_cast<uint64_t>(i * length), scale, dropout};
      function(head, b * q.stride(1) + h * width, b * k.stride(1) + h * width, b * v.stride(1) + h * width,
               b * out.stride(1) + h * width, i * length, scratch.data());
    }
  });
}

template <typename Function>
void by_type(at::ScalarType type, const Function& function) {
  if (type == at::kBFloat16) {
    function(BFloat16{});
  } else {
    TORCH_CHECK(type == at::kFloat, "attention takes float32 and bfloat16, not ", type);
    function(float{});
  }
}

// ((length, batch, heads, width) output, (batch, heads, length) log of the sums of exponentials)
std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const std::optional<at::Tensor>& mask,
                                             const std::optional<at::Tensor>& padding, double p, int64_t seed) {
  const int64_t memory = forward_memory(q.size(0), k.size(0), q.size(3));
  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({q.size(1), q.size(2), q.size(0)}, q.options().dtype(at::kFloat));
  by_type(q.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T *Q = q.const_data_ptr<T>(), *K = k.const_data_ptr<T>(), *V = v.const_data_ptr<T>();
    T* O = out.mutable_data_ptr<T>();
    float* L = lse.mutable_data_ptr<float>();
    for_each_head(q, k, v, out, mask, padding, p, seed, memory,
                  [&](const Head& head, int64_t qo, int64_t ko, int64_t vo, int64_t oo, int64_t row, float* scratch) {
                    forward_head(head, Q + qo, K + ko, V + vo, O + oo, L + row, scratch);
                  });
  });
  return {out, lse};
}

// Writes the gradients, which lie in memory as their tensors do.
void attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& lse, const std::optional<at::Tensor>& mask,
                        const std::optional<at::Tensor>& padding, double p, int64_t seed, const at::Tensor& grad_q,
                        const at::Tensor& grad_k, const at::Tensor& grad_v) {
  TORCH_CHECK(grad_q.strides() == q.strides() && grad_k.strides() == k.strides() && grad_v.strides() == v.strides(),
              "gradients must lie in memory as their tensors do");
  const int64_t memory = backward_memory(q.size(0), k.size(0), q.size(3));
  by_type(q.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T *G = grad.const_data_ptr<T>(), *Q = q.const_data_ptr<T>(), *K = k.const_data_ptr<T>(),
            *V = v.const_data_ptr<T>();
    T *gQ = grad_q.mutable_data_ptr<T>(), *gK = grad_k.mutable_data_ptr<T>(), *gV = grad_v.mutable_data_ptr<T>();
    const float* L = lse.const_data_ptr<float>();
    for_each_head(q, k, v, grad, mask, padding, p, seed, memory,
                  [&](const Head& head, int64_t qo, int64_t ko, int64_t vo, int64_t oo, int64_t row, float* scratch) {
                    backward_head(head, G + oo, Q + qo, K + ko, V + vo, L + row, gQ + qo, gK + ko, gV + vo, scratch);
                  });
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mtmoe, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? padding, float p, int seed) "
        "-> (Tensor, Tensor)", &attention);
  m.def("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor? mask, Tensor? padding, "
        "float p, int seed, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()", &attention_backward);
}
