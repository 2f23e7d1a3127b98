// Deals the blocks of a list of tensors out to the team.
#pragma once
#include "columns.h"

namespace fastllm {
namespace {

// body(tensor, first element, elements, number of the block) for this thread's blocks.
template <class Tensor, class F> FL_INLINE void each_block(const Team& team, const Tensor* tensors, int64_t count, int64_t blocks, F body) {
  const Range mine = share(team, blocks);
  for (int64_t t = 0, before = 0; t < count && before < mine.end; ++t) {    // `before` blocks lie in earlier tensors
    const int64_t here = (tensors[t].count + kListBlock - 1) / kListBlock;
    const int64_t begin = mine.begin > before ? mine.begin - before : 0, end = mine.end - before < here ? mine.end - before : here;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t from = b * kListBlock, left = tensors[t].count - from;
      body(tensors[t], from, left < kListBlock ? left : kListBlock, before + b);
    }
    before += here;
  }
}

}  // namespace
}  // namespace fastllm
