// gelu(x) = x * Phi(x), Phi the normal distribution, and its approximation by tanh; shared by gelu and geglu.
#pragma once
#include "gated.h"

namespace fastllm {
namespace {

// Phi(x) from its tail, Phi(-t) = e^(-t^2/2) R(t) for t >= 0, so that neither side cancels. R falls from 1/2 like 1/t; with
// u = 1 / (t + 5/2) it is u times a polynomial of degree 6 in u, fitted to 8e-8 of its value over [1, 14.5]. What t * t loses
// to rounding is put back behind the exponential. Between -1 and 1, where 1 - 1/2 would keep the tail's error,
// Phi(x) = 1/2 + x Q(x^2), fitted to 8e-10. x Phi(x) is within 2 ulp above 0, 3 above -1, 7 below.
struct Normal {
  vf below, bell;    // Phi(x) and e^(-x^2/2)
};
FL_INLINE Normal normal(vf x) {
  const vf t = min(set1(20), abs(x)), square = t * t, lost = fma(t, t, set1(0) - square);
  const vf e = exp_not_positive(square * set1(-0.5f)), bell = fma(e, lost * set1(-0.5f), e);
  const vf u = set1(1) / (t + set1(2.5f));
  vf p = set1(41.578006744384766f);
  p = fma(p, u, set1(-45.514671325683594f));
  p = fma(p, u, set1(10.289381980895996f));
  p = fma(p, u, set1(2.169550895690918f));
  p = fma(p, u, set1(2.1719112396240234f));
  p = fma(p, u, set1(0.9943749308586121f));
  p = fma(p, u, set1(0.3989894688129425f));
  const vf tail = p * u * bell;
  vf q = set1(-7.662608368264046e-06f);
  q = fma(q, square, set1(0.0001135074780904688f));
  q = fma(q, square, set1(-0.0011863484978675842f));
  q = fma(q, square, set1(0.009973330423235893f));
  q = fma(q, square, set1(-0.06649035960435867f));
  q = fma(q, square, set1(0.3989422917366028f));
  const vf far = select(x >= set1(0), set1(1) - tail, tail);
  return {select(t < set1(1), fma(q, x, set1(0.5f)), far), bell};
}

struct Gelu {
  static FL_INLINE_MEMBER vf value(vf x) {
    const vf bounded = max(set1(-kLargest), x);    // -inf * 0 would be NaN; in this order NaN passes
    return bounded * normal(bounded).below;
  }
  static FL_INLINE_MEMBER Slope slope(vf x) {    // Phi(x) + x phi(x), phi(x) = e^(-x^2/2) / sqrt(2 pi)
    const Normal n = normal(x);
    return {x * n.below, fma(x * set1(0.3989422804014327f), n.bell, n.below)};
  }
};

// x (1 + tanh(z / 2)) / 2 = x sigmoid(z) with z = 2 sqrt(2/pi) (x + 0.044715 x^3).
constexpr float kLinear = 1.5957691216057308f, kCubic = 0.07135481627159664f;

struct GeluTanh {
  static FL_INLINE_MEMBER vf value(vf x) {
    const vf bounded = max(set1(-kLargest), x);
    return bounded * sigmoid(bounded * fma(bounded * bounded, set1(kCubic), set1(kLinear))).of;
  }
  static FL_INLINE_MEMBER Slope slope(vf x) {    // s * (1 + x z' (1 - s)) with s = sigmoid(z)
    const vf near = min(set1(30), max(set1(-30), x)), square = near * near;    // beyond, 1 - s or s is zero
    const Sigmoid s = sigmoid(near * fma(square, set1(kCubic), set1(kLinear)));
    const vf rise = near * fma(square, set1(3 * kCubic), set1(kLinear));
    return {x * s.of, s.of * fma(rise, s.of_negative, set1(1))};
  }
};

template <bool gated, class Args> FL_INLINE void run_gelu(const Args& a, Team& team) {
  a.tanh ? run_gated<GeluTanh, gated>(a, team) : run_gated<Gelu, gated>(a, team);
}

}  // namespace
}  // namespace fastllm
