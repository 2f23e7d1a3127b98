// The row of an RMS norm, shared by rms_norm and by the linears that take one as a prologue: the same bits in both.
#pragma once
#include "simd.h"

namespace fastllm {
namespace {

// Sum of squares of a row, in one fixed order whatever surrounds the row. Four accumulators hide the FMA's latency.
template <class T> FL_INLINE float sum_of_squares(const T* x, int64_t n) {
  constexpr int64_t kChains = 4;
  vf acc[kChains] = {set1(0), set1(0), set1(0), set1(0)};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int64_t c = 0; c < kChains; ++c) {
      const vf v = load(x + i + c * kLanes);
      acc[c] = fma(v, v, acc[c]);
    }
  for (int64_t c = 0; i < n; i += kLanes, ++c) {
    const vf v = load(x + i, first(n - i));
    acc[c] = fma(v, v, acc[c]);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <class T> FL_INLINE float reciprocal_rms(const T* x, int64_t n, double eps) {
  return 1.0f / sqrtf(sum_of_squares(x, n) / float(n) + float(eps));
}

template <class T> FL_INLINE void scale_row(T* y, const T* x, const T* weight, float rstd, int64_t n) {
  const vf scale = set1(rstd);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
  if (i < n) {
    const vm m = first(n - i);
    store(y + i, load(x + i, m) * scale * load(weight + i, m), m);
  }
}

}  // namespace
}  // namespace fastllm
