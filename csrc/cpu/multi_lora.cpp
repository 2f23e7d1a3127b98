// multi_lora: the forward of lora_linear with an adapter of its own for each row; the bits of lora_linear row by row.
#include "lora.h"

namespace fastllm {
namespace {

// The adapter of a row, or -1: none, or none that there is.
FL_INLINE int64_t adapter_of(const MultiLoraArgs& a, int64_t row) {
  const int64_t id = a.adapter[row];
  return id >= 0 && id < a.slots && a.rank[id * a.parts] >= 0 ? id : -1;
}

struct ManyLowRank : NoHooks {
  const MultiLoraArgs& a;
  const float* s;    // [rows][parts][max_rank]
  ManyLowRank(const MultiLoraArgs& a_, const float* s_) : a(a_), s(s_) {}
  template <int R, int P> FL_INLINE_MEMBER void end(vf (&acc)[R][P], int64_t row, const int64_t (&panel)[P]) const {
    const int64_t one = adapter_of(a, row);
    bool same = !a.gain;
    for (int r = 1; r < R; ++r) same &= adapter_of(a, row + r) == one;
    if (same) {
      if (one >= 0) go_on(acc, row, one, panel);
      return;
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
  // R rows of one adapter: each panel's chains go on over the rank of its part.
  template <int R, int P> FL_INLINE_MEMBER void go_on(vf (&acc)[R][P], int64_t row, int64_t id, const int64_t (&panel)[P]) const {
    const float *x[P], *w[P];
    int64_t rank[P], common = a.max_rank;
    const int64_t stride = a.parts * a.max_rank, ahead = streaming.ahead;
    for (int p = 0; p < P; ++p) {
      const int64_t part = a.part[panel[p]];
      x[p] = s + (row * a.parts + part) * a.max_rank;
      w[p] = a.b + (id * a.panels + panel[p]) * a.max_rank * kLanes;
      rank[p] = a.rank[id * a.parts + part];
      common = rank[p] < common ? rank[p] : common;
    }
    for (int64_t k = 0; k < common; ++k)
      FL_UNROLL
      for (int p = 0; p < P; ++p) {
        const vf b = load(w[p] + k * kLanes);
        if (R == 1) prefetch(reinterpret_cast<const char*>(w[p] + k * kLanes) + ahead);
        FL_UNROLL
        for (int r = 0; r < R; ++r) acc[r][p] = fma(set1(x[p][r * stride + k]), b, acc[r][p]);
      }
    FL_UNROLL
    for (int p = 0; p < P; ++p)
      for (int64_t k = common; k < rank[p]; ++k) {
        const vf b = load(w[p] + k * kLanes);
        FL_UNROLL
        for (int r = 0; r < R; ++r) acc[r][p] = fma(set1(x[p][r * stride + k]), b, acc[r][p]);
      }
  }
  template <int P>
  __attribute__((noinline)) void one_row(float (&chain)[P][kLanes], int64_t row, int64_t id, const int64_t (&panel)[P]) const {
    vf acc[1][P];
    for (int p = 0; p < P; ++p) acc[0][p] = load(chain[p]);
    go_on(acc, row, id, panel);
    for (int p = 0; p < P; ++p) {
      const vf g = a.gain ? load(a.gain + (id * a.panels + panel[p]) * kLanes) : set1(1);
      store(chain[p], acc[0][p] * g);
    }
  }
};

// What one part of the weight's rows takes of an adapter.
struct Panels {
  const float* at;    // [rank / 16][depth][16]
  int64_t rank;       // 0: nothing
  float scale;
};
FL_INLINE Panels panels_of_part(const MultiLoraArgs& a, int64_t id, int64_t part) {
  if (id < 0) return {nullptr, 0, 0};
  const int64_t i = id * a.parts + part;
  return {a.a + i * up_to_16(a.max_rank) * a.base.depth, a.rank[i], a.scale[i]};
}

// s of one row. One chain is a single stream through memory, a third of what there is: `next` is fetched meanwhile.
void shrink_row(const MultiLoraArgs& a, const Panels& panels, const float* x, float* s, const Panels& next) {
  const int64_t depth = a.base.depth, lines = depth * ((next.rank + kLanes - 1) / kLanes);
  for (int64_t n = 0; n < panels.rank; n += kLanes) {
    const float *w = panels.at + n * depth, *then = next.at + n * depth;
    const int64_t ahead = lines < n / kLanes * depth ? 0 : lines - n / kLanes * depth < depth ? lines - n / kLanes * depth : depth;
    vf sum = set1(0);
    for (int64_t k = 0; k < depth;) {
      const int64_t begin = k, end = depth - k < kChain ? depth : k + kChain;
      vf acc = set1(0);
      for (; k < end && k < ahead; ++k) {
        prefetch(then + k * kLanes);
        acc = fma(set1(x[k]), load(w + k * kLanes), acc);
      }
      for (; k < end; ++k) acc = fma(set1(x[k]), load(w + k * kLanes), acc);
      sum = begin ? sum + acc : acc;
    }
    store(s + n, sum * set1(panels.scale), first(panels.rank - n));
  }
}

// s of rows [row, row + rows) of one adapter, for one part.
void shrink(const MultiLoraArgs& a, float* s, int64_t row, int64_t rows, const Panels& panels, const Panels& next, float* rest) {
  LinearArgs n = a.base;
  n.y = s, n.y_dtype = kFloat32, n.y_stride = a.parts * a.max_rank;
  n.weight = panels.at, n.form = kPanels, n.cols = panels.rank;
  n.bias = n.residual = n.norm = nullptr, n.halves = kWhole;
  const auto* x = static_cast<const float*>(n.x) + row * n.x_stride;
  int64_t stride = n.x_stride;
  if (a.base.norm || n.x_dtype != kFloat32 || (rows >= 12 && collides(stride))) {
    float* own = rest + kRowBlock * 2 * kLanes;
    stride = narrow_width(n.depth);
    with_dtype(n.x_dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t r = 0; r < rows; ++r)
        prepare_row(own + r * stride, static_cast<const T*>(n.x) + (row + r) * n.x_stride, static_cast<const T*>(a.base.norm), n.eps, n.depth);
    });
    x = own;
  }
  if (rows == 1) return shrink_row(a, panels, x, s + row * n.y_stride, next);
  narrow_block(n, Scaled(panels.scale), x, stride, row, rows, rest);
}

}  // namespace

namespace FASTLLM_TIER {

void multi_lora(const MultiLoraArgs& a, Team& team) noexcept {
  const LinearArgs& base = a.base;
  float* s = reinterpret_cast<float*>(team.scratch);
  float* scratch = s + up_to_16(base.rows * a.parts * a.max_rank);
  const int64_t all = base.rows * a.parts;
  const Range mine = share(team, all);    // part by part: a part of a single row is a thread's
  // What is read first is fetched before: by all threads where there is little, by each its own where there is much.
  for (int64_t i = all <= kFewRows ? 0 : mine.begin; i < (all <= kFewRows ? all : mine.begin + 1) && i < all; ++i) {
    const Panels panels = panels_of_part(a, adapter_of(a, i % base.rows), i / base.rows);
    const int64_t lines = (panels.rank + kLanes - 1) / kLanes * base.depth;
    const Range lines_of = all <= kFewRows ? share(team, lines) : Range{0, lines};
    for (int64_t k = lines_of.begin; k < lines_of.end; ++k) prefetch(panels.at + k * kLanes);
  }
  for (int64_t i = mine.begin; i < mine.end;) {           // neighbours with one adapter go together
    const int64_t part = i / base.rows, row = i % base.rows, id = adapter_of(a, row);
    int64_t rows = 1;
    while (i + rows < mine.end && row + rows < base.rows && rows < kNarrowRows && adapter_of(a, row + rows) == id) ++rows;
    for (int64_t r = row; r < row + rows; ++r)
      if (id < 0 && a.adapter[r] != -1) report(team, kIndexOutOfRange);
    i += rows;
    const Panels panels = panels_of_part(a, id, part);
    const Panels next = i < mine.end && all > kFewRows ? panels_of_part(a, adapter_of(a, i % base.rows), i / base.rows) : Panels{};
    if (panels.rank) shrink(a, s + part * a.max_rank, row, rows, panels, next, scratch + team.rank * narrow_floats(base.depth));
  }
  sync(team);
  any_product(base, ManyLowRank(a, s), team, scratch);
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
