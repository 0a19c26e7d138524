// Grouped GEMM over the rows of each expert, forward and backward, on oneDNN's batch-reduce kernels as torch exports
// them (AMX and AVX-512 BF16 where the processor has them).
//
// torch.mm packs its operands and compiles a kernel for each new number of rows, and an expert's number of tokens is
// new at nearly every step. Here only tiles are compiled, of a few shapes, and each operand is packed at most once:
//
//   forward   y^T  = W   x^T    few rows: W as it is, 64 of its rows at a time; x is packed once for all of them
//             y    = x   W^T    many rows: x as it is; 64 rows of W are packed for all rows of the expert
//   backward  dx   = dy  W      dy as it is; 64 columns of W are packed for all rows of the expert
//             dW   = dy^T x     both packed once, in chunks of at most 128 rows; dW is written once
//
// With fp32 weights under bf16 (autocast), a block of W is cast when it is used and its gradient when it is stored.
// Legend: R rows, N d_out, K d_in; in a packed operand V rows stand interleaved: 2 for bf16 (VNNI), 1 for fp32.

#include "parallel.h"

#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <limits>
#include <memory>
#include <vector>

namespace mtmoe {
namespace {


using at::native::cpublas::brgemm;
using c10::BFloat16;

constexpr int64_t kTile = 64;    // rows and columns of an output tile: 16 KiB of fp32 sums
constexpr int64_t kChunk = 128;  // most rows that a product over rows (dW) takes at once
constexpr int64_t kPad = 32;     // rows of a chunk are padded to a multiple: few shapes of kernels, whole AMX tiles

constexpr size_t kLastCache = 32 << 20;

template <typename T>
constexpr int64_t kVnni = sizeof(T) == 2 ? 2 : 1;

template <typename T>
struct Buffer {
  explicit Buffer(int64_t n) : storage(c10::GetCPUAllocator()->allocate(std::max<int64_t>(n, 1) * sizeof(T))) {}
  T* data() const { return static_cast<T*>(storage.get()); }
  at::DataPtr storage;
};

struct Block {
  int64_t expert, start, rows, offset;  // offset: rows that stand before it in a packed buffer
};

// The rows of each expert in blocks of at most `size`, each padded to a multiple of `pad` in the packed buffer.
struct Blocks {
  Blocks(const int64_t* offsets, int64_t experts, int64_t size, int64_t pad) : first(experts + 1) {
    for (int64_t e = 0; e < experts; ++e) {
      first[e] = all.size();
      for (int64_t start = offsets[e]; start < offsets[e + 1]; start += size) {
        const int64_t rows = std::min(size, offsets[e + 1] - start);
        all.push_back({e, start, rows, padded});
        padded += divide_up(rows, pad) * pad;
      }
      if (offsets[e + 1] > offsets[e]) used.push_back(e);
    }
    first[experts] = all.size();
  }
  std::vector<Block> all;
  std::vector<int64_t> first, used;  // first block of each expert; experts that have rows
  int64_t padded = 0;
};

template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, bool add, const T* a, const T* b, float* c) {
  brgemm(m, n, k, lda, ldb, kTile, add, a, b, c, sizeof(T) == 2);
}

void release() { at::native::cpublas::brgemm_release(); }

// (rows, columns) -> (columns, rows), in pieces that the vector registers hold.
template <typename T>
void transpose(const T* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows, int64_t columns) {
  constexpr int64_t piece = sizeof(T) == 2 ? 32 : 16;
  for (int64_t i = 0; i < rows; i += piece) {
    for (int64_t j = 0; j < columns; j += piece) {
      at::vec::transpose_mxn<T>(
          from + i * ld_from + j, ld_from, to + j * ld_to + i, ld_to,
          static_cast<int>(std::min(piece, rows - i)), static_cast<int>(std::min(piece, columns - j)));
    }
  }
}

// x (rows, K) -> B operand (K / V, padded rows, V): the product runs over K, rows are its columns.
template <typename T>
void pack_columns(const T* x, int64_t rows, int64_t padded, int64_t K, T* to) {
  // V neighbours along K make one 32-bit word, so packing is a transpose of words.
  const int64_t words = K / kVnni<T>;
  auto* out = reinterpret_cast<float*>(to);
  transpose(reinterpret_cast<const float*>(x), words, out, padded, rows, words);
  if (rows < padded) {
    for (int64_t w = 0; w < words; ++w) std::fill(out + w * padded + rows, out + (w + 1) * padded, 0.0f);
  }
}

// Rows of `from` (rows, width) -> B operand (padded / V, kTile, V): the product runs over rows.
template <typename From, typename T>
void pack_rows(const From* from, int64_t ld, int64_t rows, int64_t padded, int64_t width, T* to) {
  if constexpr (kVnni<T> == 1) {
    for (int64_t r = 0; r < rows; ++r) convert(from + r * ld, to + r * kTile, width);
    std::fill(to + rows * kTile, to + padded * kTile, T(0));
  } else {
    T first[kTile], second[kTile];
    for (int64_t r = 0; r < padded; r += 2, to += 2 * kTile) {
      const T *a = first, *b = second;
      auto row = [&](int64_t i, T* copy) -> const T* {
        if (i >= rows) {
          std::fill(copy, copy + width, T(0));
          return copy;
        }
        if constexpr (std::is_same_v<From, T>) return from + i * ld;
        else {
          convert(from + i * ld, copy, width);
          return copy;
        }
      };
      a = row(r, first);
      b = row(r + 1, second);
      auto* out = reinterpret_cast<uint16_t*>(to);
      const auto *low = reinterpret_cast<const uint16_t*>(a), *high = reinterpret_cast<const uint16_t*>(b);
      if (width == kTile) {
#pragma GCC ivdep
        for (int64_t j = 0; j < kTile; ++j) {
          reinterpret_cast<uint32_t*>(out)[j] = low[j] | static_cast<uint32_t>(high[j]) << 16;
        }
      } else {
        for (int64_t j = 0; j < width; ++j) {
          reinterpret_cast<uint32_t*>(out)[j] = low[j] | static_cast<uint32_t>(high[j]) << 16;
        }
      }
    }
  }
}

// W rows n0 … n0 + count of an expert in the type of x: a view where it has that type, else a copy in `scratch`.
template <typename W, typename T>
const T* cast_rows(const W* weight, int64_t K, int64_t count, T* scratch) {
  if constexpr (std::is_same_v<W, T>) return weight;
  else {
    convert(weight, scratch, count * K);
    return scratch;
  }
}

// Whether W is packed instead of x: what is turned is then N x K once, else R x K, and R x N as the result comes out.
inline bool packs_weight(int64_t R, int64_t N, int64_t K) { return R * (K + 2 * N) > N * K; }

// sums + shift, maybe through relu, in the type of the output.
template <typename T>
void finish_row(const float* sums, const float* shift, bool relu, int64_t width, T* to) {
  const float least = relu ? 0.0f : -std::numeric_limits<float>::infinity();
  const Vec low(least);
  int64_t j = 0;
  for (; j + kPair <= width; j += kPair) {
    const Vec a = Vec::loadu(sums + j) + Vec::loadu(shift + j);
    const Vec b = Vec::loadu(sums + j + Vec::size()) + Vec::loadu(shift + j + Vec::size());
    store_pair(to + j, at::vec::clamp_min(a, low), at::vec::clamp_min(b, low));
  }
  for (; j < width; ++j) {
    const float v = sums[j] + shift[j];
    to[j] = static_cast<T>(v < least ? least : v);
  }
}

template <typename T, typename W>
void forward(
    const T* x, const int64_t* offsets, const W* weight, const W* bias, bool relu, int64_t experts, int64_t N,
    int64_t K, T* y) {
  const Blocks blocks(offsets, experts, kTile, 16);
  std::vector<bool> turned_weight(experts);
  int64_t turned_rows = 0;  // of x, to the end of the last expert whose rows are packed
  std::vector<int64_t> packing;
  for (int64_t e : blocks.used) {
    turned_weight[e] = packs_weight(offsets[e + 1] - offsets[e], N, K);
    for (int64_t b = blocks.first[e]; !turned_weight[e] && b < blocks.first[e + 1]; ++b) {
      packing.push_back(b);
      turned_rows = blocks.all[b].offset + divide_up(blocks.all[b].rows, 16) * 16;
    }
  }
  const Buffer<T> packed(turned_rows * K);
  run_tasks(packing.size(), [&](int64_t i) {
    const Block& block = blocks.all[packing[i]];
    pack_columns(x + block.start * K, block.rows, divide_up(block.rows, 16) * 16, K, packed.data() + block.offset * K);
  });

  const int64_t tiles = divide_up(N, kTile);
  const bool same = std::is_same_v<W, T>;
  run_tasks(blocks.used.size() * tiles, [&](int64_t task) {
    const int64_t e = blocks.used[task / tiles], n0 = task % tiles * kTile, width = std::min(kTile, N - n0);
    const Buffer<T> scratch(same ? 0 : width * K), packed_weight(turned_weight[e] ? kTile * K : 0);
    const T* matrix = cast_rows(weight + (e * N + n0) * K, K, width, scratch.data());
    if (turned_weight[e]) pack_columns(matrix, width, kTile, K, packed_weight.data());
    alignas(64) float sums[kTile * kTile], turned[kTile * kTile], shift[kTile] = {};
    if (bias) convert(bias + e * N + n0, shift, width);
    for (int64_t b = blocks.first[e]; b < blocks.first[e + 1]; ++b) {
      const Block& block = blocks.all[b];
      const int64_t padded = divide_up(block.rows, 16) * 16;
      const float* result = turned;
      if (turned_weight[e]) {
        // Rows of the next expert are taken along, and their results left out: 4 shapes of kernels instead of 64.
        const int64_t height = std::min(padded, offsets[experts] - block.start);
        multiply(height, kTile, K, K, kTile, false, x + block.start * K, packed_weight.data(), sums);
        result = sums;
      } else {
        multiply(width, padded, K, K, padded, false, matrix, packed.data() + block.offset * K, sums);
        transpose(sums, kTile, turned, kTile, width, padded);
      }
      for (int64_t r = 0; r < block.rows; ++r) {
        finish_row(result + r * kTile, shift, relu, width, y + (block.start + r) * N + n0);
      }
    }
  }, release);
}

// One column tile of a block of dy: the gradient before relu, which passes where the output is above 0.
inline void mask_row(const float* dy, const float* y, int64_t width, float* to) {
  for (int64_t j = 0; j < width; ++j) to[j] = y[j] > 0.0f ? dy[j] : 0.0f;
}
inline void mask_row(const BFloat16* dy, const BFloat16* y, int64_t width, BFloat16* to) {
  // As integers: y is an output of relu, never below 0, so every pattern but that of 0 is a positive number.
  const auto *from = reinterpret_cast<const uint16_t*>(dy), *out = reinterpret_cast<const uint16_t*>(y);
  auto* target = reinterpret_cast<uint16_t*>(to);
  for (int64_t j = 0; j < width; ++j) target[j] = static_cast<int16_t>(out[j]) > 0 ? from[j] : 0;
}

template <typename T>
void add_row(const T* row, int64_t width, float* sums) {
  int64_t j = 0;
  for (; j + kPair <= width; j += kPair) {
    auto [a, b] = load_pair(row + j);
    store_pair(sums + j, Vec::loadu(sums + j) + a, Vec::loadu(sums + j + Vec::size()) + b);
  }
  for (; j < width; ++j) sums[j] += static_cast<float>(row[j]);
}

// One column tile of an expert's dy: the gradient before relu, its transpose for dW, and the sum over rows for db.
template <typename T>
void prepare_gradient(
    const T* dy, const T* y, const Blocks& chunks, int64_t e, int64_t n0, int64_t width, int64_t N, int64_t chunk,
    T* masked, T* turned, float* column_sums) {
  std::fill(column_sums, column_sums + kTile, 0.0f);
  for (int64_t c = chunks.first[e]; c < chunks.first[e + 1]; ++c) {
    const Block& block = chunks.all[c];
    const T* from = dy + block.start * N + n0;
    if (y) {
      T* to = masked + block.start * N + n0;
      for (int64_t r = 0; r < block.rows; ++r) {
        mask_row(from + r * N, y + (block.start + r) * N + n0, width, to + r * N);
      }
      from = to;
    }
    for (int64_t r = 0; r < block.rows; ++r) add_row(from + r * N, width, column_sums);
    if (!turned) continue;
    T* to = turned + c * N * chunk + n0 * chunk;
    const int64_t padded = divide_up(block.rows, kPad) * kPad;
    transpose(from, N, to, chunk, block.rows, width);
    for (int64_t j = 0; j < width && block.rows < padded; ++j) {
      std::fill(to + j * chunk + block.rows, to + j * chunk + padded, T(0));
    }
  }
}

template <typename T, typename W>
void backward(
    const T* dy, const T* x, const T* y, const int64_t* offsets, const W* weight, int64_t experts, int64_t N,
    int64_t K, T* dx, W* dw, W* db) {
  int64_t longest = 0;
  for (int64_t e = 0; e < experts; ++e) longest = std::max(longest, offsets[e + 1] - offsets[e]);
  const int64_t chunk = std::min(kChunk, divide_up(std::max<int64_t>(longest, 1), kPad) * kPad);
  const Blocks chunks(offsets, experts, chunk, kPad), blocks(offsets, experts, kTile, 1);
  const int64_t total = chunks.all.size(), used = chunks.used.size();
  const int64_t n_tiles = divide_up(N, kTile), k_tiles = divide_up(K, kTile);

  // dy is packed where it is needed turned; a masked copy exists only under relu.
  const Buffer<T> masked(y ? offsets[experts] * N : 0), turned(dw ? total * N * chunk : 0);
  const Buffer<T> interleaved(dw ? total * k_tiles * chunk * kTile : 0);
  const T* gradient = y ? masked.data() : dy;
  const int64_t gradient_tasks = y || dw || db ? used * n_tiles : 0, input_tasks = dw ? total * k_tiles : 0;
  run_tasks(gradient_tasks + input_tasks, [&](int64_t task) {
    if (task < gradient_tasks) {
      const int64_t e = chunks.used[task / n_tiles], n0 = task % n_tiles * kTile, width = std::min(kTile, N - n0);
      alignas(64) float sums[kTile];
      prepare_gradient(dy, y, chunks, e, n0, width, N, chunk, masked.data(), dw ? turned.data() : nullptr, sums);
      if (db) convert(sums, db + e * N + n0, width);
      return;
    }
    task -= gradient_tasks;
    const Block& block = chunks.all[task / k_tiles];
    const int64_t k0 = task % k_tiles * kTile, padded = divide_up(block.rows, kPad) * kPad;
    pack_rows(
        x + block.start * K + k0, K, block.rows, padded, std::min(kTile, K - k0),
        interleaved.data() + task * chunk * kTile);
  });

  // A gradient larger than the last cache is gone from it anyway before the optimiser reads it.
  const bool streaming = experts * N * K * sizeof(W) > kLastCache && K % kTile == 0;
  const int64_t dx_tasks = dx ? used * k_tiles : 0, dw_tasks = dw ? used * n_tiles : 0;
  run_tasks(dx_tasks + dw_tasks, [&](int64_t task) {
    alignas(64) float sums[kTile * kTile];
    if (task < dx_tasks) {
      const int64_t e = blocks.used[task / k_tiles], k0 = task % k_tiles * kTile, width = std::min(kTile, K - k0);
      const Buffer<T> matrix(N * kTile);
      pack_rows(weight + e * N * K + k0, K, N, N, width, matrix.data());
      for (int64_t b = blocks.first[e]; b < blocks.first[e + 1]; ++b) {
        const Block& block = blocks.all[b];
        // Rows of the next expert are taken along, and their results left out: 4 shapes of kernels instead of 64.
        const int64_t height = std::min(divide_up(block.rows, 16) * 16, offsets[experts] - block.start);
        multiply(height, width, N, N, kTile, false, gradient + block.start * N, matrix.data(), sums);
        for (int64_t r = 0; r < block.rows; ++r) convert(sums + r * kTile, dx + (block.start + r) * K + k0, width);
      }
      return;
    }
    task -= dx_tasks;
    const int64_t e = chunks.used[task / n_tiles], n0 = task % n_tiles * kTile, height = std::min(kTile, N - n0);
    for (int64_t tile = 0; tile < k_tiles; ++tile) {
      const int64_t k0 = tile * kTile, width = std::min(kTile, K - k0);
      for (int64_t c = chunks.first[e]; c < chunks.first[e + 1]; ++c) {
        const int64_t padded = divide_up(chunks.all[c].rows, kPad) * kPad;
        multiply(
            height, width, padded, chunk, kTile, c > chunks.first[e], turned.data() + c * N * chunk + n0 * chunk,
            interleaved.data() + (c * k_tiles + tile) * chunk * kTile, sums);
      }
      for (int64_t r = 0; r < height; ++r) {
        W* to = dw + (e * N + n0 + r) * K + k0;
        if (streaming && width == kTile) stream(sums + r * kTile, to, kTile);
        else convert(sums + r * kTile, to, width);
      }
    }
  }, [] {
    std::atomic_thread_fence(std::memory_order_seq_cst);  // streamed stores are weakly ordered
    release();
  });
}

void check(const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& weight) {
  TORCH_CHECK(weight.size(1) % 2 == 0 && weight.size(2) % 2 == 0, "d_in and d_out must be even");
  TORCH_CHECK(offsets.scalar_type() == at::kLong && offsets.numel() == weight.size(0) + 1, "offsets: (experts + 1,) int64");
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && offsets.is_contiguous(), "inputs must be contiguous");
}

// Call with the C++ types of x and of the weights: fp32 or bf16 alone, or bf16 with fp32 weights.
template <typename Function>
void with_types(at::ScalarType x, at::ScalarType weight, const Function& function) {
  if (x == at::kFloat && weight == at::kFloat) function(float(), float());
  else if (x == at::kBFloat16 && weight == at::kBFloat16) function(BFloat16(), BFloat16());
  else if (x == at::kBFloat16 && weight == at::kFloat) function(BFloat16(), float());
  else TORCH_CHECK(false, "grouped_linear has no kernel for x of ", x, " and weight of ", weight);
}

at::Tensor grouped_linear_forward(
    const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    bool relu) {
  check(x, offsets, weight);
  const int64_t experts = weight.size(0), N = weight.size(1), K = weight.size(2);
  at::Tensor y = at::empty({x.size(0), N}, x.options());
  with_types(x.scalar_type(), weight.scalar_type(), [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const W* shift = bias ? bias->const_data_ptr<W>() : nullptr;
    forward<T, W>(
        x.const_data_ptr<T>(), offsets.const_data_ptr<int64_t>(), weight.const_data_ptr<W>(), shift, relu, experts, N,
        K, y.mutable_data_ptr<T>());
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(
    const at::Tensor& dy, const at::Tensor& x, const std::optional<at::Tensor>& y, const at::Tensor& offsets,
    const at::Tensor& weight, bool need_x, bool need_weight, bool need_bias) {
  check(x, offsets, weight);
  const int64_t experts = weight.size(0), N = weight.size(1), K = weight.size(2);
  // Experts without tokens keep zeros; where all have some, each gradient is written exactly once.
  const int64_t* bounds = offsets.const_data_ptr<int64_t>();
  bool full = true;
  for (int64_t e = 0; e < experts; ++e) full = full && bounds[e + 1] > bounds[e];
  auto make = [&](at::IntArrayRef shape) {
    return full ? at::empty(shape, weight.options()) : at::zeros(shape, weight.options());
  };
  at::Tensor dx = need_x ? at::empty_like(x) : at::Tensor();
  at::Tensor dw = need_weight ? make({experts, N, K}) : at::Tensor();
  at::Tensor db = need_bias ? make({experts, N}) : at::Tensor();
  with_types(x.scalar_type(), weight.scalar_type(), [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    backward<T, W>(
        dy.const_data_ptr<T>(), x.const_data_ptr<T>(), y ? y->const_data_ptr<T>() : nullptr, bounds,
        weight.const_data_ptr<W>(), experts, N, K, need_x ? dx.mutable_data_ptr<T>() : nullptr,
        need_weight ? dw.mutable_data_ptr<W>() : nullptr, need_bias ? db.mutable_data_ptr<W>() : nullptr);
  });
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mtmoe, m) {
  m.def("grouped_linear_forward(Tensor x, Tensor offsets, Tensor weight, Tensor? bias, bool relu) -> Tensor");
  m.def(
      "grouped_linear_backward(Tensor dy, Tensor x, Tensor? y, Tensor offsets, Tensor weight, bool need_x, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mtmoe, CPU, m) {
  m.impl("grouped_linear_forward", grouped_linear_forward);
  m.impl("grouped_linear_backward", grouped_linear_backward);
}

}  // namespace mtmoe
