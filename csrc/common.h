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

// How this processor reads memory fastest: runs side by side in a thread, and bytes to prefetch ahead in each (cpu/registry.cpp).
struct Streaming {
  int64_t streams, ahead;
};
extern const Streaming streaming;

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

// ---- linear: y = norm(x) W^T + bias, then + residual, or silu(gate) * up -----------------------------------------------
struct LinearArgs {
  float* y;              // [rows, cols], unit stride in cols
  const float* x;        // [rows, depth]
  const float* panels;   // [cols/16][depth][16], columns beyond `cols` zero; swiglu: gate and up panels alternate. Or null:
  const float* weight;   // [cols, depth] row-major, packed on the way; swiglu: [2 cols, depth], gate rows first
  const float* bias;     // [cols] or null
  const float* residual; // [rows, cols] or null
  const float* norm;     // [depth], weight of an rms_norm applied to x first, or null
  int64_t rows, cols, depth, x_stride, y_stride, weight_stride, residual_stride, swiglu;
  double eps;
};
static inline int64_t work(const LinearArgs& a) { return a.rows * a.cols * a.depth / 8; }
// A thread's own: resting chains of a row block against two panels, and two packed panels.
static inline int64_t linear_thread_floats(const LinearArgs& a) { return 96 * 2 * 16 + (a.panels ? 0 : 2 * 16 * a.depth); }
static inline int64_t scratch_bytes(const LinearArgs& a, int64_t threads) {
  int64_t normalised = a.norm ? (a.rows <= 4 ? threads : 1) * a.rows * a.depth : 0;
  return 4 * (normalised + threads * linear_thread_floats(a));
}

// ---- quant_linear: the same with weights of 4 or 8 bits in groups of 32; layout in cpu/quant_linear.cpp -----------------
struct QuantLinearArgs {
  float* y;
  const float* x;
  const uint8_t* weight;    // panels
  const float *bias, *residual, *norm;
  int64_t rows, cols, depth, x_stride, y_stride, residual_stride, swiglu, bits, has_min;
  double eps;
};
static inline int64_t work(const QuantLinearArgs& a) { return a.rows * a.cols * a.depth / 16; }
static inline int64_t activation_bytes(int64_t rows, int64_t depth) { return (rows + 7) / 8 * 8 * (depth + depth / 32 * 8); }
static inline int64_t scratch_bytes(const QuantLinearArgs& a, int64_t threads) {
  const int64_t depth = (a.depth + 31) / 32 * 32;
  return threads * depth * 4 + (a.rows <= 4 ? threads : 1) * activation_bytes(a.rows, depth);
}

// Rows of a quantised weight as floats: y[i, :] = dequantised row ids[i].
struct QuantEmbeddingArgs {
  float* y;
  const int64_t* ids;
  const uint8_t* weight;
  int64_t count, rows, depth, bits, has_min;
};
static inline int64_t work(const QuantEmbeddingArgs& a) { return a.count * a.depth; }

// Rows [first, first + count) of a quantised weight of `rows` rows, from blocks of 32 as GGUF stores them: float16 scale, float16
// minimum if block_min, then 16 bytes of nibbles (k and k + 16) or 32 of s8. A block may hold fewer bits than the panels, and
// have no minimum where they have one: nothing is lost.
struct PackQuantsArgs {
  uint8_t* panels;
  const uint8_t* blocks;    // [count, groups] contiguous
  int64_t first, count, rows, groups, swiglu, bits, has_min, block_bits, block_min;
};
static inline int64_t work(const PackQuantsArgs& a) { return a.count * a.groups * 32; }

struct PackPanelsArgs {
  float* panels;    // panel p at p * panel_stride
  const float* weight;
  int64_t cols, depth, weight_stride, panel_stride;
};
static inline int64_t work(const PackPanelsArgs& a) { return a.cols * a.depth; }

// Rows of a packed weight: y[i, :] = row ids[i].
struct PanelRowsArgs {
  float* y;
  const int64_t* ids;
  const float* panels;
  int64_t count, rows, depth;
};
static inline int64_t work(const PanelRowsArgs& a) { return a.count * a.depth; }

// ---- swiglu: y = gate * sigmoid(gate) * up ----------------------------------------------------------------------------
struct SwigluArgs {
  void* y;    // [rows, cols] contiguous
  const void *gate, *up;
  int64_t rows, cols, gate_stride, up_stride, dtype;
};
static inline int64_t work(const SwigluArgs& a) { return a.rows * a.cols * 4; }

struct SwigluBackwardArgs {
  void *dgate, *dup;    // [rows, cols] contiguous
  const void *dy, *gate, *up;
  int64_t rows, cols, dy_stride, gate_stride, up_stride, dtype;
};
static inline int64_t work(const SwigluBackwardArgs& a) { return a.rows * a.cols * 6; }

// ---- embedding: y[t] = weight[ids[t]] ----------------------------------------------------------------------------------
struct EmbeddingArgs {
  void* y;            // [count, cols] contiguous; a row whose id is out of range becomes NaN
  const void* ids;    // [count], read again at every replay
  const void* weight;
  int64_t count, cols, vocabulary, ids_stride, weight_stride, wide_ids, dtype;    // wide_ids: int64 ids, else int32
};
static inline int64_t work(const EmbeddingArgs& a) { return a.count * a.cols; }

struct EmbeddingBackwardArgs {
  void* dweight;    // [vocabulary, cols] contiguous; every row is written once
  const void *dy, *ids;
  int64_t count, cols, vocabulary, dy_stride, ids_stride, wide_ids, dtype;
};
static inline int64_t work(const EmbeddingBackwardArgs& a) { return (a.count + a.vocabulary) * a.cols; }
// The chains of positions that hold the same id (first and next), and the counter that hands out work.
static inline int64_t scratch_bytes(const EmbeddingBackwardArgs& a, int64_t) { return (a.vocabulary + a.count + 8) * 8; }

// ---- ceilings: what the machine can do at best; threads share the lines, each runs a peak whole ----------------------
struct ReadBandwidthArgs {
  int32_t* sum;    // += the 32-bit lanes of data, wrapping: proof that everything was read
  const void* data;
  int64_t lines, streams, prefetch;    // 64-byte lines; runs read side by side in a thread; bytes ahead
};
static inline int64_t work(const ReadBandwidthArgs& a) { return a.lines * 16; }

struct PeakArgs {
  double* result;         // [threads]: keeps the arithmetic alive
  int64_t* operations;    // += operations done (a multiply and an add count two)
  int64_t iterations;
  double factor, term;
};
static inline int64_t work(const PeakArgs&) { return int64_t(1) << 40; }    // always on every thread


// ---- rope: (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of the first `rotary` elements of a head ---------
struct RopeArgs {
  void *q_out, *k_out;    // [batch, tokens, heads | kv_heads, dim] contiguous
  const void *q, *k, *position;    // position: int64 or int32
  const float* table;              // [positions, rotary] contiguous: cosines, then sines
  int64_t batch, tokens, heads, kv_heads, dim, rotary, positions;
  int64_t q_batch, q_row, q_head, k_batch, k_row, k_head, position_batch, position_row, position_is_int64, dtype;
};
static inline int64_t work(const RopeArgs& a) { return a.batch * a.tokens * (a.heads + a.kv_heads) * a.dim * 2; }

// ---- kv_append: rope of q and k, k and v written into the pages of one layer ------------------------------------------
constexpr int64_t kPage = 16;    // tokens a page of the cache: K as [dim][16], V as [16][dim]

struct KvAppendArgs {
  float *q_out, *k_pages, *v_pages;    // q_out [tokens, heads, dim] contiguous; pages [pages][kv_heads, dim * 16]
  const float *q, *k, *v;
  const int64_t* slot;     // [tokens]: page * 16 + offset, negative: write nothing
  const void* position;    // [tokens]: int64 or int32
  const float* table;
  int64_t tokens, heads, kv_heads, dim, rotary, positions, pages;    // heads is 0 without q
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, position_is_int64, k_page, v_page;    // _page: from page to page
};
static inline int64_t work(const KvAppendArgs& a) { return a.tokens * (a.heads + 2 * a.kv_heads) * a.dim * 2; }

// ---- attention: softmax(q k^T * scale) v over KV tiles of 256 keys, dense and paged ------------------------------------
constexpr int64_t kKvTile = 256;
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kQueryBlock = 192;    // query rows that share a pass over the keys
constexpr int64_t kSplitRows = 32;      // fewer rows than this may be cut over KV tiles

struct AttentionArgs {
  float* out;    // [batch, queries, heads, dim] contiguous
  const float *q, *k, *v;
  int64_t batch, queries, keys, heads, kv_heads, dim;
  int64_t q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head;
  int64_t causal, window;    // window 0: none
  double scale, softcap;     // softcap 0: none
};
struct PagedAttentionArgs {
  float* out;    // [rows, heads, dim] contiguous
  const float *q, *k_pages, *v_pages;
  const int32_t *block_table, *context_len, *cu_q;
  int64_t batch, rows, heads, kv_heads, dim, pages, max_pages, table_row;
  int64_t q_row, q_head, k_page, v_page;
  int64_t causal, window;
  double scale, softcap;
};

// A thread's scratch, in floats: query rows, their running state, one group's scores, packed keys and values, partials.
struct AttentionScratch {
  int64_t query, state, values, group, keys, padded_values, partial, total;
};
static inline AttentionScratch attention_scratch(int64_t rows, int64_t tiles, int64_t dim, bool packed) {
  const int64_t padded = (dim + 15) / 16 * 16, block = (rows < kQueryBlock ? rows : kQueryBlock) + 16;
  AttentionScratch s;
  s.query = block * (kMaxHeadDim + 16);
  s.state = block * 6;
  s.values = block * padded;
  s.group = 8 * (kKvTile + 16 + padded);
  s.keys = packed ? kKvTile * dim : 0;
  s.padded_values = padded == dim ? 0 : kKvTile * padded;
  s.partial = (rows < kSplitRows ? rows : kSplitRows) * tiles * (padded + 16);
  s.total = s.query + s.state + s.values + s.group + s.keys + s.padded_values + s.partial;
  s.total = (s.total + 15) / 16 * 16;
  return s;
}
static inline AttentionScratch layout(const AttentionArgs& a) {
  return attention_scratch(a.queries * (a.heads / a.kv_heads), (a.keys + kKvTile - 1) / kKvTile, a.dim, true);
}
static inline AttentionScratch layout(const PagedAttentionArgs& a) {
  return attention_scratch(a.rows * (a.heads / a.kv_heads), (a.max_pages * kPage + kKvTile - 1) / kKvTile, a.dim, false);
}
static inline int64_t scratch_bytes(const AttentionArgs& a, int64_t threads) { return threads * layout(a).total * 4; }
static inline int64_t scratch_bytes(const PagedAttentionArgs& a, int64_t threads) { return threads * layout(a).total * 4; }

// Eight multiply-adds weigh as much as one element touched.
static inline int64_t work(const AttentionArgs& a) { return a.batch * a.queries * a.keys * a.heads * a.dim / 4; }
static inline int64_t work(const PagedAttentionArgs& a) {
  int64_t scores = 0;
  for (int64_t b = 0; b < a.batch; ++b) scores += int64_t(a.cu_q[b + 1] - a.cu_q[b]) * a.context_len[b];
  return scores * a.heads * a.dim / 4;
}

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

// ---- target_logprobs: log p of a given token at temperature 1 ------------------------------------------------------------
struct TargetLogprobsArgs {
  float* logprob;    // [count]
  const float* logits;
  const int64_t* target;
  int64_t count, vocab, logits_stride;
};
static inline int64_t work(const TargetLogprobsArgs& a) { return a.count * a.vocab * 2; }
static inline int64_t scratch_bytes(const TargetLogprobsArgs& a, int64_t threads) { return threads * sample_scratch(a.vocab, threads); }

// ---- advance: what a decode step changes between the sampled token and the next forward --------------------------------
struct AdvanceArgs {
  SampleRow* state;
  int32_t* history;         // [state_rows, history_stride]
  void* position;           // [count] int64 or int32, or null
  int32_t* context_len;     // [count] or null
  int64_t* slot;            // [count] or null: where the cache takes the token, from block_table
  int64_t* next_ids;        // [count] or null: takes the token, for the embedding of the next step
  const int64_t* token;     // [count]
  const int32_t* rows;      // as in SampleArgs
  const int32_t* block_table;    // [count, table_stride]
  int64_t count, state_rows, history_stride, table_stride, pages, page, position_is_int64;    // pages: columns of the table
};
static inline int64_t work(const AdvanceArgs& a) { return a.count; }

}  // namespace fastllm
