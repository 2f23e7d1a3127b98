// dropout: y = kept ? x / (1 - p) : 0
#pragma once
#include "../common.h"

namespace fastllm {

struct DropoutArgs {
  void* y;    // [rows, cols] contiguous
  const void* x;
  int64_t rows, cols, x_stride, dtype, seed, call, threshold;
  double p;
};
static inline int64_t work(const DropoutArgs& a) { return a.rows * a.cols * 4; }

}  // namespace fastllm
