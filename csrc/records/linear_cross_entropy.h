// linear_cross_entropy: the loss of a block of rows of logits, which their gradient overwrites
#pragma once
#include "../common.h"

namespace fastllm {

struct LinearCrossEntropyArgs {
  float* loss;      // [rows]
  float* logits;    // [rows, vocab]: becomes coefficient * dloss/dlogits; unchanged without coefficient
  const int64_t* target;
  const float* coefficient;    // [rows] or null
  int64_t rows, vocab, logits_stride, ignore_index;
  double smoothing, softcap, z_loss;
};
static inline int64_t work(const LinearCrossEntropyArgs& a) { return a.rows * a.vocab * 4; }

}  // namespace fastllm
