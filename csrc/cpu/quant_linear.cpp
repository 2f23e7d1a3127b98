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
constexpr int64_t kFewRows = 4;    // up to here each thread quantises the rows for itself and needs no barrier

// Quantised rows lie in tiles of kTileRows: for each group the values of the tile's rows, 32 bytes each, then their scales,
// then what multiplies the zero point (int32 -zero * sum x) or the minimum (float scale * sum x). So a tile is read in order,
// at offsets known to the compiler.
constexpr int64_t kTileBytes = kTileRows * (kGroup + 8);    // of one group

struct Rows {    // of the first of some rows within one tile; a group further is kTileBytes further
  int8_t* values;
  char* meta;
};
FL_INLINE Rows rows_at(char* base, int64_t row, int64_t groups) {
  char* tile = base + row / kTileRows * groups * kTileBytes;
  const int64_t r = row % kTileRows;
  return {reinterpret_cast<int8_t*>(tile) + r * kGroup, tile + kTileRows * kGroup + r * 4};
}
FL_INLINE vf broadcast_float(const char* p) {
  float v;
  memcpy(&v, p, 4);
  return set1(v);
}

constexpr float kSmallest = 1e-35f;    // a group below this counts as zeros: 127 / max|x| would overflow

// One row: scale = max|x| / 127, value = round(x * (127 / max|x|)). A group of zeros has scale 0; a NaN or infinity makes the
// scale NaN, and with it every output of the row.
template <int kBits, bool kMin> FL_INLINE void quantise_row(Rows to, const float* x, int64_t n, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kGroup, to.values += kTileBytes, to.meta += kTileBytes) {
    const vf a = load(x + k, first(n - k)), b = load(x + k + kLanes, first(n - k - kLanes > 0 ? n - k - kLanes : 0));
    const vf size = max(abs(a), abs(b)), infinity = set1(__builtin_inff());
    const bool finite = (bits(abs(a) < infinity) & bits(abs(b) < infinity)) == 0xffff;
    const float top = finite ? max(size) : 0.0f;
    const bool plain = top >= kSmallest;
    const float scale = plain ? top / 127.0f : finite ? 0.0f : __builtin_nanf("");
    const vf inverse = set1(plain ? 127.0f / top : 0.0f);
    const vi qa = plain ? to_int(a * inverse) : seti(0), qb = plain ? to_int(b * inverse) : seti(0);
    store_s8(to.values, qa);
    store_s8(to.values + kLanes, qb);
    const int32_t total = sum(qa + qb), start = -total * (kBits == 4 ? 8 : 128);
    const float moment = scale * float(total);
    memcpy(to.meta, &scale, 4);
    memcpy(to.meta + kTileRows * 4, kMin ? static_cast<const void*>(&moment) : &start, 4);
  }
}

template <int kBits, bool kMin> struct Format {
  static constexpr int64_t kQuants = kBits == 4 ? 256 : 512;
  static constexpr int64_t kBytes = kQuants + 32 + (kMin ? 32 : 0);    // of one group of one panel
};

// One group of one panel against R rows.
template <int kBits, bool kMin, int R> FL_INLINE void accumulate(vf (&acc)[R], const uint8_t* w, const Rows& x) {
  using F = Format<kBits, kMin>;
  const vf scale = load(reinterpret_cast<const f16*>(w + F::kQuants));
  const vf minimum = kMin ? load(reinterpret_cast<const f16*>(w + F::kQuants + 32)) : set1(0);
  Quants<kBits> q;
  q.load(w);
  FL_UNROLL
  for (int r = 0; r < R; ++r) {
    const char* meta = x.meta + r * 4;
    const vi start = kMin ? seti(0) : broadcast4(reinterpret_cast<const int8_t*>(meta) + kTileRows * 4);
    acc[r] = fma(to_float(q.dot(x.values + r * kGroup, start)), scale * broadcast_float(meta), acc[r]);
    if (kMin) acc[r] = fma(minimum, broadcast_float(meta + kTileRows * 4), acc[r]);
  }
}

FL_INLINE void finish(const QuantLinearArgs& a, vf v, int64_t row, int64_t n) {
  const vm inside = first(a.cols - n);
  if (a.bias) v = v + load(a.bias + n, inside);
  if (a.residual) v = v + load(a.residual + row * a.residual_stride + n, inside);
  store(a.y + row * a.y_stride + n, v, inside);
}

// R rows against units [begin, end) of panels (swiglu: a gate and an up panel), P panels at once, each its own stream.
// Each stream starts one panel further into its run than the one before: runs of a multiple of 4 KiB would otherwise meet in the
// same cache sets and memory banks, a third of the bandwidth.
template <int kBits, bool kMin, int R, int P>
void stream(const QuantLinearArgs& a, const Rows& x, int64_t row, int64_t begin, int64_t end) {
  const int64_t ahead = streaming.ahead, depth = padded(a.depth), groups = depth / kGroup, bytes = Format<kBits, kMin>::kBytes;
  const int64_t width = a.swiglu ? 2 : 1, lanes = P / width, length = (end - begin) / lanes;
  for (int64_t i = 0; i < length; ++i) {
    const uint8_t* w[P];
    int64_t panel[P];
    vf acc[P][R];
    FL_UNROLL
    for (int p = 0; p < P; ++p) {
      panel[p] = (begin + p / width * length + (i + p / width) % length) * width + p % width;
      w[p] = a.weight + panel[p] * groups * bytes;
      FL_UNROLL
      for (int r = 0; r < R; ++r) acc[p][r] = set1(0);
    }
    Rows at = x;
    for (int64_t g = 0; g < groups; ++g, at.values += kTileBytes, at.meta += kTileBytes)
      FL_UNROLL
      for (int p = 0; p < P; ++p) {
        if (R <= kFewRows)
          for (int64_t line = 0; line < bytes; line += 64) prefetch(w[p] + g * bytes + ahead + line);
        accumulate<kBits, kMin, R>(acc[p], w[p] + g * bytes, at);
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
  if constexpr (P == 6)
    return;    // taken only where nothing is left over
  else if constexpr (P > 2)
    stream<kBits, kMin, R, P / 2>(a, x, row, begin + length * lanes, end);
  else if constexpr (P == 2)
    if (!a.swiglu) stream<kBits, kMin, R, 1>(a, x, row, begin + length * lanes, end);
}

// Few rows, with as many streams as this machine's memory wants. A left-over of one or two panels would run with one or two
// streams: where eight are wanted, one row takes six if they come out even and eight do not.
template <int kBits, bool kMin, int R> void stream_rows(const QuantLinearArgs& a, const Rows& x, int64_t row, int64_t begin, int64_t end) {
  const int64_t width = a.swiglu ? 2 : 1, units = end - begin;
  if (streaming.streams == 2)
    stream<kBits, kMin, R, 2>(a, x, row, begin, end);
  else if (streaming.streams == 4)
    stream<kBits, kMin, R, 4>(a, x, row, begin, end);
  else if (R == 1 && kStreams == 8 && units % (8 / width) && units % (6 / width) == 0)
    stream<kBits, kMin, 1, 6>(a, x, row, begin, end);
  else
    stream<kBits, kMin, R, (R == 4 ? 4 : kStreams)>(a, x, row, begin, end);
}

template <int kBits, bool kMin> void run(const QuantLinearArgs& a, Team& team) {
  const int64_t depth = padded(a.depth), groups = depth / kGroup;
  const bool few = a.rows <= kFewRows;
  char* at = team.scratch;
  float* row = reinterpret_cast<float*>(at + team.rank * depth * 4);    // this thread's normalised row
  at += team.size * depth * 4;
  char* all = at + (few ? team.rank * activation_bytes(a.rows, depth) : 0);
  const Range mine = few ? Range{0, a.rows} : share(team, a.rows);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    const float* x = a.x + r * a.x_stride;
    if (a.norm) {
      scale_row(row, x, a.norm, reciprocal_rms(x, a.depth, a.eps), a.depth);
      x = row;
    }
    quantise_row<kBits, kMin>(rows_at(all, r, groups), x, a.depth, depth);
  }
  if (!few) sync(team);

  const int64_t units = (a.cols + kLanes - 1) / kLanes;
  if (few) {
    const Range u = share(team, units);
    int64_t r = 0;
    if (a.rows >= 4) stream_rows<kBits, kMin, 4>(a, rows_at(all, r, groups), r, u.begin, u.end), r += 4;
    if (a.rows - r >= 2) stream_rows<kBits, kMin, 2>(a, rows_at(all, r, groups), r, u.begin, u.end), r += 2;
    if (a.rows - r >= 1) stream_rows<kBits, kMin, 1>(a, rows_at(all, r, groups), r, u.begin, u.end);
    return;
  }
  // Row blocks stay in cache while the panels pass; a tile takes one unit.
  const int64_t blocks = (a.rows + kRowBlock - 1) / kRowBlock;
  const Range items = share(team, blocks * units);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t u = item % units, begin = item / units * kRowBlock, end = begin + kRowBlock < a.rows ? begin + kRowBlock : a.rows;
    for (int64_t r = begin; r < end;) {
      if (end - r >= kTileRows)
        stream<kBits, kMin, kTileRows, 2>(a, rows_at(all, r, groups), r, u, u + 1), r += kTileRows;
      else if (kTileRows > 4 && end - r >= 4)
        stream<kBits, kMin, 4, 2>(a, rows_at(all, r, groups), r, u, u + 1), r += 4;
      else if (end - r >= 2)
        stream<kBits, kMin, 2, 2>(a, rows_at(all, r, groups), r, u, u + 1), r += 2;
      else
        stream<kBits, kMin, 1, 2>(a, rows_at(all, r, groups), r, u, u + 1), r += 1;
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

void pack_quants(const PackQuantsArgs& a, Team& team) noexcept {
  const int64_t width = a.swiglu ? 2 : 1, half = a.rows / width, quants = a.bits == 4 ? 256 : 512;
  const int64_t bytes = quants + (a.has_min ? 64 : 32), size = (a.block_min ? 4 : 2) + a.block_bits * 4;
  const int zero = a.block_bits == 4 ? 8 : 128, own = a.bits == 4 ? 8 : 128;
  const uint8_t shift = (a.block_bits == 8 ? 128 : 0) + (a.has_min ? 0 : own - zero);    // s8 to unsigned, zero point to zero point
  const Range mine = share(team, (half + kLanes - 1) / kLanes * width);
  for (int64_t p = mine.begin; p < mine.end; ++p) {
    const int64_t n = p % width * half + p / width * kLanes;    // row of lane 0
    const int64_t limit = (p % width + 1) * half, last = a.first + a.count < limit ? a.first + a.count : limit;
    const int64_t begin = a.first > n ? a.first - n : 0, end = last - n < kLanes ? last - n : kLanes;
    for (int64_t g = 0; g < a.groups && begin < end; ++g) {
      uint8_t* w = a.panels + (p * a.groups + g) * bytes;
      f16 scale[16] = {}, minimum[16] = {};
      for (int64_t i = begin; i < end; ++i) {
        const uint8_t* block = a.blocks + ((n + i - a.first) * a.groups + g) * size;
        memcpy(scale + i, block, 2);
        if (a.block_min) memcpy(minimum + i, block + 2, 2);
        block += a.block_min ? 4 : 2;
        uint8_t q[32];
        if (a.block_bits == 8)
          for (int k = 0; k < 32; ++k) q[k] = uint8_t(block[k] + shift);
        else
          for (int k = 0; k < 16; ++k) q[k] = uint8_t((block[k] & 15) + shift), q[k + 16] = uint8_t((block[k] >> 4) + shift);
        uint32_t words[8];    // of 4 consecutive k
        memcpy(words, q, 32);
        if (a.bits == 8)
          for (int c = 0; c < 8; ++c) memcpy(w + c * 64 + i * 4, words + c, 4);
        else
          for (int c = 0; c < 4; ++c) {
            const uint32_t both = words[2 * c] | words[2 * c + 1] << 4;
            memcpy(w + c * 64 + i * 4, &both, 4);
          }
      }
      if (a.has_min && !a.block_min) store(minimum, load(scale) * set1(float(-zero)));    // a power of two: exact
      memcpy(w + quants + begin * 2, scale + begin, (end - begin) * 2);
      if (a.has_min) memcpy(w + quants + 32 + begin * 2, minimum + begin, (end - begin) * 2);
    }
  }
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
