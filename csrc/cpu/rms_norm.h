// The row of an RMS norm, shared by rms_norm and by the linears that take one as a prologue: the same bits in both.
#pragma once
#include "columns.h"

namespace fastllm {
namespace {

template <class T> FL_INLINE float reciprocal_rms(const T* x, int64_t n, double eps) {
  const float squares = sum_columns(n, [&](vf acc, int64_t i, auto m) {
    const vf v = load(x + i, m);
    return fma(v, v, acc);
  });
  return 1.0f / sqrtf(squares / float(n) + float(eps));
}

template <bool past_cache = false, class T> FL_INLINE void scale_row(T* y, const T* x, const T* weight, float rstd, int64_t n) {
  const vf scale = set1(rstd);
  each(n, [&](int64_t i, auto m) { put<past_cache>(y + i, load(x + i, m) * scale * load(weight + i, m), m); });
}

}  // namespace
}  // namespace fastllm
