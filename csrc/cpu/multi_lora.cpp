// multi_lora: the forward of lora_linear with an adapter of its own for each row; the bits of lora_linear row by row.
#include "lora.h"

namespace fastllm {
namespace {

// The adapter of a row, or -1: none, or none that there is.
FL_INLINE int64_t adapter_of(const MultiLoraArgs& a, int64_t row) {
  const int64_t id = a.adapter[row];
  return id >= 0 && id < a.slots && a.rank[id] > 0 ? id : -1;
}

struct ManyLowRank : NoHooks {
  const MultiLoraArgs& a;
  const float* s;    // [rows, max_rank]
  ManyLowRank(const MultiLoraArgs& a_, const float* s_) : a(a_), s(s_) {}
  FL_INLINE_MEMBER const float* panel_of(int64_t id, int64_t panel) const {
    return a.b + (id * up_to_16(a.base.cols) + panel * kLanes) * a.max_rank;
  }
  template <int R, int P> FL_INLINE_MEMBER void end(vf (&acc)[R][P], int64_t row, const int64_t (&panel)[P]) const {
    const int64_t one = adapter_of(a, row);
    bool same = !a.gain;
    for (int r = 1; r < R; ++r) same &= adapter_of(a, row + r) == one;
    if (same) {
      if (one < 0) return;
      Tile t{s + row * a.max_rank, a.max_rank, {}};
      for (int p = 0; p < P; ++p) t.panel[p] = panel_of(one, panel[p]);
      return multiply<R, P>(acc, t, a.rank[one]);
    }
    float chains[R][P][kLanes];    // row by row through memory: the rows differ
    FL_UNROLL
    for (int r = 0; r < R; ++r)
      FL_UNROLL
      for (int p = 0; p < P; ++p) store(chains[r][p], acc[r][p]);
    for (int r = 0; r < R; ++r)
      if (const int64_t id = adapter_of(a, row + r); id >= 0) one_row<P>(chains[r], row + r, id, panel);
    FL_UNROLL
    for (int r = 0; r < R; ++r)
      FL_UNROLL
      for (int p = 0; p < P; ++p) acc[r][p] = load(chains[r][p]);
  }
  template <int P>
  __attribute__((noinline)) void one_row(float (&chain)[P][kLanes], int64_t row, int64_t id, const int64_t (&panel)[P]) const {
    vf acc[1][P];
    Tile t{s + row * a.max_rank, a.max_rank, {}};
    for (int p = 0; p < P; ++p) acc[0][p] = load(chain[p]), t.panel[p] = panel_of(id, panel[p]);
    multiply<1, P>(acc, t, a.rank[id]);
    for (int p = 0; p < P; ++p) {
      const int64_t n = panel[p] * kLanes;
      const vf g = a.gain ? load(a.gain + id * a.base.cols + n, first(a.base.cols - n)) : set1(1);
      store(chain[p], acc[0][p] * g);
    }
  }
};

}  // namespace

namespace FASTLLM_TIER {

void multi_lora(const MultiLoraArgs& a, Team& team) noexcept {
  const LinearArgs& base = a.base;
  float* s = reinterpret_cast<float*>(team.scratch);
  float* scratch = s + up_to_16(base.rows * a.max_rank);
  float* rest = scratch + team.rank * narrow_floats(base.depth);
  float* own = rest + kRowBlock * 2 * kLanes;
  const int64_t width = up_to_16(base.depth);
  const Range mine = share(team, base.rows);
  for (int64_t row = mine.begin; row < mine.end;) {    // neighbours with one adapter go together
    const int64_t id = adapter_of(a, row);
    int64_t end = row + 1;
    while (end < mine.end && end - row < kNarrowRows && adapter_of(a, end) == id) ++end;
    for (int64_t r = row; r < end; ++r)
      if (id < 0 && a.adapter[r] != -1) report(team, kIndexOutOfRange);
    if (id >= 0) {
      LinearArgs n = base;
      n.y = s, n.y_dtype = kFloat32, n.y_stride = a.max_rank, n.bias = nullptr;
      n.weight = a.a + id * up_to_16(a.max_rank) * base.depth, n.form = kPanels, n.cols = a.rank[id];
      const auto* x = static_cast<const float*>(base.x) + row * base.x_stride;
      int64_t stride = base.x_stride;
      if (base.x_dtype != kFloat32) {
        with_dtype(base.x_dtype, [&](auto type) {
          const auto* from = static_cast<const decltype(type)*>(base.x);
          for (int64_t r = row; r < end; ++r)
            dropped_row(own + (r - row) * width, from + r * base.x_stride, nullptr, 1.0f, base.depth);
        });
        x = own, stride = width;
      }
      narrow_block(n, Scaled(a.scale[id]), x, stride, row, end - row, rest);
    }
    row = end;
  }
  sync(team);
  any_product(base, ManyLowRank(a, s), team, scratch);
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
