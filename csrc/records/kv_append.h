// kv_append: rope of q and k, k and v written into the pages of one layer
#pragma once
#include "../common.h"

namespace fastllm {

constexpr int64_t kPage = 16;    // tokens a page of the cache: K as [dim][16], V as [16][dim]

struct KvAppendArgs {
  void *q_out, *k_pages, *v_pages;    // q_out [tokens, heads, dim] contiguous; pages [pages][kv_heads, dim * 16]
  const void *q, *k, *v;
  const int64_t* slot;     // [tokens]: page * 16 + offset, negative: write nothing
  const void* position;    // [tokens]: int64 or int32
  const float* table;
  float* scales;    // of pages of bytes, else null: [pages][kv_heads, 2 (keys, values), 16]
  int64_t tokens, heads, kv_heads, dim, rotary, positions, pages;    // heads is 0 without q
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, position_is_int64, k_page, v_page, scale_page, dtype, page_dtype;    // k_page ..: from page to page
};
static inline int64_t work(const KvAppendArgs& a) { return a.tokens * (a.heads + 2 * a.kv_heads) * a.dim * 2; }

}  // namespace fastllm
