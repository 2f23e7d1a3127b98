// multi_lora: the forward of lora_linear with an adapter for each row, out of a pool
#pragma once
#include "lora_linear.h"

namespace fastllm {

struct MultiLoraArgs {
  LinearArgs base;           // halves: kWhole or kSwiglu
  // pool: panels [slots][parts][max_rank / 16][depth][16], and [slots][panels][max_rank][16] in the order of the weight's
  const float *a, *b;
  const float* gain;         // [slots][panels][16] or null
  const int64_t* rank;       // [slots][parts]; -1: nothing in this slot
  const float* scale;        // [slots][parts]
  const int64_t* part;       // [panels]: whose x A^T a panel of B takes
  const int64_t* adapter;    // [rows] of slots; -1: none
  int64_t slots, parts, panels, max_rank;
};
static inline int64_t work(const MultiLoraArgs& a) { return work(a.base); }
static inline int64_t scratch_bytes(const MultiLoraArgs& a, int64_t threads) {
  return 4 * up_to_16(a.base.rows * a.parts * a.max_rank) +
         larger(scratch_bytes(a.base, threads), 4 * threads * narrow_floats(a.base.depth));
}

}  // namespace fastllm
