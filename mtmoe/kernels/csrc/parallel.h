// Tasks of unequal cost over torch's own thread pool, and the small pieces that all kernels here share.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

namespace mtmoe {

// Call task(i) for i in [0, tasks); threads take the next one when they are free. Which thread runs a task changes
// nothing in its result, so results do not depend on the number of threads.
template <typename Task, typename Finish>
void run_tasks(int64_t tasks, const Task& task, const Finish& finish) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), tasks);
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < tasks; i = next++) task(i);
      finish();
    }
  });
}

template <typename Task>
void run_tasks(int64_t tasks, const Task& task) {
  run_tasks(tasks, task, [] {});
}

using Vec = at::vec::Vectorized<float>;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Two vectors of fp32 out of 2 * Vec::size() elements of T, and back.
inline std::tuple<Vec, Vec> load_pair(const float* from) {
  return {Vec::loadu(from), Vec::loadu(from + Vec::size())};
}
inline std::tuple<Vec, Vec> load_pair(const c10::BFloat16* from) {
  return at::vec::convert_bfloat16_float(at::vec::Vectorized<c10::BFloat16>::loadu(from));
}
inline void store_pair(float* to, const Vec& a, const Vec& b) {
  a.store(to);
  b.store(to + Vec::size());
}
inline void store_pair(c10::BFloat16* to, const Vec& a, const Vec& b) {
#ifdef __AVX512BF16__  // one instruction instead of torch's eighteen; it takes subnormal numbers for 0
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
#else
  at::vec::convert_float_bfloat16(a, b).store(to);
#endif
}

constexpr int64_t kPair = 2 * Vec::size();

// Past the caches: for results that are larger than them, so that no line is read before it is overwritten.
// `to` must be aligned to a vector.
inline void stream(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::size()) {
#ifdef __AVX512F__
    _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
#else
    Vec::loadu(from + i).store(to + i);
#endif
  }
}
inline void stream(const float* from, c10::BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kPair) {
#ifdef __AVX512BF16__
    const __m512bh v = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), reinterpret_cast<__m512i>(v));
#else
    store_pair(to + i, Vec::loadu(from + i), Vec::loadu(from + i + Vec::size()));
#endif
  }
}

template <typename From, typename To>
void convert(const From* from, To* to, int64_t n) {
  int64_t i = 0;
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, n * sizeof(To));
    return;
  }
  for (; i + kPair <= n; i += kPair) {
    auto [a, b] = load_pair(from + i);
    store_pair(to + i, a, b);
  }
  for (; i < n; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
}

}  // namespace mtmoe
