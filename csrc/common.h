// What the CPU kernels, the CUDA kernels and the bindings share: plain records and nothing that needs a library.
//
// An argument record has 8-byte fields only (pointer, int64_t, double), so that one generic binding fills every record
// from Python and a plan stores it as bytes. Strides and sizes count elements; a null pointer means "absent".
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fastllm {

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// What a kernel reports besides its outputs. Everything else is validated before a kernel is entered.
enum Status : int32_t { kOk = 0, kIndexOutOfRange = 1, kNotANumber = 2 };

// Threads that run one kernel together. Every kernel is SPMD: it is entered by `size` threads, takes its own share of the
// work by `rank`, and may meet the others at a barrier. `scratch` is shared by the team, 64-byte aligned, uninitialised.
struct Barrier {
  alignas(64) int32_t arrived;
  alignas(64) int32_t phase;
};
struct Team {
  int32_t rank, size;
  Barrier* barrier;
  char* scratch;
  int32_t* status;
};

// Defaults, overloaded beside the records that need more.
template <class Args> int64_t scratch_bytes(const Args&, int64_t /*threads*/) { return 0; }

// ---- rms_norm: s = x + residual; rstd = 1/sqrt(mean(s^2) + eps); y = s * rstd * weight -------------------------------
struct RmsNormArgs {
  void *y, *s;    // [rows, cols] contiguous; s is null when there is no residual
  float* rstd;    // [rows] or null
  const void *x, *residual, *weight;
  int64_t rows, cols, x_stride, residual_stride, dtype;
  double eps;
};
static inline int64_t work(const RmsNormArgs& a) { return a.rows * a.cols * 2; }

struct RmsNormBackwardArgs {
  void* dx;          // [rows, cols] contiguous
  float* dweight;    // [cols]
  const void *dy, *ds, *s, *weight;    // ds: gradient that reaches s beside the norm, or null
  const float* rstd;
  int64_t rows, cols, dy_stride, ds_stride, s_stride, dtype;
};
static inline int64_t work(const RmsNormBackwardArgs& a) { return a.rows * a.cols * 4; }
static inline int64_t scratch_bytes(const RmsNormBackwardArgs& a, int64_t threads) { return threads * (a.cols + 16) * 4; }

// ---- sample: the next token of every row of logits ---------------------------------------------------------------------
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

struct TopLogprobsArgs {
  int64_t* token;    // [count, best]
  float* logprob;    // [count, best]
  const float* logits;
  int64_t count, vocab, logits_stride, best;
};
static inline int64_t work(const TopLogprobsArgs& a) { return a.count * a.vocab * 2; }
static inline int64_t scratch_bytes(const TopLogprobsArgs& a, int64_t threads) { return threads * sample_scratch(a.vocab, threads); }

// ---- advance: what a decode step changes between the sampled token and the next forward --------------------------------
struct AdvanceArgs {
  SampleRow* state;
  int32_t* history;         // [state_rows, history_stride]
  void* position;           // [count] int64 or int32, or null
  int32_t* context_len;     // [count] or null
  int64_t* slot;            // [count] or null: where the cache takes the token, from block_table
  const int64_t* token;     // [count]
  const int32_t* rows;      // as in SampleArgs
  const int32_t* block_table;    // [count, table_stride]
  int64_t count, state_rows, history_stride, table_stride, pages, page, position_is_int64;    // pages: columns of the table
};
static inline int64_t work(const AdvanceArgs& a) { return a.count; }

}  // namespace fastllm
