// adamw: one step of AdamW over a list of tensors, in place
#pragma once
#include "tensor_list.h"

namespace fastllm {

struct AdamwTensor {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  float* master;    // or null: param itself is the weight
  int64_t count;
};
struct AdamwArgs {
  const AdamwTensor* tensors;
  const float *scale, *skip;    // factor of the gradients, or null; not zero: change nothing, or null
  const float* rates;           // step_size and keep of each tensor, [count, 2], in place of the two below, or null
  int64_t count, blocks, param_dtype, grad_dtype, moment_dtype;
  double step_size, root, beta1, beta2, eps, keep;    // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), 1 - lr * decay
};
static inline int64_t work(const AdamwArgs& a) { return a.blocks * kListBlock; }

}  // namespace fastllm
