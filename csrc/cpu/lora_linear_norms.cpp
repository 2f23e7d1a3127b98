// lora_row_norms: ||W + scale * B A|| of each row, what divides a magnitude (DoRA), in one pass over W.
//
// A panel of 16 rows of W is made or found; 16 lanes go down it, a few k at a time, add scale * B A as chains over the rank, and
// square. Four sums a row, of every fourth k, are added up at the end: no result depends on the number of threads.
#include "lora.h"

namespace fastllm {
namespace {

// Panel p of the weight as floats: where it lies, or in `own`.
const float* float_panel(const LoraRowNormsArgs& a, int64_t p, float* own) {
  const auto* bytes = static_cast<const uint8_t*>(a.weight);
  switch (a.form) {
    case kPanels: return static_cast<const float*>(a.weight) + p * a.depth * kLanes;
    case kInt4: pack_quant_rows<4, false>(own, bytes, a.depth, p, a.group); break;
    case kInt4Min: pack_quant_rows<4, true>(own, bytes, a.depth, p, a.group); break;
    case kInt8: pack_quant_rows<8, false>(own, bytes, a.depth, p, a.group); break;
    case kInt8Min: pack_quant_rows<8, true>(own, bytes, a.depth, p, a.group); break;
    default: pack(matrix(a.weight, kRows, a.cols, a.depth, a.weight_stride, a.dtype), NoHooks(), own, p);
  }
  return own;
}

// The next R k of one panel: squares[r % 4] += (w + b a)^2.
template <int R>
FL_INLINE void add_squares(vf (&squares)[4], const float* w, const float* a_panels, const float* b, int64_t rank, int64_t depth) {
  vf acc[R][1];
  FL_UNROLL
  for (int r = 0; r < R; ++r) acc[r][0] = load(w + r * kLanes);
  for (int64_t q = 0; q < rank; q += kLanes) {
    Tile t{a_panels + q * depth, kLanes, {b + q * kLanes}};
    multiply<R, 1>(acc, t, rank - q < kLanes ? rank - q : kLanes);
  }
  FL_UNROLL
  for (int r = 0; r < R; ++r) squares[r % 4] = fma(acc[r][0], acc[r][0], squares[r % 4]);
}

}  // namespace

namespace FASTLLM_TIER {

void lora_row_norms(const LoraRowNormsArgs& a, Team& team) noexcept {
  float* a_panels = reinterpret_cast<float*>(team.scratch);
  float* b_panels = a_panels + up_to_16(a.rank) * a.depth;
  float* own = b_panels + up_to_16(a.cols) * a.rank + team.rank * kLanes * up_to_16(a.depth + kLanes);
  pack_all(matrix(a.a, kRows, a.rank, a.depth, a.a_stride, a.dtype), a_panels, team);
  pack_all(matrix(a.b, kRows, a.cols, a.rank, a.b_stride, a.dtype), b_panels, team);
  sync(team);
  constexpr int R = kTileRows >= 12 ? 16 : 4;    // whole fours
  const Range mine = share(team, (a.cols + kLanes - 1) / kLanes);
  for (int64_t p = mine.begin; p < mine.end; ++p) {
    const float* w = float_panel(a, p, own);
    float* b = b_panels + p * a.rank * kLanes;
    for (int64_t r = 0; r < a.rank; ++r) store(b + r * kLanes, load(b + r * kLanes) * set1(float(a.scale)));
    vf squares[4] = {set1(0), set1(0), set1(0), set1(0)};
    int64_t k = 0;
    for (; k + R <= a.depth; k += R) add_squares<R>(squares, w + k * kLanes, a_panels + k * kLanes, b, a.rank, a.depth);
    for (; k < a.depth; ++k) {
      vf one[4] = {squares[k % 4], set1(0), set1(0), set1(0)};
      add_squares<1>(one, w + k * kLanes, a_panels + k * kLanes, b, a.rank, a.depth);
      squares[k % 4] = one[0];
    }
    const int64_t n = p * kLanes;
    store(a.norms + n, sqrt((squares[0] + squares[1]) + (squares[2] + squares[3])), first(a.cols - n));
  }
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
