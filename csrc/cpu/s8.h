// Signed bytes in +-127 that stand for floats: x ~ scale * value.
#pragma once
#include "columns.h"

namespace fastllm {
namespace {

FL_INLINE void store_s8(int8_t* p, vi a) {    // values within s8
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v));
#else
  int32_t t[16];
  storei(t, a);
  for (int i = 0; i < 16; ++i) p[i] = int8_t(t[i]);
#endif
}

FL_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
#elif defined(__AVX2__)
  const __m128i lo = _mm_loadl_epi64((const __m128i*)p), hi = _mm_loadl_epi64((const __m128i*)(p + 8));
  return to_float({_mm256_cvtepi8_epi32(lo), _mm256_cvtepi8_epi32(hi)});
#else
  vi r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i];
  return to_float(r);
#endif
}

constexpr float kSmallest = 1e-35f;    // numbers below this count as zeros: 127 / max|x| would overflow

// How numbers with a largest size of `top` become bytes: scale = top / 127, value = round(x * (127 / top)). Zeros have scale 0; a
// NaN or infinity among them makes the scale NaN, and with it whatever is computed from them.
struct Symmetric {
  bool plain;    // else the bytes are zeros
  float scale, inverse;
};
FL_INLINE Symmetric symmetric(float top, bool finite) {
  const bool plain = finite && top >= kSmallest;
  return {plain, plain ? top / 127.0f : finite ? 0.0f : __builtin_nanf(""), plain ? 127.0f / top : 0.0f};
}

// x[0, n) as bytes, one scale for all; `step` bytes apart. n: a multiple of 16.
FL_INLINE float quantise(const float* x, int64_t n, int8_t* to, int64_t step) {
  const vf infinity = set1(__builtin_inff());
  vf size = set1(0);
  uint32_t finite = 0xffff;
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf a = abs(load(x + i));
    size = max(a, size), finite &= bits(a < infinity);
  }
  const Symmetric s = symmetric(max(size), finite == 0xffff);
  for (int64_t i = 0; i < n; i += kLanes) {
    const vi q = s.plain ? to_int(load(x + i) * set1(s.inverse)) : seti(0);
    if (step == 1) {
      store_s8(to + i, q);
    } else {
      int8_t bytes[kLanes];
      store_s8(bytes, q);
      for (int64_t j = 0; j < kLanes; ++j) to[(i + j) * step] = bytes[j];
    }
  }
  return s.scale;
}

}  // namespace
}  // namespace fastllm
