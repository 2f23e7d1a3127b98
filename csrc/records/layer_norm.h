// layer_norm: s = x + residual; rstd = 1/sqrt(mean((s - mean(s))^2) + eps); y = (s - mean) * rstd * weight + bias
#pragma once
#include "norm.h"

namespace fastllm {

struct LayerNormArgs {
  void *y, *s;           // [rows, cols] contiguous; s is null when there is no residual
  float *mean, *rstd;    // [rows], both or neither
  const void *x, *residual, *weight, *bias;    // bias [cols] or null
  int64_t rows, cols, x_stride, residual_stride, dtype;
  double eps;
};
static inline int64_t work(const LayerNormArgs& a) { return a.rows * a.cols * 3; }

struct LayerNormBackwardArgs {
  void* dx;                   // [rows, cols] contiguous
  float *dweight, *dbias;     // [cols]
  const void *dy, *ds, *s, *weight;    // ds: gradient that reaches s beside the norm, or null
  const float *mean, *rstd;
  int64_t rows, cols, dy_stride, ds_stride, s_stride, dtype;
};
static inline int64_t work(const LayerNormBackwardArgs& a) { return a.rows * a.cols * 5; }
static inline int64_t scratch_bytes(const LayerNormBackwardArgs& a, int64_t) { return norm_scratch(a.rows, a.cols, 2); }

}  // namespace fastllm
