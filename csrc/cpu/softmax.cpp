// softmax: e = exp((x - max) / temperature), y = e / sum(e), a row at a time: it is read from memory once, its weights stay in
// the cache as fp32 until their sum is known, and y is rounded once.
#include "columns.h"

namespace fastllm {
namespace {

// Whatever comes first in a row of NaN and -inf is its maximum; the NaN itself then spoils the sum.
template <class T> FL_INLINE float largest(const T* x, int64_t n) {
  const auto larger = [](vf a, vf b) { return max(a, b); };
  const vf lanes = chains(n, set1(-INFINITY), [&](vf acc, int64_t i, auto m) { return max(acc, select(m, load(x + i, m), set1(-INFINITY))); }, larger);
  return max(lanes);
}

template <class T, bool past_cache> void forward(const SoftmaxArgs& a, Team& team) {
  const int64_t n = a.cols;
  float* e = reinterpret_cast<float*>(team.scratch) + team.rank * ((n + kLanes - 1) / kLanes * kLanes);
  const vf scale = set1(float(a.scale));
  const Range rows = share(team, a.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    const float top = largest(x, n);
    const vf from = set1(top == -INFINITY ? 0.0f : top);
    const float total = sum_columns(n, [&](vf acc, int64_t i, auto m) {
      prefetch(x + a.x_stride + i);    // the next row, while this one computes
      const vf w = select(m, exp_not_positive((load(x + i, m) - from) * scale), set1(0));
      store(e + i, w);
      return acc + w;
    });
    const vf share_of = set1(total == 0 ? 0.0f : 1.0f / total);    // nothing but -inf: zeros
    T* y = static_cast<T*>(a.y) + r * n;
    each(n, [&](int64_t i, auto m) { put<past_cache>(y + i, load(e + i) * share_of, m); });
  }
  if (past_cache) fence();
}

// dx = y * (dy - sum(dy * y)) / temperature
template <class T, bool past_cache> void backward(const SoftmaxBackwardArgs& a, Team& team) {
  const Range rows = share(team, a.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T *dy = static_cast<const T*>(a.dy) + r * a.dy_stride, *y = static_cast<const T*>(a.y) + r * a.y_stride;
    T* dx = static_cast<T*>(a.dx) + r * a.cols;
    const vf dot = set1(sum_columns(a.cols, [&](vf acc, int64_t i, auto m) { return fma(load(dy + i, m), load(y + i, m), acc); }));
    each(a.cols, [&](int64_t i, auto m) {
      prefetch(dy + a.dy_stride + i), prefetch(y + a.y_stride + i);    // the next row
      put<past_cache>(dx + i, (load(dy + i, m) - dot) * load(y + i, m) * set1(float(a.scale)), m);
    });
  }
  if (past_cache) fence();
}

}  // namespace

namespace FASTLLM_TIER {

void softmax(const SoftmaxArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    streams(a.y, a.rows, a.cols * sizeof(T)) ? forward<T, true>(a, team) : forward<T, false>(a, team);
  });
}
void softmax_backward(const SoftmaxBackwardArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    streams(a.dx, a.rows, a.cols * sizeof(T)) ? backward<T, true>(a, team) : backward<T, false>(a, team);
  });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
