// Products in the order of the contract: an output element is the sum, in order, of FMA chains over kChain k each, K ascending,
// starting from zero. Tiles over rows and columns are free, so one row and a thousand give the same bits. Weights are read in
// panels of 16 output columns: a vector of the panel times a broadcast of x feeds 16 chains. A weight that is not in panels is
// packed on the way, panel by panel.
//
// A product takes hooks: where its first chains start, what is added after the last k, and what is changed while packing.
#pragma once
#include "panels.h"
#include "rms_norm.h"

namespace fastllm {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTilePanels = 2;    // 24 accumulators, 2 weights, 1 broadcast of 32 registers
constexpr int kStreams = 8;                       // panels in flight for one row: DRAM wants many streams
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTilePanels = 1;
constexpr int kStreams = 4;
#else
constexpr int kTileRows = 2, kTilePanels = 1;
constexpr int kStreams = 2;
#endif
constexpr int tile_rows(int panels) { return kTileRows * kTilePanels / panels; }
constexpr int64_t kChain = 128;        // one chain over all of K would lose two to four times as much in rounding
constexpr int64_t kRowBlock = 96;      // rows of x that stay in L2 while the panels pass
constexpr int64_t kDepthBlock = 2048;  // of K, whole chains: two panels of this depth stay in L2 while the rows pass
constexpr int64_t kFewRows = 4;        // up to here each thread makes its own normalised rows and needs no barrier

// The plain product. A product whose hooks say kPacks never meets panels: its streams of few rows need not be compiled.
struct NoHooks {
  static constexpr bool kPacks = false;
  template <int R, int P> FL_INLINE_MEMBER void start(vf (&acc)[R][P], int64_t /*row*/, const int64_t (&)[P]) const {
    FL_UNROLL
    for (int r = 0; r < R; ++r)
      FL_UNROLL
      for (int p = 0; p < P; ++p) acc[r][p] = set1(0);
  }
  template <int R, int P> FL_INLINE_MEMBER void end(vf (&)[R][P], int64_t /*row*/, const int64_t (&)[P]) const {}
  FL_INLINE_MEMBER vf pack(vf v, int64_t /*row*/, int64_t /*column*/) const { return v; }    // form kRowsAcross alone
};

struct Tile {
  const float* x;    // first row
  int64_t x_stride;
  const float* panel[8];
};

// acc[r][p] continues its chain over k in [0, depth).
template <int R, int P> FL_INLINE void multiply(vf (&acc)[R][P], const Tile& t, int64_t depth) {
  const int64_t ahead = streaming.ahead;
  for (int64_t k = 0; k < depth; ++k) {
    vf w[P];
    FL_UNROLL
    for (int p = 0; p < P; ++p) {
      w[p] = load(t.panel[p] + k * kLanes);
      if (R == 1) prefetch(reinterpret_cast<const char*>(t.panel[p] + k * kLanes) + ahead);
    }
    FL_UNROLL
    for (int r = 0; r < R; ++r) {
      const vf v = set1(t.x[r * t.x_stride + k]);
      FL_UNROLL
      for (int p = 0; p < P; ++p) acc[r][p] = fma(v, w[p], acc[r][p]);
    }
  }
}

// acc = the product over k in [0, depth): chains of kChain k, added up in order in `sum` [R][P][16]. The first goes on from acc;
// or, where the sum goes on, acc is not read and all are added to the sum.
template <int R, int P>
FL_INLINE void sum_chains(vf (&acc)[R][P], Tile t, int64_t depth, float* sum, bool goes_on = false) {
  for (int64_t k = 0; k < depth; k += kChain) {
    const bool adds = k || goes_on;
    if (adds) {
      FL_UNROLL
      for (int r = 0; r < R; ++r)
        FL_UNROLL
        for (int p = 0; p < P; ++p) {
          if (k) store(sum + (r * P + p) * kLanes, acc[r][p]);
          acc[r][p] = set1(0);
        }
    }
    multiply<R, P>(acc, t, depth - k < kChain ? depth - k : kChain);
    t.x += kChain;
    for (int p = 0; p < P; ++p) t.panel[p] += kChain * kLanes;
    if (!adds) continue;
    FL_UNROLL
    for (int r = 0; r < R; ++r)
      FL_UNROLL
      for (int p = 0; p < P; ++p) acc[r][p] = load(sum + (r * P + p) * kLanes) + acc[r][p];
  }
}

FL_INLINE vf load_as(int64_t dtype, const void* p, int64_t i, vm inside) {
  if (dtype == kFloat32) return load(static_cast<const float*>(p) + i, inside);
  return dtype == kBFloat16 ? load(static_cast<const bf16*>(p) + i, inside) : load(static_cast<const f16*>(p) + i, inside);
}
FL_INLINE void store_as(int64_t dtype, void* p, int64_t i, vf v, vm inside) {
  if (dtype == kFloat32) return store(static_cast<float*>(p) + i, v, inside);
  dtype == kBFloat16 ? store(static_cast<bf16*>(p) + i, v, inside) : store(static_cast<f16*>(p) + i, v, inside);
}

// Whether a weight's panels hold its two halves in turn.
FL_INLINE bool alternates(const LinearArgs& a) { return a.halves && (a.form == kPanels || quantises(a)); }

// What follows the chain, for one row and the `count` columns from n on.
FL_INLINE void finish(const LinearArgs& a, vf v, int64_t row, int64_t n, int64_t count) {
  const vm inside = first(count);
  if (a.bias) v = v + load_as(a.dtype, a.bias, n, inside);
  if (a.residual) v = v + load_as(a.dtype, a.residual, row * a.residual_stride + n, inside);
  store_as(a.y_dtype, a.y, row * a.y_stride + n, v, inside);
}

// Panels come in units: one panel, or a gate panel and the up panel behind it, whose product is one output panel with swiglu.
// Once a tier, through memory: inlined into every tile, its branches would take minutes to compile.
[[maybe_unused]] __attribute__((noinline)) void finish_chains(const LinearArgs& a, const float* chain, int rows, int panels, int64_t row,
                                                              const int64_t* panel) {
  for (int r = 0; r < rows; ++r)
    for (int p = 0; p < panels; ++p, chain += kLanes) {
      if (a.halves != kSwiglu) {
        const PanelRows at = rows_of_panel(panel[p], a.cols, alternates(a));
        finish(a, load(chain), row + r, at.first, at.count);
      } else if (p % 2 == 0) {
        const int64_t n = panel[p] / 2 * kLanes;
        finish(a, silu(load(chain)) * load(chain + kLanes), row + r, n, a.cols - n);
      }
    }
}
template <class Hooks, int R, int P>
FL_INLINE void finish_all(const LinearArgs& a, const Hooks& hooks, vf (&acc)[R][P], int64_t row, const int64_t (&panel)[P]) {
  hooks.end(acc, row, panel);
  alignas(64) float chain[R * P * kLanes];
  FL_UNROLL
  for (int r = 0; r < R; ++r)
    FL_UNROLL
    for (int p = 0; p < P; ++p) store(chain + (r * P + p) * kLanes, acc[r][p]);
  finish_chains(a, chain, R, P, row, panel);
}

// One row (or few) against units [begin, end): P panels at once, each its own stream through memory.
// Each stream starts one panel further into its run than the one before: runs of a multiple of 4 KiB would otherwise meet in the
// same cache sets and memory banks, a third of the bandwidth.
template <int R, int P, class Hooks>
void stream(const LinearArgs& a, const Hooks& hooks, const float* x, int64_t x_stride, int64_t row, int64_t begin, int64_t end) {
  const int64_t width = a.halves ? 2 : 1, lanes = P / width, length = (end - begin) / lanes;
  for (int64_t i = 0; i < length; ++i) {
    Tile t{x, x_stride, {}};
    int64_t panel[P];
    for (int p = 0; p < P; ++p) {
      panel[p] = (begin + p / width * length + (i + p / width) % length) * width + p % width;
      t.panel[p] = static_cast<const float*>(a.weight) + panel[p] * a.depth * kLanes;
    }
    vf acc[R][P];
    alignas(64) float sum[R * P * kLanes];
    hooks.start(acc, row, panel);
    sum_chains<R, P>(acc, t, a.depth, sum);
    finish_all(a, hooks, acc, row, panel);
  }
  if constexpr (P == 6)
    return;    // taken only where nothing is left over
  else if constexpr (P > 2)
    stream<R, P / 2>(a, hooks, x, x_stride, row, begin + length * lanes, end);
  else if constexpr (P == 2)
    if (!a.halves) stream<R, 1>(a, hooks, x, x_stride, row, begin + length * lanes, end);
}

// Few rows, with as many streams as this machine's memory wants. A left-over of one or two panels would run with one or two
// streams: where eight are wanted, one row takes six if they come out even and eight do not.
template <int R, class Hooks>
void stream_rows(const LinearArgs& a, const Hooks& hooks, const float* x, int64_t x_stride, int64_t row, int64_t begin, int64_t end) {
  const int64_t width = a.halves ? 2 : 1, units = end - begin;
  if (kStreams == 2 || streaming.streams == 2) return stream<R, 2>(a, hooks, x, x_stride, row, begin, end);
  if constexpr (kStreams > 2) {
    if (kStreams == 4 || R == 4 || streaming.streams == 4) return stream<R, 4>(a, hooks, x, x_stride, row, begin, end);
    if constexpr (kStreams == 8 && R < 4) {
      if (R == 1 && units % (8 / width) && units % (6 / width) == 0) return stream<1, 6>(a, hooks, x, x_stride, row, begin, end);
      stream<R, 8>(a, hooks, x, x_stride, row, begin, end);
    }
  }
}

// R rows against P panels over one block of the depth; the sums rest in `rest` between blocks.
template <int R, int P, class Hooks>
FL_INLINE void tile(const LinearArgs& a, const Hooks& hooks, const Tile& t, float* rest, int64_t row, const int64_t (&panel)[P], int64_t k,
                    int64_t depth) {
  vf acc[R][P];
  if (!k) hooks.start(acc, row, panel);
  sum_chains<R, P>(acc, t, depth, rest, k != 0);
  if (k + depth == a.depth) return finish_all(a, hooks, acc, row, panel);
  FL_UNROLL
  for (int r = 0; r < R; ++r)
    FL_UNROLL
    for (int p = 0; p < P; ++p) store(rest + (r * P + p) * kLanes, acc[r][p]);
}

// Rows [row, row + count), which begin at x, against one group of P panels that lie at `packed`, `stride` apart.
template <int P, class Hooks>
void block(const LinearArgs& a, const Hooks& hooks, const float* x, int64_t x_stride, const float* packed, int64_t stride, int64_t row,
           int64_t count, const int64_t (&panel)[P], float* rest) {
  for (int64_t k = 0; k < a.depth || k == 0; k += kDepthBlock) {
    const int64_t depth = a.depth - k < kDepthBlock ? a.depth - k : kDepthBlock;
    for (int64_t r = 0; r < count;) {
      Tile t{x + r * x_stride + k, x_stride, {}};
      for (int p = 0; p < P; ++p) t.panel[p] = packed + p * stride + k * kLanes;
      float* resting = rest + r * P * kLanes;
      const int64_t left = count - r;
      constexpr int R = tile_rows(P);
      if (left >= R) {
        tile<R, P>(a, hooks, t, resting, row + r, panel, k, depth), r += R;
      } else if (R > 8 && left >= 8) {
        tile<8, P>(a, hooks, t, resting, row + r, panel, k, depth), r += 8;
      } else if (R > 4 && left >= 4) {
        tile<4, P>(a, hooks, t, resting, row + r, panel, k, depth), r += 4;
      } else if (R > 2 && left >= 2) {
        tile<2, P>(a, hooks, t, resting, row + r, panel, k, depth), r += 2;
      } else {
        tile<1, P>(a, hooks, t, resting, row + r, panel, k, depth), r += 1;
      }
    }
  }
}

// A group of panels, `count` of them side by side, against a block of rows.
template <class Hooks>
void block_of_group(const LinearArgs& a, const Hooks& hooks, const float* x, int64_t x_stride, const float* packed, int64_t row,
                    int64_t rows, int64_t group, int64_t count, float* rest) {
  const int64_t stride = a.depth * kLanes;
  if (count == 2 && (kTilePanels == 2 || a.halves == kSwiglu)) {
    const int64_t panel[2] = {group * 2, group * 2 + 1};
    block<2>(a, hooks, x, x_stride, packed, stride, row, rows, panel, rest);
  } else {
    for (int64_t p = 0; p < count; ++p) {
      const int64_t panel[1] = {group * 2 + p};
      block<1>(a, hooks, x, x_stride, packed + p * stride, stride, row, rows, panel, rest);
    }
  }
}

// One panel of a weight in any form but kPanels, or `count` of them, one behind the other. With swiglu, gate and up rows are taken
// in turn.
template <class Hooks> void pack(const LinearArgs& a, const Hooks& hooks, float* to, int64_t p, int64_t count = 1) {
  if (count > 1 && a.form != kRowsAcross && a.form != kOuter) {
    for (int64_t i = 0; i < count; ++i) pack(a, hooks, to + i * a.depth * kLanes, p + i);
    return;
  }
  const bool alternate = a.halves != kWhole;
  const int64_t n = p * kLanes;
  const auto* bytes = static_cast<const uint8_t*>(a.weight);
  const auto* panels = static_cast<const float*>(a.weight);
  switch (a.form) {
    case kRows:
      return with_dtype(a.dtype, [&](auto type) {
        const auto* weight = static_cast<const decltype(type)*>(a.weight);
        if (a.halves != kSwiglu) return pack_rows(to, weight, a.weight_stride, a.cols, a.depth, n);
        pack_rows(to, weight + p % 2 * a.cols * a.weight_stride, a.weight_stride, a.cols, a.depth, p / 2 * kLanes);
      });
    case kRowsAcross: case kOuter:
      return with_dtype(a.dtype, [&](auto type) {
        const auto* weight = static_cast<const decltype(type)*>(a.weight);
        pack_columns(to, a.depth * kLanes, count, weight, a.weight_stride, a.cols, a.depth, n,
                     [&](vf v, int64_t row, int64_t column) { return hooks.pack(v, row, column); });
      });
    case kPanelsAcross: return pack_panel_columns(to, panels, a.cols, a.depth, alternate, n);
    case kInt4Across: return pack_quant_columns<4, false>(to, bytes, a.cols, a.depth, alternate, n, a.group);
    case kInt4MinAcross: return pack_quant_columns<4, true>(to, bytes, a.cols, a.depth, alternate, n, a.group);
    case kInt8Across: return pack_quant_columns<8, false>(to, bytes, a.cols, a.depth, alternate, n, a.group);
    default: return pack_quant_columns<8, true>(to, bytes, a.cols, a.depth, alternate, n, a.group);
  }
}

FL_INLINE int64_t panels_of(const LinearArgs& a) {
  if (a.halves == kSwiglu) return (a.cols + kLanes - 1) / kLanes * 2;
  if (alternates(a)) return (a.cols / 2 + kLanes - 1) / kLanes * 2;
  return (a.cols + kLanes - 1) / kLanes;
}

// A row of x as the product reads it: normalised, rounded to its dtype, widened.
template <class T> void prepare_row(float* to, const T* x, const T* norm, double eps, int64_t n) {
  const vf scale = set1(norm ? reciprocal_rms(x, n, eps) : 1.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const vm inside = first(n - i);
    vf v = load(x + i, inside);
    if (norm) {
      T rounded[kLanes];
      store(rounded, v * scale * load(norm + i, inside));
      v = load(rounded);
    }
    store(to + i, v, inside);
  }
}

// Rows r..r+15 of x^T, x [depth, rows], each `depth` long and widened, `apart` floats apart.
template <class T>
void transpose_rows(float* to, int64_t apart, const T* x, int64_t stride, int64_t rows, int64_t depth, int64_t r) {
  const int64_t count = rows - r < kLanes ? rows - r : kLanes;
  const vm inside = first(count);
  alignas(64) float block[kLanes * kLanes];
  for (int64_t k = 0; k < depth; k += kLanes) {
    vf in[16];
    for (int i = 0; i < 16; ++i) in[i] = k + i < depth ? load(x + (k + i) * stride + r, inside) : set1(0);
    transpose(block, in, count);
    for (int64_t i = 0; i < count; ++i) store(to + (r + i) * apart + k, load(block + i * kLanes), first(depth - k));
  }
}

template <class Hooks> void product(const LinearArgs& a, const Hooks& hooks, Team& team, float* scratch) {
  const int64_t width = alternates(a) ? 2 : 1;
  const auto* x = static_cast<const float*>(a.x);
  int64_t x_stride = a.x_stride;
  const bool few = a.rows <= kFewRows;
  if (makes_rows(a)) {
    const int64_t apart = row_floats(a.depth);
    float* rows = scratch + (few ? team.rank * a.rows * apart : 0);
    with_dtype(a.x_dtype, [&](auto type) {
      using T = decltype(type);
      const auto* source = static_cast<const T*>(a.x);
      const int64_t step = a.form == kOuter ? kLanes : 1, steps = (a.rows + step - 1) / step;
      const Range mine = few ? Range{0, steps} : share(team, steps);
      for (int64_t r = mine.begin * step; r < mine.end * step; r += step)
        if (a.form == kOuter)
          transpose_rows(rows, apart, source, a.x_stride, a.rows, a.depth, r);
        else
          prepare_row(rows + r * apart, source + r * a.x_stride, static_cast<const T*>(a.norm), a.eps, a.depth);
    });
    if (!few) sync(team);
    x = rows, x_stride = apart;
    scratch += linear_x_floats(a, team.size);
  }
  const int64_t panels = panels_of(a);
  if constexpr (!Hooks::kPacks)
    if (few && a.form == kPanels) {
      const Range mine = share(team, panels / width);
      int64_t r = 0;
      if (a.rows == 4) stream_rows<4>(a, hooks, x, x_stride, 0, mine.begin, mine.end), r = 4;
      if (a.rows == 2 || a.rows == 3) stream_rows<2>(a, hooks, x, x_stride, 0, mine.begin, mine.end), r = 2;
      if (r < a.rows) stream_rows<1>(a, hooks, x + r * x_stride, x_stride, r, mine.begin, mine.end);
      return;
    }
  // Items: panel groups x row blocks. A few groups, whose panels stay in cache, meet one block of rows after the other.
  float* rest = scratch + team.rank * linear_thread_floats(a);
  float* packed = rest + kRowBlock * 2 * kLanes;
  constexpr int P = 2;    // a unit of swiglu is two panels; the tile takes them together on every tier
  const bool packs = a.form != kPanels;
  const int64_t groups = (panels + P - 1) / P, blocks = (a.rows + kRowBlock - 1) / kRowBlock, stride = a.depth * kLanes;
  // A weight that must be packed is packed once per thread and panel: then each thread owns panels, not items.
  const Range own = packs ? share(team, groups) : Range{0, groups};
  const int64_t all = (own.end - own.begin) * blocks, most = packs ? packed_groups(a.depth) : 4;
  const Range items = packs ? Range{0, all} : share(team, all);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t chunk = item / (most * blocks), at = item % (most * blocks), begin = own.begin + chunk * most;
    const int64_t together = own.end - begin < most ? own.end - begin : most, group = begin + at % together;
    const int64_t left = panels - group * P, row = at / together * kRowBlock;
    if (packs && at == 0) pack(a, hooks, packed, begin * P, together * P < panels - begin * P ? together * P : panels - begin * P);
    const float* source = packs ? packed + (group - begin) * P * stride : static_cast<const float*>(a.weight) + group * P * stride;
    block_of_group(a, hooks, x + row * x_stride, x_stride, source, row, a.rows - row < kRowBlock ? a.rows - row : kRowBlock, group,
                   left < P ? left : P, rest);
  }
}

}  // namespace
}  // namespace fastllm
