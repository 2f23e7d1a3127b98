// Softmax in fixed point: the weight of a logit is exp(x - max) as a multiple of 2^-40 in 64 bits, rounded to nearest even.
// Integer sums are associative: the same for any cut of the vocabulary, any thread count, any batch. What every reader of
// these sums needs (sampler, log-probabilities, entropy) is here, so that all of them get the same bits.
//
// The sum of a row stays below 2^63 for up to 2^23 logits.
#pragma once
#include "simd.h"

namespace fastllm {
namespace {

constexpr float kNothing = -33.0f;    // exp(z) and -z exp(z) both round to zero below this

// exp(scale * (x - max)) in [0, 1]. `max` is finite: a row whose largest logit is +inf passes the largest float, and its
// infinities weigh 1 each, everything else 0.
FL_INLINE vf exponent(vf x, vf max, vf scale) { return min(fastllm::max((x - max) * scale, set1(-104.0f)), set1(0)); }
FL_INLINE vf weight(vf x, vf max, vf scale) { return exp_bounded(exponent(x, max, scale)); }

#if defined(__AVX512F__)
struct vsum {
  __m512i a, b;
};
FL_INLINE vsum no_sum() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
FL_INLINE vsum fixed(vf e) {
  const __m512 x = _mm512_mul_ps(e.v, _mm512_set1_ps(0x1p40f));
  return {_mm512_cvtps_epi64(_mm512_castps512_ps256(x)), _mm512_cvtps_epi64(_mm512_extractf32x8_ps(x, 1))};
}
FL_INLINE vsum operator+(vsum x, vsum y) { return {_mm512_add_epi64(x.a, y.a), _mm512_add_epi64(x.b, y.b)}; }
FL_INLINE uint64_t total(vsum s) { return uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(s.a, s.b))); }
FL_INLINE void store(uint64_t* p, vsum s) { _mm512_storeu_si512(p, s.a), _mm512_storeu_si512(p + 8, s.b); }

#elif defined(__AVX2__)
struct vsum {
  __m256i a, b, c, d;
};
FL_INLINE vsum no_sum() {
  const __m256i z = _mm256_setzero_si256();
  return {z, z, z, z};
}
// Adding 2^52 leaves the rounded integer in the mantissa.
FL_INLINE __m256i fixed(__m128 e) {
  const __m256d x = _mm256_fmadd_pd(_mm256_cvtps_pd(e), _mm256_set1_pd(0x1p40), _mm256_set1_pd(0x1p52));
  return _mm256_and_si256(_mm256_castpd_si256(x), _mm256_set1_epi64x(0xfffffffffffff));
}
FL_INLINE vsum fixed(vf e) {
  return {fixed(_mm256_castps256_ps128(e.a)), fixed(_mm256_extractf128_ps(e.a, 1)), fixed(_mm256_castps256_ps128(e.b)),
          fixed(_mm256_extractf128_ps(e.b, 1))};
}
FL_INLINE vsum operator+(vsum x, vsum y) {
  return {_mm256_add_epi64(x.a, y.a), _mm256_add_epi64(x.b, y.b), _mm256_add_epi64(x.c, y.c), _mm256_add_epi64(x.d, y.d)};
}
FL_INLINE void store(uint64_t* p, vsum s) {
  _mm256_storeu_si256((__m256i*)p, s.a), _mm256_storeu_si256((__m256i*)(p + 4), s.b);
  _mm256_storeu_si256((__m256i*)(p + 8), s.c), _mm256_storeu_si256((__m256i*)(p + 12), s.d);
}
FL_INLINE uint64_t total(vsum s) {
  alignas(32) uint64_t t[4];
  _mm256_store_si256((__m256i*)t, _mm256_add_epi64(_mm256_add_epi64(s.a, s.b), _mm256_add_epi64(s.c, s.d)));
  return t[0] + t[1] + t[2] + t[3];
}

#else
struct vsum {
  uint64_t v[16];
};
FL_INLINE vsum no_sum() { return vsum{}; }
FL_INLINE vsum fixed(vf e) {
  vsum r;
  for (int i = 0; i < 16; ++i) {
    const double x = double(e.v[i]) * 0x1p40 + 0x1p52;    // the product is exact: one rounding
    memcpy(&r.v[i], &x, 8);
    r.v[i] &= 0xfffffffffffff;
  }
  return r;
}
FL_INLINE vsum operator+(vsum x, vsum y) {
  for (int i = 0; i < 16; ++i) x.v[i] += y.v[i];
  return x;
}
FL_INLINE void store(uint64_t* p, vsum s) { memcpy(p, s.v, sizeof s.v); }
FL_INLINE uint64_t total(vsum s) {
  uint64_t t = 0;
  for (uint64_t x : s.v) t += x;
  return t;
}
#endif

// Natural logarithm of a positive normal number, error below 2 ulp: x = 2^e m with m in [sqrt(1/2), sqrt(2)), then the series
// of 2 atanh((m - 1) / (m + 1)). Additions, products and one division only: the same bits in every tier.
[[maybe_unused]] inline double natural_log(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  int64_t e = int64_t(u >> 52 & 2047) - 1023;
  u = (u & 0xfffffffffffff) | 0x3ff0000000000000;
  double m;
  memcpy(&m, &u, 8);
  if (m > 1.4142135623730951) m *= 0.5, ++e;
  const double s = (m - 1) / (m + 1), z = s * s;
  double p = 1.0 / 23;
  for (int k = 21; k > 0; k -= 2) p = p * z + 1.0 / k;
  // ln2 in two parts: the first ends in 17 zero bits, so that e times it is exact
  return double(e) * 0x1.62e42fefap-1 + (2 * s * p + double(e) * 0x1.cf79abc9e3b3ap-40);
}

// log of a sum of weights
[[maybe_unused]] inline double log_weight(uint64_t sum) { return natural_log(double(sum) * 0x1p-40); }

// log of exp(x - max) / sum, for a logit and the largest of its row. Both in double: the difference is exact but for one
// rounding, whatever their size.
[[maybe_unused]] inline float log_probability(float x, float max, uint64_t sum, double temperature = 1) {
  if (max == __builtin_inff()) {
    if (x < max) return -__builtin_inff();
    return float(-log_weight(sum));
  }
  return float((double(x) - double(max)) / temperature - log_weight(sum));
}

// Entropy in nats from the sum of weights and the sum of weight * (max - x), both in fixed point.
[[maybe_unused]] inline float entropy(uint64_t sum, uint64_t moment) {
  return float(log_weight(sum) + double(moment) / double(sum));
}

}  // namespace
}  // namespace fastllm
