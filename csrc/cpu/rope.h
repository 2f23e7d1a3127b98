// The rotation of one head row, shared by rope and kv_append: one source, so that a key has the same bits wherever it was
// rotated. Half-split convention (NeoX, Hugging Face Llama): element i pairs with element i + rotary / 2.
#pragma once
#include "simd.h"

namespace fastllm {
namespace {

// Arithmetic in fp32: a * cos and a * sin rounded by their FMA, the products with b before it; one rounding to T.
template <class T, class Out> FL_INLINE void rotate(const T* x, const float* cosine, int64_t rotary, int64_t dim, Out* out) {
  const int64_t half = rotary / 2;
  const float* sine = cosine + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vf a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i);
    store(out + i, fma(a, c, set1(0) - b * s));
    store(out + half + i, fma(a, s, b * c));
  }
  if (i < half) {
    const vm m = first(half - i);
    const vf a = load(x + i, m), b = load(x + half + i, m), c = load(cosine + i, m), s = load(sine + i, m);
    store(out + i, fma(a, c, set1(0) - b * s), m);
    store(out + half + i, fma(a, s, b * c), m);
  }
  for (i = rotary; i < dim; i += kLanes) store(out + i, load(x + i, first(dim - i)), first(dim - i));    // partial rotary
}

// The row of the table for the position at `index`, or null when there is none.
FL_INLINE const float* angles(const void* position, int64_t is_int64, int64_t index, const float* table, int64_t positions, int64_t rotary) {
  const int64_t p = is_int64 ? static_cast<const int64_t*>(position)[index] : static_cast<const int32_t*>(position)[index];
  return p >= 0 && p < positions ? table + p * rotary : nullptr;
}

}  // namespace
}  // namespace fastllm
