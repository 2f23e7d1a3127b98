// soft_cap: cap * tanh(x / cap), for attention scores and for logits.
#pragma once
#include "simd.h"

namespace fastllm {
namespace {

// Near zero an odd polynomial (the coefficients of Cephes' tanhf), else 1 - 2 / (e^2t + 1). Its slope at x is 1 - (y / cap)^2.
FL_INLINE vf soft_cap(vf x, vf cap) {
  const vf t = x / cap, size = max(t, set1(0) - t), square = t * t;
  vf p = set1(-5.70498872745e-3f);
  p = fma(p, square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  const vf small = fma(p * square, t, t), large = set1(1) - set1(2) / (exp(size + size) + set1(1));
  const vf signed_large = select(t < set1(0), set1(0) - large, large);
  return cap * select(size < set1(0.625f), small, select(is_nan(x), x, signed_large));
}

}  // namespace
}  // namespace fastllm
