// attention: softmax(q k^T * scale) v over KV tiles of 256 keys, dense and paged
#pragma once
#include "kv_append.h"

namespace fastllm {

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

}  // namespace fastllm
