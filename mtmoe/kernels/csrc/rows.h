// What the fused kernels share: 16-bit floats as bits, an exponential that vectorises, and random numbers by counter.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MTMOE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define MTMOE_INLINE inline __attribute__((always_inline))
#else
#define MTMOE_CLONES
#define MTMOE_INLINE inline
#endif

namespace mtmoe {

MTMOE_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MTMOE_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MTMOE_INLINE float load(const float* p) { return *p; }
MTMOE_INLINE float load(const c10::BFloat16* p) { return from_bits(static_cast<uint32_t>(p->x) << 16); }

MTMOE_INLINE void store(float* p, float value) { *p = value; }
// Round to nearest even; NaN stays one, since its quiet bit is set in the upper half.
MTMOE_INLINE void store(c10::BFloat16* p, float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->x = static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40u);
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87, NaN for NaN.
MTMOE_INLINE float exp_negative(float x) {
  const float clamped = x > -87.0f ? x : -87.0f;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // the sum's low bits are round(x / ln 2)
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const float scale = from_bits((to_bits(shifted) + 127u) << 23);
  return x > -87.0f ? y * scale : (x == x ? 0.0f : x);
}

// A key for a row of random numbers (the finaliser of SplitMix64).
MTMOE_INLINE uint32_t row_key(uint64_t seed, uint64_t row) {
  uint64_t z = seed + (row + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>(z ^ (z >> 31));
}

// 32 random bits for a column of a row (the mixer "lowbias32"): a mask needs no memory, backward draws it again.
MTMOE_INLINE uint32_t random_bits(uint32_t key, uint32_t column) {
  uint32_t x = (column * 0x9e3779b1u) ^ key;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// Dropout as a comparison: an element is kept where its random bits reach `threshold`, and then times `scale`.
struct Dropout {
  uint32_t threshold = 0;
  float scale = 1.0f;
  uint64_t seed = 0;

  Dropout(double p, int64_t seed) : seed(static_cast<uint64_t>(seed)) {
    const double levels = 4294967296.0 * p + 0.5;
    threshold = levels >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(levels);
    scale = p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f;
  }

  bool active() const { return threshold != 0; }
};

MTMOE_INLINE float keep(uint32_t key, uint32_t column, uint32_t threshold, float scale) {
  return random_bits(key, column) >= threshold ? scale : 0.0f;
}

}  // namespace mtmoe
