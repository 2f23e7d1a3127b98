// multi_lora: the forward of lora_linear with an adapter for each row, out of a pool
#pragma once
#include "lora_linear.h"

namespace fastllm {

struct MultiLoraArgs {
  LinearArgs base;
  const float *a, *b;        // pool: panels [slots][max_rank / 16][depth][16], [slots][cols / 16][max_rank][16]
  const float* gain;         // [slots, cols] or null
  const int64_t* rank;       // [slots]; 0: nothing in this slot
  const float* scale;        // [slots]
  const int64_t* adapter;    // [rows] of slots; -1: none
  int64_t slots, max_rank;
};
static inline int64_t work(const MultiLoraArgs& a) { return work(a.base); }
static inline int64_t scratch_bytes(const MultiLoraArgs& a, int64_t threads) {
  return 4 * up_to_16(a.base.rows * a.max_rank) + larger(scratch_bytes(a.base, threads), 4 * threads * narrow_floats(a.base.depth));
}

}  // namespace fastllm
