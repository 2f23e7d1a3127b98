// swiglu: y = gate * sigmoid(gate) * up
#pragma once
#include "../common.h"

namespace fastllm {

struct SwigluArgs {
  void* y;    // [rows, cols] contiguous
  const void *gate, *up;
  int64_t rows, cols, gate_stride, up_stride, dtype;
};
static inline int64_t work(const SwigluArgs& a) { return a.rows * a.cols * 4; }

struct SwigluBackwardArgs {
  void *dgate, *dup;    // [rows, cols] contiguous
  const void *dy, *gate, *up;
  int64_t rows, cols, dy_stride, gate_stride, up_stride, dtype;
};
static inline int64_t work(const SwigluBackwardArgs& a) { return a.rows * a.cols * 6; }

}  // namespace fastllm
