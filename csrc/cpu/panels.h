// Panels: 16 output columns side by side, [depth][16], from every way in which a weight lies (records/linear.h).
#pragma once
#include "quant.h"

namespace fastllm {
namespace {

// to[j][i] = in[i][j], for the first `count` of the 16 j.
#if defined(__AVX512F__)
FL_INLINE void transpose(float* to, const vf (&in)[16], int64_t count = 16) {
  __m512 a[16], b[16];
  FL_UNROLL
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(in[i].v, in[i + 1].v), b[i + 1] = _mm512_unpackhi_ps(in[i].v, in[i + 1].v);
  FL_UNROLL
  for (int i = 0; i < 16; i += 4) {    // a[i + j]: column 4q + j of rows i..i+3, in 128-bit lane q
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44), a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44), a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  FL_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512 even0 = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88), odd0 = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88), odd1 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
    if (j < count) _mm512_storeu_ps(to + j * 16, _mm512_shuffle_f32x4(even0, even1, 0x88));
    if (j + 4 < count) _mm512_storeu_ps(to + (j + 4) * 16, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
    if (j + 8 < count) _mm512_storeu_ps(to + (j + 8) * 16, _mm512_shuffle_f32x4(even0, even1, 0xdd));
    if (j + 12 < count) _mm512_storeu_ps(to + (j + 12) * 16, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
  }
}
#else    // once a tier: inlined into every packing it would take minutes to compile
[[maybe_unused]] __attribute__((noinline)) void transpose(float* to, const vf (&in)[16], int64_t count = 16) {
  float rows[16][16];
  for (int i = 0; i < 16; ++i) store(rows[i], in[i]);
  for (int64_t j = 0; j < 16 && j < count; ++j)
    for (int i = 0; i < 16; ++i) to[j * 16 + i] = rows[i][j];
}
#endif

// Rows n..n+15 of a row-major [cols, depth] weight; absent rows are zeros.
template <class T> void pack_rows(float* to, const T* weight, int64_t stride, int64_t cols, int64_t depth, int64_t n) {
  const int64_t rows = cols - n < kLanes ? cols - n : kLanes;
  for (int64_t k = 0; k < depth; k += kLanes) {
    vf in[16];
    if (rows == kLanes && k + kLanes <= depth) {
      FL_UNROLL
      for (int i = 0; i < 16; ++i) in[i] = load(weight + (n + i) * stride + k);
    } else {
      for (int i = 0; i < 16; ++i) in[i] = i < rows ? load(weight + (n + i) * stride + k, first(depth - k)) : set1(0);
    }
    transpose(to + k * kLanes, in, depth - k);
  }
}

// Columns c..c+15 of a row-major [depth, cols] weight, and of the `count` panels behind it, which lie `apart`: a row's part of them
// all is read at once. Each vector as `change(v, row, column)` makes it.
template <class T, class F>
FL_INLINE void pack_columns(float* to, int64_t apart, int64_t count, const T* weight, int64_t stride, int64_t cols, int64_t depth,
                            int64_t c, F change) {
  const int64_t ahead = (count > 1 ? 8 : 16) * stride;
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t p = 0; p < count; ++p) {
      const int64_t column = c + p * kLanes;
      const T* from = weight + k * stride + column;
      prefetch(from + ahead);
      store(to + p * apart + k * kLanes, change(load(from, first(cols - column)), k, column));
    }
}

// Sixteen rows of a weight whose halves' panels may alternate: the first of them, and how many there are.
struct PanelRows {
  int64_t first, count;
};
FL_INLINE PanelRows rows_of_panel(int64_t p, int64_t rows, bool alternate) {
  const int64_t halves = alternate ? 2 : 1, half = rows / halves, n = p / halves * kLanes;
  return {p % halves * half + n, half - n < kLanes ? half - n : kLanes};
}

// Columns c..c+15 of panels [depth / 16][cols][16].
[[maybe_unused]] void pack_panel_columns(float* to, const float* panels, int64_t cols, int64_t depth, bool alternate, int64_t c) {
  const int64_t half = alternate ? depth / 2 : depth, count = (half + kLanes - 1) / kLanes * (alternate ? 2 : 1);
  for (int64_t p = 0; p < count; ++p) {
    const PanelRows at = rows_of_panel(p, depth, alternate);
    vf in[16];
    for (int i = 0; i < 16; ++i) in[i] = c + i < cols ? load(panels + (p * cols + c + i) * kLanes) : set1(0);
    transpose(to + at.first * kLanes, in, at.count);
  }
}

// 16 k of the 16 rows of a quantised panel, from k = 16 i on, dequantised: exact but for one rounding where there is a minimum.
template <int kBits, bool kMin> FL_INLINE void dequantise(vf (&to)[16], const uint8_t* panel, const QuantFormat& format, int64_t i) {
  const int64_t g = i / 2;
  const uint8_t* w = panel + format.at(g);
  const auto* scales = reinterpret_cast<const f16*>(panel + format.scales(g));
  const vf scale = load(scales), minimum = kMin ? load(scales + 16) : set1(0);
  const vi mask = seti(kBits == 4 ? 15 : 255);
  const vf zero = set1(kMin ? 0.0f : kBits == 4 ? 8.0f : 128.0f);
  FL_UNROLL
  for (int q = 0; q < 4; ++q) {    // four k a word
    const int64_t k = i % 2 * 16 + q * 4;
    const vi word = kBits == 8 ? loadi(w + k / 4 * 64) : k % 8 ? shift_right<4>(loadi(w + k / 8 * 64)) : loadi(w + k / 8 * 64);
    const vi bytes[4] = {word, shift_right<8>(word), shift_right<16>(word), shift_right<24>(word)};
    FL_UNROLL
    for (int j = 0; j < 4; ++j) to[q * 4 + j] = fma(to_float(bytes[j] & mask) - zero, scale, minimum);
  }
}

// Columns c..c+15 of the quantised panels of quant.h.
template <int kBits, bool kMin>
void pack_quant_columns(float* to, const uint8_t* panels, int64_t cols, int64_t depth, bool alternate, int64_t c, int64_t group) {
  const QuantFormat format(kBits, kMin, group);
  const int64_t half = alternate ? depth / 2 : depth, count = (half + kLanes - 1) / kLanes * (alternate ? 2 : 1);
  for (int64_t p = 0; p < count; ++p) {
    vf in[16];    // of one k each, over the panel's rows
    dequantise<kBits, kMin>(in, panels + p * format.panel(cols), format, c / kLanes);
    for (int i = 0; i < 16; ++i)
      if (c + i >= cols) in[i] = set1(0);
    const PanelRows at = rows_of_panel(p, depth, alternate);
    transpose(to + at.first * kLanes, in, at.count);
  }
}

// Rows 16 p..16 p + 15 of those panels, as a float32 panel of `depth` up to a multiple of 16.
template <int kBits, bool kMin> void pack_quant_rows(float* to, const uint8_t* panels, int64_t depth, int64_t p, int64_t group) {
  const QuantFormat format(kBits, kMin, group);
  for (int64_t i = 0; i * kLanes < depth; ++i) {
    vf in[16];
    dequantise<kBits, kMin>(in, panels + p * format.panel(depth), format, i);
    for (int k = 0; k < 16; ++k) store(to + (i * kLanes + k) * kLanes, in[k]);
  }
}

}  // namespace
}  // namespace fastllm
