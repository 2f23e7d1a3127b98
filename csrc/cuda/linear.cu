// linear on a GPU for up to 16 rows of 16 bits, where a product is a pass over the weight: y = x W^T + bias + residual, or
// silu(gate) * up + residual. Sums are float32, and rounded once, at the end.
//
// A block has 16 rows of the weight, each of its warps a share of k. A lane loads 16 bytes of two of them, which go to the matrix
// unit as they are: eight elements that lie beside each other are no eight that belong together there, but any order of k will
// do that is also that of x. x stands on the narrow side, 8 or 16 rows wide, so that a row has the same bits alone and beside
// others. What the warps have found is added up in their order.
#include <cuda_fp16.h>

#include "../records/linear.h"
#include "mma.cuh"

namespace fastllm {
namespace {

constexpr int kWarps = 8, kColumns = 16, kTile = 8, kMostRows = 2 * kTile;    // kColumns: of y, rows of the weight
constexpr int kStep = 32;    // k of a step
constexpr int ahead_of(int tiles) { return tiles == 1 ? 8 : 4; }    // steps whose loads are on their way

template <int kTiles> struct Sums {
  float of[kWarps][kTiles * kTile][kColumns];
};

template <bool kHalf> __device__ __forceinline__ float widened(const void* from, int64_t at) {
  if constexpr (kHalf)
    return __half2float(static_cast<const __half*>(from)[at]);
  else
    return __int_as_float(int(uint32_t(static_cast<const uint16_t*>(from)[at]) << 16));
}

// kTiles: of eight rows of x.
template <bool kHalf, int kTiles> __global__ void __launch_bounds__(kWarps * 32, 2) linear_kernel(const LinearArgs a) {
  constexpr int kAhead = ahead_of(kTiles);
  auto& s = shared_memory<Sums<kTiles>>();
  const int warp = int(threadIdx.x / 32), t = int(threadIdx.x % 4), g = int(threadIdx.x % 32 / 4);
  // Of gate over up a block has eight rows each, one in each half of the matrix unit's sixteen.
  const bool halves = a.halves == kSwiglu;
  const int64_t first = int64_t(blockIdx.x) * (halves ? kTile : kColumns), second = halves ? a.cols + first : first + kTile;
  const bool has_first = first + g < a.cols, has_second = halves ? has_first : second + g < a.cols;
  const auto* weight = static_cast<const uint16_t*>(a.weight);
  const uint16_t *w0 = weight + (first + g) * a.weight_stride, *w1 = weight + (second + g) * a.weight_stride;
  const auto* x = static_cast<const uint16_t*>(a.x) + g * a.x_stride;
  const int depth = int(a.depth), steps = (depth + kStep - 1) / kStep, share = (steps + kWarps - 1) / kWarps;
  const int from = warp * share, to = from + share < steps ? from + share : steps;

  const uint4 none = {0, 0, 0, 0};
  float acc[kTiles][4] = {};    // of columns g, g + 8 and rows 2t, 2t + 1
#pragma unroll 1
  for (int step = from; step < to; step += kAhead) {
    uint4 lower_rows[kAhead], upper_rows[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      const int k = (step + n) * kStep + t * 8;
      const bool there = step + n < to && k < depth;
      lower_rows[n] = there && has_first ? __ldcs(reinterpret_cast<const uint4*>(w0 + k)) : none;
      upper_rows[n] = there && has_second ? __ldcs(reinterpret_cast<const uint4*>(w1 + k)) : none;
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      const int k = (step + n) * kStep + t * 8;
      const bool there = step + n < to && k < depth;
      const uint4 &w = lower_rows[n], &u = upper_rows[n];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const bool row = tile * kTile + g < a.rows;
        const uint4 v = there && row ? *reinterpret_cast<const uint4*>(x + tile * kTile * a.x_stride + k) : none;
        mma<kHalf>(acc[tile], {w.x, u.x, w.y, u.y}, {v.x, v.y});
        mma<kHalf>(acc[tile], {w.z, u.z, w.w, u.w}, {v.z, v.w});
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) s.of[warp][tile * kTile + 2 * t + i % 2][g + i / 2 * kTile] = acc[tile][i];
  __syncthreads();

  const int row = int(threadIdx.x / kColumns), at = int(threadIdx.x % kColumns);
  const int64_t n = first + at;
  if (row >= a.rows || n >= a.cols || (halves && at >= kTile)) return;
  auto sum = [&](int column) {
    float v = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) v += s.of[w][row][column];
    return v;
  };
  float v = sum(at);
  if (a.bias) v += widened<kHalf>(a.bias, n);
  if (halves) v = v / (1.0f + expf(-v)) * sum(at + kTile);
  if (a.residual) v += widened<kHalf>(a.residual, row * a.residual_stride + n);
  if (a.y_dtype == kFloat32)
    static_cast<float*>(a.y)[row * a.y_stride + n] = v;
  else
    static_cast<uint16_t*>(a.y)[row * a.y_stride + n] = uint16_t(pack<kHalf>(v, 0.0f));
}

template <bool kHalf, int kTiles> int launch_linear(const LinearArgs& a, void* stream) {
  const int64_t columns = a.halves == kSwiglu ? kTile : kColumns;
  return launch(linear_kernel<kHalf, kTiles>, (a.cols + columns - 1) / columns, kWarps * 32, sizeof(Sums<kTiles>), 1, stream, a);
}
template <bool kHalf> int of_rows(const LinearArgs& a, void* stream) {
  return a.rows <= kTile ? launch_linear<kHalf, 1>(a, stream) : launch_linear<kHalf, 2>(a, stream);
}

}  // namespace

// Rows of x and of the weight begin at multiples of 16 bytes and are as long; x was normalised before.
int linear(const LinearArgs& a, char*, void* stream) {
  if (a.form != kRows || a.rows > kMostRows || a.dtype == kFloat32 || a.norm || a.depth % 8 || a.x_stride % 8 ||
      a.weight_stride % 8 || a.halves == kGateUp || (a.bias && a.halves))
    return int(cudaErrorInvalidValue);
  return a.dtype == kFloat16 ? of_rows<true>(a, stream) : of_rows<false>(a, stream);
}

}  // namespace fastllm
