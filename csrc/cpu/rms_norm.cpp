// rms_norm: s = x + residual; rstd = 1/sqrt(mean(s^2) + eps); y = s * rstd * weight.
// Sums and products in fp32, one rounding to the output's dtype. s is rounded to that dtype before it is normalised, so that
// a separate addition followed by a norm gives the same bits.
#include "rms_norm.h"

namespace fastllm {
namespace {

template <class T> void add_row(T* s, const T* x, const T* residual, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const vm m = first(n - i);
    store(s + i, load(x + i, m) + load(residual + i, m), m);
  }
}

template <class T> void forward(const RmsNormArgs& a, Team& team) {
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
    scale_row(static_cast<T*>(a.y) + r * a.cols, x, weight, rstd, a.cols);
  }
}

// With h = s * rstd and g = dy * weight:  dx = rstd * (g - h * mean(g * h)) + ds,  dweight = sum over rows of dy * h.
template <class T> void backward(const RmsNormBackwardArgs& a, Team& team) {
  const int64_t n = a.cols, padded = (n + kLanes - 1) / kLanes * kLanes;
  float* partial = reinterpret_cast<float*>(team.scratch) + team.rank * padded;    // this thread's dweight
  for (int64_t i = 0; i < padded; i += kLanes) store(partial + i, set1(0));
  const T* weight = static_cast<const T*>(a.weight);
  const Range rows = share(team, a.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* dy = static_cast<const T*>(a.dy) + r * a.dy_stride;
    const T* s = static_cast<const T*>(a.s) + r * a.s_stride;
    const T* ds = a.ds ? static_cast<const T*>(a.ds) + r * a.ds_stride : nullptr;
    T* dx = static_cast<T*>(a.dx) + r * n;
    const vf rstd = set1(a.rstd[r]);
    vf dot = set1(0);
    for (int64_t i = 0; i < n; i += kLanes) {
      const vm m = first(n - i);
      const vf d = load(dy + i, m), h = load(s + i, m) * rstd;
      dot = fma(d * load(weight + i, m), h, dot);
      store(partial + i, fma(d, h, load(partial + i)));
    }
    const vf mean = set1(sum(dot) / float(n));
    for (int64_t i = 0; i < n; i += kLanes) {
      const vm m = first(n - i);
      const vf g = load(dy + i, m) * load(weight + i, m), h = load(s + i, m) * rstd;
      const vf d = (g - h * mean) * rstd;
      store(dx + i, ds ? d + load(ds + i, m) : d, m);
    }
  }
  sync(team);
  const Range vectors = share(team, padded / kLanes);
  for (int64_t i = vectors.begin * kLanes; i < vectors.end * kLanes; i += kLanes) {
    vf total = set1(0);
    for (int64_t t = 0; t < team.size; ++t) total = total + load(reinterpret_cast<float*>(team.scratch) + t * padded + i);
    store(a.dweight + i, total, first(n - i));
  }
}

}  // namespace

namespace FASTLLM_TIER {

void rms_norm(const RmsNormArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) { forward<decltype(type)>(a, team); });
}
void rms_norm_backward(const RmsNormBackwardArgs& a, Team& team) noexcept {
  with_dtype(a.dtype, [&](auto type) { backward<decltype(type)>(a, team); });
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
