// linear on a GPU for up to 16 rows of 16 bits, where a product is a pass over the weight: y = norm(x) W^T + bias + residual, or
// silu(gate) * up + residual. Sums are float32, and rounded once, at the end.
//
// A block has 16 rows of the weight, each of its warps a share of k. A lane loads 16 bytes of two of them, which go to the matrix
// unit as they are: eight elements that lie beside each other are no eight that belong together there, but any order of k will
// do that is also that of x. x stands on the narrow side, 8 or 16 rows wide, so that a row has the same bits alone and beside
// others. What the warps have found is added up in their order. In a captured step, whose weights nobody writes, a block begins
// with them while the kernel before is still at work.
#include "../records/linear.h"
#include "mma.cuh"

namespace fastllm {
namespace {

constexpr int kWarps = 8, kColumns = 16, kTile = 8, kMostRows = 2 * kTile;    // kColumns: of y, rows of the weight
constexpr int kStep = 32;    // k of a step
constexpr int ahead_of(int tiles) { return tiles == 1 ? 8 : 4; }    // steps whose loads are on their way

template <int kTiles> struct Sums {
  float of[kWarps][kTiles * kTile][kColumns];
  float scale[kTiles * kTile];    // of the rows of x, for their norm
};

template <bool kHalf> __device__ __forceinline__ float element(const void* of, int64_t at) {
  return wide<kHalf>(static_cast<const uint16_t*>(of)[at]);
}
template <bool kHalf> __device__ __forceinline__ float2 both(uint32_t word) {
  return make_float2(wide<kHalf>(word & 0xffff), wide<kHalf>(word >> 16));
}

// Two elements, times the row's scale and the norm's weight, rounded.
template <bool kHalf> __device__ __forceinline__ uint32_t normed(uint32_t two, uint32_t gain, float scale) {
  const float2 v = both<kHalf>(two), w = both<kHalf>(gain);
  return pack<kHalf>(v.x * scale * w.x, v.y * scale * w.y);
}

// kTiles: of eight rows of x. kNorm: of their rms_norm, whose scales a block finds while its first part of the weight is on its way.
template <bool kHalf, int kTiles, bool kNorm> __global__ void __launch_bounds__(kWarps * 32, 2) linear_kernel(const LinearArgs a) {
  constexpr int kAhead = ahead_of(kTiles);
  auto& s = shared_memory<Sums<kTiles>>();
  const int warp = int(threadIdx.x / 32), t = int(threadIdx.x % 4), g = int(threadIdx.x % 32 / 4);
  // Of gate over up a block has eight rows each, one in each half of the matrix unit's sixteen.
  const bool halves = a.halves == kSwiglu;
  const int64_t first = int64_t(blockIdx.x) * (halves ? kTile : kColumns), second = halves ? a.cols + first : first + kTile;
  const auto* weight = static_cast<const uint16_t*>(a.weight);
  const auto *rows = static_cast<const uint16_t*>(a.x);
  const int depth = int(a.depth), steps = (depth + kStep - 1) / kStep, share = (steps + kWarps - 1) / kWarps;
  const int from = warp * share, begin = from * kStep + t * 8;
  const int end = (from + share) * kStep < depth ? (from + share) * kStep : depth;
  // Rows beyond the last are that one again: nobody reads their sums.
  auto place = [&](int64_t row, int64_t count) { return row < count ? row : count - 1; };
  const uint16_t* lower_row = weight + place(first + g, a.cols) * a.weight_stride + begin;
  const uint16_t* upper_row = weight + (halves ? a.cols + place(first + g, a.cols) : place(second + g, a.cols)) * a.weight_stride + begin;

  const uint4 none = {0, 0, 0, 0};
  uint4 lower_rows[kAhead], upper_rows[kAhead];
  int k = begin;    // of the lane's next step
  auto load = [&](int n, int step) {
    lower_rows[n] = k + step * kStep < end ? __ldcs(reinterpret_cast<const uint4*>(lower_row + step * kStep)) : none;
    upper_rows[n] = k + step * kStep < end ? __ldcs(reinterpret_cast<const uint4*>(upper_row + step * kStep)) : none;
  };
#pragma unroll
  for (int n = 0; n < kAhead; ++n) load(n, n);
  wait_for_previous();    // what comes before may still be making x
  next_may_begin();
  float scale[kTiles];
  if constexpr (kNorm) {
    for (int row = warp; row < a.rows; row += kWarps) {
      float squares = 0;
      for (int at = int(threadIdx.x % 32) * 8; at < depth; at += 256) {
        const uint4 v = *reinterpret_cast<const uint4*>(rows + row * a.x_stride + at);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 two = both<kHalf>(words[i]);
          squares = fmaf(two.x, two.x, squares), squares = fmaf(two.y, two.y, squares);
        }
      }
      squares = warp_sum(squares);
      if (threadIdx.x % 32 == 0) s.scale[row] = 1.0f / sqrtf(squares / float(depth) + float(a.eps));
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) scale[tile] = s.scale[place(tile * kTile + g, a.rows)];
  }

  const uint16_t* x[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) x[tile] = rows + place(tile * kTile + g, a.rows) * a.x_stride + begin;
  float acc[kTiles][4] = {};    // of columns g, g + 8 and rows 2t, 2t + 1
#pragma unroll 1
  for (; k - t * 8 < end; k += kAhead * kStep) {
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      const bool there = k + n * kStep < end;
      const uint4 &w = lower_rows[n], &u = upper_rows[n];
      const uint4 gain = kNorm && there ? *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(a.norm) + k + n * kStep) : none;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint4 v = there ? *reinterpret_cast<const uint4*>(x[tile] + n * kStep) : none;
        if constexpr (kNorm) {
          v.x = normed<kHalf>(v.x, gain.x, scale[tile]), v.y = normed<kHalf>(v.y, gain.y, scale[tile]);
          v.z = normed<kHalf>(v.z, gain.z, scale[tile]), v.w = normed<kHalf>(v.w, gain.w, scale[tile]);
        }
        mma<kHalf>(acc[tile], {w.x, u.x, w.y, u.y}, {v.x, v.y});
        mma<kHalf>(acc[tile], {w.z, u.z, w.w, u.w}, {v.z, v.w});
      }
      load(n, kAhead + n);    // at once, so that as many are always on their way
    }
    lower_row += kAhead * kStep, upper_row += kAhead * kStep;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) x[tile] += kAhead * kStep;
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) s.of[warp][tile * kTile + 2 * t + i % 2][g + i / 2 * kTile] = acc[tile][i];
  __syncthreads();

  const int row = int(threadIdx.x / kColumns), column = int(threadIdx.x % kColumns);
  const int64_t n = first + column;
  if (row >= a.rows || n >= a.cols || (halves && column >= kTile)) return;
  auto sum = [&](int of) {
    float v = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) v += s.of[w][row][of];
    return v;
  };
  float v = sum(column);
  if (a.bias) v += element<kHalf>(a.bias, n);
  if (halves) v = v / (1.0f + expf(-v)) * sum(column + kTile);
  if (a.residual) v += element<kHalf>(a.residual, row * a.residual_stride + n);
  if (a.y_dtype == kFloat32)
    static_cast<float*>(a.y)[row * a.y_stride + n] = v;
  else
    static_cast<uint16_t*>(a.y)[row * a.y_stride + n] = uint16_t(pack<kHalf>(v, 0.0f));
}

template <bool kHalf, int kTiles, bool kNorm> int launch_linear(const LinearArgs& a, void* stream) {
  const int64_t columns = a.halves == kSwiglu ? kTile : kColumns, blocks = (a.cols + columns - 1) / columns;
  return launch_with(weights_rest(), linear_kernel<kHalf, kTiles, kNorm>, blocks, kWarps * 32, sizeof(Sums<kTiles>), 1, stream, a);
}
template <bool kHalf, bool kNorm> int of_rows(const LinearArgs& a, void* stream) {
  return a.rows <= kTile ? launch_linear<kHalf, 1, kNorm>(a, stream) : launch_linear<kHalf, 2, kNorm>(a, stream);
}
template <bool kHalf> int of_norm(const LinearArgs& a, void* stream) {
  return a.norm ? of_rows<kHalf, true>(a, stream) : of_rows<kHalf, false>(a, stream);
}

}  // namespace

// Rows of x and of the weight, and the norm's weight, begin at multiples of 16 bytes; rows are as long.
int linear(const LinearArgs& a, char*, void* stream) {
  if (a.form != kRows || a.rows > kMostRows || a.dtype == kFloat32 || a.depth % 8 || a.x_stride % 8 ||
      a.weight_stride % 8 || a.halves == kGateUp || (a.bias && a.halves))
    return int(cudaErrorInvalidValue);
  return a.dtype == kFloat16 ? of_norm<true>(a, stream) : of_norm<false>(a, stream);
}

}  // namespace fastllm
