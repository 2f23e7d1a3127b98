// quant_linear: y = norm(x) W^T, then + bias, + residual or swiglu, with weights of 4 or 8 bits.
//
// Contract. Activations become s8 in +-127, one scale per row and group of 32; weights are u4 or u8 with one scale (and one
// minimum, or a fixed zero point) per row and group of 32. Within a group the integer sum is exact; the scaled sum runs over
// groups ascending:
//     acc = fma(float(sum u*x - zero*sum x), scale_w * scale_x, acc);   with minima also acc = fma(min_w, scale_x * sum x, acc)
// so one row alone and a thousand give the same bits, whatever the tile.
//
// Layout: panels of 16 output rows; per group of 32 the quants (u4: 256 bytes, u8: 512), 16 float16 scales, 16 float16 minima
// if any. Each 64-byte vector holds 4 consecutive k of 16 rows; u4 has the next 4 in the high nibbles.
#include "quant.h"
#include "rms_norm.h"

namespace fastllm {
namespace {

#if defined(__AVX512F__)
constexpr int kStreams = 8, kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kStreams = 4, kTileRows = 4;
#else
constexpr int kStreams = 2, kTileRows = 4;
#endif
constexpr int64_t kRowBlock = 64;
constexpr int64_t kAhead = 1024;
constexpr int64_t kFewRows = 4;    // up to here each thread quantises the rows for itself and needs no barrier

// Quantised rows: values [rows][depth], then scales [rows][groups], then sums [rows][groups].
struct Activations {
  int8_t* values;
  float* scales;
  int32_t* sums;
};

FL_INLINE Activations activations_at(char* p, int64_t rows, int64_t depth) {
  Activations a;
  a.scales = reinterpret_cast<float*>(p);
  a.sums = reinterpret_cast<int32_t*>(a.scales + rows * (depth / kGroup));
  a.values = reinterpret_cast<int8_t*>(a.sums + rows * (depth / kGroup));
  return a;
}

// One row: scale = max|x| / 127, value = round(x / scale). A group of (nearly, below 1e-36) zeros has
// scale 0; a NaN or infinity makes the scale NaN,
// and with it every output of the row.
FL_INLINE void quantise_row(int8_t* values, float* scales, int32_t* sums, const float* x, int64_t n, int64_t depth) {
  for (int64_t g = 0; g * kGroup < depth; ++g) {
    const int64_t k = g * kGroup;
    const vf a = load(x + k, first(n - k)), b = load(x + k + kLanes, first(n - k - kLanes > 0 ? n - k - kLanes : 0));
    const vf size = max(abs(a), abs(b)), infinity = set1(__builtin_inff());
    const bool finite = (bits(abs(a) < infinity) & bits(abs(b) < infinity)) == 0xffff;
    const float largest = finite ? max(size) : 0.0f, top = largest > 1e-36f ? largest : 0.0f;    // 127 / top stays finite
    scales[g] = finite ? top / 127.0f : __builtin_nanf("");
    const vf inverse = set1(top > 0 ? 127.0f / top : 0.0f);
    const vi qa = to_int(min(max(set1(-127.0f), a * inverse), set1(127.0f)));
    const vi qb = to_int(min(max(set1(-127.0f), b * inverse), set1(127.0f)));
    store_s8(values + k, finite ? qa : seti(0));
    store_s8(values + k + kLanes, finite ? qb : seti(0));
    sums[g] = finite ? sum(qa + qb) : 0;
  }
}

template <int kBits, bool kMin> struct Format {
  static constexpr int64_t kQuants = kBits == 4 ? 256 : 512;
  static constexpr int64_t kBytes = kQuants + 32 + (kMin ? 32 : 0);    // of one group of one panel
};

// Group g of one panel against R rows.
template <int kBits, bool kMin, int R>
FL_INLINE void accumulate(vf (&acc)[R], const uint8_t* w, const Activations& x, int64_t g, int64_t depth) {
  using F = Format<kBits, kMin>;
  const vf scale = load(reinterpret_cast<const f16*>(w + F::kQuants));
  Quants<kBits> q;
  q.load(w);
  const int64_t groups = depth / kGroup;
  FL_UNROLL
  for (int r = 0; r < R; ++r) {
    const int32_t total = x.sums[r * groups + g];
    const float xs = x.scales[r * groups + g];
    const vi sum = q.dot(x.values + r * depth + g * kGroup, seti(kMin ? 0 : -total * (kBits == 4 ? 8 : 128)));
    acc[r] = fma(to_float(sum), scale * set1(xs), acc[r]);
    if (kMin) acc[r] = fma(load(reinterpret_cast<const f16*>(w + F::kQuants + 32)), set1(xs * float(total)), acc[r]);
  }
}

FL_INLINE void finish(const QuantLinearArgs& a, vf v, int64_t row, int64_t n) {
  const vm inside = first(a.cols - n);
  if (a.bias) v = v + load(a.bias + n, inside);
  if (a.residual) v = v + load(a.residual + row * a.residual_stride + n, inside);
  store(a.y + row * a.y_stride + n, v, inside);
}

// R rows against units [begin, end) of panels (swiglu: a gate and an up panel), P panels at once, each its own stream.
template <int kBits, bool kMin, int R, int P>
void stream(const QuantLinearArgs& a, const Activations& x, int64_t row, int64_t begin, int64_t end) {
  const int64_t depth = padded(a.depth), groups = depth / kGroup, bytes = Format<kBits, kMin>::kBytes;
  const int64_t width = a.swiglu ? 2 : 1, lanes = P / width, length = (end - begin) / lanes;
  for (int64_t i = 0; i < length; ++i) {
    const uint8_t* w[P];
    int64_t panel[P];
    vf acc[P][R];
    FL_UNROLL
    for (int p = 0; p < P; ++p) {
      panel[p] = (begin + p / width * length + i) * width + p % width;
      w[p] = a.weight + panel[p] * groups * bytes;
      FL_UNROLL
      for (int r = 0; r < R; ++r) acc[p][r] = set1(0);
    }
    for (int64_t g = 0; g < groups; ++g)
      FL_UNROLL
      for (int p = 0; p < P; ++p) {
        if (R <= kFewRows)
          for (int64_t line = 0; line < bytes; line += 64) prefetch(w[p] + g * bytes + kAhead + line);
        accumulate<kBits, kMin, R>(acc[p], w[p] + g * bytes, x, g, depth);
      }
    FL_UNROLL
    for (int r = 0; r < R; ++r) {
      if (a.swiglu) {
        FL_UNROLL
        for (int p = 0; p + 1 < P; p += 2) finish(a, silu(acc[p][r]) * acc[p + 1][r], row + r, panel[p] / 2 * kLanes);
      } else {
        FL_UNROLL
        for (int p = 0; p < P; ++p) finish(a, acc[p][r], row + r, panel[p] * kLanes);
      }
    }
  }
  if constexpr (P > 2)
    stream<kBits, kMin, R, P / 2>(a, x, row, begin + length * lanes, end);
  else if constexpr (P == 2)
    if (!a.swiglu) stream<kBits, kMin, R, 1>(a, x, row, begin + length * lanes, end);
}

template <int kBits, bool kMin> void run(const QuantLinearArgs& a, Team& team) {
  const int64_t depth = padded(a.depth), groups = depth / kGroup;
  const bool few = a.rows <= kFewRows;
  char* at = team.scratch;
  float* row = reinterpret_cast<float*>(at + team.rank * depth * 4);    // this thread's normalised row
  at += team.size * depth * 4;
  const Activations all = activations_at(at + (few ? team.rank * activation_bytes(a.rows, depth) : 0), a.rows, depth);
  const Range mine = few ? Range{0, a.rows} : share(team, a.rows);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    const float* x = a.x + r * a.x_stride;
    if (a.norm) {
      scale_row(row, x, a.norm, reciprocal_rms(x, a.depth, a.eps), a.depth);
      x = row;
    }
    quantise_row(all.values + r * depth, all.scales + r * groups, all.sums + r * groups, x, a.depth, depth);
  }
  if (!few) sync(team);

  const int64_t units = (a.cols + kLanes - 1) / kLanes;
  const auto rows_at = [&](int64_t r) { return Activations{all.values + r * depth, all.scales + r * groups, all.sums + r * groups}; };
  if (few) {
    const Range u = share(team, units);
    int64_t r = 0;
    if (a.rows >= 4) stream<kBits, kMin, 4, 4>(a, rows_at(r), r, u.begin, u.end), r += 4;
    if (a.rows - r >= 2) stream<kBits, kMin, 2, kStreams>(a, rows_at(r), r, u.begin, u.end), r += 2;
    if (a.rows - r >= 1) stream<kBits, kMin, 1, kStreams>(a, rows_at(r), r, u.begin, u.end);
    return;
  }
  // Row blocks stay in cache while the panels pass; a tile takes one unit.
  const int64_t blocks = (a.rows + kRowBlock - 1) / kRowBlock;
  const Range items = share(team, blocks * units);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t u = item % units, begin = item / units * kRowBlock, end = begin + kRowBlock < a.rows ? begin + kRowBlock : a.rows;
    for (int64_t r = begin; r < end;) {
      if (end - r >= kTileRows)
        stream<kBits, kMin, kTileRows, 2>(a, rows_at(r), r, u, u + 1), r += kTileRows;
      else if (kTileRows > 4 && end - r >= 4)
        stream<kBits, kMin, 4, 2>(a, rows_at(r), r, u, u + 1), r += 4;
      else if (end - r >= 2)
        stream<kBits, kMin, 2, 2>(a, rows_at(r), r, u, u + 1), r += 2;
      else
        stream<kBits, kMin, 1, 2>(a, rows_at(r), r, u, u + 1), r += 1;
    }
  }
}

}  // namespace

namespace FASTLLM_TIER {

void quant_linear(const QuantLinearArgs& a, Team& team) noexcept {
  if (a.bits == 4)
    a.has_min ? run<4, true>(a, team) : run<4, false>(a, team);
  else
    a.has_min ? run<8, true>(a, team) : run<8, false>(a, team);
}

// Exact: a float16 scale times a quant has at most 19 significant bits, so the product is, and one rounding adds the minimum.
void quant_embedding(const QuantEmbeddingArgs& a, Team& team) noexcept {
  const int64_t groups = padded(a.depth) / kGroup, quants = a.bits == 4 ? 256 : 512, bytes = quants + (a.has_min ? 64 : 32);
  const Range mine = share(team, a.count);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t id = a.ids[i];
    if (id < 0 || id >= a.rows) {
      report(team, kIndexOutOfRange);
      continue;
    }
    const int64_t r = id % kLanes;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* w = a.weight + (id / kLanes * groups + g) * bytes;
      float scales[16], minima[16];
      store(scales, load(reinterpret_cast<const f16*>(w + quants)));
      store(minima, a.has_min ? load(reinterpret_cast<const f16*>(w + quants + 32)) : set1(0));
      for (int64_t k = g * kGroup; k < (g + 1) * kGroup && k < a.depth; ++k) {
        const int64_t j = k % kGroup;
        const uint8_t b = a.bits == 4 ? w[j / 8 * 64 + r * 4 + j % 4] >> (j % 8 / 4 * 4) & 15 : w[j / 4 * 64 + r * 4 + j % 4];
        const float q = a.has_min ? float(b) : float(int(b) - (a.bits == 4 ? 8 : 128));
        a.y[i * a.depth + k] = q * scales[r] + minima[r];
      }
    }
  }
}

}  // namespace FASTLLM_TIER
}  // namespace fastllm
