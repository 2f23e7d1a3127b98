// How rows of queries, keys and values become what the microkernels of attention read: fp32, in panels of 16 keys, or
// in rows padded to whole vectors. 16-bit types are widened on the way, so no other copy of them is ever made.
#pragma once
#include "page_bytes.h"

namespace fastllm {
namespace {

#if defined(__AVX512F__)
FL_INLINE void transpose(vf (&x)[16]) {
  __m512 t[16];
  FL_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  __m512 u[16];
  FL_UNROLL for (int i = 0; i < 16; i += 4)
    FL_UNROLL for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  FL_UNROLL for (int j = 0; j < 4; ++j) {    // u[4 i + j]: 128-bit blocks b hold column 4 b + j of rows 4 i .. 4 i + 3
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x44), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xee);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x44);
    const __m512 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xee);
    x[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
    x[4 + j].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[8 + j].v = _mm512_shuffle_f32x4(b, d, 0x88);
    x[12 + j].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
#elif defined(__AVX2__)
FL_INLINE void transpose8(__m256 (&x)[8]) {
  __m256 t[8], u[8];
  FL_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  FL_UNROLL for (int i = 0; i < 8; i += 4)
    FL_UNROLL for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  FL_UNROLL for (int j = 0; j < 4; ++j) {
    x[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    x[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}
FL_INLINE void transpose(vf (&x)[16]) {
  __m256 a[8], b[8], c[8], d[8];
  FL_UNROLL for (int i = 0; i < 8; ++i) a[i] = x[i].a, b[i] = x[i].b, c[i] = x[8 + i].a, d[i] = x[8 + i].b;
  transpose8(a), transpose8(b), transpose8(c), transpose8(d);
  FL_UNROLL for (int i = 0; i < 8; ++i) x[i] = {a[i], c[i]}, x[8 + i] = {b[i], d[i]};
}
#else
FL_INLINE void transpose(vf (&x)[16]) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = x[i].v[j];
      x[i].v[j] = x[j].v[i];
      x[j].v[i] = t;
    }
}
#endif

// 16 rows (zeros past `count`) as a panel [dim][16].
template <class T> void pack_panel(const T* rows, int64_t stride, int64_t count, int64_t dim, float* panel) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    vf x[16];
    if (count >= kLanes && d + kLanes <= dim) {
      FL_UNROLL for (int i = 0; i < 16; ++i) x[i] = load(rows + i * stride + d);
    } else {
      for (int i = 0; i < 16; ++i) x[i] = i < count ? load(rows + i * stride + d, first(dim - d)) : set1(0);
    }
    transpose(x);
    const int64_t width = dim - d < kLanes ? dim - d : kLanes;
    for (int64_t i = 0; i < width; ++i) store(panel + (d + i) * kLanes, x[i]);
  }
}

// A whole number of vectors.
template <class T> FL_INLINE void widen(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(from + i));
}

// Rows of any width into rows padded with zeros to whole vectors.
template <class T>
FL_INLINE void copy_rows(const T* from, int64_t from_row, int64_t rows, int64_t dim, float* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < dim; c += kLanes) {
      const T* at = from + r * from_row + c;
      store(to + r * to_row + c, c + kLanes <= dim ? load(at) : load(at, first(dim - c)));
    }
}

// What the microkernels read where T is stored: bytes as they are, all else as floats.
template <class T> struct Read {
  using Type = float;
  static constexpr bool kInPlace = false;
};
template <> struct Read<float> {
  using Type = float;
  static constexpr bool kInPlace = true;
};
template <> struct Read<int8_t> {
  using Type = int8_t;
  static constexpr bool kInPlace = true;
};
template <> struct Read<e4m3> {
  using Type = e4m3;
  static constexpr bool kInPlace = true;
};

}  // namespace
}  // namespace fastllm
