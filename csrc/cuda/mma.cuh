// Matrix products of a warp (sm_80 and later), for 16-bit operands in its registers. A lane is t = lane % 4 and g = lane / 4; a
// register holds two elements that lie beside each other along k, the lower one first. tests/cuda_host/mma.h has the same for a
// processor.
//
//   a [16, 16]: rows g, g + 8 of k 2t, 2t + 1; then of k 2t + 8, 2t + 9        b [16, 8]: column g of k 2t, 2t + 1; of 2t + 8, 2t + 9
//   d [16, 8]: row g of columns 2t, 2t + 1; then row g + 8
//
// In what order k is summed is open, so any k may stand where another does, if it does so in both.
#pragma once
#include "hopper.cuh"

namespace fastllm {

#ifdef __CUDACC__
namespace {

// d += a b. kHalf: float16, else bfloat16.
template <bool kHalf> __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define MMA(type)                                                                                                                  \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (kHalf)
    MMA("f16");
  else
    MMA("bf16");
#undef MMA
}

// Of an 8 x 8 matrix of 16-bit elements, row g of columns 2t, 2t + 1 in each lane, the transposed one's.
__device__ __forceinline__ uint32_t transposed(uint32_t row) {
  uint32_t column;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
  return column;
}

}  // namespace
#else
}    // namespace fastllm
#include "mma.h"
namespace fastllm {
using namespace cuda_host::warp;
#endif

namespace {

// The lower halves of two registers beside each other, and the upper halves.
__device__ __forceinline__ uint32_t lower(uint32_t first, uint32_t second) { return __byte_perm(first, second, 0x5410); }
__device__ __forceinline__ uint32_t upper(uint32_t first, uint32_t second) { return __byte_perm(first, second, 0x7632); }

}  // namespace
}  // namespace fastllm
