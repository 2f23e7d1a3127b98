// One vector type for every tier: vf is 16 floats, vi is 16 int32, in one register (AVX-512), two (AVX2) or an array that the
// compiler lowers (generic). The same width everywhere means one panel layout, one reduction tree and one kernel source.
//
// Rules for files that include this (they are compiled once per tier):
//   - everything has internal linkage and no standard library: a comdat function compiled with -mavx512f could be the copy that
//     the linker keeps for every tier, and would crash an older processor (a test on `nm` holds this);
//   - tails are masked vectors, never scalar libm, so that a value does not depend on its column;
//   - fma() is one rounding in the AVX tiers. The generic tier rounds twice: its bits are its own.
//
// Longer than 500 lines: the three tiers of one type stand side by side, so that a new operation is written in all of them.
#pragma once
#include <math.h>
#include <string.h>

#include "sync.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef FASTLLM_TIER
#error "FASTLLM_TIER names the instruction-set tier; setup.py sets it"
#endif
#define FL_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#if defined(__AVX2__)
#define FL_INLINE_MEMBER inline __attribute__((always_inline))
#define FL_UNROLL _Pragma("GCC unroll 16")
#else    // the generic tier lowers each vector to many instructions: unrolled as well, it would take minutes to compile
#define FL_INLINE_MEMBER __attribute__((noinline))
#define FL_UNROLL
#endif

namespace fastllm {
namespace {

constexpr int64_t kLanes = 16;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// ---------------------------------------------------------------------------------------------------------- AVX-512
#if defined(__AVX512F__)

struct vf {
  __m512 v;
};
struct vi {
  __m512i v;
};
struct vm {
  __mmask16 v;
};    // one bit a lane

FL_INLINE vm first(int64_t n) { return {__mmask16(n >= 16 ? 0xffff : (1u << n) - 1)}; }
FL_INLINE uint32_t bits(vm m) { return m.v; }
FL_INLINE vm lanes(uint32_t bits) { return {__mmask16(bits)}; }
FL_INLINE vf set1(float x) { return {_mm512_set1_ps(x)}; }
FL_INLINE vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
FL_INLINE vf load(const float* p, vm m) { return {_mm512_maskz_loadu_ps(m.v, p)}; }
FL_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
FL_INLINE void store(float* p, vf a, vm m) { _mm512_mask_storeu_ps(p, m.v, a.v); }
FL_INLINE vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
FL_INLINE vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
FL_INLINE vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
FL_INLINE vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
FL_INLINE vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FL_INLINE vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }    // b where either is NaN
FL_INLINE vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
FL_INLINE vf round(vf a) { return {_mm512_roundscale_ps(a.v, 8)}; }
FL_INLINE vf sqrt(vf a) { return {_mm512_sqrt_ps(a.v)}; }
FL_INLINE vf swap_pairs(vf a) { return {_mm512_permute_ps(a.v, 0xb1)}; }    // lanes 1 0 3 2 5 4 ...
FL_INLINE vf twice(vf a) {                                                  // lanes 0 0 1 1 2 2 ...
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), a.v)};
}
FL_INLINE vm odd_lanes() { return {0xaaaa}; }
FL_INLINE vf select(vm m, vf yes, vf no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
FL_INLINE vm operator<(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
FL_INLINE vm operator>=(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
FL_INLINE vm is_nan(vf a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }

FL_INLINE vi seti(int32_t x) { return {_mm512_set1_epi32(x)}; }
FL_INLINE vi loadi(const void* p) { return {_mm512_loadu_si512(p)}; }
FL_INLINE void storei(void* p, vi a) { _mm512_storeu_si512(p, a.v); }
FL_INLINE vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
FL_INLINE vi operator-(vi a, vi b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FL_INLINE vi operator&(vi a, vi b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int n> FL_INLINE vi shift_left(vi a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n> FL_INLINE vi shift_right(vi a) { return {_mm512_srli_epi32(a.v, n)}; }    // zeros come in
FL_INLINE vf to_float(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
FL_INLINE vi to_int(vf a) { return {_mm512_cvtps_epi32(a.v)}; }    // to nearest, ties to even
FL_INLINE vi as_int(vf a) { return {_mm512_castps_si512(a.v)}; }
FL_INLINE vf as_float(vi a) { return {_mm512_castsi512_ps(a.v)}; }

FL_INLINE vf load(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
FL_INLINE vf load(const bf16* p, vm m) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m.v, p)), 16))};
}
FL_INLINE __m256i narrow_bf16(vf a) {
  __m512i u = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  r = _mm512_mask_or_epi32(r, is_nan(a).v, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
FL_INLINE void store(bf16* p, vf a) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(a)); }
FL_INLINE void store(bf16* p, vf a, vm m) { _mm256_mask_storeu_epi16(p, m.v, narrow_bf16(a)); }
FL_INLINE vf load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
FL_INLINE vf load(const f16* p, vm m) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m.v, p))}; }
FL_INLINE void store(f16* p, vf a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, 0)); }
FL_INLINE void store(f16* p, vf a, vm m) { _mm256_mask_storeu_epi16(p, m.v, _mm512_cvtps_ph(a.v, 0)); }

// Per 32-bit lane: acc + sum of four products u8 (weights) x s8 (activations, the same four for every lane).
FL_INLINE vi dot4(vi acc, vi weights, vi activations) { return {_mm512_dpbusd_epi32(acc.v, weights.v, activations.v)}; }


// ------------------------------------------------------------------------------------------------------------- AVX2
#elif defined(__AVX2__)

struct vf {
  __m256 a, b;
};
struct vi {
  __m256i a, b;
};
struct vm {
  __m256i a, b;
};    // all ones or zero, a lane

FL_INLINE vm first(int64_t n) {
  const __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), k = _mm256_set1_epi32(int(n));
  return {_mm256_cmpgt_epi32(k, i), _mm256_cmpgt_epi32(k, _mm256_add_epi32(i, _mm256_set1_epi32(8)))};
}
FL_INLINE uint32_t bits(vm m) {
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(m.a))) | uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(m.b))) << 8;
}
FL_INLINE vm lanes(uint32_t bits) {
  const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i low = _mm256_set1_epi32(int(bits)), high = _mm256_set1_epi32(int(bits >> 8));
  return {_mm256_cmpeq_epi32(_mm256_and_si256(low, own), own), _mm256_cmpeq_epi32(_mm256_and_si256(high, own), own)};
}
FL_INLINE vf set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FL_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FL_INLINE vf load(const float* p, vm m) { return {_mm256_maskload_ps(p, m.a), _mm256_maskload_ps(p + 8, m.b)}; }
FL_INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
FL_INLINE void store(float* p, vf v, vm m) { _mm256_maskstore_ps(p, m.a, v.a), _mm256_maskstore_ps(p + 8, m.b, v.b); }
FL_INLINE vf operator+(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
FL_INLINE vf operator-(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
FL_INLINE vf operator*(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
FL_INLINE vf operator/(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
FL_INLINE vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
FL_INLINE vf max(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
FL_INLINE vf min(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
FL_INLINE vf round(vf x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
FL_INLINE vf sqrt(vf x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
FL_INLINE vf swap_pairs(vf x) { return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)}; }
FL_INLINE vf twice(vf x) {
  return {_mm256_permutevar8x32_ps(x.a, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
          _mm256_permutevar8x32_ps(x.a, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
}
FL_INLINE vm odd_lanes() {
  const __m256i odd = _mm256_setr_epi32(0, -1, 0, -1, 0, -1, 0, -1);
  return {odd, odd};
}
FL_INLINE vf select(vm m, vf yes, vf no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_castsi256_ps(m.a)), _mm256_blendv_ps(no.b, yes.b, _mm256_castsi256_ps(m.b))};
}
template <int op> FL_INLINE vm compare(vf x, vf y) {
  return {_mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, op)), _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, op))};
}
FL_INLINE vm operator<(vf x, vf y) { return compare<_CMP_LT_OQ>(x, y); }
FL_INLINE vm operator>=(vf x, vf y) { return compare<_CMP_GE_OQ>(x, y); }
FL_INLINE vm is_nan(vf x) { return compare<_CMP_UNORD_Q>(x, x); }

FL_INLINE vi seti(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
FL_INLINE vi loadi(const void* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}; }
FL_INLINE void storei(void* p, vi v) { _mm256_storeu_si256((__m256i*)p, v.a), _mm256_storeu_si256((__m256i*)p + 1, v.b); }
FL_INLINE vi operator+(vi x, vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
FL_INLINE vi operator-(vi x, vi y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
FL_INLINE vi operator&(vi x, vi y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int n> FL_INLINE vi shift_left(vi x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
template <int n> FL_INLINE vi shift_right(vi x) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
FL_INLINE vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
FL_INLINE vi to_int(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
FL_INLINE vi as_int(vf x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
FL_INLINE vf as_float(vi x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

FL_INLINE vf load(const bf16* p) {
  const __m128i lo = _mm_loadu_si128((const __m128i*)p), hi = _mm_loadu_si128((const __m128i*)p + 1);
  return as_float(shift_left<16>({_mm256_cvtepu16_epi32(lo), _mm256_cvtepu16_epi32(hi)}));
}
FL_INLINE void store(bf16* p, vf x) {
  const vi u = as_int(x), odd = shift_right<16>(u) & seti(1);
  const vm nan = is_nan(x);
  vi r = u + odd + seti(0x7fff);
  const __m256i quiet = _mm256_set1_epi32(0x400000);
  r = {_mm256_blendv_epi8(r.a, _mm256_or_si256(u.a, quiet), nan.a), _mm256_blendv_epi8(r.b, _mm256_or_si256(u.b, quiet), nan.b)};
  r = shift_right<16>(r);
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(r.a, r.b), 0xd8));
}
FL_INLINE vf load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
FL_INLINE void store(f16* p, vf x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, 0)), _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(x.b, 0));
}

// maddubs saturates its 16-bit pair sums at u8 x s8 full range. Splitting the weights' top bit off keeps it exact:
// w = (w & 127) + (w & 128), each half's pair sums stay below 2 * 128 * 127 < 2^15.
FL_INLINE __m256i dot4_half(__m256i acc, __m256i w, __m256i x) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(w, _mm256_set1_epi8(127)), x);
  const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(w, _mm256_set1_epi8(char(128))), x);
  return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones)));
}
FL_INLINE vi dot4(vi acc, vi w, vi x) { return {dot4_half(acc.a, w.a, x.a), dot4_half(acc.b, w.b, x.b)}; }

// ---------------------------------------------------------------------------------------------------------- generic
#else    // the compiler's own vectors, lowered to what the processor has

typedef float float16_t_ __attribute__((vector_size(64)));
typedef int32_t int16_t_ __attribute__((vector_size(64)));
typedef uint32_t uint16_t_ __attribute__((vector_size(64)));    // sums may wrap, as they do in the other tiers
struct vf {
  float16_t_ v;
};
struct vi {
  int16_t_ v;
};
struct vm {
  int16_t_ v;
};    // all ones or zero, a lane

FL_INLINE vm first(int64_t n) {
  const int16_t_ lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return {lane < int32_t(n < 16 ? n : 16)};
}
FL_INLINE uint32_t bits(vm m) {
  uint32_t b = 0;
  for (int i = 0; i < 16; ++i) b |= uint32_t(m.v[i] & 1) << i;
  return b;
}
FL_INLINE vm lanes(uint32_t bits) {
  vm m;
  for (int i = 0; i < 16; ++i) m.v[i] = -int32_t(bits >> i & 1);
  return m;
}
FL_INLINE vf set1(float x) { return {x - float16_t_{}}; }
FL_INLINE vf load(const float* p) {
  vf r;
  memcpy(&r, p, 64);
  return r;
}
FL_INLINE void store(float* p, vf a) { memcpy(p, &a, 64); }
FL_INLINE vf operator+(vf a, vf b) { return {a.v + b.v}; }
FL_INLINE vf operator-(vf a, vf b) { return {a.v - b.v}; }
FL_INLINE vf operator*(vf a, vf b) { return {a.v * b.v}; }
FL_INLINE vf operator/(vf a, vf b) { return {a.v / b.v}; }
FL_INLINE vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
FL_INLINE vf max(vf a, vf b) { return {a.v > b.v ? a.v : b.v}; }
FL_INLINE vf min(vf a, vf b) { return {a.v < b.v ? a.v : b.v}; }
FL_INLINE vf select(vm m, vf yes, vf no) { return {m.v ? yes.v : no.v}; }
FL_INLINE vm operator<(vf a, vf b) { return {a.v < b.v}; }
FL_INLINE vm operator>=(vf a, vf b) { return {a.v >= b.v}; }
FL_INLINE vm is_nan(vf a) { return {a.v != a.v}; }

FL_INLINE vi seti(int32_t x) { return {x - int16_t_{}}; }
FL_INLINE vi loadi(const void* p) {
  vi r;
  memcpy(&r, p, 64);
  return r;
}
FL_INLINE void storei(void* p, vi a) { memcpy(p, &a, 64); }
FL_INLINE vi operator+(vi a, vi b) { return {int16_t_(uint16_t_(a.v) + uint16_t_(b.v))}; }
FL_INLINE vi operator-(vi a, vi b) { return {int16_t_(uint16_t_(a.v) - uint16_t_(b.v))}; }
FL_INLINE vi operator&(vi a, vi b) { return {a.v & b.v}; }
template <int n> FL_INLINE vi shift_left(vi a) { return {a.v << n}; }
template <int n> FL_INLINE vi shift_right(vi a) { return {(a.v >> n) & int32_t(0xffffffffu >> n)}; }
FL_INLINE vf to_float(vi a) { return {__builtin_convertvector(a.v, float16_t_)}; }
FL_INLINE vi as_int(vf a) {
  vi r;
  memcpy(&r, &a, 64);
  return r;
}
FL_INLINE vf as_float(vi a) {
  vf r;
  memcpy(&r, &a, 64);
  return r;
}
FL_INLINE vf round(vf a) {    // to nearest even below 2^22 by the magic number, identity above
  const vi sign = as_int(a) & seti(int32_t(0x80000000u));
  const vf magic = as_float({as_int(set1(12582912.0f)).v | sign.v}), size = as_float(as_int(a) & seti(0x7fffffff));
  return select(size < set1(4194304.0f), (a + magic) - magic, a);
}
FL_INLINE vi to_int(vf a) { return {__builtin_convertvector(round(a).v, int16_t_)}; }
FL_INLINE vf sqrt(vf a) {
  for (int i = 0; i < 16; ++i) a.v[i] = sqrtf(a.v[i]);
  return a;
}
FL_INLINE vf swap_pairs(vf a) {
  vf r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i ^ 1];
  return r;
}
FL_INLINE vf twice(vf a) {
  vf r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i / 2];
  return r;
}
FL_INLINE vm odd_lanes() { return {int16_t_{0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1}}; }

FL_INLINE vf load(const bf16* p) {
  vi r;
  for (int i = 0; i < 16; ++i) r.v[i] = int32_t(uint32_t(p[i].bits) << 16);
  return as_float(r);
}
FL_INLINE void store(bf16* p, vf a) {
  const vi u = as_int(a), even = u + (shift_right<16>(u) & seti(1)) + seti(0x7fff);
  const vi r = shift_right<16>({is_nan(a).v ? u.v | 0x400000 : even.v});
  for (int i = 0; i < 16; ++i) p[i].bits = uint16_t(r.v[i]);
}
[[maybe_unused]] static float widen(f16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, magnitude = uint32_t(h.bits & 0x7fff) << 13;
  float x;
  if ((h.bits & 0x7c00) == 0x7c00) {    // infinity and NaN keep their payload
    const uint32_t u = magnitude | 0x7f800000u;
    memcpy(&x, &u, 4);
  } else {
    memcpy(&x, &magnitude, 4);
    x *= 5.192296858534828e33f;    // 2^112 moves the exponent's bias; subnormals come out right
  }
  uint32_t u;
  memcpy(&u, &x, 4);
  u |= sign;
  memcpy(&x, &u, 4);
  return x;
}
[[maybe_unused]] static f16 narrow(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return {uint16_t(sign | 0x7e00 | (u >> 13 & 0x3ff))};
  if (u >= 0x47800000) return {uint16_t(sign | 0x7c00)};
  if (u < 0x38800000) {    // subnormal: let the adder round at 2^-24
    float magnitude;
    memcpy(&magnitude, &u, 4);
    magnitude += 0.5f;
    uint32_t r;
    memcpy(&r, &magnitude, 4);
    return {uint16_t(sign | (r - 0x3f000000))};
  }
  return {uint16_t(sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13))};
}
FL_INLINE vf load(const f16* p) {
  float t[16];
  for (int i = 0; i < 16; ++i) t[i] = widen(p[i]);
  return load(t);
}
FL_INLINE void store(f16* p, vf a) {
  for (int i = 0; i < 16; ++i) p[i] = narrow(a.v[i]);
}

FL_INLINE vi dot4(vi acc, vi w, vi x) {
  return {acc.v + (w.v & 255) * (x.v << 24 >> 24) + (w.v >> 8 & 255) * (x.v << 16 >> 24) + (w.v >> 16 & 255) * (x.v << 8 >> 24) +
          (w.v >> 24 & 255) * (x.v >> 24)};
}

#endif
// ------------------------------------------------------------------------------------------------- built from the above

#if !defined(__AVX512F__)    // masked forms through a buffer where the tier has no masked instruction
template <class T> FL_INLINE vf load_masked(const T* p, vm m) {
  T buffer[16] = {};
  const uint32_t b = bits(m);
  for (int i = 0; i < 16; ++i)
    if (b >> i & 1) buffer[i] = p[i];
  return load(buffer);
}
template <class T> FL_INLINE void store_masked(T* p, vf a, vm m) {
  T buffer[16];
  store(buffer, a);
  const uint32_t b = bits(m);
  for (int i = 0; i < 16; ++i)
    if (b >> i & 1) p[i] = buffer[i];
}
#if !defined(__AVX2__)
FL_INLINE vf load(const float* p, vm m) { return load_masked(p, m); }
FL_INLINE void store(float* p, vf a, vm m) { store_masked(p, a, m); }
#endif
FL_INLINE vf load(const bf16* p, vm m) { return load_masked(p, m); }
FL_INLINE vf load(const f16* p, vm m) { return load_masked(p, m); }
FL_INLINE void store(bf16* p, vf a, vm m) { store_masked(p, a, m); }
FL_INLINE void store(f16* p, vf a, vm m) { store_masked(p, a, m); }
#endif

FL_INLINE vf abs(vf a) { return as_float(as_int(a) & seti(0x7fffffff)); }

FL_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }    // never faults, wherever p points
FL_INLINE void prefetch_into_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Stores past the cache, for outputs too large to stay in it: the line is not read first. `p` is aligned to the vector's bytes
// in memory (64 for fp32, 32 for 16-bit types). Call fence() before another thread may read.
FL_INLINE void stream(float* p, vf a) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, a.v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, a.a), _mm256_stream_ps(p + 8, a.b);
#else
  store(p, a);
#endif
}
template <class T> FL_INLINE void stream(T* p, vf a) {
#if defined(__AVX2__)
  alignas(32) T buffer[16];
  store(buffer, a);
  _mm256_stream_si256((__m256i*)p, *(const __m256i*)buffer);
#else
  store(p, a);
#endif
}
FL_INLINE void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
// Whether stream() suits an output of contiguous rows: it may (alignment), and it pays (nothing that large stays cached).
FL_INLINE bool streams(const void* p, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= (int64_t(4) << 20) && (uintptr_t(p) | uintptr_t(row_bytes)) % 64 == 0;
}

// Reductions: one tree (halves folded onto each other) for every tier, so that the order of additions is known.
#if defined(__AVX2__)
FL_INLINE float sum(__m256 a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
FL_INLINE float max(__m256 a) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
FL_INLINE int32_t sum(__m256i a) {
  __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}
#if defined(__AVX512F__)
FL_INLINE __m256 low(__m512 a) { return _mm512_castps512_ps256(a); }
FL_INLINE __m256 high(__m512 a) { return _mm512_extractf32x8_ps(a, 1); }
FL_INLINE float sum(vf a) { return sum(_mm256_add_ps(low(a.v), high(a.v))); }
FL_INLINE float max(vf a) { return max(_mm256_max_ps(low(a.v), high(a.v))); }
FL_INLINE int32_t sum(vi a) { return sum(_mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti32x8_epi32(a.v, 1))); }
#else
FL_INLINE float sum(vf a) { return sum(_mm256_add_ps(a.a, a.b)); }
FL_INLINE float max(vf a) { return max(_mm256_max_ps(a.a, a.b)); }
FL_INLINE int32_t sum(vi a) { return sum(_mm256_add_epi32(a.a, a.b)); }
#endif
#else
FL_INLINE float sum(vf a) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
FL_INLINE float max(vf a) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
  return a.v[0];
}
FL_INLINE int32_t sum(vi a) {
  int32_t s = 0;
  for (int i = 0; i < 16; ++i) s += a.v[i];
  return s;
}
#endif

// 2^n for n rounded already and within [-252, 254], in two factors so that subnormals come out right.
FL_INLINE vf ldexp2(vf x, vf n) {
#if defined(__AVX512F__)
  return {_mm512_scalef_ps(x.v, n.v)};
#else
  const vi i = to_int(n);
#if defined(__AVX2__)
  const vi half = {_mm256_srai_epi32(i.a, 1), _mm256_srai_epi32(i.b, 1)};
#else
  const vi half = {i.v >> 1};
#endif
  const vi bias = seti(127);
  return x * as_float(shift_left<23>(half + bias)) * as_float(shift_left<23>(i - half + bias));
#endif
}

// e^x for x within [-104, 89] or NaN, error below 1.1 ulp: x = n ln2 + f with ln2 in two parts (Cody-Waite), then a degree-6
// polynomial in f on [-ln2/2, ln2/2] (minimax, the coefficients of Cephes' expf).
FL_INLINE vf exp_in_range(vf x) {
  const vf n = round(x * set1(1.44269504088896341f));
  vf f = fma(n, set1(-0.693359375f), x);
  f = fma(n, set1(2.12194440e-4f), f);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, f, set1(1.3981999507e-3f));
  p = fma(p, f, set1(8.3334519073e-3f));
  p = fma(p, f, set1(4.1665795894e-2f));
  p = fma(p, f, set1(1.6666665459e-1f));
  p = fma(p, f, set1(5.0000001201e-1f));
  p = fma(p, f * f, f) + set1(1.0f);
  return ldexp2(p, n);
}

// e^x: exp(-inf) = 0, exp(NaN) = NaN, overflow gives +inf.
FL_INLINE vf exp(vf x) {
  const vf clamped = min(max(set1(-104.0f), x), set1(89.0f));
  return select(is_nan(x), x, exp_in_range(clamped));
}

// e^x for x <= 0 or NaN, the bits of exp(): max() hands a NaN in its second operand through.
FL_INLINE vf exp_not_positive(vf x) { return exp_in_range(max(set1(-104.0f), x)); }

constexpr float kLargest = 3.402823466e38f;    // the largest float

// sigmoid(x) and sigmoid(-x) from e^-|x|, which overflows on neither side.
struct Sigmoid {
  vf of, of_negative;
};
FL_INLINE Sigmoid sigmoid(vf x) {
  const vf t = exp(set1(0) - abs(x)), near_one = set1(1) / (t + set1(1)), near_zero = t * near_one;
  const vm positive = x >= set1(0);
  return {select(positive, near_one, near_zero), select(positive, near_zero, near_one)};
}

// x * sigmoid(x); -0 at -inf, its limit.
FL_INLINE vf silu(vf x) {
  const vf bounded = max(set1(-kLargest), x);    // -inf * 0 would be NaN; in this order NaN passes
  return bounded * sigmoid(bounded).of;
}

// Calls f with a value of the element type that a DType names; only its type matters.
template <class F> FL_INLINE void with_dtype(int64_t dtype, F f) {
  if (dtype == kFloat32)
    f(float());
  else if (dtype == kBFloat16)
    f(bf16());
  else
    f(f16());
}

}  // namespace
}  // namespace fastllm
