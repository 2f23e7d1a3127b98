// How quantised weights lie in panels of 16 rows, and their exact integer dot product with s8 activations, 32 at a time, tier by
// tier.
#pragma once
#include "s8.h"

namespace fastllm {
namespace {

constexpr int64_t kGroup = 32;    // of activations; a weight's group is one, two or four of them

FL_INLINE int64_t padded(int64_t depth) { return (depth + kGroup - 1) / kGroup * kGroup; }

FL_INLINE vi broadcast4(const int8_t* x) {    // four activations to every lane
  int32_t v;
  memcpy(&v, x, 4);
  return seti(v);
}

// A weight's group in a panel: quants, 32 of k after 32 of k, then 16 float16 scales, then 16 float16 minima if any. Offsets are
// those of the g-th 32 of k.
struct QuantFormat {
  int64_t quants, shift, bytes;    // of 32 of k; log2 of how many of them share a scale; of a weight's group
  FL_INLINE_MEMBER QuantFormat(int64_t bits, bool minimum, int64_t group)
      : quants(bits * 64), shift(group / 64), bytes((quants << shift) + (minimum ? 64 : 32)) {}
  FL_INLINE_MEMBER int64_t panel(int64_t depth) const { return (depth + (kGroup << shift) - 1) / (kGroup << shift) * bytes; }
  FL_INLINE_MEMBER int64_t at(int64_t g) const { return (g >> shift) * bytes + (g & ((1 << shift) - 1)) * quants; }
  FL_INLINE_MEMBER int64_t scales(int64_t g) const { return (g >> shift) * bytes + (quants << shift); }
};

template <int kBits> struct Quants;

// dot(x, start): start + sum over 32 of k of quant * x, per row.
template <> struct Quants<8> {
  vi q[8];    // k 4c..4c+3
  FL_INLINE_MEMBER void load(const uint8_t* w) {
    FL_UNROLL
    for (int c = 0; c < 8; ++c) q[c] = loadi(w + c * 64);
  }
  FL_INLINE_MEMBER vi dot(const int8_t* x, vi start) const {
    vi even = start, odd = seti(0);
    FL_UNROLL
    for (int c = 0; c < 8; c += 2) {
      even = dot4(even, q[c], broadcast4(x + c * 4));
      odd = dot4(odd, q[c + 1], broadcast4(x + c * 4 + 4));
    }
    return even + odd;
  }
};

template <> struct Quants<4> {
  vi low[4], high[4];    // k 8c..8c+3 and k 8c+4..8c+7
  FL_INLINE_MEMBER void load(const uint8_t* w) {
    const vi nibble = seti(0x0f0f0f0f);
    FL_UNROLL
    for (int c = 0; c < 4; ++c) {
      const vi q = loadi(w + c * 64);
      low[c] = q & nibble;
      high[c] = shift_right<4>(q) & nibble;
    }
  }
#if defined(__AVX2__) && !defined(__AVX512F__)
  // |pair sum| <= 2 * 15 * 127, so eight of them fit 16 bits: one widening at the end of the group.
  FL_INLINE_MEMBER vi dot(const int8_t* x, vi start) const {
    vi t = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    FL_UNROLL
    for (int c = 0; c < 4; ++c) {
      const vi x0 = broadcast4(x + c * 8), x1 = broadcast4(x + c * 8 + 4);
      t.a = _mm256_add_epi16(t.a, _mm256_add_epi16(_mm256_maddubs_epi16(low[c].a, x0.a), _mm256_maddubs_epi16(high[c].a, x1.a)));
      t.b = _mm256_add_epi16(t.b, _mm256_add_epi16(_mm256_maddubs_epi16(low[c].b, x0.b), _mm256_maddubs_epi16(high[c].b, x1.b)));
    }
    const __m256i ones = _mm256_set1_epi16(1);
    return start + vi{_mm256_madd_epi16(t.a, ones), _mm256_madd_epi16(t.b, ones)};
  }
#else
  FL_INLINE_MEMBER vi dot(const int8_t* x, vi start) const {
    vi even = start, odd = seti(0);
    FL_UNROLL
    for (int c = 0; c < 4; ++c) {
      even = dot4(even, low[c], broadcast4(x + c * 8));
      odd = dot4(odd, high[c], broadcast4(x + c * 8 + 4));
    }
    return even + odd;
  }
#endif
};

}  // namespace
}  // namespace fastllm
