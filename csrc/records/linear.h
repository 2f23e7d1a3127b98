// linear: y = norm(x) W^T + bias, then + residual, or silu(gate) * up; and y = x W and y = x^T W, the gradients of its input and
// of its weight
#pragma once
#include "../common.h"

namespace fastllm {

// How a weight W [N, K] lies, and which side of it a product takes.
enum WeightForm : int64_t {
  kPanels = 0,          // x W^T: float32 panels of 16 rows, [N/16][K][16], rows beyond N zero
  kRows = 1,            // x W^T: row-major, packed into panels on the way
  kRowsAcross = 2,      // x W
  kPanelsAcross = 3,    // x W
  kInt4Across = 4,      // x W, of the dequantised panels of quant_linear; the next three likewise
  kInt4MinAcross = 5,
  kInt8Across = 6,
  kInt8MinAcross = 7,
  kInt4 = 8,            // x W^T, of those panels, x rounded to 8 bits; the next three likewise
  kInt4Min = 9,
  kInt8 = 10,
  kInt8Min = 11,
  kOuter = 12,          // x^T W, both row-major, x [depth, rows] and W [depth, cols]: a sum of outer products
};
// Two stacked halves of a weight, gate over up, whose panels alternate: gate, up, gate, up.
enum Halves : int64_t {
  kWhole = 0,
  kSwiglu = 1,    // y = silu(gate) * up
  kGateUp = 2,    // panels alternate, y (across: x) is [gate, up]
};

struct LinearArgs {
  void* y;                 // [rows, cols] of y_dtype, unit stride in cols
  const void* x;           // [rows, depth] of x_dtype; kOuter: [depth, rows]
  const void* weight;      // as `form` says; rows of `dtype`
  const void* bias;        // [cols] of dtype, or null
  const void* residual;    // [rows, cols] of dtype, or null
  const void* norm;        // [depth] of x_dtype, the weight of an rms_norm applied to x first, or null
  int64_t rows, cols, depth, x_stride, y_stride, weight_stride, residual_stride, form, halves, x_dtype, dtype, y_dtype;
  int64_t group;           // k that share a scale of a quantised weight: 32, 64 or 128
  double eps;
};
static inline bool quantises(const LinearArgs& a) { return a.form >= kInt4 && a.form <= kInt8Min; }    // rows of x, to 8 bits
static inline int64_t work(const LinearArgs& a) { return a.rows * a.cols * a.depth / (quantises(a) ? 16 : 8); }
// Groups of two panels that a thread packs before rows pass over them: each pass reads x again. A megabyte, to stay in cache.
static inline int64_t packed_groups(int64_t depth) { return depth <= 2048 ? 4 : depth <= 4096 ? 2 : 1; }
// A thread's own: resting chains of a row block against two panels, and packed panels.
static inline int64_t linear_thread_floats(const LinearArgs& a) {
  return 96 * 2 * 16 + (a.form == kPanels ? 0 : packed_groups(a.depth) * 2 * 16 * a.depth);
}
// A tile multiplies twelve rows of x at once. Where these lie a multiple of 4 KiB apart, their elements of one k share a set of the
// first cache, which has eight places, or twelve: so rows that are made lie 64 bytes further apart. Against fewer columns than 256
// a copy costs what it saves.
static inline bool collides(int64_t stride) { return stride % 1024 == 0; }    // floats from row to row
static inline int64_t row_floats(int64_t depth) { return collides(depth) ? depth + 16 : depth; }
static inline bool rows_collide(const LinearArgs& a) { return collides(a.x_stride) && a.rows >= 12 && a.cols >= 256; }
// x as the product reads it, where it must be made: normalised, widened, transposed or spread rows, once, or for few rows once a
// thread.
static inline bool makes_rows(const LinearArgs& a) { return a.norm || a.x_dtype != kFloat32 || a.form == kOuter || rows_collide(a); }
static inline int64_t linear_x_floats(const LinearArgs& a, int64_t threads) {
  return makes_rows(a) ? (a.rows <= 4 ? threads : 1) * a.rows * row_floats(a.depth) : 0;
}
static inline int64_t activation_bytes(int64_t rows, int64_t depth) { return (rows + 15) / 16 * 16 * (depth + depth / 32 * 8); }
static inline int64_t scratch_bytes(const LinearArgs& a, int64_t threads) {
  const int64_t depth = (a.depth + 31) / 32 * 32;
  if (quantises(a)) return threads * depth * 4 + (a.rows <= 4 ? threads : 1) * activation_bytes(a.rows, depth);
  return 4 * (linear_x_floats(a, threads) + threads * linear_thread_floats(a));
}

// A weight packed for good: panel p at p * panel_stride.
struct PackPanelsArgs {
  float* panels;
  const void* weight;    // [cols, depth] of dtype
  int64_t cols, depth, weight_stride, panel_stride, dtype;
};
static inline int64_t work(const PackPanelsArgs& a) { return a.cols * a.depth; }

// Rows of a packed weight: y[i, :] = row ids[i].
struct PanelRowsArgs {
  float* y;
  const int64_t* ids;
  const float* panels;
  int64_t count, rows, depth;
};
static inline int64_t work(const PanelRowsArgs& a) { return a.count * a.depth; }

}  // namespace fastllm
