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
enum Status : int32_t { kOk = 0, kIndexOutOfRange = 1 };

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
  float *q_out, *k_pages, *v_pages;    // q_out [tokens, heads, dim] contiguous; pages [pages, kv_heads, dim * 16]
  const float *q, *k, *v;
  const int64_t* slot;     // [tokens]: page * 16 + offset, negative: write nothing
  const void* position;    // [tokens]: int64 or int32
  const float* table;
  int64_t tokens, heads, kv_heads, dim, rotary, positions, pages;    // heads is 0 without q
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, position_is_int64;
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
  int64_t q_row, q_head;
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

}  // namespace fastllm
