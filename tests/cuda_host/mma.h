// The matrix products of a warp on a processor: the functions of csrc/cuda/mma.cuh, written from "PTX ISA" 9.0, "Matrix Fragments
// for mma.m16n8k16 with floating point type" and "movmatrix". All 32 lanes must come.
#pragma once
#include "cuda.h"

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) bytes |= uint32_t(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return bytes;
}

namespace cuda_host {
namespace warp {

template <bool kHalf> void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  const int lane = int(machine.self->thread.x % 32), t = lane % 4, g = lane / 4;
  uint32_t rows[16][8], columns[8][8];    // pairs along k
  uint64_t mine[3] = {uint64_t(a[1]) << 32 | a[0], uint64_t(a[3]) << 32 | a[2], uint64_t(b[1]) << 32 | b[0]};
  for (int part = 0; part < 3; ++part) {
    const uint64_t* all = exchange(~0u, mine[part], line);
    for (int of = 0; of < 32; ++of) {
      const uint64_t both = lane_of<uint64_t>(all, unsigned(of));
      const uint32_t low = uint32_t(both), high = uint32_t(both >> 32);
      if (part < 2) rows[of / 4][of % 4 + part * 4] = low, rows[of / 4 + 8][of % 4 + part * 4] = high;
      if (part == 2) columns[of / 4][of % 4] = low, columns[of / 4][of % 4 + 4] = high;
    }
  }
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 8; ++k)
      for (int half = 0; half < 32; half += 16)
        d[i] += hopper::wide<kHalf>(rows[row][k] >> half & 0xffff) * hopper::wide<kHalf>(columns[column][k] >> half & 0xffff);
  }
}

inline uint32_t transposed(uint32_t row, int line = __builtin_LINE()) {
  const int lane = int(machine.self->thread.x % 32), t = lane % 4, g = lane / 4;
  const uint64_t* all = exchange(~0u, row, line);
  const auto element = [&](int r, int c) { return lane_of<uint32_t>(all, unsigned(r * 4 + c / 2)) >> c % 2 * 16 & 0xffff; };
  return element(2 * t, g) | element(2 * t + 1, g) << 16;
}

}  // namespace warp
}  // namespace cuda_host
