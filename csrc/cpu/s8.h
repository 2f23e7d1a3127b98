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

// How numbers with a largest size of `top` become bytes: scale = top / largest, value = round(x * (largest / top)). Zeros have
// scale 0; a NaN or infinity among them makes the scale NaN, and with it whatever is computed from them.
struct Symmetric {
  bool plain;    // else the bytes are zeros
  float scale, inverse;
};
FL_INLINE Symmetric symmetric(float top, bool finite, float largest = 127, float smallest = kSmallest) {
  const bool plain = finite && top >= smallest;
  return {plain, plain ? top / largest : finite ? 0.0f : __builtin_nanf(""), plain ? largest / top : 0.0f};
}

}  // namespace
}  // namespace fastllm
