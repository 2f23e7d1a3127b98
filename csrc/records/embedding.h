// embedding: y[t] = weight[ids[t]]
#pragma once
#include "../common.h"

namespace fastllm {

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

}  // namespace fastllm
