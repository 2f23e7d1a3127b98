// A streaming copy: what `fastllm bench --device cuda` measures as the memory ceiling. cudaMemcpy uses the copy engines on
// some paths; the ceiling of a kernel is what a kernel reaches.
#include "common.cuh"

namespace fastllm {
namespace {

constexpr int kThreads = 512;
constexpr int kVectors = 4;    // 16-byte loads in flight per thread

__global__ void copy_kernel(uint4* __restrict__ to, const uint4* __restrict__ from, int64_t n) {
  const int64_t tile = int64_t(kThreads) * kVectors;
  for (int64_t base = blockIdx.x * tile + threadIdx.x; base < n; base += gridDim.x * tile) {
    uint4 v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (base + i * kThreads < n) v[i] = __ldcs(from + base + i * kThreads);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (base + i * kThreads < n) __stcs(to + base + i * kThreads, v[i]);
  }
}

}  // namespace

int copy(void* to, const void* from, int64_t bytes, void* stream) {
  if (bytes % 16) return int(cudaErrorInvalidValue);
  if (bytes == 0) return int(cudaSuccess);
  return launch(copy_kernel, attribute(cudaDevAttrMultiProcessorCount) * 4, kThreads, 0, 1, stream, static_cast<uint4*>(to),
                static_cast<const uint4*>(from), bytes / 16);
}

}  // namespace fastllm
