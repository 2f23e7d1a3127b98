// rope: (a, b) -> (a cos - b sin, b cos + a sin) for pairs (a, b) of the first `rotary` elements of a head: its halves, or its
// neighbours when interleaved; with `inverse` by the negative angle, which is the gradient
#pragma once
#include "../common.h"

namespace fastllm {

struct RopeArgs {
  void *q_out, *k_out;    // [batch, tokens, heads | kv_heads, dim] contiguous
  const void *q, *k, *position;    // position: int64 or int32
  const float* table;              // [positions, rotary] contiguous: cosines, then sines
  int64_t batch, tokens, heads, kv_heads, dim, rotary, positions;
  int64_t q_batch, q_row, q_head, k_batch, k_row, k_head, position_batch, position_row, position_is_int64, dtype;
  int64_t interleaved, inverse;
};
static inline int64_t work(const RopeArgs& a) { return a.batch * a.tokens * (a.heads + a.kv_heads) * a.dim * 2; }

}  // namespace fastllm
