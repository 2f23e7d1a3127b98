// target_logprobs: log p of a given token at temperature 1
#pragma once
#include "sample.h"

namespace fastllm {

struct TargetLogprobsArgs {
  float* logprob;    // [count]
  const float* logits;
  const int64_t* target;
  int64_t count, vocab, logits_stride;
};
static inline int64_t work(const TargetLogprobsArgs& a) { return a.count * a.vocab * 2; }
static inline int64_t scratch_bytes(const TargetLogprobsArgs& a, int64_t threads) { return threads * sample_scratch(a.vocab, threads); }

}  // namespace fastllm
