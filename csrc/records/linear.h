// linear: y = norm(x) W^T + bias, then + residual, or silu(gate) * up
#pragma once
#include "../common.h"

namespace fastllm {

struct LinearArgs {
  float* y;              // [rows, cols], unit stride in cols
  const float* x;        // [rows, depth]
  const float* panels;   // [cols/16][depth][16], columns beyond `cols` zero; swiglu: gate and up panels alternate. Or null:
  const float* weight;   // [cols, depth] row-major, packed on the way; swiglu: [2 cols, depth], gate rows first
  const float* bias;     // [cols] or null
  const float* residual; // [rows, cols] or null
  const float* norm;     // [depth], weight of an rms_norm applied to x first, or null
  int64_t rows, cols, depth, x_stride, y_stride, weight_stride, residual_stride, swiglu;
  double eps;
};
static inline int64_t work(const LinearArgs& a) { return a.rows * a.cols * a.depth / 8; }
// A thread's own: resting chains of a row block against two panels, and two packed panels.
static inline int64_t linear_thread_floats(const LinearArgs& a) { return 96 * 2 * 16 + (a.panels ? 0 : 2 * 16 * a.depth); }
static inline int64_t scratch_bytes(const LinearArgs& a, int64_t threads) {
  int64_t normalised = a.norm ? (a.rows <= 4 ? threads : 1) * a.rows * a.depth : 0;
  return 4 * (normalised + threads * linear_thread_floats(a));
}

}  // namespace fastllm
