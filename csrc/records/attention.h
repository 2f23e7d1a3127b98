// attention: softmax(q k^T * scale) v over KV tiles of 256 keys, dense, packed and paged, and its backward
#pragma once
#include "kv_append.h"

namespace fastllm {

constexpr int64_t kKvTile = 256;
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kQueryBlock = 192;       // query rows that share a pass over the keys
constexpr int64_t kSplitRows = 32;         // fewer rows than this may be cut over KV tiles
constexpr int64_t kGradientBlock = 96;     // query rows that the backward holds against a KV tile
constexpr int64_t kGradientUnits = 16;     // as many pieces as the backward is cut into, if it can be

// A bias is [batch, heads, queries, keys], with stride 0 where it is one for all.
struct AttentionArgs {
  void* out;            // [batch, queries, heads, dim] contiguous
  float* lse;           // [batch, heads, queries], or null
  const void *q, *k, *v;
  const int32_t *cu_q, *cu_k;    // null, or [batch + 1]: then queries and keys count the rows of all sequences
  const void* bias;              // or null
  const float *alibi, *sinks;    // [heads], or null
  int64_t batch, queries, keys, heads, kv_heads, dim;
  int64_t q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head;
  int64_t bias_batch, bias_head, bias_query, bias_key, bias_queries, bias_keys;    // strides; rows and keys it has
  int64_t dtype, bias_dtype, causal, window;                                       // window 0: none
  int64_t seed, call, threshold;
  double scale, softcap, p;    // softcap 0: none
};
struct PagedAttentionArgs {
  void* out;    // [rows, heads, dim] contiguous
  const void *q, *k_pages, *v_pages;
  const int32_t *block_table, *context_len, *cu_q;
  const float *alibi, *sinks;
  const float* scales;    // KvAppendArgs; where there are any, dim is a multiple of 16
  int64_t batch, rows, heads, kv_heads, dim, pages, max_pages, table_row;
  int64_t q_row, q_head, k_page, v_page, scale_page;
  int64_t dtype, page_dtype, causal, window;
  double scale, softcap;
};
struct AttentionBackwardArgs {
  void *dq, *dk, *dv;         // contiguous
  float *dbias, *dsinks;      // dbias: contiguous, zeros, of the bias's own shape; null where nothing is asked for
  const void *dout, *q, *k, *v, *out;
  const float* lse;
  const int32_t *cu_q, *cu_k;
  const void* bias;
  const float *alibi, *sinks;
  int64_t batch, queries, keys, heads, kv_heads, dim;
  int64_t dout_batch, dout_row, dout_head;
  int64_t q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head;
  int64_t bias_batch, bias_head, bias_query, bias_key, bias_queries, bias_keys;
  int64_t dtype, bias_dtype, causal, window;
  int64_t seed, call, threshold;
  double scale, softcap, p;
};

static inline int64_t attention_padded(int64_t dim) { return (dim + 15) / 16 * 16; }
static inline int64_t attention_tiles(int64_t keys) { return (keys + kKvTile - 1) / kKvTile; }

// A thread's scratch, in floats: query rows, their running state, one group's scores, keys and values, partials.
struct AttentionScratch {
  int64_t query, state, values, group, keys, padded_values, partial, total;
};
static inline AttentionScratch attention_scratch(int64_t rows, int64_t tiles, int64_t dim, bool keys, bool values) {
  const int64_t padded = attention_padded(dim), block = (rows < kQueryBlock ? rows : kQueryBlock) + 16;
  AttentionScratch s;
  s.query = block * (kMaxHeadDim + 16);
  s.state = block * 6;
  s.values = block * padded;
  s.group = 8 * (kKvTile + 16 + padded);
  s.keys = keys ? kKvTile * dim : 0;
  s.padded_values = values || padded != dim ? kKvTile * padded : 0;
  s.partial = (rows < kSplitRows ? rows : kSplitRows) * tiles * (padded + 16);
  s.total = s.query + s.state + s.values + s.group + s.keys + s.padded_values + s.partial;
  s.total = (s.total + 15) / 16 * 16;
  return s;
}
static inline AttentionScratch layout(const AttentionArgs& a) {
  const int64_t rows = a.queries * (a.heads / a.kv_heads);
  return attention_scratch(rows, attention_tiles(a.keys), a.dim, true, a.dtype != kFloat32);
}
static inline AttentionScratch layout(const PagedAttentionArgs& a) {
  const bool widened = a.dtype != kFloat32 && !a.scales;
  const int64_t rows = a.rows * (a.heads / a.kv_heads);
  return attention_scratch(rows, attention_tiles(a.max_pages * kPage), a.dim, widened, widened);
}
static inline int64_t scratch_bytes(const AttentionArgs& a, int64_t threads) { return threads * layout(a).total * 4; }
static inline int64_t scratch_bytes(const PagedAttentionArgs& a, int64_t threads) {
  return threads * layout(a).total * 4;
}

// The backward's, in floats: for all threads rowsum(dout * out) and, where the keys are cut in pieces, the dq of each;
// for each thread, rows of q and dout, their scores and gradients of scores, a tile's keys and values as rows and as
// panels, its dk and dv, and the dq of one sequence and KV head. The pieces follow from the shapes alone: the order of
// every sum does, too.
struct GradientScratch {
  int64_t pieces, delta, dq, own_dq, rows, scores, panels, tile, thread, shared;
  bool merge_batch, merge_heads;    // where a bias is shared, one thread adds up its gradient
};
static inline GradientScratch layout(const AttentionBackwardArgs& a) {
  const int64_t padded = attention_padded(a.dim), sequences = a.cu_q ? 1 : a.batch;
  GradientScratch s;
  s.merge_batch = a.dbias && !a.bias_batch, s.merge_heads = a.dbias && !a.bias_head;
  const int64_t units = (s.merge_batch ? 1 : a.batch) * (s.merge_heads ? 1 : a.kv_heads);
  const int64_t wanted = units ? (kGradientUnits + units - 1) / units : 1, tiles = attention_tiles(a.keys);
  s.pieces = a.dbias || wanted <= 1 || tiles <= 1 ? 1 : wanted < tiles ? wanted : tiles;
  s.delta = (sequences * a.queries * a.heads + 15) / 16 * 16;
  s.dq = s.pieces > 1 ? s.pieces * sequences * a.queries * a.heads * padded : 0;
  s.own_dq = s.pieces > 1 ? 0 : a.queries * (a.heads / a.kv_heads) * padded;
  s.rows = kGradientBlock * (kMaxHeadDim + 16);
  s.scores = kGradientBlock * (kKvTile + 16);
  s.panels = kKvTile * a.dim;
  s.tile = kKvTile * padded;
  s.thread = 2 * s.rows + 2 * s.scores + 2 * s.panels + 3 * s.tile + s.own_dq + kGradientBlock * 8;
  s.thread = (s.thread + 15) / 16 * 16;
  s.shared = 16 + s.delta + s.dq;
  return s;
}
static inline int64_t scratch_bytes(const AttentionBackwardArgs& a, int64_t threads) {
  const GradientScratch s = layout(a);
  return (s.shared + threads * s.thread) * 4;
}

// Eight multiply-adds weigh as much as one element touched.
static inline int64_t work(const AttentionArgs& a) {
  const int64_t sequences = a.cu_q && a.batch ? 1 : a.batch;
  return sequences * a.queries * a.keys * a.heads * a.dim / 4;
}
static inline int64_t work(const AttentionBackwardArgs& a) {
  const int64_t sequences = a.cu_q && a.batch ? 1 : a.batch;
  return sequences * a.queries * a.keys * a.heads * a.dim;
}
static inline int64_t work(const PagedAttentionArgs& a) {
  int64_t scores = 0;
  for (int64_t b = 0; b < a.batch; ++b) scores += int64_t(a.cu_q[b + 1] - a.cu_q[b]) * a.context_len[b];
  return scores * a.heads * a.dim / 4;
}

}  // namespace fastllm
