// linear: y = norm(x) W^T + bias, then + residual or swiglu, in fp32.
//
// The contract: one FMA chain per output element, K ascending, starting from zero. Tiles over rows and columns are free,
// so one row and a thousand give the same bits. Weights lie in panels of 16 output columns, [N/16][K][16]: a vector of the
// panel times a broadcast of x feeds 16 chains. A row-major weight is packed panel by panel on the way.
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
constexpr int64_t kRowBlock = 96;      // rows of x that stay in L2 while the panels pass
constexpr int64_t kDepthBlock = 2048;  // of K: two panels of this depth stay in L2 while the rows pass
constexpr int64_t kFewRows = 4;        // up to here each thread makes its own normalised rows and needs no barrier

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

// What follows the chain, for one row and one panel of columns n..n+15.
FL_INLINE void finish(const LinearArgs& a, vf v, int64_t row, int64_t n) {
  const vm inside = first(a.cols - n);
  if (a.bias) v = v + load(a.bias + n, inside);
  if (a.residual) v = v + load(a.residual + row * a.residual_stride + n, inside);
  store(a.y + row * a.y_stride + n, v, inside);
}

// Panels come in units: one panel, or for swiglu a gate panel and the up panel behind it, whose product is one output panel.
template <int R, int P> FL_INLINE void finish_all(const LinearArgs& a, vf (&acc)[R][P], int64_t row, const int64_t (&panel)[P]) {
  FL_UNROLL
  for (int r = 0; r < R; ++r) {
    if (a.swiglu) {
      FL_UNROLL
      for (int p = 0; p + 1 < P; p += 2) finish(a, silu(acc[r][p]) * acc[r][p + 1], row + r, panel[p] / 2 * kLanes);
    } else {
      FL_UNROLL
      for (int p = 0; p < P; ++p) finish(a, acc[r][p], row + r, panel[p] * kLanes);
    }
  }
}

// One row (or few) against units [begin, end): P panels at once, each its own stream through memory.
// Each stream starts one panel further into its run than the one before: runs of a multiple of 4 KiB would otherwise meet in the
// same cache sets and memory banks, a third of the bandwidth.
template <int R, int P> void stream(const LinearArgs& a, const float* x, int64_t x_stride, int64_t row, int64_t begin, int64_t end) {
  const int64_t width = a.swiglu ? 2 : 1, lanes = P / width, length = (end - begin) / lanes;
  for (int64_t i = 0; i < length; ++i) {
    Tile t{x, x_stride, {}};
    int64_t panel[P];
    vf acc[R][P];
    for (int p = 0; p < P; ++p) {
      panel[p] = (begin + p / width * length + (i + p / width) % length) * width + p % width;
      t.panel[p] = a.panels + panel[p] * a.depth * kLanes;
      for (int r = 0; r < R; ++r) acc[r][p] = set1(0);
    }
    multiply<R, P>(acc, t, a.depth);
    finish_all<R, P>(a, acc, row, panel);
  }
  if constexpr (P == 6)
    return;    // taken only where nothing is left over
  else if constexpr (P > 2)
    stream<R, P / 2>(a, x, x_stride, row, begin + length * lanes, end);
  else if constexpr (P == 2)
    if (!a.swiglu) stream<R, 1>(a, x, x_stride, row, begin + length * lanes, end);
}

// Few rows, with as many streams as this machine's memory wants. A left-over of one or two panels would run with one or two
// streams: where eight are wanted, one row takes six if they come out even and eight do not.
template <int R> void stream_rows(const LinearArgs& a, const float* x, int64_t x_stride, int64_t row, int64_t begin, int64_t end) {
  const int64_t width = a.swiglu ? 2 : 1, units = end - begin;
  if (streaming.streams == 2)
    stream<R, 2>(a, x, x_stride, row, begin, end);
  else if (streaming.streams == 4)
    stream<R, 4>(a, x, x_stride, row, begin, end);
  else if (R == 1 && kStreams == 8 && units % (8 / width) && units % (6 / width) == 0)
    stream<1, 6>(a, x, x_stride, row, begin, end);
  else
    stream<R, (R == 4 ? 4 : kStreams)>(a, x, x_stride, row, begin, end);
}

// R rows against P panels over one block of the depth; partial chains rest in `rest` between blocks.
template <int R, int P>
FL_INLINE void tile(const LinearArgs& a, const Tile& t, float* rest, int64_t row, const int64_t (&panel)[P], int64_t k, int64_t depth) {
  vf acc[R][P];
  FL_UNROLL
  for (int r = 0; r < R; ++r)
    FL_UNROLL
    for (int p = 0; p < P; ++p) acc[r][p] = k ? load(rest + (r * P + p) * kLanes) : set1(0);
  multiply<R, P>(acc, t, depth);
  if (k + depth == a.depth) return finish_all<R, P>(a, acc, row, panel);
  FL_UNROLL
  for (int r = 0; r < R; ++r)
    FL_UNROLL
    for (int p = 0; p < P; ++p) store(rest + (r * P + p) * kLanes, acc[r][p]);
}

// Rows [row, row + count) against one group of P panels that lie at `packed`, `stride` apart.
template <int P>
void block(const LinearArgs& a, const float* x, int64_t x_stride, const float* packed, int64_t stride, int64_t row, int64_t count,
           const int64_t (&panel)[P], float* rest) {
  for (int64_t k = 0; k < a.depth || k == 0; k += kDepthBlock) {
    const int64_t depth = a.depth - k < kDepthBlock ? a.depth - k : kDepthBlock;
    for (int64_t r = 0; r < count;) {
      Tile t{x + r * x_stride + k, x_stride, {}};
      for (int p = 0; p < P; ++p) t.panel[p] = packed + p * stride + k * kLanes;
      float* resting = rest + r * P * kLanes;
      const int64_t left = count - r;
      constexpr int R = tile_rows(P);
      if (left >= R) {
        tile<R, P>(a, t, resting, row + r, panel, k, depth), r += R;
      } else if (R > 8 && left >= 8) {
        tile<8, P>(a, t, resting, row + r, panel, k, depth), r += 8;
      } else if (R > 4 && left >= 4) {
        tile<4, P>(a, t, resting, row + r, panel, k, depth), r += 4;
      } else if (R > 2 && left >= 2) {
        tile<2, P>(a, t, resting, row + r, panel, k, depth), r += 2;
      } else {
        tile<1, P>(a, t, resting, row + r, panel, k, depth), r += 1;
      }
    }
  }
}

FL_INLINE void transpose(float* to, const float* from, int64_t stride) {    // 16 x 16
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  FL_UNROLL
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * stride);
  FL_UNROLL
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  FL_UNROLL
  for (int i = 0; i < 16; i += 4) {    // a[i + j]: column 4q + j of rows i..i+3, in 128-bit lane q
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44), a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44), a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  FL_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512 even0 = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88), odd0 = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88), odd1 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
    _mm512_storeu_ps(to + j * 16, _mm512_shuffle_f32x4(even0, even1, 0x88));
    _mm512_storeu_ps(to + (j + 4) * 16, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
    _mm512_storeu_ps(to + (j + 8) * 16, _mm512_shuffle_f32x4(even0, even1, 0xdd));
    _mm512_storeu_ps(to + (j + 12) * 16, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * 16 + i] = from[i * stride + j];
#endif
}

// Rows n..n+15 of a row-major [cols, depth] weight as one panel [depth][16]; absent rows are zeros.
void pack(float* to, const float* weight, int64_t stride, int64_t cols, int64_t depth, int64_t n) {
  int64_t k = 0;
  if (n + kLanes <= cols)
    for (; k + kLanes <= depth; k += kLanes) transpose(to + k * kLanes, weight + n * stride + k, stride);
  for (; k < depth; ++k)
    for (int64_t i = 0; i < kLanes; ++i) to[k * kLanes + i] = n + i < cols ? weight[(n + i) * stride + k] : 0.0f;
}

int64_t panels_of(const LinearArgs& a) { return (a.cols + kLanes - 1) / kLanes * (a.swiglu ? 2 : 1); }

}  // namespace

namespace FASTLLM_TIER {

void linear(const LinearArgs& a, Team& team) noexcept {
  const int64_t width = a.swiglu ? 2 : 1, units = panels_of(a) / width;
  const float* x = a.x;
  int64_t x_stride = a.x_stride;
  const bool few = a.rows <= kFewRows;
  float* scratch = reinterpret_cast<float*>(team.scratch);
  if (a.norm) {
    float* rows = scratch + (few ? team.rank * a.rows * a.depth : 0);
    const Range mine = few ? Range{0, a.rows} : share(team, a.rows);
    for (int64_t r = mine.begin; r < mine.end; ++r)
      scale_row(rows + r * a.depth, x + r * a.x_stride, a.norm, reciprocal_rms(x + r * a.x_stride, a.depth, a.eps), a.depth);
    if (!few) sync(team);
    x = rows, x_stride = a.depth;
    scratch += (few ? team.size : 1) * a.rows * a.depth;
  }
  if (few && a.panels) {
    const Range mine = share(team, units);
    int64_t r = 0;
    if (a.rows == 4) stream_rows<4>(a, x, x_stride, 0, mine.begin, mine.end), r = 4;
    if (a.rows == 2 || a.rows == 3) stream_rows<2>(a, x, x_stride, 0, mine.begin, mine.end), r = 2;
    if (r < a.rows) stream_rows<1>(a, x + r * x_stride, x_stride, r, mine.begin, mine.end);
    return;
  }
  // Items: row blocks x panel groups, panel groups of one row block next to each other so that its rows stay in cache.
  float* rest = scratch + team.rank * linear_thread_floats(a);
  float* packed = rest + kRowBlock * 2 * kLanes;
  constexpr int P = 2;    // a unit of swiglu is two panels; the tile takes them together on every tier
  const int64_t panels = panels_of(a), groups = (panels + P - 1) / P;
  // A weight that must be packed is packed once per thread and panel: then each thread owns panels, not items.
  const int64_t blocks = (a.rows + kRowBlock - 1) / kRowBlock;
  const Range items = a.panels ? share(team, blocks * groups) : share(team, groups);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t group = item % groups, count = group * P + P <= panels ? P : 1;
    const int64_t stride = a.depth * kLanes;
    const float* source = a.panels ? a.panels + group * P * stride : packed;
    if (!a.panels)
      for (int64_t p = 0; p < count; ++p) {    // swiglu: gate rows first, then up rows, taken in turn
        const float* half = a.weight + (a.swiglu && p ? a.cols * a.weight_stride : 0);
        pack(packed + p * stride, half, a.weight_stride, a.cols, a.depth, (a.swiglu ? group : group * P + p) * kLanes);
      }
    const int64_t b0 = a.panels ? item / groups : 0, b1 = a.panels ? b0 + 1 : blocks;
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t row = b * kRowBlock, rows = a.rows - row < kRowBlock ? a.rows - row : kRowBlock;
      const float* at = x + row * x_stride;
      if (count == 2 && (kTilePanels == 2 || a.swiglu)) {
        const int64_t panel[2] = {group * 2, group * 2 + 1};
        block<2>(a, at, x_stride, source, stride, row, rows, panel, rest);
      } else {
        for (int64_t p = 0; p < count; ++p) {
          const int64_t panel[1] = {group * 2 + p};
          block<1>(a, at, x_stride, source + p * stride, stride, row, rows, panel, rest);
        }
      }
    }
  }
}

void pack_panels(const PackPanelsArgs& a, Team& team) noexcept {
  const Range mine = share(team, (a.cols + kLanes - 1) / kLanes);
  for (int64_t p = mine.begin; p < mine.end; ++p)
    pack(a.panels + p * a.panel_stride, a.weight, a.weight_stride, a.cols, a.depth, p * kLanes);
}

void panel_rows(const PanelRowsArgs& a, Team& team) noexcept {
  const Range mine = share(team, a.count);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t id = a.ids[i];
    if (id < 0 || id >= a.rows) {
      report(team, kIndexOutOfRange);
      continue;
    }
    const float* column = a.panels + id / kLanes * a.depth * kLanes + id % kLanes;
    for (int64_t k = 0; k < a.depth; ++k) a.y[i * a.depth + k] = column[k * kLanes];
  }
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
