// What sm_90a has beyond CUDA C++, one function an instruction: barriers in shared memory, the copy engine (TMA), matrix products
// of a warpgroup (WGMMA), registers that pass between warpgroups. For a processor tests/cuda_host/cuda.h has the same functions.
//
// Shared memory is named by its 32-bit address. A product runs on while its threads go on: what it reads or writes in
// registers is theirs again after wgmma_wait, and `settle` keeps the compiler from reading it earlier.
#pragma once
#include <cuda.h>

#include "common.cuh"

namespace fastllm {

#ifdef __CUDACC__
namespace {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---------------------------------------------------------------------------------------------- barriers in shared memory
// A phase ends with `count` arrivals and all the bytes that were announced. A wait names the parity of the phase it waits for.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// The copy engine may use what this thread has initialised.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {    // and arrives
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// A box of a tensor of four dimensions, from (c0, c1, c2, c3) on; what lies outside is zeros.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Bytes that lie beside each other, at multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
               : "memory");
}
// Products that begin after a barrier see what this thread has written to shared memory.
__device__ __forceinline__ void shared_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Adds to four numbers in memory, each for itself; `to` at a multiple of 16 bytes.
__device__ __forceinline__ void add_four(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(a), "f"(b),
               "f"(c), "f"(d)
               : "memory");
}

// ---------------------------------------------------------------------------------------------------- barriers by number
// 1 to 15; 0 is __syncthreads. `threads` counts those that arrive and those that wait.

__device__ __forceinline__ void numbered_wait(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void numbered_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <int kRegisters> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ------------------------------------------------------------------------------------------------------ products (WGMMA)

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups, the last committed, still run.
template <int kPending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <int kCount> __device__ __forceinline__ void settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount> __device__ __forceinline__ void settle(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define EIGHT(d, i)                                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LIST_64 TEN() TEN(1) TEN(2) "%30, %31"
#define LIST_128 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63"
#define SUMS_64(d) EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24)
#define SUMS_128(d) SUMS_64(d), EIGHT(d, 32), EIGHT(d, 40), EIGHT(d, 48), EIGHT(d, 56)

// d [64, kCols] (+)= a [64, 16] b [16, kCols], both in shared memory, along k or, where it says so, along their other side. kHalf:
// float16, else bfloat16.
#define BOTH_SHARED(cols, type, at_a, at_b, at_add, a_across, b_across)                                                   \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #at_add ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #cols            \
               "k16.f32." type "." type " {" LIST_##cols "}, %" #at_a ", %" #at_b ", p, 1, 1, %" #a_across ", %" #b_across    \
               ";\n\t}"                                                                                                   \
               : SUMS_##cols(d)                                                                                          \
               : "l"(a), "l"(b), "r"(int(add)), "n"(int(kAcrossA)), "n"(int(kAcrossB)))
template <int kCols, bool kHalf, bool kAcrossA = false, bool kAcrossB = false>
__device__ __forceinline__ void wgmma(float (&d)[kCols / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kCols == 64 || kCols == 128, "these are written out");
  if constexpr (kCols == 64 && kHalf) BOTH_SHARED(64, "f16", 32, 33, 34, 35, 36);
  if constexpr (kCols == 64 && !kHalf) BOTH_SHARED(64, "bf16", 32, 33, 34, 35, 36);
  if constexpr (kCols == 128 && kHalf) BOTH_SHARED(128, "f16", 64, 65, 66, 67, 68);
  if constexpr (kCols == 128 && !kHalf) BOTH_SHARED(128, "bf16", 64, 65, 66, 67, 68);
}

// d [64, kCols] += a [64, 16] b [16, kCols], a in registers, b in shared memory along its columns.
#define A_IN_REGISTERS(cols, type, a0, a1, a2, a3, at_b, at_add)                                                            \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #at_add ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #cols            \
               "k16.f32." type "." type " {" LIST_##cols "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #at_b             \
               ", p, 1, 1, 1;\n\t}"                                                                                      \
               : SUMS_##cols(d)                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1))
template <int kCols, bool kHalf>
__device__ __forceinline__ void wgmma(float (&d)[kCols / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kCols == 64 || kCols == 128, "these are written out");
  if constexpr (kCols == 64 && kHalf) A_IN_REGISTERS(64, "f16", 32, 33, 34, 35, 36, 37);
  if constexpr (kCols == 64 && !kHalf) A_IN_REGISTERS(64, "bf16", 32, 33, 34, 35, 36, 37);
  if constexpr (kCols == 128 && kHalf) A_IN_REGISTERS(128, "f16", 64, 65, 66, 67, 68, 69);
  if constexpr (kCols == 128 && !kHalf) A_IN_REGISTERS(128, "bf16", 64, 65, 66, 67, 68, 69);
}
#undef BOTH_SHARED
#undef A_IN_REGISTERS
#undef LIST_64
#undef LIST_128
#undef SUMS_64
#undef SUMS_128
#undef TEN
#undef EIGHT

// ------------------------------------------------------------------------------------------------------------- numbers

template <bool kHalf> __device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (kHalf)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <bool kHalf> __device__ __forceinline__ float wide(uint32_t bits) {
  if constexpr (!kHalf) return __int_as_float(int(bits << 16));
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16_t(bits)));
  return x;
}
// To 2 ulp, log2 near 1 to 2^-22; without the branches for subnormals.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace
#else
using namespace cuda_host::hopper;
#endif

namespace {

// Tiles of 64 16-bit columns, 128 bytes a row, begin at multiples of 1024 bytes; the copy engine and the matrix unit exchange
// 16-byte pieces within eight rows in the same way. Eight rows on are 1024 bytes on (of a matrix along its columns: eight k on),
// the next 64 columns, which only a matrix along its columns has, `beside` bytes.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, int beside = 16) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(beside >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// --------------------------------------------------------------------------------------------------------- tensor maps

// For boxes of [1, 1, rows, 64] of a 16-bit tensor [d3, d2, d1, d0] with unit stride in d0. The driver makes it, and is asked for
// it by name: the library links none.
inline int tensor_map(CUtensorMap* map, const void* base, bool half, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                      int rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static cudaError_t missing = cudaSuccess;
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    missing = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
    missing = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    if (missing == cudaSuccess && (status != cudaDriverEntryPointSuccess || !found)) missing = cudaErrorInsufficientDriver;
    return missing == cudaSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return int(missing);
  cuuint64_t size[4], stride[3];    // of one element any stride will do
  for (int i = 0; i < 4; ++i) size[i] = cuuint64_t(sizes[i]);
  for (int i = 0; i < 3; ++i)
    stride[i] = sizes[i + 1] > 1 ? cuuint64_t(strides[i]) * 2 : (i ? stride[i - 1] : 2) * size[i];
  const cuuint32_t box[4] = {64, cuuint32_t(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult r = encode(map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                            const_cast<void*>(base), size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                            CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return r == CUDA_SUCCESS ? int(cudaSuccess) : int(cudaErrorInvalidValue);
}

}  // namespace
}  // namespace fastllm
