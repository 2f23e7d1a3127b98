// The microkernels of attention over one KV tile: scores, softmax, values, and the fold of a tile into a row's running
// state.
//
// What they promise, whatever rows stand beside each other and however keys lie in memory: a score is one FMA chain
// over the head dimension ascending; a weighted sum is one FMA chain over the tile's visible keys ascending, starting
// from zero; a tile's exponentials are added lane by lane over its panels of 16, then in the tree of sum(). Keys that a
// row may not see never enter its arithmetic: their scores are replaced, their values are not read for it.
#pragma once
#include "attention_pack.h"
#include "attention_shape.h"

namespace fastllm {
namespace {

constexpr int64_t kPanels = kKvTile / kLanes;
constexpr int64_t kQueryStride = kMaxHeadDim + 16;    // constant, so that a row is a displacement; 17 cache lines
constexpr int64_t kScoreStride = kKvTile + 16;        // spreads rows over the sets of the first-level cache

// Register tile: rows x width accumulators, width key panels or value vectors beside one broadcast.
#if defined(__AVX512F__)
constexpr int64_t kGroupRows = 8;
constexpr int width(int rows) { return rows <= 2 ? 8 : rows <= 6 ? 4 : 2; }
#elif defined(__AVX2__)
constexpr int64_t kGroupRows = 6;
constexpr int width(int rows) { return rows <= 1 ? 4 : rows <= 3 ? 2 : 1; }
#else
constexpr int64_t kGroupRows = 6;
constexpr int width(int rows) { return rows <= 1 ? 2 : 1; }
#endif
FL_INLINE int64_t group_rows(int64_t left) { return left <= kGroupRows ? left : 6; }

// Where the keys of one tile lie: panels [dim][16] of 16 keys, and as many groups of 16 value rows. E: float, or int8_t
// or e4m3 with a scale for each key and each value row.
template <class E> struct KvTile {
  const E* keys[kPanels];
  const E* values[kPanels];
  const E* keys_ahead[kPanels];      // what to fetch while these keys, or these values, are at work: pages are read
  const E* values_ahead[kPanels];    // keys, values, next tile; each fetches the one that comes `width` after it
  const float* scales[kPanels];      // of bytes: of a panel's keys [16], then of its values [16]
  int64_t value_row;                 // elements from one value row to the next
};
template <class E> constexpr bool kBytes = sizeof(E) == 1;
template <class E> constexpr int64_t kVectorsOfLine = 4 / sizeof(E);    // vectors of 16 in a cache line

template <int n> struct Rows {
  static constexpr int value = n;
};
template <class F> FL_INLINE void with_rows(int64_t rows, F f) {
  switch (rows) {
    case 1: return f(Rows<1>());
    case 2: return f(Rows<2>());
    case 3: return f(Rows<3>());
    case 4: return f(Rows<4>());
    case 5: return f(Rows<5>());
    case 6: return f(Rows<6>());
#if defined(__AVX512F__)
    case 7: return f(Rows<7>());
    case 8: return f(Rows<8>());
#endif
  }
}

// ------------------------------------------------------------------------------------------------------------- scores

// s[r][16 p ..] = scale * (q[r] . keys), R rows by N panels, then times the scales of bytes. Ahead: as many other panels
// or pages of values, which have the same number of lines, are fetched meanwhile. A page is short and pages lie anywhere:
// the hardware's own prefetch starts too late on each. Into L2: a core has more misses in flight there than its first
// level can wait for.
template <int R, int N, bool Ahead, class E>
FL_INLINE void score_block(const float* q, const KvTile<E>& tile, int64_t panel, int64_t dim, vf scale, float* s) {
  const E *k[N], *next[N];
  vf acc[R][N];
  FL_UNROLL for (int p = 0; p < N; ++p) {
    k[p] = tile.keys[panel + p];
    if (Ahead) next[p] = tile.keys_ahead[panel + p];
    FL_UNROLL for (int r = 0; r < R; ++r) acc[r][p] = set1(0);
  }
  for (int64_t d = 0; d < dim; ++d) {
    vf w[N];
    FL_UNROLL for (int p = 0; p < N; ++p) {
      w[p] = load(k[p] + d * kLanes);
      if (Ahead && d % kVectorsOfLine<E> == 0) prefetch_into_l2(next[p] + d * kLanes);
    }
    FL_UNROLL for (int r = 0; r < R; ++r) {
      const vf x = set1(q[r * kQueryStride + d]);
      FL_UNROLL for (int p = 0; p < N; ++p) acc[r][p] = fma(x, w[p], acc[r][p]);
    }
  }
  FL_UNROLL for (int r = 0; r < R; ++r)
    FL_UNROLL for (int p = 0; p < N; ++p) {
      vf x = acc[r][p] * scale;
      if constexpr (kBytes<E>) x = x * load(tile.scales[panel + p]);
      store(s + r * kScoreStride + p * kLanes, x);
    }
}

template <int R, int N, bool Ahead, class E>
void score_panels(const float* q, const KvTile<E>& tile, int64_t p, int64_t end, int64_t dim, vf scale, float* s) {
  for (; p + N <= end; p += N) score_block<R, N, Ahead>(q, tile, p, dim, scale, s + p * kLanes);
  if constexpr (N > 1)
    if (p < end) score_panels<R, N / 2, Ahead>(q, tile, p, end, dim, scale, s);
}

// ------------------------------------------------------------------------------------------------------------ softmax

// The keys of panel p that lie in [begin, end) keep x, the others get `other`.
FL_INLINE vf keep(vf x, int64_t p, Visible keys, vf other) {
  const int64_t end = keys.end - p * kLanes, begin = keys.begin - p * kLanes;
  if (end < kLanes) x = select(first(end), x, other);
  if (begin > 0) x = select(first(begin), other, x);
  return x;
}

// Scores become exp(score - highest); returns the highest and the sum. A NaN score leaves a NaN sum; where all are -inf
// the exponentials are zeros.
FL_INLINE void softmax_tile(float* s, Visible keys, float& highest, float& total) {
  const int64_t p0 = keys.begin / kLanes, p1 = (keys.end + kLanes - 1) / kLanes;
  const vf lowest = set1(-__builtin_inff());
  vf top = lowest;
  for (int64_t p = p0; p < p1; ++p) top = max(keep(load(s + p * kLanes), p, keys, lowest), top);    // no NaN enters
  highest = max(top);
  const vf shift = set1(highest == -__builtin_inff() ? 0.0f : highest);
  vf sums = set1(0);
  for (int64_t p = p0; p < p1; ++p) {
    const vf e = exp_not_positive(load(s + p * kLanes) - shift);
    store(s + p * kLanes, e);
    sums = sums + keep(e, p, keys, set1(0));
  }
  total = sum(sums);
}

// ------------------------------------------------------------------------------------------------------------- values

// The weights of keys whose values are bytes, times the scales of those.
template <class E> FL_INLINE void scale_weights(float* p, const KvTile<E>& tile, Visible keys) {
  for (int64_t i = keys.begin / kLanes; i * kLanes < keys.end; ++i)
    store(p + i * kLanes, load(p + i * kLanes) * (load(tile.scales[i] + kLanes) * set1(kLoadUnit<E>)));
}

// acc[r][16 c ..] continues (or, when fresh, starts) the chain over keys [begin, end) of p[r][j] * values[j].
template <int R, int N, bool Ahead, class E>
FL_INLINE void value_block(const float* p, const KvTile<E>& tile, int64_t column, Visible keys, int64_t line, float* out,
                           int64_t out_row, bool fresh) {
  vf acc[R][N];
  FL_UNROLL for (int r = 0; r < R; ++r)
    FL_UNROLL for (int c = 0; c < N; ++c) acc[r][c] = fresh ? set1(0) : load(out + r * out_row + c * kLanes);
  for (int64_t j = keys.begin; j < keys.end;) {
    const int64_t panel = j / kLanes, next = (panel + 1) * kLanes, stop = next < keys.end ? next : keys.end;
    const E* v = tile.values[panel] + (j % kLanes) * tile.value_row + column;
    const E* ahead = Ahead ? tile.values_ahead[panel] + (j % kLanes) * line + column : nullptr;
    for (; j < stop; ++j, v += tile.value_row) {
      vf w[N];
      FL_UNROLL for (int c = 0; c < N; ++c) {
        w[c] = load(v + c * kLanes);
        if (Ahead && c % kVectorsOfLine<E> == 0) prefetch_into_l2(ahead + c * kLanes);
      }
      if (Ahead) ahead += line;
      FL_UNROLL for (int r = 0; r < R; ++r) {
        const vf x = set1(p[r * kScoreStride + j]);
        FL_UNROLL for (int c = 0; c < N; ++c) acc[r][c] = fma(x, w[c], acc[r][c]);
      }
    }
  }
  FL_UNROLL for (int r = 0; r < R; ++r)
    FL_UNROLL for (int c = 0; c < N; ++c) store(out + r * out_row + c * kLanes, acc[r][c]);
}

template <int R, int N, bool Ahead, class E>
void value_columns(
    const float* p, const KvTile<E>& tile, int64_t column, Visible keys, int64_t padded, float* out, bool fresh) {
  for (; column + N * kLanes <= padded; column += N * kLanes)
    value_block<R, N, Ahead>(p, tile, column, keys, padded, out + column, padded, fresh);
  if constexpr (N > 1)
    if (column < padded) value_columns<R, N / 2, Ahead>(p, tile, column, keys, padded, out, fresh);
}

// acc[r] continues (or, when fresh, starts) the chain over the keys that row r sees. A group's rows see nearly the same
// keys: those that all see go through the register tile, the few at both ends row by row.
template <int R, bool Ahead, class E>
void weigh_values(const float* p, const KvTile<E>& tile, const Visible* keys, int64_t padded, float* acc, bool fresh) {
  Visible common = keys[0];
  bool same = true;
  for (int r = 1; r < R; ++r) {
    same = same && keys[r].begin == keys[0].begin && keys[r].end == keys[0].end;
    if (keys[r].begin > common.begin) common.begin = keys[r].begin;
    if (keys[r].end < common.end) common.end = keys[r].end;
  }
  if (same) {    // several passes over the columns: in steps that stay in the first-level cache, if it has not met them
    const int64_t step = Ahead && padded > width(R) * kLanes ? width(R) * kLanes : kKvTile;
    for (int64_t j = common.begin, stop; j < common.end; j = stop) {
      stop = (j / step + 1) * step < common.end ? (j / step + 1) * step : common.end;
      value_columns<R, width(R), Ahead>(p, tile, 0, {j, stop}, padded, acc, fresh && j == common.begin);
    }
    return;
  }
  if (common.begin >= common.end) common.begin = common.end = kKvTile;
  for (int r = 0; r < R; ++r) {
    const Visible head = {keys[r].begin, keys[r].end < common.begin ? keys[r].end : common.begin};
    value_columns<1, width(1), false>(p + r * kScoreStride, tile, 0, head, padded, acc + r * padded, fresh);
  }
  if (common.begin == kKvTile) return;
  value_columns<R, width(R), Ahead>(p, tile, 0, common, padded, acc, false);
  for (int r = 0; r < R; ++r)
    if (keys[r].end > common.end) {
      const Visible tail = {common.end, keys[r].end};
      value_columns<1, width(1), false>(p + r * kScoreStride, tile, 0, tail, padded, acc + r * padded, false);
    }
}

// --------------------------------------------------------------------------------------------------------------- fold

// Running state of a query row: highest score, sum and weighted values, both relative to the highest.
struct State {
  float *highest, *total, *values;    // [rows], [rows], [rows][padded]
};

// Folds a tile's results for one row into its state: the tile with the higher maximum keeps its scale.
FL_INLINE void fold(const State& state, int64_t row, float highest, float total, const float* values, int64_t padded) {
  float& old = state.highest[row];
  const float top = highest > old ? highest : old, reference = top == -__builtin_inff() ? 0.0f : top;
  const vf keep_old = exp(set1(old - reference)), keep_new = exp(set1(highest - reference));
  float sums[kLanes];
  store(sums, fma(set1(total), keep_new, set1(state.total[row]) * keep_old));
  old = top, state.total[row] = sums[0];
  float* running = state.values + row * padded;
  for (int64_t c = 0; c < padded; c += kLanes)
    store(running + c, fma(load(values + c), keep_new, load(running + c) * keep_old));
}

// A row's first tile is taken as it is.
FL_INLINE void begin(
    const State& state, int64_t row, float highest, float total, const float* values, int64_t padded) {
  state.highest[row] = highest, state.total[row] = total;
  for (int64_t c = 0; c < padded; c += kLanes) store(state.values + row * padded + c, load(values + c));
}

}  // namespace
}  // namespace fastllm
