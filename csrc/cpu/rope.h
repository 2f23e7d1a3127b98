// The rotation of one head row, shared by rope and kv_append: one source, so that a key has the same bits wherever it was
// rotated.
#pragma once
#include "columns.h"

namespace fastllm {
namespace {

// Half-split convention (NeoX, Hugging Face Llama): element i pairs with element i + rotary / 2. Arithmetic in fp32: a * cos and
// a * sin rounded by their FMA, the products with b before it; one rounding to T. sign: 1, or -1 for the inverse.
template <bool past_cache = false, class T, class Out>
FL_INLINE void rotate(const T* x, const float* cosine, int64_t rotary, int64_t dim, Out* out, float sign = 1) {
  const int64_t half = rotary / 2;
  const float* sine = cosine + half;
  each(half, [&](int64_t i, auto m) {
    const vf a = load(x + i, m), b = load(x + half + i, m), c = load(cosine + i, m), s = load(sine + i, m) * set1(sign);
    put<past_cache>(out + i, fma(a, c, set1(0) - b * s), m);
    put<past_cache>(out + half + i, fma(a, s, b * c), m);
  });
  each(dim - rotary, [&](int64_t i, auto m) { store(out + rotary + i, load(x + rotary + i, m), m); });    // partial rotary
}

// Interleaved convention (GPT-J): element 2i pairs with element 2i + 1. The bits of the other convention, elsewhere.
template <bool past_cache = false, class T, class Out>
FL_INLINE void rotate_pairs(const T* x, const float* cosine, int64_t rotary, int64_t dim, Out* out, float sign = 1) {
  const float* sine = cosine + rotary / 2;
  each(rotary, [&](int64_t i, auto m) {
    const vm pairs = first(rotary - i < kLanes ? (rotary - i) / 2 : kLanes / 2);
    const vf c = twice(load(cosine + i / 2, pairs)), s = twice(load(sine + i / 2, pairs)) * set1(sign);
    const vf v = load(x + i, m), other = swap_pairs(v);    // even lanes: a, and b as the other; odd lanes: b, and a
    put<past_cache>(out + i, select(odd_lanes(), fma(other, s, v * c), fma(v, c, set1(0) - other * s)), m);
  });
  each(dim - rotary, [&](int64_t i, auto m) { store(out + rotary + i, load(x + rotary + i, m), m); });
}

// The row of the table for the position at `index`, or null when there is none.
FL_INLINE const float* angles(const void* position, int64_t is_int64, int64_t index, const float* table, int64_t positions, int64_t rotary) {
  const int64_t p = is_int64 ? static_cast<const int64_t*>(position)[index] : static_cast<const int32_t*>(position)[index];
  return p >= 0 && p < positions ? table + p * rotary : nullptr;
}

}  // namespace
}  // namespace fastllm
