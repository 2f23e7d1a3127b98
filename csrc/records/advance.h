// advance: what a decode step changes between the sampled token and the next forward
#pragma once
#include "sample.h"

namespace fastllm {

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
