// rms_norm: s = x + residual; rstd = 1/sqrt(mean(s^2) + eps); y = s * rstd * weight.
// Sums and products in fp32, one rounding to the output's dtype. s is rounded to that dtype before it is normalised, so that
// a separate addition followed by a norm gives the same bits.
#include "rms_norm.h"

#include "norm.h"

namespace fastllm {
namespace {

template <class T, bool past_cache> void forward(const RmsNormArgs& a, Team& team) {
  const T* weight = static_cast<const T*>(a.weight);
  const Range rows = share(team, a.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    if (a.residual) {
      T* s = static_cast<T*>(a.s) + r * a.cols;
      add_row(s, x, static_cast<const T*>(a.residual) + r * a.residual_stride, a.cols);
      x = s;
    }
    const float rstd = reciprocal_rms(x, a.cols, a.eps);
    if (a.rstd) a.rstd[r] = rstd;
    scale_row<past_cache>(static_cast<T*>(a.y) + r * a.cols, x, weight, rstd, a.cols);
  }
  if (past_cache) fence();
}

// With h = s * rstd and g = dy * weight:  dx = rstd * (g - h * mean(g * h)) + ds,  dweight = sum over rows of dy * h.
template <class T, bool past_cache> void backward(const RmsNormBackwardArgs& a, Team& team) {
  const int64_t n = a.cols;
  const T* weight = static_cast<const T*>(a.weight);
  grouped_rows(team, a.rows, n, 1, [&](int64_t r, float* partial) {
    const T* dy = static_cast<const T*>(a.dy) + r * a.dy_stride;
    const T* s = static_cast<const T*>(a.s) + r * a.s_stride;
    const T* ds = a.ds ? static_cast<const T*>(a.ds) + r * a.ds_stride : nullptr;
    T* dx = static_cast<T*>(a.dx) + r * n;
    const vf rstd = set1(a.rstd[r]);
    const float dot = sum_columns(n, [&](vf acc, int64_t i, auto m) {
      const vf d = load(dy + i, m), h = load(s + i, m) * rstd;
      store(partial + i, fma(d, h, load(partial + i)));
      return fma(d * load(weight + i, m), h, acc);
    });
    const vf mean = set1(dot / float(n));
    each(n, [&](int64_t i, auto m) {
      prefetch(dy + a.dy_stride + i), prefetch(s + a.s_stride + i);    // the next row
      const vf g = load(dy + i, m) * load(weight + i, m), h = load(s + i, m) * rstd;
      const vf d = (g - h * mean) * rstd;
      put<past_cache>(dx + i, ds ? d + load(ds + i, m) : d, m);
    });
  });
  add_groups(team, a.dweight, a.rows, n, 1, 0);
  if (past_cache) fence();
}

}  // namespace

namespace FASTLLM_TIER {

void rms_norm(const RmsNormArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    streams(a.y, a.rows, a.cols * sizeof(T)) ? forward<T, true>(a, team) : forward<T, false>(a, team);
  });
}
void rms_norm_backward(const RmsNormBackwardArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    streams(a.dx, a.rows, a.cols * sizeof(T)) ? backward<T, true>(a, team) : backward<T, false>(a, team);
  });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
