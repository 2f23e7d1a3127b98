// quant_linear: its product takes LinearArgs; here is what packs its weights and reads them back
#pragma once
#include "linear.h"

namespace fastllm {

// Rows of a quantised weight as floats: y[i, :] = dequantised row ids[i].
struct QuantEmbeddingArgs {
  float* y;
  const int64_t* ids;
  const uint8_t* weight;
  int64_t count, rows, depth, bits, has_min, group;
};
static inline int64_t work(const QuantEmbeddingArgs& a) { return a.count * a.depth; }

// Rows [first, first + count) of a quantised weight of `rows` rows, from blocks of `group` as GGUF stores those of 32: float16
// scale, float16 minimum if block_min, then for each 32 of k 16 bytes of nibbles (k and k + 16) or 32 of s8. A block may hold
// fewer bits than the panels, and have no minimum where they have one: nothing is lost.
struct PackQuantsArgs {
  uint8_t* panels;
  const uint8_t* blocks;    // [count, groups] contiguous
  int64_t first, count, rows, groups, swiglu, bits, has_min, block_bits, block_min, group;
};
static inline int64_t work(const PackQuantsArgs& a) { return a.count * a.groups * a.group; }

}  // namespace fastllm
