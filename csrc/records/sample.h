// sample: the next token of every row of logits
#pragma once
#include "../common.h"

namespace fastllm {

// What a row asks of the sampler, one cache line. temperature <= 0: greedy; top_k <= 0, top_p >= 1, min_p <= 0: off.
struct SampleRow {
  int64_t seed, index, position;    // what the random number depends on, and nothing else
  float temperature, top_p, min_p, repetition, presence, frequency;
  int32_t top_k, prompt_len, history_len, min_new;
};
static_assert(sizeof(SampleRow) == 64, "ops/sample.py knows this layout");

constexpr int64_t kLogitBlock = 256;    // logits of one block of maxima

struct SampleArgs {
  int64_t* token;                                  // [count]
  float *logprob, *truncated_logprob, *entropy;    // [count]; entropy may be null
  int32_t* kept;                                   // [count]
  const float* logits;
  const SampleRow* state;     // [state_rows]
  const int32_t* rows;        // [count]: row of the state that a row of logits uses, negative: left out; null: the same
  const int32_t* history;     // [state_rows, history_stride]: prompt, then what was generated
  const int32_t* suppress;    // [state_rows, suppressed]: ids kept out while fewer than min_new were generated
  int64_t count, vocab, logits_stride, state_rows, history_stride, suppressed;
};
static inline int64_t work(const SampleArgs& a) { return a.count * a.vocab * 2; }

// Bytes of scratch that the threads of one row share, for up to `threads` of them; csrc/cpu/row.h lays it out.
static inline int64_t sample_scratch(int64_t vocab, int64_t threads) {
  const int64_t blocks = (vocab + kLogitBlock - 1) / kLogitBlock;
  return (threads * 64 + blocks * (2 * 64 + 8) + 7 * (blocks * 4 * kLogitBlock + 64) + 63) / 64 * 64;
}
static inline int64_t scratch_bytes(const SampleArgs& a, int64_t threads) { return threads * sample_scratch(a.vocab, threads); }

}  // namespace fastllm
