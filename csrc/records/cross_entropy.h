// cross_entropy: loss = logsumexp(logits) - (1 - smoothing) logits[target] - smoothing mean(logits) + z logsumexp^2
#pragma once
#include "../common.h"

namespace fastllm {

struct CrossEntropyArgs {
  float* loss;     // [rows]; 0 where the target is ignored
  float* stats;    // [rows, 2]: the largest logit, log of the sum of exp(logit - largest)
  const void* logits;
  const int64_t* target;    // [rows]
  int64_t rows, vocab, logits_stride, ignore_index, dtype;
  double smoothing, softcap, z_loss;    // softcap 0: none
};
static inline int64_t work(const CrossEntropyArgs& a) { return a.rows * a.vocab * 2; }

struct CrossEntropyBackwardArgs {
  void* dlogits;    // [rows, vocab] contiguous
  const float* dloss;    // [rows], of any stride
  const void* logits;
  const int64_t* target;
  const float* stats;
  int64_t rows, vocab, dloss_stride, logits_stride, ignore_index, dtype;
  double smoothing, softcap, z_loss;
};
static inline int64_t work(const CrossEntropyBackwardArgs& a) { return a.rows * a.vocab * 2; }

}  // namespace fastllm
