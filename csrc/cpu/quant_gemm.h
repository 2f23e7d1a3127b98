// Products with weights of 4 or 8 bits, x W^T. x, norm and what is added are float32.
//
// Contract. Activations become s8 in +-127, one scale per row and group of 32; weights are u4 or u8 with one scale (and one
// minimum, or a fixed zero point) per row and group of 32, 64 or 128. Within 32 of k the integer sum is exact; the scaled sum runs
// over them ascending, so a weight in larger groups gives the bits of one in groups of 32 that repeats its scales:
//     acc = fma(float(sum u*x - zero*sum x), scale_w * scale_x, acc);   with minima also acc = fma(min_w, scale_x * sum x, acc)
// so one row alone and a thousand give the same bits, whatever the tile.
//
// Layout: panels of 16 output rows; per group the quants (u4: 256 bytes for 32 of k, u8: 512), 16 float16 scales, 16 float16
// minima if any. Each 64-byte vector holds 4 consecutive k of 16 rows; u4 has the next 4 in the high nibbles.
#pragma once
#include "gemm.h"

namespace fastllm {
namespace {

#if defined(__AVX512F__)
constexpr int kQuantTileRows = 16;    // 16 accumulators, 8 vectors of quants, a scale, a minimum, two sums of 32 registers
#else
constexpr int kQuantTileRows = 4;
#endif
constexpr int64_t kQuantRowBlock = 64;
constexpr int64_t kQuantPartBytes = 28 << 10;    // of weights and activations that pass at once, below a first-level cache of 32 KiB

// Quantised rows lie in tiles of kQuantTileRows: for each group the values of the tile's rows, 32 bytes each, then their scales,
// then what multiplies the zero point (int32 -zero * sum x) or the minimum (float scale * sum x). So a tile is read in order,
// at offsets known to the compiler.
constexpr int64_t kQuantTileBytes = kQuantTileRows * (kGroup + 8);    // of one group

struct Rows {    // of the first of some rows within one tile; a group further is kQuantTileBytes further
  int8_t* values;
  char* meta;
};
FL_INLINE Rows rows_at(char* base, int64_t row, int64_t groups) {
  char* tile = base + row / kQuantTileRows * groups * kQuantTileBytes;
  const int64_t r = row % kQuantTileRows;
  return {reinterpret_cast<int8_t*>(tile) + r * kGroup, tile + kQuantTileRows * kGroup + r * 4};
}
FL_INLINE vf broadcast_float(const char* p) {
  float v;
  memcpy(&v, p, 4);
  return set1(v);
}

// One row of x, padded with zeros to `depth`.
template <int kBits, bool kMin> FL_INLINE void quantise_row(Rows to, const float* x, int64_t n, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kGroup, to.values += kQuantTileBytes, to.meta += kQuantTileBytes) {
    const vf a = load(x + k, first(n - k)), b = load(x + k + kLanes, first(n - k - kLanes > 0 ? n - k - kLanes : 0));
    const vf size = max(abs(a), abs(b)), infinity = set1(__builtin_inff());
    const bool finite = (bits(abs(a) < infinity) & bits(abs(b) < infinity)) == 0xffff;
    const Symmetric s = symmetric(max(size), finite);
    const vi qa = s.plain ? to_int(a * set1(s.inverse)) : seti(0), qb = s.plain ? to_int(b * set1(s.inverse)) : seti(0);
    store_s8(to.values, qa);
    store_s8(to.values + kLanes, qb);
    const int32_t total = sum(qa + qb), start = -total * (kBits == 4 ? 8 : 128);
    const float moment = s.scale * float(total);
    memcpy(to.meta, &s.scale, 4);
    memcpy(to.meta + kQuantTileRows * 4, kMin ? static_cast<const void*>(&moment) : &start, 4);
  }
}

// 32 of k of one panel against R rows.
template <int kBits, bool kMin, int R> FL_INLINE void accumulate(vf (&acc)[R], const uint8_t* w, const uint8_t* scales, const Rows& x) {
  const vf scale = load(reinterpret_cast<const f16*>(scales));
  const vf minimum = kMin ? load(reinterpret_cast<const f16*>(scales + 32)) : set1(0);
  Quants<kBits> q;
  q.load(w);
  FL_UNROLL
  for (int r = 0; r < R; ++r) {
    const char* meta = x.meta + r * 4;
    const vi start = kMin ? seti(0) : broadcast4(reinterpret_cast<const int8_t*>(meta) + kQuantTileRows * 4);
    acc[r] = fma(to_float(q.dot(x.values + r * kGroup, start)), scale * broadcast_float(meta), acc[r]);
    if (kMin) acc[r] = fma(minimum, broadcast_float(meta + kQuantTileRows * 4), acc[r]);
  }
}

// R rows against units [begin, end) of panels (swiglu: a gate and an up panel), P panels at once, each its own stream.
// Each stream starts one panel further into its run than the one before: runs of a multiple of 4 KiB would otherwise meet in the
// same cache sets and memory banks, a third of the bandwidth.
// kLarge: groups of the weight may be larger than 32.
template <int kBits, bool kMin, bool kLarge, int R, int P, class Hooks>
void quant_stream(const LinearArgs& a, const Hooks& hooks, const Rows& x, int64_t row, int64_t begin, int64_t end) {
  const QuantFormat format(kBits, kMin, kLarge ? a.group : kGroup);
  const int64_t groups = padded(a.depth) / kGroup, size = format.panel(a.depth), ahead = streaming.ahead;
  constexpr int64_t lines = kBits * 64 + 64;    // quants, and what of their scales may lie beyond
  const int64_t width = a.halves ? 2 : 1, lanes = P / width, length = (end - begin) / lanes;
  for (int64_t i = 0; i < length; ++i) {
    const uint8_t* w[P];
    int64_t panel[P];
    vf acc[P][R];
    FL_UNROLL
    for (int p = 0; p < P; ++p) {
      panel[p] = (begin + p / width * length + (i + p / width) % length) * width + p % width;
      w[p] = static_cast<const uint8_t*>(a.weight) + panel[p] * size;
      FL_UNROLL
      for (int r = 0; r < R; ++r) acc[p][r] = set1(0);    // no hook starts one
    }
    Rows at = x;
    for (int64_t g = 0; g < groups; ++g, at.values += kQuantTileBytes, at.meta += kQuantTileBytes) {
      const int64_t quants = format.at(g), scales = format.scales(g);
      FL_UNROLL
      for (int p = 0; p < P; ++p) {
        for (int64_t line = 0; line < lines; line += 64) prefetch(w[p] + quants + ahead + line);
        accumulate<kBits, kMin, R>(acc[p], w[p] + quants, w[p] + scales, at);
      }
    }
    FL_UNROLL
    for (int r = 0; r < R; ++r) {
      vf of_row[1][P];
      FL_UNROLL
      for (int p = 0; p < P; ++p) of_row[0][p] = acc[p][r];
      finish_all(a, hooks, of_row, row + r, panel);
    }
  }
  if constexpr (P == 6)
    return;    // taken only where nothing is left over
  else if constexpr (P > 2)
    quant_stream<kBits, kMin, kLarge, R, P / 2>(a, hooks, x, row, begin + length * lanes, end);
  else if constexpr (P == 2)
    if (!a.halves) quant_stream<kBits, kMin, kLarge, R, 1>(a, hooks, x, row, begin + length * lanes, end);
}

// Which 32s of k, and where chains rest between one part and the next: [panels][rows][16].
struct Part {
  int64_t begin, end;
  float* rest;
};

// R rows against the panels of one unit, one after the other: the chains of two would not fit the registers.
// ahead: how many bytes ahead to fetch; 0: the unit is in cache already.
template <int kBits, bool kMin, bool kLarge, int R, class Hooks>
void quant_tile(const LinearArgs& a, const Hooks& hooks, const Rows& x, int64_t row, int64_t unit, int64_t ahead, const Part& part) {
  const QuantFormat format(kBits, kMin, kLarge ? a.group : kGroup);
  const int64_t groups = padded(a.depth) / kGroup, size = format.panel(a.depth);
  constexpr int64_t lines = kBits * 64 + 64;    // quants, and what of their scales may lie beyond
  const int width = a.halves ? 2 : 1;
  const int64_t panels[2] = {unit * width, unit * width + 1};
  for (int p = 0; p < width; ++p) {
    const uint8_t* w = static_cast<const uint8_t*>(a.weight) + panels[p] * size;
    float* rest = part.rest + p * R * kLanes;
    vf acc[R];
    FL_UNROLL
    for (int r = 0; r < R; ++r) acc[r] = part.begin ? load(rest + r * kLanes) : set1(0);    // no hook starts one
    Rows at = {x.values + part.begin * kQuantTileBytes, x.meta + part.begin * kQuantTileBytes};
    for (int64_t g = part.begin; g < part.end; ++g, at.values += kQuantTileBytes, at.meta += kQuantTileBytes) {
      const int64_t quants = format.at(g);
      if (ahead)
        for (int64_t line = 0; line < lines; line += 64) prefetch(w + quants + ahead + line);
      accumulate<kBits, kMin, R>(acc, w + quants, w + format.scales(g), at);
    }
    FL_UNROLL
    for (int r = 0; r < R; ++r) store(rest + r * kLanes, acc[r]);
  }
  if (part.end < groups) return;
  for (int r = 0; r < R; ++r) {
    const float* rest = part.rest + r * kLanes;
    if (width == 2) {
      vf of_row[1][2] = {{load(rest), load(rest + R * kLanes)}};
      finish_all(a, hooks, of_row, row + r, panels);
    } else {
      vf of_row[1][1] = {{load(rest)}};
      const int64_t panel[1] = {unit};
      finish_all(a, hooks, of_row, row + r, panel);
    }
  }
}

// Few rows, with as many streams as this machine's memory wants. A left-over of one or two panels would run with one or two
// streams: where eight are wanted, one row takes six if they come out even and eight do not.
template <int kBits, bool kMin, bool kLarge, int R, class Hooks>
void quant_stream_rows(const LinearArgs& a, const Hooks& hooks, const Rows& x, int64_t row, int64_t begin, int64_t end) {
  const int64_t width = a.halves ? 2 : 1, units = end - begin;
  if (kStreams == 2 || streaming.streams == 2) return quant_stream<kBits, kMin, kLarge, R, 2>(a, hooks, x, row, begin, end);
  if constexpr (kStreams > 2) {
    if (kStreams == 4 || R == 4 || streaming.streams == 4) return quant_stream<kBits, kMin, kLarge, R, 4>(a, hooks, x, row, begin, end);
    if constexpr (kStreams == 8 && R < 4) {
      if (R == 1 && units % (8 / width) && units % (6 / width) == 0)
        return quant_stream<kBits, kMin, kLarge, 1, 6>(a, hooks, x, row, begin, end);
      quant_stream<kBits, kMin, kLarge, R, 8>(a, hooks, x, row, begin, end);
    }
  }
}

// Groups of 32, or any: few rows of the former would lose some percents to the offsets of the latter.
template <int kBits, bool kMin, bool kLarge, class Hooks>
void quant_rows(const LinearArgs& a, const Hooks& hooks, Team& team, char* all) {
  const int64_t groups = padded(a.depth) / kGroup, units = panels_of(a) / (a.halves ? 2 : 1);
  if (a.rows <= kFewRows) {
    const Range u = share(team, units);
    int64_t r = 0;
    if (a.rows >= 4) quant_stream_rows<kBits, kMin, kLarge, 4>(a, hooks, rows_at(all, r, groups), r, u.begin, u.end), r += 4;
    if (a.rows - r >= 2) quant_stream_rows<kBits, kMin, kLarge, 2>(a, hooks, rows_at(all, r, groups), r, u.begin, u.end), r += 2;
    if (a.rows - r >= 1) quant_stream_rows<kBits, kMin, kLarge, 1>(a, hooks, rows_at(all, r, groups), r, u.begin, u.end);
    return;
  }
  // Row blocks stay in cache while the panels pass; a tile takes one unit. All blocks have as many tiles, or one less: threads share
  // out blocks and units, whose number says nothing of their rows.
  const int64_t blocks = (a.rows + kQuantRowBlock - 1) / kQuantRowBlock, tiles = (a.rows + kQuantTileRows - 1) / kQuantTileRows;
  // A unit and a tile of rows stay in the first-level cache: of a greater depth, part after part.
  const int64_t unit = (a.halves ? 2 : 1) * QuantFormat(kBits, kMin, kLarge ? a.group : kGroup).panel(a.depth);
  const int64_t parts = (unit + groups * kQuantTileBytes) / kQuantPartBytes + 1, step = (groups + parts - 1) / parts;
  alignas(64) float rest[kQuantRowBlock * 2 * kLanes];
  const Range items = share(team, blocks * units);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t u = item % units, b = item / units, begin = tiles * b / blocks * kQuantTileRows;
    const int64_t last = tiles * (b + 1) / blocks * kQuantTileRows, end = last < a.rows ? last : a.rows;
    for (int64_t g = 0; g < groups; g += step) {
      Part part = {g, g + step < groups ? g + step : groups, rest};
      int64_t ahead = unit;    // while the first tile passes over this unit, the next one is fetched
      for (int64_t r = begin, n; r < end; r += n, ahead = 0, part.rest += n * 2 * kLanes) {
        const Rows x = rows_at(all, r, groups);
        n = end - r >= kQuantTileRows ? kQuantTileRows : end - r >= 8 ? 8 : end - r >= 4 ? 4 : end - r >= 2 ? 2 : 1;
        if (n == kQuantTileRows)
          quant_tile<kBits, kMin, kLarge, kQuantTileRows>(a, hooks, x, r, u, ahead, part);
        else if (kQuantTileRows > 8 && n == 8)
          quant_tile<kBits, kMin, kLarge, kQuantTileRows < 8 ? kQuantTileRows : 8>(a, hooks, x, r, u, ahead, part);
        else if (n == 4)
          quant_tile<kBits, kMin, kLarge, 4>(a, hooks, x, r, u, ahead, part);
        else if (n == 2)
          quant_tile<kBits, kMin, kLarge, 2>(a, hooks, x, r, u, ahead, part);
        else
          quant_tile<kBits, kMin, kLarge, 1>(a, hooks, x, r, u, ahead, part);
      }
    }
  }
}

template <int kBits, bool kMin, class Hooks> void quant_product(const LinearArgs& a, const Hooks& hooks, Team& team, char* scratch) {
  const int64_t depth = padded(a.depth);
  const bool few = a.rows <= kFewRows;
  char* at = scratch;
  float* row = reinterpret_cast<float*>(at + team.rank * depth * 4);    // this thread's normalised row
  at += team.size * depth * 4;
  char* all = at + (few ? team.rank * activation_bytes(a.rows, depth) : 0);
  const Range mine = few ? Range{0, a.rows} : share(team, a.rows);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    const float* x = static_cast<const float*>(a.x) + r * a.x_stride;
    if (a.norm) {
      scale_row(row, x, static_cast<const float*>(a.norm), reciprocal_rms(x, a.depth, a.eps), a.depth);
      x = row;
    }
    quantise_row<kBits, kMin>(rows_at(all, r, depth / kGroup), x, a.depth, depth);
  }
  if (!few) sync(team);
  a.group > kGroup ? quant_rows<kBits, kMin, true>(a, hooks, team, all) : quant_rows<kBits, kMin, false>(a, hooks, team, all);
}

template <class Hooks> void quant_product(const LinearArgs& a, const Hooks& hooks, Team& team, float* scratch) {
  char* bytes = reinterpret_cast<char*>(scratch);
  switch (a.form) {
    case kInt4: return quant_product<4, false>(a, hooks, team, bytes);
    case kInt4Min: return quant_product<4, true>(a, hooks, team, bytes);
    case kInt8: return quant_product<8, false>(a, hooks, team, bytes);
    default: return quant_product<8, true>(a, hooks, team, bytes);
  }
}

}  // namespace
}  // namespace fastllm
