// What lora_linear and multi_lora share: the narrow product s = scale * drop(x) A^T, and the chain that goes on after K.
#pragma once
#include "dropout.h"
#include "quant_gemm.h"

namespace fastllm {
namespace {

template <class Hooks> void any_product(const LinearArgs& a, const Hooks& hooks, Team& team, float* scratch) {
  if (quantises(a))
    quant_product(a, hooks, team, scratch);
  else
    product(a, hooks, team, scratch);
}

// A matrix of `dtype` as packing sees it.
FL_INLINE LinearArgs matrix(const void* weight, int64_t form, int64_t cols, int64_t depth, int64_t stride, int64_t dtype) {
  LinearArgs m{};
  m.weight = weight, m.form = form, m.cols = cols, m.depth = depth, m.weight_stride = stride, m.dtype = dtype;
  return m;
}
[[maybe_unused]] void pack_all(const LinearArgs& m, float* to, Team& team) {
  const Range mine = share(team, panels_of(m));
  for (int64_t p = mine.begin; p < mine.end; ++p) pack(m, NoHooks(), to + p * m.depth * kLanes, p);
}

// y = scale * (the chain).
struct Scaled : NoHooks {
  float scale;
  explicit Scaled(float s) : scale(s) {}
  template <int R, int P> FL_INLINE_MEMBER void end(vf (&acc)[R][P], int64_t /*row*/, const int64_t (&)[P]) const {
    FL_UNROLL
    for (int r = 0; r < R; ++r)
      FL_UNROLL
      for (int p = 0; p < P; ++p) acc[r][p] = acc[r][p] * set1(scale);
  }
};

// Rows [row, row + rows), which begin at x, against all panels of a.weight.
template <class Hooks>
void narrow_block(const LinearArgs& a, const Hooks& hooks, const float* x, int64_t x_stride, int64_t row, int64_t rows, float* rest) {
  const int64_t panels = panels_of(a), stride = a.depth * kLanes;
  for (int64_t g = 0; g * 2 < panels; ++g) {
    const float* packed = static_cast<const float*>(a.weight) + g * 2 * stride;
    block_of_group(a, hooks, x, x_stride, packed, row, rows, g, g * 2 + 2 <= panels ? 2 : 1, rest);
  }
}

// A row of x in fp32, with elements dropped where `keep` (64 columns a word) says so.
template <class T> void dropped_row(float* to, const T* x, const uint64_t* keep, float scale, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf v = load(x + i, first(n - i));
    store(to + i, keep ? drop(v, keep[i / 64] >> i % 64, set1(scale)) : v, first(n - i));
  }
}

}  // namespace
}  // namespace fastllm
