// top_logprobs: the likeliest tokens of every row of logits, with their log-probabilities
#pragma once
#include "sample.h"

namespace fastllm {

struct TopLogprobsArgs {
  int64_t* token;    // [count, best]
  float* logprob;    // [count, best]
  const float* logits;
  int64_t count, vocab, logits_stride, best;
};
static inline int64_t work(const TopLogprobsArgs& a) { return a.count * a.vocab * 2; }
static inline int64_t scratch_bytes(const TopLogprobsArgs& a, int64_t threads) { return threads * sample_scratch(a.vocab, threads); }

}  // namespace fastllm
