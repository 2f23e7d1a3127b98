// lora_linear: y = gain * (x W^T + s B^T) + bias, s = scale * drop(x) A^T, and its gradients but those of gain and bias.
//
// The contract: s[t, r] is gemm.h's sum over k, then times scale; y's sum goes on over r: acc = fma(s[t, r], B[n, r], acc).
// Every gradient has gemm.h's order too (dx over r, masked, then over n; dA and dB over the rows), so that no result depends on the
// number of threads.
#include "lora.h"

namespace fastllm {
namespace {

// Each chain goes on over the rank.
struct LowRank : NoHooks {
  const float *s, *b, *gain;    // b: panels [cols / 16][rank][16]
  int64_t rank, cols;
  LowRank(const float* s_, const float* b_, const float* gain_, int64_t rank_, int64_t cols_)
      : s(s_), b(b_), gain(gain_), rank(rank_), cols(cols_) {}
  template <int R, int P> FL_INLINE_MEMBER void end(vf (&acc)[R][P], int64_t row, const int64_t (&panel)[P]) const {
    Tile t{s + row * rank, rank, {}};
    for (int p = 0; p < P; ++p) t.panel[p] = b + panel[p] * rank * kLanes;
    multiply<R, P>(acc, t, rank);
    if (!gain) return;
    FL_UNROLL
    for (int p = 0; p < P; ++p) {
      const int64_t n = panel[p] * kLanes;
      const vf g = load(gain + n, first(cols - n));
      FL_UNROLL
      for (int r = 0; r < R; ++r) acc[r][p] = acc[r][p] * g;
    }
  }
};

// In the backward: a chain may begin with mask * (ds A), and elements may be dropped while they are packed.
struct Backward : NoHooks {
  static constexpr bool kPacks = true;
  const float *ds, *a;      // ds null: chains begin with zero; a: panels [cols / 16][rank][16]
  const uint64_t* keep;     // [rows, words] or null
  int64_t rank, words;
  float scale;
  Backward(const float* ds_, const float* a_, const uint64_t* keep_, int64_t rank_, int64_t words_, float scale_)
      : ds(ds_), a(a_), keep(keep_), rank(rank_), words(words_), scale(scale_) {}
  FL_INLINE_MEMBER vf dropped(vf v, int64_t row, int64_t column) const {
    return drop(v, keep[row * words + column / 64] >> column % 64, set1(scale));
  }
  template <int R, int P> FL_INLINE_MEMBER void start(vf (&acc)[R][P], int64_t row, const int64_t (&panel)[P]) const {
    NoHooks::start(acc, row, panel);
    if (!ds) return;
    Tile t{ds + row * rank, rank, {}};
    for (int p = 0; p < P; ++p) t.panel[p] = a + panel[p] * rank * kLanes;
    multiply<R, P>(acc, t, rank);
    if (!keep) return;
    FL_UNROLL
    for (int r = 0; r < R; ++r)
      FL_UNROLL
      for (int p = 0; p < P; ++p) acc[r][p] = dropped(acc[r][p], row + r, panel[p] * kLanes);
  }
  FL_INLINE_MEMBER vf pack(vf v, int64_t row, int64_t column) const { return keep && !ds ? dropped(v, row, column) : v; }
};

// y [rows, cols] float32 = scale * x' W^T, W in panels; x' is x widened, and dropped where dropout says so. done(row, count)
// is called for each block of rows when it is there.
struct Narrow {
  LinearArgs a;
  Dropout dropout;    // threshold 0: none
  float scale;
};
template <class F> void narrow_product(const Narrow& n, Team& team, float* scratch, F done) {
  const LinearArgs& a = n.a;
  float* rest = scratch + team.rank * narrow_floats(a.depth);
  float* own = rest + kRowBlock * 2 * kLanes;
  const int64_t width = narrow_width(a.depth), fair = (a.rows + team.size - 1) / team.size;
  const int64_t height = fair < kNarrowRows ? fair : kNarrowRows, blocks = a.rows ? (a.rows + height - 1) / height : 0;
  const Range mine = share(team, blocks);
  for (int64_t b = mine.begin; b < mine.end; ++b) {
    const int64_t row = b * height, rows = a.rows - row < height ? a.rows - row : height;
    const auto* x = static_cast<const float*>(a.x) + row * a.x_stride;
    int64_t stride = a.x_stride;
    if (a.x_dtype != kFloat32 || n.dropout.threshold || collides(stride)) {
      with_dtype(a.x_dtype, [&](auto type) {
        const auto* from = static_cast<const decltype(type)*>(a.x);
        for (int64_t r = row; r < row + rows; ++r)
          for (int64_t k = 0; k < a.depth; k += 64) {
            const uint64_t keep = n.dropout.threshold ? kept(n.dropout, r, k / 64) : 0;
            dropped_row(own + (r - row) * width + k, from + r * a.x_stride + k, n.dropout.threshold ? &keep : nullptr,
                        n.dropout.scale, a.depth - k < 64 ? a.depth - k : 64);
          }
      });
      x = own, stride = width;
    }
    narrow_block(a, Scaled(n.scale), x, stride, row, rows, rest);
    done(row, rows);
  }
}

// to[j, i] = from[i, j] for rows [row, row + rows) of from [all, width]; rows of `to` are row_floats(all) apart.
void transpose_rows(float* to, const float* from, int64_t all, int64_t width, int64_t row, int64_t rows) {
  for (int64_t j = 0; j < width; ++j)
    for (int64_t i = row; i < row + rows; ++i) to[j * row_floats(all) + i] = from[i * width + j];
}

}  // namespace

namespace FASTLLM_TIER {

void lora_linear(const LoraLinearArgs& a, Team& team) noexcept {
  const LinearArgs& base = a.base;
  float* a_panels = reinterpret_cast<float*>(team.scratch);
  float* b_panels = a_panels + up_to_16(a.rank) * base.depth;
  float* s = b_panels + up_to_16(base.cols) * a.rank;
  float* scratch = s + up_to_16(base.rows * a.rank);
  if (a.s) s = a.s;
  pack_all(matrix(a.a, kRows, a.rank, base.depth, a.a_stride, base.dtype), a_panels, team);
  pack_all(matrix(a.b, kRows, base.cols, a.rank, a.b_stride, base.dtype), b_panels, team);
  sync(team);
  Narrow n{base, dropout_of(a.dropout, a.seed, a.call, a.threshold), float(a.scale)};
  n.a.y = s, n.a.y_dtype = kFloat32, n.a.y_stride = a.rank;
  n.a.weight = a_panels, n.a.form = kPanels, n.a.cols = a.rank, n.a.bias = nullptr;
  narrow_product(n, team, scratch, [](int64_t, int64_t) {});
  sync(team);
  any_product(base, LowRank(s, b_panels, a.gain, a.rank, base.cols), team, scratch);
}

void lora_linear_backward(const LoraLinearBackwardArgs& a, Team& team) noexcept {
  const LinearArgs& base = a.base;
  const int64_t rows = base.rows, words = (base.cols + 63) / 64;
  const Dropout dropout = dropout_of(a.dropout, a.seed, a.call, a.threshold);
  float* a_panels = reinterpret_cast<float*>(team.scratch);
  float* b_panels = a_panels + up_to_16(base.cols) * a.rank;
  float* ds = b_panels + up_to_16(a.rank) * base.depth;
  float* ds_t = ds + up_to_16(rows * a.rank);
  float* s_t = ds_t + up_to_16(row_floats(rows) * a.rank);
  float* db_t = s_t + up_to_16(row_floats(rows) * a.rank);
  auto* mask = reinterpret_cast<uint64_t*>(db_t + up_to_16(base.depth * a.rank));
  float* scratch = reinterpret_cast<float*>(mask) + up_to_16(rows * words * 2);
  const uint64_t* keep = a.threshold ? mask : nullptr;

  pack_all(matrix(a.a, kRowsAcross, base.cols, a.rank, a.a_stride, base.dtype), a_panels, team);
  pack_all(matrix(a.b, kRowsAcross, a.rank, base.depth, a.b_stride, base.dtype), b_panels, team);
  const Range mine = share(team, rows);
  if (keep)
    for (int64_t r = mine.begin; r < mine.end; ++r)
      for (int64_t w = 0; w < words; ++w) mask[r * words + w] = kept(dropout, r, w);
  transpose_rows(s_t, a.s, rows, a.rank, mine.begin, mine.end - mine.begin);
  sync(team);
  Narrow n{base, Dropout{}, float(a.scale)};
  n.a.y = ds, n.a.y_dtype = kFloat32, n.a.y_stride = a.rank;
  n.a.weight = b_panels, n.a.form = kPanels, n.a.cols = a.rank, n.a.halves = kWhole;
  narrow_product(n, team, scratch, [&](int64_t row, int64_t count) { transpose_rows(ds_t, ds, rows, a.rank, row, count); });
  sync(team);
  if (base.y) {
    product(base, Backward(ds, a_panels, keep, a.rank, words, dropout.scale), team, scratch);
    sync(team);    // the next products share the scratch in another way
  }
  LinearArgs da = matrix(a.x, kRowsAcross, base.cols, rows, a.x_stride, base.x_dtype);
  da.y = a.da, da.y_stride = base.cols, da.x = ds_t, da.x_stride = row_floats(rows), da.rows = a.rank;
  LinearArgs db = matrix(base.x, kRowsAcross, base.depth, rows, base.x_stride, base.x_dtype);
  db.y = db_t, db.y_stride = base.depth, db.x = s_t, db.x_stride = row_floats(rows), db.rows = a.rank;
  product(da, Backward(nullptr, nullptr, keep, a.rank, words, dropout.scale), team, scratch);
  product(db, Backward(nullptr, nullptr, nullptr, a.rank, words, dropout.scale), team, scratch);
  sync(team);
  const Range columns = share(team, base.depth);
  for (int64_t d = columns.begin; d < columns.end; ++d)
    for (int64_t r = 0; r < a.rank; ++r) a.db[d * a.rank + r] = db_t[r * base.depth + d];
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
