// layer_norm: s = x + residual; y = (s - mean) * rstd * weight + bias with rstd = 1/sqrt(mean((s - mean)^2) + eps).
// A second pass, over a row that lies in the first cache by then, takes the differences from the mean of the first: no
// cancellation, whatever the mean, and what they add up to is what rounding took from it. fp32 within, one rounding to the
// output's dtype; s is rounded to that dtype before it is normalised.
#include "norm.h"

namespace fastllm {
namespace {

struct Moments {
  float mean, rstd;
};
template <class T> FL_INLINE Moments moments(const T* x, int64_t n, double eps, const T* next) {
  const float about = sum_columns(n, [&](vf acc, int64_t i, auto m) { return acc + load(x + i, m); }) / float(n);
  struct Sums {
    vf differences, squares;
  };
  const auto add = [&](Sums acc, int64_t i, auto m) {
    prefetch(next + i);
    const vf d = select(m, load(x + i, m) - set1(about), set1(0));
    return Sums{acc.differences + d, fma(d, d, acc.squares)};
  };
  const auto join = [](Sums a, Sums b) { return Sums{a.differences + b.differences, a.squares + b.squares}; };
  const Sums sums = chains(n, Sums{set1(0), set1(0)}, add, join);
  const float lost = sum(sums.differences) / float(n), variance = sum(sums.squares) / float(n) - lost * lost;
  return {about + lost, 1.0f / sqrtf((variance < 0 ? 0 : variance) + float(eps))};    // of a constant row it may round below
}

template <class T, bool past_cache> void forward(const LayerNormArgs& a, Team& team) {
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  const Range rows = share(team, a.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T *x = static_cast<const T*>(a.x) + r * a.x_stride, *next = x + a.x_stride;
    if (a.residual) {
      T* s = static_cast<T*>(a.s) + r * a.cols;
      add_row(s, x, static_cast<const T*>(a.residual) + r * a.residual_stride, a.cols);
      x = s;
    }
    const Moments row = moments(x, a.cols, a.eps, next);
    if (a.rstd) a.mean[r] = row.mean, a.rstd[r] = row.rstd;
    T* y = static_cast<T*>(a.y) + r * a.cols;
    each(a.cols, [&](int64_t i, auto m) {
      const vf h = (load(x + i, m) - set1(row.mean)) * set1(row.rstd), w = load(weight + i, m);
      put<past_cache>(y + i, bias ? fma(h, w, load(bias + i, m)) : h * w, m);
    });
  }
  if (past_cache) fence();
}

// With h = (s - mean) * rstd and g = dy * weight:  dx = rstd * (g - mean(g) - h * mean(g * h)) + ds,
// dweight = sum over rows of dy * h,  dbias = sum over rows of dy.
template <class T, bool past_cache> void backward(const LayerNormBackwardArgs& a, Team& team) {
  const int64_t n = a.cols, padded = norm_padded(n);
  const T* weight = static_cast<const T*>(a.weight);
  grouped_rows(team, a.rows, n, 2, [&](int64_t r, float* partial) {
    const T* dy = static_cast<const T*>(a.dy) + r * a.dy_stride;
    const T* s = static_cast<const T*>(a.s) + r * a.s_stride;
    const T* ds = a.ds ? static_cast<const T*>(a.ds) + r * a.ds_stride : nullptr;
    T* dx = static_cast<T*>(a.dx) + r * n;
    const vf mean = set1(a.mean[r]), rstd = set1(a.rstd[r]);
    vf total = set1(0);
    const float dot = sum_columns(n, [&](vf acc, int64_t i, auto m) {
      const vf d = load(dy + i, m), g = d * load(weight + i, m);
      const vf h = select(m, (load(s + i, m) - mean) * rstd, set1(0));    // beyond the row it may be infinite, and is 0 times that
      store(partial + i, fma(d, h, load(partial + i)));
      store(partial + padded + i, d + load(partial + padded + i));
      total = total + g;
      return fma(g, h, acc);
    });
    const vf mean_g = set1(sum(total) / float(n)), mean_gh = set1(dot / float(n));
    each(n, [&](int64_t i, auto m) {
      prefetch(dy + a.dy_stride + i), prefetch(s + a.s_stride + i);    // the next row
      const vf g = load(dy + i, m) * load(weight + i, m), h = (load(s + i, m) - mean) * rstd;
      const vf d = (g - mean_g - h * mean_gh) * rstd;
      put<past_cache>(dx + i, ds ? d + load(ds + i, m) : d, m);
    });
  });
  add_groups(team, a.dweight, a.rows, n, 2, 0);
  add_groups(team, a.dbias, a.rows, n, 2, 1);
  if (past_cache) fence();
}

}  // namespace

namespace FASTLLM_TIER {

void layer_norm(const LayerNormArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    streams(a.y, a.rows, a.cols * sizeof(T)) ? forward<T, true>(a, team) : forward<T, false>(a, team);
  });
}
void layer_norm_backward(const LayerNormBackwardArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    streams(a.dx, a.rows, a.cols * sizeof(T)) ? backward<T, true>(a, team) : backward<T, false>(a, team);
  });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
