// quant_linear on a GPU for up to eight rows, where a product is a pass over the weights: the bits of the CPU's, whose
// arithmetic and layout are stated in csrc/cpu/quant_gemm.h.
//
// One kernel rounds the rows to s8. In the other a block has a panel of 16 rows of the weight, and each half of a warp 32 of
// k: a lane loads 16 bytes, four k or eight of four rows, and multiplies them by dp4a. Three shuffles give every lane the
// exact integer sum of one row. Sums and the products of the scales go through shared memory to the threads that run the
// chains, one for each output, over all 32s of k ascending; two buffers, so that the next sums are made meanwhile. The product
// begins while the rows are being rounded: its first loads are of the weight.
#include <cuda_fp16.h>

#include "../records/quant_linear.h"
#include "common.cuh"

namespace fastllm {
namespace {

constexpr int kThreads = 256, kTeams = kThreads / 16;    // a team is half a warp
constexpr int kPanel = 16, kGroup = 32, kMostRows = 8;

// Rows of x as bytes; beside each 32 its scale, and what its sum starts with (int32) or what multiplies the minimum (float).
struct Activations {
  int8_t* bytes;    // [rows, groups, 32]
  float* scales;    // [rows, groups]
  int32_t* starts;
  float* moments;
};

struct Format {
  int groups, shift, bytes;    // 32s of k; log2 of how many share a scale of the weight; bytes of these
};

// ------------------------------------------------------------------------------------------------------------ activations

// A warp for each 32 of k of a row.
template <int kBits, bool kMin>
__global__ void __launch_bounds__(kThreads) quantise_kernel(const LinearArgs a, Activations to, int groups) {
  next_may_begin();    // what came before this kernel has ended: nobody writes the weight any more
  const int64_t at = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, row = at / groups;
  const int64_t k = at % groups * kGroup + threadIdx.x % 32;
  if (row >= a.rows) return;
  const float v = k < a.depth ? static_cast<const float*>(a.x)[row * a.x_stride + k] : 0;
  const bool finite = __all_sync(kWhole, fabsf(v) < infinity());
  const float top = warp_max(fabsf(v));
  const bool plain = finite && top >= 1e-35f;
  const int q = plain ? __float2int_rn(v * (127.0f / top)) : 0, sum = warp_sum(q);
  to.bytes[at * kGroup + threadIdx.x % 32] = int8_t(q);
  if (threadIdx.x % 32) return;
  const float scale = plain ? top / 127.0f : finite ? 0 : not_a_number();
  to.scales[at] = scale;
  // Quants are multiplied as s8: u4, and u8 less 128.
  if (kMin) to.moments[at] = scale * float(sum);
  if ((kBits == 8) == kMin) to.starts[at] = sum * (kMin ? 128 : -8);
}

// ---------------------------------------------------------------------------------------------------------------- product

template <int kBits> struct Quants {
  uint4 word[kBits / 4];    // of 4 bits: k and k + 4 in nibbles; of 8 bits: one after the other
  // Lane `lane` of a team: four rows of the 8 k from lane / 4 * 8 on.
  __device__ __forceinline__ void load(const uint8_t* panel, int lane) {
    const int c = lane / 4, rows = lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i)
      word[i] = __ldcs(reinterpret_cast<const uint4*>(panel + (c * (kBits / 4) + i) * 64 + rows));
  }
  // sums[row] = sum over these 8 k
  __device__ __forceinline__ void dot(int2 x, int (&sums)[4]) const {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const unsigned w = at(word[0], row), other = at(word[kBits / 4 - 1], row);
      const int low = kBits == 4 ? int(w & 0x0f0f0f0f) : int(w ^ 0x80808080);
      const int high = kBits == 4 ? int(w >> 4 & 0x0f0f0f0f) : int(other ^ 0x80808080);
      sums[row] = __dp4a(high, x.y, __dp4a(low, x.x, 0));
    }
  }
  static __device__ __forceinline__ unsigned at(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
};

// Sums over a team's four lanes of equal lane % 4: lane gets that of row lane % 4 * 4 + lane / 4.
__device__ __forceinline__ int reduce(const int (&sums)[4], int lane) {
  const bool second = lane & 8, odd = lane & 4;
  const int a = (second ? sums[2] : sums[0]) + __shfl_xor_sync(kWhole, second ? sums[0] : sums[2], 8);
  const int b = (second ? sums[3] : sums[1]) + __shfl_xor_sync(kWhole, second ? sums[1] : sums[3], 8);
  return (odd ? b : a) + __shfl_xor_sync(kWhole, odd ? a : b, 4);
}

template <bool kMin, int kRows, int kSlots> struct Sums {
  float2 term[2][kSlots][kRows][kPanel];    // the sum, and the product of the scales
  float minimum[2][kMin ? kSlots : 1][kPanel];
};

__device__ __forceinline__ void finish(const LinearArgs& a, float v, int64_t row, int64_t n) {
  if (a.bias) v += static_cast<const float*>(a.bias)[n];
  if (a.residual) v += static_cast<const float*>(a.residual)[row * a.residual_stride + n];
  static_cast<float*>(a.y)[row * a.y_stride + n] = v;
}

// How many 32s of k a team takes at a time, with as many loads on their way (of 8 bits, twice as many); of a block, `slots`.
constexpr int each_of(int rows) { return rows == 1 ? 4 : rows <= 4 ? 2 : 1; }
constexpr int slots_of(int rows) { return each_of(rows) * kTeams; }

// A block for each panel. kRows: of x, the last of them perhaps repeated. With the registers of three or four blocks (80, 64) the
// compiler starts the loads before the first is used; left alone it takes 32 and moves them down.
template <int kBits, bool kMin, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 4 : 3) linear_kernel(const LinearArgs a, Activations x, Format f) {
  constexpr int kEach = each_of(kRows), kSlots = slots_of(kRows);
  auto& s = shared_memory<Sums<kMin, kRows, kSlots>>();
  const int team = threadIdx.x / 16, lane = threadIdx.x % 16, row = lane % 4 * 4 + lane / 4;    // the row whose sum this lane gets
  const int panel = int(blockIdx.x), parts = 1 << f.shift;
  const int64_t panel_bytes = int64_t((f.groups + parts - 1) >> f.shift) * f.bytes;
  const uint8_t* weight = static_cast<const uint8_t*>(a.weight) + panel * panel_bytes;

  // The thread's own chain.
  const int of_row = threadIdx.x / kPanel, of_column = threadIdx.x % kPanel;
  const bool chains = of_row < kRows;
  const float* moments = x.moments + (of_row < a.rows ? of_row : a.rows - 1) * f.groups;
  float acc = 0;
  auto chain = [&](int begin, int buffer) {
    const int count = f.groups - begin < kSlots ? f.groups - begin : kSlots;
    for (int slot = 0; slot < count; ++slot) {
      const float2 t = s.term[buffer][slot][of_row][of_column];
      acc = fmaf(t.x, t.y, acc);
      if (kMin) acc = fmaf(s.minimum[buffer][slot][of_column], moments[begin + slot], acc);
    }
  };

  int buffer = 0;
  for (int begin = 0; begin < f.groups; begin += kSlots, buffer ^= 1) {
    Quants<kBits> q[kEach];
    float scale[kEach], minimum[kEach];
    int group[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int slot = begin + i * kTeams + team, g = group[i] = slot < f.groups ? slot : f.groups - 1;    // beyond: not used
      const uint8_t* block = weight + int64_t(g >> f.shift) * f.bytes;
      q[i].load(block + (g & (parts - 1)) * (64 * kBits), lane);
      const __half* halves = reinterpret_cast<const __half*>(block + (64 * kBits << f.shift));
      scale[i] = __half2float(halves[row]);
      minimum[i] = kMin ? __half2float(halves[kPanel + row]) : 0;
    }
    if (begin == 0) wait_for_previous();    // x is read by plain loads: __ldg promises that nobody writes, and may be moved up
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int place = i * kTeams + team;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = (r < a.rows ? r : a.rows - 1) * f.groups + group[i];
        int sums[4];
        q[i].dot(*reinterpret_cast<const int2*>(x.bytes + at * kGroup + lane / 4 * 8), sums);
        int sum = reduce(sums, lane);
        if ((kBits == 8) == kMin) sum += x.starts[at];
        s.term[buffer][place][r][row] = make_float2(float(sum), scale[i] * x.scales[at]);
      }
      if (kMin) s.minimum[buffer][place][row] = minimum[i];
    }
    __syncthreads();
    if (chains) chain(begin, buffer);
  }
  if (!chains || of_row >= a.rows) return;
  const int64_t half = a.halves ? a.cols / 2 : a.cols, n = int64_t(a.halves ? panel / 2 : panel) * kPanel + of_column;
  if (n < half) finish(a, acc, of_row, n + (a.halves ? panel % 2 * half : 0));
}

template <int kBits, bool kMin, int kRows>
int launch_rows(const LinearArgs& a, const Activations& x, const Format& f, void* stream) {
  const int64_t halves = a.halves ? 2 : 1, panels = (a.cols / halves + kPanel - 1) / kPanel * halves;
  const int64_t shared = sizeof(Sums<kMin, kRows, slots_of(kRows)>);
  return launch_early(linear_kernel<kBits, kMin, kRows>, panels, kThreads, shared, 1, stream, a, x, f);
}

template <int kBits, bool kMin> int product(const LinearArgs& a, const Activations& x, const Format& f, void* stream) {
  const int64_t warps = kThreads / 32, blocks = (a.rows * f.groups + warps - 1) / warps;
  if (const int e = launch(quantise_kernel<kBits, kMin>, blocks, kThreads, 0, 1, stream, a, x, f.groups)) return e;
  if (a.rows == 1) return launch_rows<kBits, kMin, 1>(a, x, f, stream);
  if (a.rows == 2) return launch_rows<kBits, kMin, 2>(a, x, f, stream);
  return a.rows <= 4 ? launch_rows<kBits, kMin, 4>(a, x, f, stream) : launch_rows<kBits, kMin, 8>(a, x, f, stream);
}

}  // namespace

// scratch: 44 bytes for each row and 32 of k. x was normalised before.
int quant_linear(const LinearArgs& a, char* scratch, void* stream) {
  if (a.rows > kMostRows || !quantises(a) || a.halves == kSwiglu) return int(cudaErrorInvalidValue);
  const bool wide = a.form >= kInt8, minimum = a.form == kInt4Min || a.form == kInt8Min;
  const int groups = int((a.depth + kGroup - 1) / kGroup), shift = a.group == 32 ? 0 : a.group == 64 ? 1 : 2;
  const int64_t count = a.rows * groups;
  const Format f = {groups, shift, ((wide ? 512 : 256) << shift) + (minimum ? 64 : 32)};
  Activations x;
  x.bytes = reinterpret_cast<int8_t*>(scratch);
  x.scales = reinterpret_cast<float*>(scratch + count * kGroup);
  x.starts = reinterpret_cast<int32_t*>(x.scales + count);
  x.moments = reinterpret_cast<float*>(x.starts + count);
  if (wide) return minimum ? product<8, true>(a, x, f, stream) : product<8, false>(a, x, f, stream);
  return minimum ? product<4, true>(a, x, f, stream) : product<4, false>(a, x, f, stream);
}

}  // namespace fastllm
