// y = act(gate) * up, or act(gate) where up is null: swiglu, geglu, gelu
#pragma once
#include "../common.h"

namespace fastllm {

struct GatedArgs {
  void* y;    // [rows, cols] contiguous
  const void *gate, *up;
  int64_t rows, cols, gate_stride, up_stride, dtype;
};
static inline int64_t work(const GatedArgs& a) { return a.rows * a.cols * 4; }

struct GatedBackwardArgs {
  void *dgate, *dup;    // [rows, cols] contiguous
  const void *dy, *gate, *up;
  int64_t rows, cols, dy_stride, gate_stride, up_stride, dtype;
};
static inline int64_t work(const GatedBackwardArgs& a) { return a.rows * a.cols * 6; }

struct GeluArgs : GatedArgs {
  int64_t tanh;    // the approximation by tanh
};
struct GeluBackwardArgs : GatedBackwardArgs {
  int64_t tanh;
};

}  // namespace fastllm
