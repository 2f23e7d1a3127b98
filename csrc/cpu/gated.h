// What swiglu, geglu and gelu share: y = act(gate) * up, or act(gate) alone, element by element in fp32, one rounding to the
// output's dtype. An activation is a type with `value(x)`, and `slope(x)`: the value and the derivative at a finite x or NaN.
#pragma once
#include "columns.h"

namespace fastllm {
namespace {

struct Slope {
  vf value, derivative;
};

FL_INLINE vf finite(vf x) { return min(set1(kLargest), max(set1(-kLargest), x)); }    // NaN passes

// Cuts [rows, cols] in 16-wide pieces, equally over the team. body(row, column, mask).
template <class F> FL_INLINE void each_vector(const Team& team, int64_t rows, int64_t cols, F body) {
  const int64_t vectors = (cols + kLanes - 1) / kLanes, whole = cols / kLanes;
  const Range range = share(team, rows * vectors);
  for (int64_t i = range.begin; i < range.end;) {
    const int64_t row = i / vectors, begin = i % vectors;
    const int64_t end = begin + (range.end - i) < vectors ? begin + (range.end - i) : vectors;
    for (int64_t v = begin; v < (end < whole ? end : whole); ++v) body(row, v * kLanes, All());
    if (end > whole) body(row, whole * kLanes, first(cols - whole * kLanes));
    i += end - begin;
  }
}

constexpr int64_t kAhead = 512;    // elements between a prefetch and its use

// Offset of what will be read kAhead elements later: in this row, or at the start of the next. The hardware's prefetcher stops
// at the end of a row where rows lie apart, as the halves of a fused tensor do.
FL_INLINE int64_t ahead(int64_t i, int64_t cols, int64_t stride) {
  return i + kAhead < cols ? i + kAhead : i + kAhead - cols + stride;
}

template <class Act, bool gated, class T, bool past_cache> void gated_forward(const GatedArgs& a, Team& team) {
  each_vector(team, a.rows, a.cols, [&](int64_t row, int64_t i, auto m) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    prefetch(gate + ahead(i, a.cols, a.gate_stride));
    vf y = Act::value(load(gate + i, m));
    if (gated) {
      const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
      prefetch(up + ahead(i, a.cols, a.up_stride));
      y = y * load(up + i, m);
    }
    put<past_cache>(static_cast<T*>(a.y) + row * a.cols + i, y, m);
  });
  if (past_cache) fence();
}

template <class Act, bool gated, class T, bool past_cache> void gated_backward(const GatedBackwardArgs& a, Team& team) {
  each_vector(team, a.rows, a.cols, [&](int64_t row, int64_t i, auto m) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    prefetch(dy + ahead(i, a.cols, a.dy_stride)), prefetch(gate + ahead(i, a.cols, a.gate_stride));
    const vf d = load(dy + i, m);
    const Slope act = Act::slope(finite(load(gate + i, m)));
    vf dgate = d;
    if (gated) {
      const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
      prefetch(up + ahead(i, a.cols, a.up_stride));
      dgate = d * load(up + i, m);
      put<past_cache>(static_cast<T*>(a.dup) + row * a.cols + i, d * act.value, m);
    }
    put<past_cache>(static_cast<T*>(a.dgate) + row * a.cols + i, dgate * act.derivative, m);
  });
  if (past_cache) fence();
}

template <class Act, bool gated> FL_INLINE void run_gated(const GatedArgs& a, Team& team) {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    streams(a.y, a.rows, a.cols * sizeof(T)) ? gated_forward<Act, gated, T, true>(a, team) : gated_forward<Act, gated, T, false>(a, team);
  });
}
template <class Act, bool gated> FL_INLINE void run_gated(const GatedBackwardArgs& a, Team& team) {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const bool all = streams(a.dgate, a.rows, a.cols * sizeof(T)) && (!gated || streams(a.dup, a.rows, a.cols * sizeof(T)));
    all ? gated_backward<Act, gated, T, true>(a, team) : gated_backward<Act, gated, T, false>(a, team);
  });
}

}  // namespace
}  // namespace fastllm
