// rms_norm: s = x + residual; rstd = 1/sqrt(mean(s^2) + eps); y = s * rstd * weight
#pragma once
#include "norm.h"

namespace fastllm {

struct RmsNormArgs {
  void *y, *s;    // [rows, cols] contiguous; s is null when there is no residual
  float* rstd;    // [rows] or null
  const void *x, *residual, *weight;
  int64_t rows, cols, x_stride, residual_stride, dtype;
  double eps;
};
static inline int64_t work(const RmsNormArgs& a) { return a.rows * a.cols * 2; }

struct RmsNormBackwardArgs {
  void* dx;          // [rows, cols] contiguous
  float* dweight;    // [cols]
  const void *dy, *ds, *s, *weight;    // ds: gradient that reaches s beside the norm, or null
  const float* rstd;
  int64_t rows, cols, dy_stride, ds_stride, s_stride, dtype;
};
static inline int64_t work(const RmsNormBackwardArgs& a) { return a.rows * a.cols * 4; }
static inline int64_t scratch_bytes(const RmsNormBackwardArgs& a, int64_t) { return norm_scratch(a.rows, a.cols, 1); }

}  // namespace fastllm
