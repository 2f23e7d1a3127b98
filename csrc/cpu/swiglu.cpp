// swiglu: y = gate * sigmoid(gate) * up, element by element in fp32, one rounding to the output's dtype.
#include "simd.h"

namespace fastllm {
namespace {

// dgate = dy * up * s * (1 + g * (1 - s)) and dup = dy * g * s with s = sigmoid(g).
struct Gradients {
  vf gate, up;
};
FL_INLINE Gradients swiglu_backward(vf dy, vf gate, vf up) {
  const vf g = min(set1(kLargest), max(set1(-kLargest), gate));
  const Sigmoid s = sigmoid(g);
  return {dy * up * (s.of * fma(g, s.of_negative, set1(1))), dy * (g * s.of)};
}

// Cuts [rows, cols] in 16-wide pieces, equally over the team. body(row, begin, end, tail): whole vectors in [begin, end),
// then a masked one up to `tail` where that lies beyond.
template <class F> FL_INLINE void each_vector(const Team& team, int64_t rows, int64_t cols, F body) {
  const int64_t vectors = (cols + kLanes - 1) / kLanes, whole = cols / kLanes;
  const Range range = share(team, rows * vectors);
  for (int64_t i = range.begin; i < range.end;) {
    const int64_t row = i / vectors, first_vector = i % vectors;
    const int64_t last = first_vector + (range.end - i) < vectors ? first_vector + (range.end - i) : vectors;
    body(row, first_vector * kLanes, (last < whole ? last : whole) * kLanes, last > whole ? cols : 0);
    i += last - first_vector;
  }
}

constexpr int64_t kAhead = 512;    // elements between a prefetch and its use

// Offset of what will be read kAhead elements later: in this row, or at the start of the next. The hardware's prefetcher stops
// at the end of a row where rows lie apart, as the halves of a fused tensor do.
FL_INLINE int64_t ahead(int64_t i, int64_t cols, int64_t stride) {
  return i + kAhead < cols ? i + kAhead : i + kAhead - cols + stride;
}

template <class T, bool stream_out> void forward(const SwigluArgs& a, Team& team) {
  each_vector(team, a.rows, a.cols, [&](int64_t row, int64_t begin, int64_t end, int64_t tail) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    int64_t i = begin;
    for (; i < end; i += kLanes) {
      prefetch(gate + ahead(i, a.cols, a.gate_stride)), prefetch(up + ahead(i, a.cols, a.up_stride));
      const vf v = silu(load(gate + i)) * load(up + i);
      stream_out ? stream(y + i, v) : store(y + i, v);
    }
    if (i < tail) {
      const vm m = first(tail - i);
      store(y + i, silu(load(gate + i, m)) * load(up + i, m), m);
    }
  });
  if (stream_out) fence();
}

template <class T, bool stream_out> void backward(const SwigluBackwardArgs& a, Team& team) {
  each_vector(team, a.rows, a.cols, [&](int64_t row, int64_t begin, int64_t end, int64_t tail) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T *dgate = static_cast<T*>(a.dgate) + row * a.cols, *dup = static_cast<T*>(a.dup) + row * a.cols;
    int64_t i = begin;
    for (; i < end; i += kLanes) {
      prefetch(dy + ahead(i, a.cols, a.dy_stride));
      prefetch(gate + ahead(i, a.cols, a.gate_stride)), prefetch(up + ahead(i, a.cols, a.up_stride));
      const Gradients d = swiglu_backward(load(dy + i), load(gate + i), load(up + i));
      stream_out ? stream(dgate + i, d.gate) : store(dgate + i, d.gate);
      stream_out ? stream(dup + i, d.up) : store(dup + i, d.up);
    }
    if (i < tail) {
      const vm m = first(tail - i);
      const Gradients d = swiglu_backward(load(dy + i, m), load(gate + i, m), load(up + i, m));
      store(dgate + i, d.gate, m);
      store(dup + i, d.up, m);
    }
  });
  if (stream_out) fence();
}

}  // namespace

namespace FASTLLM_TIER {

void swiglu(const SwigluArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    streams(a.y, a.rows, a.cols * sizeof(T)) ? forward<T, true>(a, team) : forward<T, false>(a, team);
  });
}
void swiglu_backward(const SwigluBackwardArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const bool both = streams(a.dgate, a.rows, a.cols * sizeof(T)) && streams(a.dup, a.rows, a.cols * sizeof(T));
    both ? backward<T, true>(a, team) : backward<T, false>(a, team);
  });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
