// AdamW for stacked experts: passes over those experts alone that an update concerns. mtmoe/kernels/adamw.py holds the
// contracts and the same in plain torch.
//
// An expert's slice is cut into blocks, which threads share. Lines of kLine elements run through one set of instructions,
// and the rest at an expert's end is padded to a line: the bits of a result depend on no number of threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

// Needs -fno-math-errno (setup.py), or square roots are not vectorised: 8 times the time.

namespace {

constexpr int64_t kBlock = 16384;
constexpr int64_t kLine = 64;

struct Update {
  float factor, decay1, decay2, weight1, weight2, weight_decay, step_size, root_correction, eps;
};

// One AdamW update of `size` elements, whole lines.
void update_lines(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
                  int64_t size, const Update& c) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float gradient = g[i] * c.factor;
    m[i] = m[i] * c.decay1 + gradient * c.weight1;
    v[i] = v[i] * c.decay2 + gradient * gradient * c.weight2;
    p[i] = p[i] * c.weight_decay - c.step_size * (m[i] / (std::sqrt(v[i]) * c.root_correction + c.eps));
  }
}

void update(float* p, const float* g, float* m, float* v, int64_t size, const Update& c) {
  const int64_t whole = size / kLine * kLine, rest = size - whole;
  update_lines(p, g, m, v, whole, c);
  if (rest == 0) return;
  float P[kLine] = {}, G[kLine] = {}, M[kLine] = {}, V[kLine] = {};
  std::copy_n(p + whole, rest, P);
  std::copy_n(g + whole, rest, G);
  std::copy_n(m + whole, rest, M);
  std::copy_n(v + whole, rest, V);
  update_lines(P, G, M, V, kLine, c);
  std::copy_n(P, rest, p + whole);
  std::copy_n(M, rest, m + whole);
  std::copy_n(V, rest, v + whole);
}

// The updates without gradient that `rows` of (weight decay, step size, eps) describe, on one block.
void replay(float* p, const float* m, const float* v, int64_t size, const float* row, int64_t rows) {
  for (int64_t start = 0; start < size; start += kLine) {
    const int64_t count = std::min(kLine, size - start);
    float P[kLine] = {}, M[kLine] = {}, S[kLine] = {};
    std::copy_n(p + start, count, P);
    std::copy_n(m + start, count, M);
    std::copy_n(v + start, count, S);
#pragma omp simd
    for (int64_t i = 0; i < kLine; ++i) S[i] = std::sqrt(S[i]);
    for (int64_t k = 0; k < rows; ++k) {
      const float decay = row[3 * k], step = row[3 * k + 1], eps = row[3 * k + 2];
#pragma omp simd
      for (int64_t i = 0; i < kLine; ++i) P[i] = P[i] * decay - step * (M[i] / (S[i] + eps));
    }
    std::copy_n(P, count, p + start);
  }
}

float squares(const float* x, int64_t size) {
  float sums[kLine] = {};
  int64_t start = 0;
  for (; start + kLine <= size; start += kLine)
#pragma omp simd
    for (int64_t i = 0; i < kLine; ++i) sums[i] += x[start + i] * x[start + i];
  for (; start < size; ++start) sums[start % kLine] += x[start] * x[start];
  float total = 0;
  for (float sum : sums) total += sum;
  return total;
}

// Calls function(expert's number in the list, first element, size) for each block of each listed expert.
template <typename Function>
void for_blocks(int64_t experts, int64_t elements, const Function& function) {
  const int64_t blocks = (elements + kBlock - 1) / kBlock;
  at::parallel_for(0, experts * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % blocks * kBlock;
      function(i / blocks, start, std::min(kBlock, elements - start));
    }
  });
}

void adamw_step(at::Tensor& param, const at::Tensor& grad, at::Tensor& exp_avg, at::Tensor& exp_avg_sq,
                at::IntArrayRef experts, at::ArrayRef<double> decay1, at::ArrayRef<double> decay2, double factor,
                double beta1, double beta2, double weight_decay, double step_size, double root_correction, double eps) {
  const int64_t elements = param.numel() / param.size(0);
  float *p = param.data_ptr<float>(), *m = exp_avg.data_ptr<float>(), *v = exp_avg_sq.data_ptr<float>();
  const float* g = grad.const_data_ptr<float>();
  for_blocks(experts.size(), elements, [&](int64_t i, int64_t start, int64_t size) {
    const int64_t at = experts[i] * elements + start;
    const Update c{float(factor),       float(decay1[i]),    float(decay2[i]),       float(1 - beta1), float(1 - beta2),
                   float(weight_decay), float(step_size), float(root_correction), float(eps)};
    update(p + at, g + at, m + at, v + at, size, c);
  });
}

void adamw_replay(at::Tensor& param, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, at::IntArrayRef experts,
                  at::IntArrayRef ends, const at::Tensor& rows) {
  const int64_t elements = param.numel() / param.size(0);
  float* p = param.data_ptr<float>();
  const float *m = exp_avg.const_data_ptr<float>(), *v = exp_avg_sq.const_data_ptr<float>();
  const float* row = rows.const_data_ptr<float>();
  for_blocks(experts.size(), elements, [&](int64_t i, int64_t start, int64_t size) {
    const int64_t at = experts[i] * elements + start, first = i ? ends[i - 1] : 0;
    replay(p + at, m + at, v + at, size, row + 3 * first, ends[i] - first);
  });
}

// Experts `ends[i - 1]` to `ends[i]` of the list are those of `grads[i]`.
double sum_of_squares(at::TensorList grads, at::IntArrayRef experts, at::IntArrayRef ends) {
  std::vector<std::pair<const float*, int64_t>> blocks;
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t elements = grads[i].numel() / std::max<int64_t>(grads[i].size(0), 1);
    for (int64_t j = i ? ends[i - 1] : 0; j < ends[i]; ++j) {
      const float* expert = grads[i].const_data_ptr<float>() + experts[j] * elements;
      for (int64_t at = 0; at < elements; at += kBlock) blocks.emplace_back(expert + at, std::min(kBlock, elements - at));
    }
  }
  std::vector<float> sums(blocks.size());  // each block has its own place: the sum has one order
  at::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = squares(blocks[i].first, blocks[i].second);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mtmoe, m) {
  m.def(
      "adamw_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, int[] experts, "
      "float[] decay1, float[] decay2, float factor, float beta1, float beta2, float weight_decay, float step_size, "
      "float root_correction, float eps) -> ()");
  m.def(
      "adamw_replay(Tensor(a!) param, Tensor exp_avg, Tensor exp_avg_sq, int[] experts, int[] ends, Tensor rows) -> ()");
  m.def("sum_of_squares(Tensor[] grads, int[] experts, int[] ends) -> float");
}

TORCH_LIBRARY_IMPL(mtmoe, CPU, m) {
  m.impl("adamw_step", &adamw_step);
  m.impl("adamw_replay", &adamw_replay);
  m.impl("sum_of_squares", &sum_of_squares);
}
