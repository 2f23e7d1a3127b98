// lora_linear: y = gain * (x W^T + s B^T) + bias with s = scale * drop(x) A^T, W frozen; and its gradients
#pragma once
#include "linear.h"

namespace fastllm {

struct LoraLinearArgs {
  LinearArgs base;         // the frozen product and its bias; no norm, residual or halves
  float* s;                // [rows, rank], or null: kept in the scratch
  const void *a, *b;       // [rank, depth], [cols, rank], row-major, of base.dtype
  const float* gain;       // [cols] or null: ones
  int64_t rank, a_stride, b_stride, seed, call, threshold;    // dropout: dropout.h; threshold 0 drops nothing
  double scale, dropout;
};
// The same for dz = gain * dy: base is dx = dz W + mask * (ds A), with ds = scale * dz B and the mask of drop(x).
struct LoraLinearBackwardArgs {
  LinearArgs base;         // y = dx [rows, cols], or null; x = dz [rows, depth]; the weight across
  float *da, *db;          // [rank, cols], [depth, rank]: ds^T drop(x), dz^T s
  const void* x;           // [rows, cols] of base.x_dtype
  const float* s;          // [rows, rank]
  const void *a, *b;       // [rank, cols], [depth, rank], row-major, of base.dtype
  int64_t x_stride, rank, a_stride, b_stride, seed, call, threshold;
  double scale, dropout;
};

// norms[n] = ||W + scale * B A|| of each row n of a base weight.
struct LoraRowNormsArgs {
  float* norms;            // [cols]
  const void *weight;      // [cols, depth] as `form` says, one of x W^T
  const void *a, *b;       // [rank, depth], [cols, rank], row-major, of dtype
  int64_t cols, depth, weight_stride, form, dtype, group, rank, a_stride, b_stride;
  double scale;
};

static inline int64_t up_to_16(int64_t n) { return (n + 15) / 16 * 16; }
constexpr int64_t kNarrowRows = 48;    // of x, that a thread takes at a time against a few panels
static inline int64_t narrow_width(int64_t depth) { return row_floats(up_to_16(depth)); }    // between rows that a thread makes
static inline int64_t narrow_floats(int64_t depth) { return 96 * 2 * 16 + kNarrowRows * narrow_width(depth); }    // a thread's own
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t work(const LoraLinearArgs& a) { return work(a.base); }
static inline int64_t scratch_bytes(const LoraLinearArgs& a, int64_t threads) {
  const int64_t panels = up_to_16(a.rank) * a.base.depth + up_to_16(a.base.cols) * a.rank, s = up_to_16(a.base.rows * a.rank);
  return 4 * (panels + s) + larger(scratch_bytes(a.base, threads), 4 * threads * narrow_floats(a.base.depth));
}
static inline int64_t work(const LoraRowNormsArgs& a) { return a.cols * a.depth * (a.rank / 4 + 1); }
static inline int64_t scratch_bytes(const LoraRowNormsArgs& a, int64_t threads) {
  return 4 * (up_to_16(a.rank) * a.depth + up_to_16(a.cols) * a.rank + threads * 2 * 16 * up_to_16(a.depth + 16));
}
static inline int64_t work(const LoraLinearBackwardArgs& a) { return work(a.base); }
static inline int64_t scratch_bytes(const LoraLinearBackwardArgs& a, int64_t threads) {
  const int64_t rows = a.base.rows, cols = a.base.cols, depth = a.base.depth;
  const int64_t panels = up_to_16(a.rank) * depth + up_to_16(cols) * a.rank, mask = rows * ((cols + 63) / 64) * 2;
  const int64_t own = threads * larger(narrow_floats(depth), 96 * 2 * 16 + packed_groups(rows) * 2 * 16 * rows);
  return 4 * (panels + up_to_16(mask) + up_to_16(rows * a.rank) + 2 * up_to_16(row_floats(rows) * a.rank) + up_to_16(depth * a.rank)) +
         larger(scratch_bytes(a.base, threads), 4 * own);
}

}  // namespace fastllm
