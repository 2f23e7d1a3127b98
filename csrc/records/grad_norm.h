// grad_norm: the root of the sum of squares over a list of tensors
#pragma once
#include "tensor_list.h"

namespace fastllm {

struct GradNormTensor {
  const void* grad;
  int64_t count;
};
struct GradNormArgs {
  float* norm;
  const GradNormTensor* tensors;
  int64_t count, blocks, dtype;
};
static inline int64_t work(const GradNormArgs& a) { return a.blocks * kListBlock; }
static inline int64_t scratch_bytes(const GradNormArgs& a, int64_t) { return a.blocks * 8; }

}  // namespace fastllm
