// What attention's kernels for sm_90a share: which keys a row sees, the order of work, tiles from the copy engine, and
// fragments. A thread of a warpgroup holds two of its 64 rows, eight apart: of each 8 columns a pair,
// d[column / 8 * 4 + row * 2 + i].
#pragma once
#include "../records/attention.h"
#include "hopper.cuh"

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTLLM_SM90A    // on another architecture the kernels are empty, and nobody launches them
#endif

namespace fastllm {
namespace {

constexpr int kGroupThreads = 128, kGroupRows = 64;    // of a warpgroup
constexpr int64_t kCache = 32 << 20;                   // of the L2 cache, what the tensors read again and again may fill

// Row i stands at key i + keys - queries.
struct Sight {
  int queries, keys, causal, window;    // window 0: none

  // The keys that a row sees, [from, to).
  __device__ __forceinline__ int from(int row) const {
    const int first = row + keys - queries - window + 1;
    return window && first > 0 ? first : 0;
  }
  __device__ __forceinline__ int to(int row) const {
    const int at = row + keys - queries, end = causal ? at + 1 : window ? at + window : keys;
    return end < keys ? end : keys;
  }
  // The rows that see a key.
  __device__ __forceinline__ int rows_from(int key) const {
    const int at = key - keys + queries, first = causal ? at : window ? at - window + 1 : 0;
    return first > 0 ? first : 0;
  }
  __device__ __forceinline__ int rows_to(int key) const {
    const int end = key - keys + queries + window;
    return window && end < queries ? end : queries;
  }
};

inline Sight sight(int64_t queries, int64_t keys, int64_t causal, int64_t window) {
  const int64_t far = queries > keys ? queries : keys;    // a window as wide hides nothing
  return {int(queries), int(keys), causal != 0, int(window < far ? window : far)};
}

// Blocks of all heads in the order of their launch: the first of each head, the second of each head, ...; of some heads, whose
// tensors fit the L2 cache together, then of the next.
struct Place {
  int block, head;
};
struct Order {
  int blocks, work, together;    // blocks of a head, of all heads; heads that come together

  __device__ __forceinline__ Place place(int at) const {
    const int section = at / (together * blocks), begin = section * together, inside = at - begin * blocks;
    const int all = work / blocks, heads = all - begin < together ? all - begin : together;
    return {inside / heads, begin + inside % heads};
  }
};

// fit: heads in the cache. False: too much work to count.
inline bool order(Order* o, int64_t blocks, int64_t heads, int64_t fit) {
  if (blocks * heads >= 1 << 30) return false;
  o->blocks = int(blocks), o->work = int(blocks * heads), o->together = int(fit < 1 ? 1 : fit < heads ? fit : heads);
  return true;
}

// Where a producer or a consumer stands in a ring of tiles, and the parity of its barriers' phase.
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  template <int kStages> __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// Rows of a head to a tile, with `more` bytes that another copy brings to the same barrier.
template <int kBlocks, int kRows>
__device__ __forceinline__ void load(uint16_t (&to)[kBlocks][kRows][64], uint64_t& full, uint64_t& empty, uint32_t phase,
                                     const CUtensorMap& map, int row, int head, int batch, int more = 0) {
  const uint32_t barrier = shared_address(&full);
  barrier_wait(shared_address(&empty), phase ^ 1);    // the first time all are empty
  barrier_expect(barrier, sizeof to + more);
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) tma_load(shared_address(to[i]), &map, barrier, i * 64, row, head, batch);
}

// d [64, kCols] = a b^T: rows of two tiles, whose blocks of 64 columns lie a_block and b_block bytes apart.
template <int kDim, bool kHalf, int kCount>
__device__ __forceinline__ void multiply_rows(float (&d)[kCount], uint32_t a_at, int a_block, uint32_t b_at, int b_block) {
  const uint64_t a = tile_descriptor(a_at), b = tile_descriptor(b_at);
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {    // 16 columns are 32 bytes of a row
    const int block = i / 4, inside = i % 4 * 32;
    wgmma<kCount * 2, kHalf>(d, a + (block * a_block + inside) / 16, b + (block * b_block + inside) / 16, i > 0);
  }
}

// d [64, kCols] += a b: fragments, and a tile of kRows rows.
template <bool kHalf, int kCount, int kSteps>
__device__ __forceinline__ void add_product(float (&d)[kCount], const uint32_t (&a)[kSteps][4], uint32_t b_at) {
  const uint64_t b = tile_descriptor(b_at, kSteps * 16 * 128);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) wgmma<kCount * 2, kHalf>(d, a[i], b + i * (16 * 128 / 16));
}

// Scores beyond [from, to) of a thread's two rows, in columns of the tile.
template <int kCount>
__device__ __forceinline__ void mask(float (&scores)[kCount], const int (&from)[2], const int (&to)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = i / 4 * 8 + i % 2 + int(threadIdx.x % 4) * 2, row = i / 2 % 2;
    if (column < from[row] || column >= to[row]) scores[i] = -infinity();
  }
}

// As the left side of a product: 16 columns are four pairs.
template <bool kHalf, int kCount>
__device__ __forceinline__ void round_left(uint32_t (&left)[kCount / 8][4], const float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) left[i / 4][i % 4] = pack<kHalf>(d[i * 2], d[i * 2 + 1]);
}

// word[i] of the quad's lane q to lane i's word[q].
__device__ __forceinline__ void transpose(uint32_t (&word)[4]) {
#pragma unroll
  for (int with = 1; with < 4; with *= 2) {
    const bool upper = threadIdx.x & unsigned(with);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & with) continue;
      const uint32_t got = __shfl_xor_sync(kWhole, upper ? word[i] : word[i + with], with);
      (upper ? word[i] : word[i + with]) = got;
    }
  }
}

// One of a thread's two rows, times a factor, to memory: a lane has eight columns of it beside each other.
template <bool kHalf, int kCount>
__device__ __forceinline__ void store_row(uint16_t* to, bool inside, const float (&d)[kCount], int row, float factor) {
  const int lane = int(threadIdx.x % 4);
#pragma unroll
  for (int g = 0; g < kCount / 16; ++g) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = (g * 4 + i) * 4 + row * 2;
      word[i] = pack<kHalf>(d[j] * factor, d[j + 1] * factor);
    }
    transpose(word);
    if (inside) *reinterpret_cast<uint4*>(to + (g * 4 + lane) * 8) = {word[0], word[1], word[2], word[3]};
  }
}

}  // namespace
}  // namespace fastllm
