// Softmax in fixed point, one number a thread: the arithmetic of csrc/cpu/fixed.h, operation for operation, so that both
// devices have the same bits; what it means is said there.
#pragma once
#include "common.cuh"

namespace fastllm {
namespace {

constexpr float kLargest = 3.402823466e38f, kMagic = 12582912.0f, kUnit = 1048576.0f;
constexpr int32_t kMagicBits = 0x4b400000;

// scale * (x - max) within [-80, 0]; max is finite.
__device__ __forceinline__ float exponent(float x, float max, float scale) {
  return fminf(fmaxf((x - max) * scale, -80.0f), 0.0f);
}

// 2^20 exp(z)
__device__ __forceinline__ float exponential(float z) {
  float n = z * 1.44269504088896341f + (kMagic + 20);
  const uint32_t power = uint32_t(__float_as_int(n)) << 23;
  n -= kMagic + 20;
  float f = fmaf(n, -0.693359375f, z);
  f = fmaf(n, 2.12194440e-4f, f);
  float e = fmaf(1.9875691500e-4f, f, 1.3981999507e-3f);
  e = fmaf(e, f, 8.3334519073e-3f);
  e = fmaf(e, f, 4.1665795894e-2f);
  e = fmaf(e, f, 1.6666665459e-1f);
  e = fmaf(e, f, 5.0000001201e-1f);
  e = fmaf(e, f * f, f) + 1.0f;
  return __int_as_float(int(uint32_t(__float_as_int(e)) + power));
}

// Up to 2^11 weights, as 2^20 high + low.
struct Fixed {
  int32_t high = 0, low = 0;
  __device__ __forceinline__ void add(float e) {
    const float up = e + kMagic;
    high += __float_as_int(up) - kMagicBits;
    low += __float_as_int(fmaf(e - (up - kMagic), kUnit, kMagic)) - kMagicBits;
  }
  __device__ __forceinline__ uint64_t total() const { return uint64_t(int64_t(high) * (1 << 20) + low); }
};
__device__ __forceinline__ uint64_t weight(float e) {
  Fixed one;
  one.add(e);
  return one.total();
}

__device__ __forceinline__ double natural_log(double x) {
  const uint64_t u = uint64_t(__double_as_longlong(x));
  int64_t e = int64_t(u >> 52 & 2047) - 1023;
  double m = __longlong_as_double(int64_t((u & 0xfffffffffffff) | 0x3ff0000000000000));
  if (m > 1.4142135623730951) m *= 0.5, ++e;
  const double s = (m - 1) / (m + 1), z = s * s;
  double p = 1.0 / 23;
#pragma unroll
  for (int k = 21; k > 0; k -= 2) p = p * z + 1.0 / k;
  return double(e) * 0x1.62e42fefap-1 + (2 * s * p + double(e) * 0x1.cf79abc9e3b3ap-40);
}
__device__ __forceinline__ double log_weight(uint64_t sum) { return natural_log(double(sum) * 0x1p-40); }

__device__ __forceinline__ float log_probability(float x, float max, uint64_t sum, double temperature = 1) {
  const double log = log_weight(sum);
  if (max > kLargest) return x < max ? -infinity() : float(-log);
  return float((double(x) - double(max)) / temperature - log);
}
__device__ __forceinline__ float entropy(uint64_t sum, uint64_t moment) {
  return float(log_weight(sum) + double(moment) / double(sum));
}

// A float as an integer of the same order, both zeros 0; and back.
__device__ __forceinline__ int32_t key(float x) {
  const int32_t u = __float_as_int(x);
  return u < 0 ? -(u & 0x7fffffff) : u;
}
__device__ __forceinline__ float value(int32_t key) { return __int_as_float(key < 0 ? int(0x80000000u | uint32_t(-key)) : key); }

// The order "larger logit first, lower index first among equals" as one integer, larger first; indices are below 2^24.
__device__ __forceinline__ int64_t order(float x, int64_t index) { return int64_t(key(x)) * (1 << 24) - index; }
__device__ __forceinline__ int64_t index_of(int64_t order) { return -order & 0xffffff; }
__device__ __forceinline__ float value_of(int64_t order) { return value(int32_t(-(-order >> 24))); }

}  // namespace
}  // namespace fastllm
