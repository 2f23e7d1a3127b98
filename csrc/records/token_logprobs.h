// token_logprobs: log-probability of a given token and entropy, of a block of rows of logits; and their gradient, in place
#pragma once
#include "sample.h"

namespace fastllm {

struct TokenLogprobsArgs {
  float *logprob, *entropy;    // [rows]
  float* logits;               // [rows, vocab]: becomes the gradient where dlogprob and dentropy are given
  const int64_t* target;
  const int32_t* kept;         // [rows]: how many tokens the distribution is over, the largest logits; null: all
  const float *dlogprob, *dentropy;    // [rows], both or neither
  int64_t rows, vocab, logits_stride;
  double temperature;
};
static inline int64_t work(const TokenLogprobsArgs& a) { return a.rows * a.vocab * 4; }
static inline int64_t scratch_bytes(const TokenLogprobsArgs& a, int64_t threads) { return threads * sample_scratch(a.vocab, 1); }

}  // namespace fastllm
