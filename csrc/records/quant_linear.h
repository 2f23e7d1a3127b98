// quant_linear: the same with weights of 4 or 8 bits in groups of 32; layout in cpu/quant_linear.cpp
#pragma once
#include "../common.h"

namespace fastllm {

struct QuantLinearArgs {
  float* y;
  const float* x;
  const uint8_t* weight;    // panels
  const float *bias, *residual, *norm;
  int64_t rows, cols, depth, x_stride, y_stride, residual_stride, swiglu, bits, has_min;
  double eps;
};
static inline int64_t work(const QuantLinearArgs& a) { return a.rows * a.cols * a.depth / 16; }
static inline int64_t activation_bytes(int64_t rows, int64_t depth) { return (rows + 7) / 8 * 8 * (depth + depth / 32 * 8); }
static inline int64_t scratch_bytes(const QuantLinearArgs& a, int64_t threads) {
  const int64_t depth = (a.depth + 31) / 32 * 32;
  return threads * depth * 4 + (a.rows <= 4 ? threads : 1) * activation_bytes(a.rows, depth);
}

// Rows of a quantised weight as floats: y[i, :] = dequantised row ids[i].
struct QuantEmbeddingArgs {
  float* y;
  const int64_t* ids;
  const uint8_t* weight;
  int64_t count, rows, depth, bits, has_min;
};
static inline int64_t work(const QuantEmbeddingArgs& a) { return a.count * a.depth; }

// Rows [first, first + count) of a quantised weight of `rows` rows, from blocks of 32 as GGUF stores them: float16 scale, float16
// minimum if block_min, then 16 bytes of nibbles (k and k + 16) or 32 of s8. A block may hold fewer bits than the panels, and
// have no minimum where they have one: nothing is lost.
struct PackQuantsArgs {
  uint8_t* panels;
  const uint8_t* blocks;    // [count, groups] contiguous
  int64_t first, count, rows, groups, swiglu, bits, has_min, block_bits, block_min;
};
static inline int64_t work(const PackQuantsArgs& a) { return a.count * a.groups * 32; }

struct PackPanelsArgs {
  float* panels;    // panel p at p * panel_stride
  const float* weight;
  int64_t cols, depth, weight_stride, panel_stride;
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
