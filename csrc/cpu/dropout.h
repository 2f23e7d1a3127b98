// Dropout by counter: whether an element is kept is a function of (seed, call, row, column); fastllm/ops/_dropout.py has the
// formula. One Philox gives four neighbouring columns, a vector of them 64.
#pragma once
#include "../philox.h"
#include "simd.h"

namespace fastllm {
namespace {

struct Dropout {
  uint64_t seed;
  uint32_t call, threshold;    // a word below the threshold drops its element
  float scale;                 // of what is kept
};
FL_INLINE Dropout dropout_of(double p, int64_t seed, int64_t call, int64_t threshold) {
  return {uint64_t(seed), uint32_t(call), uint32_t(threshold), float(1.0 / (1.0 - p))};
}

// Low and high words of a[i] * b, unsigned.
FL_INLINE void multiply_words(vi a, uint32_t b, vi& low, vi& high) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(int32_t(b)), even = _mm512_mul_epu32(a.v, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  low = {_mm512_mullo_epi32(a.v, factor)};
  high = {_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd)};
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(int32_t(b));
  const auto upper = [&](__m256i x) {
    const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  };
  low = {_mm256_mullo_epi32(a.a, factor), _mm256_mullo_epi32(a.b, factor)};
  high = {upper(a.a), upper(a.b)};
#else
  for (int i = 0; i < 16; ++i) {
    const uint64_t p = uint64_t(uint32_t(a.v[i])) * b;
    low.v[i] = int32_t(uint32_t(p)), high.v[i] = int32_t(uint32_t(p >> 32));
  }
#endif
}
FL_INLINE vi exclusive_or(vi a, vi b) {
#if defined(__AVX512F__)
  return {_mm512_xor_si512(a.v, b.v)};
#elif defined(__AVX2__)
  return {_mm256_xor_si256(a.a, b.a), _mm256_xor_si256(a.b, b.b)};
#else
  return {a.v ^ b.v};
#endif
}
// Bit i: word i of `a` is at least `least`, unsigned.
FL_INLINE uint32_t at_least(vi a, uint32_t least) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask(a.v, _mm512_set1_epi32(int32_t(least)));
#elif defined(__AVX2__)
  const __m256i least8 = _mm256_set1_epi32(int32_t(least));
  const auto reaches = [&](__m256i x) { return _mm256_cmpeq_epi32(_mm256_max_epu32(x, least8), x); };
  return bits(vm{reaches(a.a), reaches(a.b)});
#else
  uint32_t b = 0;
  for (int i = 0; i < 16; ++i) b |= uint32_t(uint32_t(a.v[i]) >= least) << i;
  return b;
#endif
}
// Bit i of `b` to bit 4 i.
FL_INLINE uint64_t spread4(uint32_t b) {
  uint64_t x = b;
  x = (x | x << 24) & 0x000000ff000000ffull;
  x = (x | x << 12) & 0x000f000f000f000full;
  x = (x | x << 6) & 0x0303030303030303ull;
  return (x | x << 3) & 0x1111111111111111ull;
}

// Bit c: column 64 * block + c of `row` is kept.
FL_INLINE uint64_t kept(const Dropout& d, int64_t row, int64_t block) {
  alignas(64) static const int32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vi c0 = seti(int32_t(block * 16)) + loadi(lane), c1 = seti(int32_t(uint32_t(uint64_t(row))));
  vi c2 = seti(int32_t(uint32_t(uint64_t(row) >> 32))), c3 = seti(int32_t(d.call));
  uint32_t k0 = uint32_t(d.seed), k1 = uint32_t(d.seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    vi low0, high0, low1, high1;
    multiply_words(c0, 0xD2511F53u, low0, high0);
    multiply_words(c2, 0xCD9E8D57u, low1, high1);
    c0 = exclusive_or(exclusive_or(high1, c1), seti(int32_t(k0)));
    c2 = exclusive_or(exclusive_or(high0, c3), seti(int32_t(k1)));
    c1 = low1, c3 = low0;
  }
  return spread4(at_least(c0, d.threshold)) | spread4(at_least(c1, d.threshold)) << 1 | spread4(at_least(c2, d.threshold)) << 2 |
         spread4(at_least(c3, d.threshold)) << 3;
}

// x * scale where the low bits of `keep` say so, else 0 (also for a NaN or infinity that is dropped).
FL_INLINE vf drop(vf x, uint64_t keep, vf scale) { return select(lanes(uint32_t(keep & 0xffff)), x * scale, set1(0)); }

}  // namespace
}  // namespace fastllm
