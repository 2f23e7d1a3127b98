// Numbers of the KV cache in a byte each: int8, or E4M3 (4 bits of exponent, 3 of mantissa, largest 448, no infinity).
//
// E4M3 is taken apart with integers and the float16 conversions, which know subnormals whatever the processor's mode
// says of flushing them: torch.set_flush_denormal changes no bit.
#pragma once
#include "s8.h"

namespace fastllm {
namespace {

struct e4m3 {
  uint8_t bits;
};

// Numbers / 256: as float16, whose exponents are biased by 8 more. A NaN, which pages do not hold, reads as 480 / 256.
FL_INLINE vf load(const e4m3* p) {
#if defined(__AVX2__)
  const __m256i spread = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  const __m256i half = _mm256_and_si256(spread, _mm256_set1_epi16(int16_t(0xbfff)));    // the sign came twice
#if defined(__AVX512F__)
  return {_mm512_cvtph_ps(half)};
#else
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
#endif
#else
  vi sign, size;
  for (int i = 0; i < 16; ++i) sign.v[i] = p[i].bits & 0x80, size.v[i] = p[i].bits & 0x7f;
  const vf eighths = to_float(size), normal = as_float(shift_left<20>(size) + seti(112 << 23));
  const vf magnitude = select(eighths < set1(8), eighths * set1(0x1p-17f), normal);
  return as_float(as_int(magnitude) + shift_left<24>(sign));
#endif
}

// Bits of E4M3, 0 to 255: to nearest, ties to even; beyond 448: 448. No NaN.
FL_INLINE vi to_e4m3(vf x) {
  const vf size = min(abs(x), set1(448)), carrier = set1(16384);    // of which a unit is 2^-9, the least number
  const vi u = as_int(size);
  const vi normal = shift_right<20>(u + (shift_right<20>(u) & seti(1)) + seti(0x7ffff)) - seti(120 << 3);
  const vi subnormal = as_int(size + carrier) - as_int(carrier);
  const vi magnitude = as_int(select(size < set1(0x1p-6f), as_float(subnormal), as_float(normal)));
  return magnitude + (shift_right<24>(as_int(x)) & seti(0x80));
}

template <class E> constexpr float kLoadUnit = 1;    // what 1 of load(const E*) stands for
template <> constexpr float kLoadUnit<e4m3> = 256;

// kLargest: what the largest number of a row becomes. kSmallest: rows below it count as zeros, so that subnormal floats,
// which may be flushed, become zeros beside any other.
template <class E> struct PageBytes;
template <> struct PageBytes<int8_t> {
  static constexpr float kLargest = 127, kSmallest = fastllm::kSmallest;
  static FL_INLINE_MEMBER vi of(vf x) { return to_int(x); }
};
template <> struct PageBytes<e4m3> {
  static constexpr float kLargest = 448, kSmallest = 1e-32f;
  static FL_INLINE_MEMBER vi of(vf x) { return to_e4m3(x); }
};

// Calls f with a value of the type that the DType of pages names, which have scales.
template <class F> FL_INLINE void with_page_bytes(int64_t dtype, F f) {
  if (dtype == kS8)
    f(int8_t());
  else
    f(e4m3());
}

// x[0, n) as bytes, `step` bytes apart, and their scale. n: a multiple of 16.
template <class E> FL_INLINE float quantise(const float* x, int64_t n, E* to, int64_t step) {
  const vf infinity = set1(__builtin_inff());
  vf size = set1(0);
  uint32_t finite = 0xffff;
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf a = abs(load(x + i));
    size = max(a, size), finite &= bits(a < infinity);
  }
  const Symmetric s = symmetric(max(size), finite == 0xffff, PageBytes<E>::kLargest, PageBytes<E>::kSmallest);
  int8_t* bytes = reinterpret_cast<int8_t*>(to);
  for (int64_t i = 0; i < n; i += kLanes) {
    const vi q = s.plain ? PageBytes<E>::of(load(x + i) * set1(s.inverse)) : seti(0);
    if (step == 1) {
      store_s8(bytes + i, q);
    } else {
      int8_t apart[kLanes];
      store_s8(apart, q);
      for (int64_t j = 0; j < kLanes; ++j) bytes[(i + j) * step] = apart[j];
    }
  }
  return s.scale;
}

}  // namespace
}  // namespace fastllm
