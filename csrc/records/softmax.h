// softmax: y = exp(x / temperature - max) / sum, over the columns
#pragma once
#include "../common.h"

namespace fastllm {

struct SoftmaxArgs {
  void* y;    // [rows, cols] contiguous
  const void* x;
  int64_t rows, cols, x_stride, dtype;
  double scale;    // 1 / temperature
};
static inline int64_t work(const SoftmaxArgs& a) { return a.rows * a.cols * 6; }
// A row of weights for each thread.
static inline int64_t scratch_bytes(const SoftmaxArgs& a, int64_t threads) { return threads * ((a.cols + 15) / 16 * 64); }

struct SoftmaxBackwardArgs {
  void* dx;    // [rows, cols] contiguous
  const void *dy, *y;
  int64_t rows, cols, dy_stride, y_stride, dtype;
  double scale;
};
static inline int64_t work(const SoftmaxBackwardArgs& a) { return a.rows * a.cols * 4; }

}  // namespace fastllm
